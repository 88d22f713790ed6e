"""The benchmark of posteriors: its models are what they say, its errors measure errors, its references are checked."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from pyro_sivism.layout import LatentLayout
from pyro_sivism.target import Target

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXACT = ["conjugate_regression", "two_modes", "dirichlet_multinomial", "beta_binomial", "eight_schools_centered"]


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark the way its own command does: with its folder first on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def target_of(posterior):
    """The model's density in the fit's own coordinates, without a fit."""
    trace = pyro.poutine.trace(posterior.model).get_trace(*posterior.args)
    layout = LatentLayout.from_trace(trace)
    return Target(posterior.model, layout, trace, posterior.args), layout


@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_are_of_the_model(load, float64, name):
    """Stein's identities hold at draws of p: E[s_i] = 0 and E[x_i s_i] = -1 for the model's own scores s.

    Tolerance: 5 standard errors, at most 64 statistics a posterior: below 4e-5 by chance.
    """
    posterior = load("posterior_zoo").POSTERIORS[name]()
    draws = posterior.exact(4000)
    target, layout = target_of(posterior)
    x = layout.pack(draws)
    score = torch.cat([target.score(chunk) for chunk in x.split(1000)])
    centered = x - x.mean(0)
    for statistic, expected in ((score, 0.0), (centered * score, -1.0)):
        error = statistic.std(0) / math.sqrt(len(x))
        assert ((statistic.mean(0) - expected).abs() < 5.0 * error).all()


def test_every_model_has_a_finite_density(load):
    zoo = load("posterior_zoo")
    assert len(zoo.POSTERIORS) >= 12
    for name, make in zoo.POSTERIORS.items():
        posterior = make()
        assert posterior.name == name
        trace = pyro.poutine.trace(posterior.model).get_trace(*posterior.args)
        assert math.isfinite(trace.log_prob_sum())


def test_data_are_the_same_in_either_precision(load):
    zoo = load("posterior_zoo")
    singles = {name: make().args for name, make in zoo.POSTERIORS.items()}
    try:
        torch.set_default_dtype(torch.double)
        for name, make in zoo.POSTERIORS.items():
            for single, double in zip(singles[name], make().args):
                assert double.dtype in (torch.double, torch.long, torch.bool)
                assert torch.equal(single.to(double.dtype), double)
    finally:
        torch.set_default_dtype(torch.float32)


def test_errors_of_known_mistakes(load):
    accuracy = load("accuracy")
    generator = torch.Generator().manual_seed(0)
    draws = {
        "a": 1e6 + 1e3 * torch.randn(4000, generator=generator, dtype=torch.double),
        "b": torch.randn(4000, 2, generator=generator, dtype=torch.double).exp(),
        "one": torch.ones(4000, 1),
    }
    reference = accuracy.Reference.from_draws(draws, ("b",))
    assert reference.names == ("a", "b[0]", "b[1]", "one[0]")
    assert len(reference.draws) == 2000
    right = accuracy.errors(draws, reference)
    assert right["mean_max"] < 1e-9
    assert right["sd_max"] < 1e-9
    assert right["num_sds_unknown"] == 0
    assert right["sw1"] < 1.5 * right["sw1_floor"]

    moved = accuracy.errors(draws | {"a": draws["a"] + 300.0}, reference)
    assert moved["mean_worst"] == "a"
    assert moved["mean_max"] == pytest.approx(0.3, abs=0.01)  # the sd of 4,000 draws is right to .011
    assert moved["sw1"] > 2.0 * right["sw1"]
    narrow = accuracy.errors(draws | {"b": draws["b"] ** torch.tensor([1.0, 0.5])}, reference)
    assert narrow["sd_worst"] == "b[1]"
    assert narrow["sd_log2_worst"] == pytest.approx(-1.0)

    broken = draws | {"a": draws["a"].where(torch.arange(4000) < 100, torch.nan)}
    assert accuracy.errors(broken, reference)["num_nonfinite"] == 3900
    with pytest.raises(ValueError, match="only 0 of 4000"):
        accuracy.errors(draws | {"a": draws["a"] * torch.nan}, reference)


def test_sds_that_the_reference_does_not_know_do_not_count(load):
    accuracy = load("accuracy")
    generator = torch.Generator().manual_seed(0)
    normal, other = torch.randn(2, 4000, generator=generator, dtype=torch.double)
    heavy = {"x": normal, "cauchy": torch.randn(4000, generator=generator, dtype=torch.double) / other}
    reference = accuracy.Reference.from_draws(heavy)
    assert reference.sd_is_known.tolist() == [True, False]
    assert accuracy.errors(heavy | {"cauchy": normal}, reference)["sd_max"] < 1e-9


def test_r_hat_sees_chains_apart_and_chains_that_drift(load):
    references = load("references")
    chains = torch.randn(4, 1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert references.split_r_hat(chains).max() < 1.01
    apart, drifting = chains.clone(), chains.clone()
    apart[0, :, 1] += 1.0
    drifting[:, 500:, 2] += 1.0
    assert references.split_r_hat(apart)[1] > 1.05
    assert references.split_r_hat(drifting)[2] > 1.05


@pytest.fixture
def short_references(load, monkeypatch, float64):
    references = load("references")
    monkeypatch.setattr(references, "LENGTHS", (50,))
    monkeypatch.setattr(references, "NUM_CHAINS", 2)
    monkeypatch.setattr(references, "WARMUP_STEPS", 20)
    return references


def normal_posterior(zoo, scale=1.0):
    def model(scale):
        pyro.sample("x", pyro.distributions.Normal(0.0, scale).expand([2]).to_event(1))

    return zoo.Posterior("normal", model, (torch.tensor(scale),))


def test_references_are_kept_and_refused_by_what_they_are(load, short_references, tmp_path):
    references, zoo = short_references, load("posterior_zoo")
    posterior = normal_posterior(zoo)
    with pytest.raises(FileNotFoundError, match="--make-references"):
        references.load_reference(posterior, tmp_path)
    report = references.make_reference(posterior, tmp_path)
    assert report["refused"]  # of 100 draws no 1,000 are independent
    with pytest.raises(ValueError, match="is refused"):
        references.load_reference(posterior, tmp_path)

    saved = torch.load(tmp_path / "normal.pt")
    torch.save({**saved, "refused": ""}, tmp_path / "normal.pt")
    reference = references.load_reference(posterior, tmp_path)
    assert report["potential_difference"] < 1e-12
    assert reference.names == ("x[0]", "x[1]")
    assert reference.draws.shape == (2000, 2)
    assert (reference.mean.abs() < 1.0).all()
    with pytest.raises(ValueError, match="another model or other data"):
        references.load_reference(replace(posterior, args=(torch.tensor(2.0),)), tmp_path)


def test_what_a_reference_is_refused_for(load):
    reason = load("references")._reason_to_refuse
    assert reason(1.005, 2000.0) == ""
    assert "R-hat 1.020" in reason(1.02, 2000.0)
    assert "R-hat" in reason(math.nan, 2000.0)
    assert "of 999" in reason(1.0, 999.0)
    assert "of nan" in reason(1.0, math.nan)


def test_a_density_that_is_not_pyro_s_makes_no_reference(load, short_references, monkeypatch):
    posterior = normal_posterior(load("posterior_zoo"))
    right = short_references.initialize_model

    def twice_the_potential(model, args):
        start, potential, transforms, trace = right(model, args)
        return start, lambda params: 2.0 * potential(params), transforms, trace

    monkeypatch.setattr(short_references, "initialize_model", twice_the_potential)
    with pytest.raises(RuntimeError, match="differ from Pyro's"):
        short_references._potential_difference(posterior, {"x": torch.zeros(3, 2)})


def test_posteriors_of_a_given_folder(load, tmp_path, monkeypatch):
    given = tmp_path / "given"
    given.mkdir()
    np.savez(given / "draws.npz", mu=np.random.default_rng(0).normal(1.0, 0.1, 2000).astype(np.float32))
    (given / "models.py").write_text(
        "import numpy as np, pathlib, torch, pyro, pyro.distributions as dist\n"
        "def model(y):\n"
        "    mu = pyro.sample('mu', dist.Normal(0.0, 10.0))\n"
        "    with pyro.plate('rows', len(y)):\n"
        "        pyro.sample('y', dist.Normal(mu, 1.0), obs=y)\n"
        "POSTERIORS = {'normal': None, 'other': None}\n"
        "def load(name):\n"
        "    draws = np.load(pathlib.Path(__file__).parent / 'draws.npz')\n"
        "    return model, torch.ones(100), {'mu': draws['mu']}\n"
    )
    posteriors = load("posteriors")
    (case,) = posteriors.other_cases(given, ["normal"])
    monkeypatch.setattr(posteriors, "NUM_SVI_STEPS", 300)
    row = posteriors.run_one(case, "AutoNormal", 0)
    assert row["mean_max"] < 3.0  # the learning rate lets a mean go 300 steps of .01, from 0 to 1 and .1 sd
    assert row["evaluations"] == 300

    (given / "metrics.py").write_text("def load_stats(name):\n    return {'mu': {'mean': 2.0, 'sd': 0.1}}\n")
    (case,) = posteriors.other_cases(given, ["normal"])
    assert case.reference().mean.item() == 2.0


def test_rows_tables_and_failures(load, tmp_path, capsys, monkeypatch):
    posteriors = load("posteriors")

    def exact_draws(model, args):
        posterior = load("posterior_zoo").POSTERIORS["two_modes"]()
        facts = {"steps": 1, "evaluations": 1, "verdict": "suspect", "sentence": "it is not"}
        return lambda: posterior.exact(10_000), facts

    def refuses(model, args):
        raise RuntimeError("no")

    monkeypatch.setitem(posteriors.METHODS, "default", exact_draws)
    monkeypatch.setitem(posteriors.METHODS, "NUTS", refuses)
    out = tmp_path / "posteriors.json"
    posteriors.main(["--names", "two_modes", "--methods", "default", "NUTS", "--seeds", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    good, failed = report["rows"]
    assert {"pyro_sivism", "commit", "torch"} <= set(report["versions"])
    assert good["sw1"] < good["sw1_floor"]
    assert failed["error"] == "RuntimeError: no"
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: no" in printed
    assert "not good with an error under .1: 1 of 1" in printed

    one, both = ["--names", "two_modes", "--seeds", "1", "--add", str(out)], tmp_path / "both.json"
    posteriors.main([*one, "--methods", "default", "--first-seed", "1", "--out", str(both)])
    assert json.loads(both.read_text())["rows"][:2] == report["rows"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["`two_modes`", "3", "2"] in [line[:3] for line in lines]
    assert ["`two_modes`", "3", "0 of 1"] in [line[:3] for line in lines]
    with pytest.raises(SystemExit):
        posteriors.main([*one, "--methods", "NUTS"])
    assert "1 fits are in --add already" in capsys.readouterr().err
