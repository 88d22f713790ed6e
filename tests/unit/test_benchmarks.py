"""Every benchmark runs on a tiny case and writes what it promises. No test here looks at a time."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark the way its own command does: with its folder first on the path."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def rows_of(path: Path) -> list[dict]:
    report = json.loads(path.read_text())
    assert {"pyro_sivism", "commit", "torch", "pyro", "threads"} <= set(report["versions"])
    return report["rows"]


def test_step_cost_has_a_row_for_every_method(load, tmp_path):
    out = tmp_path / "step_cost.json"
    load("step_cost").main(["--quick", "--compile", "off", "--out", str(out)])
    rows = {row["method"]: row for row in rows_of(out)}
    assert list(rows) == ["SIVISM", "AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"]
    assert rows["AutoNormal"]["ratio"] == 1.0
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize("problem", ["eight_schools", "subsampled_regression", "mixture"])
def test_capture_compares_scores_that_agree_with_pyro(load, tmp_path, problem):
    out = tmp_path / "capture.json"
    load("capture").main(["--quick", "--problems", problem, "--out", str(out)])
    (row,) = rows_of(out)
    assert {"vmap", "loop", "pyro"} <= set(row["errors"])
    assert max(row["errors"].values()) < 1e-4  # float32, sums of up to a few hundred terms in another order
    assert set(row["reasons"]) == {"captured", "vmap", "plate", "loop"}


def test_capture_notices_a_score_that_is_wrong(load):
    capture, problems = load("capture"), load("problems")
    problem = problems.PROBLEMS["logistic"]()
    points = torch.ones(2, 22)
    target, _ = capture.target_along("loop", problem, points)
    other = problems.logistic_regression(400, 22)
    halved = problems.Problem("halved", other.model, (0.5 * other.args[0], other.args[1]))
    right, wrong = target.score(points), capture.score_by_pyro(halved, target)(points)
    assert not torch.allclose(right, wrong, rtol=1e-2)
    assert torch.allclose(right, capture.score_by_pyro(problem, target)(points), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_capture_compares_whole_fits(load, tmp_path):
    folder, out = tmp_path / "posteriors", tmp_path / "capture.json"
    folder.mkdir()
    (folder / "models.py").write_text(
        "import pyro, torch\n"
        "import pyro.distributions as dist\n"
        "def model(y):\n"
        "    a = pyro.sample('a', dist.Normal(torch.zeros(2), 1.0).to_event(1))\n"
        "    pyro.sample('y', dist.Normal(a.exp(), 1.0).to_event(1), obs=y)\n"
        "POSTERIORS = {'pair': model, 'broken': None}\n"
        "def load(name):\n"
        "    return POSTERIORS[name], torch.ones(2), None\n"
    )
    load("capture").main(["--posteriors", str(folder), "--quick", "--out", str(out)])
    pair, broken = rows_of(out)
    assert (pair["captured_path"], pair["uncaptured_path"]) == ("captured", "vmap")
    assert pair["draws_difference"] < 1e-8
    assert pair["speedup"] > 0
    assert "ArgumentError" in broken["error"]


def test_scaling_measures_a_point_and_keeps_a_failure(load, tmp_path):
    scaling = load("scaling")
    point = scaling.BASE | {"dim": 2, "num_rows": 10, "num_particles": 4, "rounds": 2}
    row = {"axis": "dim", **point, **scaling.measure(point)}
    assert row["step_ms_median"] > 0
    assert row["peak_mib"] > row["own_mib"] >= 0
    failed = {"axis": "dim", **point, "error": "MemoryError"}
    scaling.print_row("dim", failed)
    scaling.plot([row, failed], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 0


def test_a_fresh_process_gives_its_row_or_its_error(load, tmp_path):
    fresh = load("fresh")
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('noise')\nprint('{\"answer\": 42}') if '7' in sys.argv[-1] else 1 / 0\n")
    assert fresh.run_fresh(str(script), {"size": 7}) == {"size": 7, "answer": 42}
    assert fresh.run_fresh(str(script), {"size": 8}) == {"size": 8, "error": "ZeroDivisionError: division by zero"}


def test_peak_memory_is_the_process_s_own():
    hold = "x = bytearray({size}); from fresh import peak_mib; print(peak_mib())"
    large, small = (
        float(subprocess.check_output([sys.executable, "-c", hold.format(size=size)], cwd=BENCHMARKS))
        for size in (200 * 2**20, 0)
    )
    assert large - small == pytest.approx(200, abs=20)


def test_large_cases_give_the_right_posterior(load):
    large = load("large")
    row = large.multinomial(large.QUICK["multinomial"])
    assert row["dim"] == 12
    assert math.isfinite(row["ratio"])
    covariates, outcomes = torch.ones(100, 1), torch.full((100,), 2.0)
    mean, covariance = large.exact_posterior(covariates, outcomes)
    assert mean.item() == pytest.approx(200.0 / 100.01)
    assert covariance.item() == pytest.approx(1.0 / 100.01)


def test_digits_compares_with_a_reference(load, tmp_path):
    digits = load("digits")
    weights = torch.zeros(3, 10, 65)
    uniform = digits.log_predictive(weights, torch.ones(4, 65), torch.tensor([0, 3, 9, 9]))
    assert torch.allclose(uniform, torch.full((4,), -math.log(10.0)))
    (covariates, labels), (test_covariates, test_labels) = digits.split(0)
    assert (len(labels), len(test_labels)) == (1347, 450)
    assert not torch.isin(covariates.sum(-1), test_covariates.sum(-1)).all()


def test_time_to_accuracy_counts_everything_and_errs_like_the_other_benchmarks(load, tmp_path):
    benchmark = load("time_to_accuracy")
    point = {"posterior": "dirichlet_multinomial", "method": "SIVISM", "budget": 3, "seed": 0, "folder": None}
    started = time.time() - 100.0
    row = benchmark.measure(point | {"references": str(tmp_path), "patience": 1.0, "started": started})
    assert row["seconds"] > 100.0
    assert row["sw1"] < 2 * row["sw1_floor"]  # the Gaussian is near it


def test_time_to_accuracy_compares_medians_with_nuts(load, tmp_path, capsys):
    benchmark = load("time_to_accuracy")

    def row(posterior, method, budget, seconds, sw1, **more):
        fit = {"posterior": posterior, "method": method, "budget": budget, "seconds": seconds, "seed": 0}
        return fit | {"sw1": sw1, "sw1_floor": 0.5, "timed_out": False} | more

    rows = [row("p", "SIVISM", None, seconds, 0.4) for seconds in (1.0, 2.0, 9.0)]
    rows += [row("p", "SIVISM", 300, 1.0, 0.6), row("p", "NUTS", 1000, 50.0, 0.0, timed_out=True)]
    rows += [row("q", "SIVISM", None, 60.0, 0.3), row("q", "NUTS", 1000, 240.0, 0.5)]
    earlier, out = tmp_path / "earlier.json", tmp_path / "curves.json"
    earlier.write_text(json.dumps({"rows": rows}))
    benchmark.main(["--methods", "--add", str(earlier), "--out", str(out)])
    assert rows_of(out) == rows
    assert out.with_suffix(".png").stat().st_size > 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert cells[2:4] == [
        ["`p`", "2.0", "50.0", "25.0", "0.80", "nan"],
        ["`q`", "60.0", "240.0", "4.0", "0.60", "1.00"],
    ]
    assert cells[6:] == [["SIVISM", "0.60", "0.60", "60", "1"], ["NUTS", "1.00", "1.00", "240", "4"]]
    assert "geometric mean of 2: 10.0 times" in printed
    assert "1 of 2 posteriors" in printed

    again = ["--names", "p", "--methods", "SIVISM", "--last-budgets-only", "--add", str(earlier), "--out", str(out)]
    with pytest.raises(SystemExit):
        benchmark.main(again)
    assert "1 fits are in --add already" in capsys.readouterr().err


def test_sbc_ranks_every_quantity_and_pools_runs(load, tmp_path, capsys):
    sbc = load("sbc")
    first, both = tmp_path / "first.json", tmp_path / "both.json"
    sbc.main(["--quick", "--out", str(first)])
    for row in rows_of(first):
        assert list(row["ranks"]) == ["beta[0]", "beta[1]", "beta[2]", "log likelihood"]
        assert all(0 <= rank <= 99 for rank in row["ranks"].values())
    failed = {"model": "logistic", "replication": 2, "error": "NonFiniteError: at once"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rows": [failed]}))
    capsys.readouterr()
    sbc.main(["--replications", "0", "--add", str(first), str(other), "--out", str(both)])
    assert rows_of(both) == [*rows_of(first), failed]
    assert "2 of 3 replications fitted" in capsys.readouterr().out
    assert both.with_suffix(".png").stat().st_size > 0
    with pytest.raises(SystemExit):
        sbc.main(["--quick", "--add", str(first), "--out", str(both)])


def test_sbc_tells_draws_that_are_right_from_those_that_are_not(load):
    sbc = load("sbc")

    def calibration(location, scale):
        """400 true values, each standard normal, ranked among 99 draws of another normal."""
        draws = location + scale * torch.randn(400, 99)
        return sbc.Calibration.of((draws < torch.randn(400, 1)).sum(1).tolist())

    assert min(calibration(0.0, 1.0).p_chi2, calibration(0.0, 1.0).p_ecdf) > 1e-3
    low, narrow, wide = calibration(-0.5, 1.0), calibration(0.0, 0.7), calibration(0.0, 1.4)
    assert max(wrong.p_chi2 for wrong in (low, narrow, wide)) < 1e-3
    assert max(wrong.p_ecdf for wrong in (low, narrow, wide)) < 1e-3
    assert low.bias == pytest.approx(0.5, abs=0.2)
    assert narrow.spread > 1.2
    assert wide.spread < 0.8

    uniform = sbc.Uniformity(200)
    p = torch.tensor([uniform.p_value(torch.randint(0, 100, (200,))) for _ in range(400)])
    assert (p < 0.1).double().mean().item() == pytest.approx(0.1, abs=0.06)  # four standard errors
    fewest, most = uniform.band(0.05)
    counted = sbc.below(torch.randint(0, 100, (2000, 200)))
    inside = ((fewest <= counted) & (counted <= most)).all(1).double().mean().item()
    assert inside == pytest.approx(0.95, abs=0.025)  # beside four standard errors of .02, the steps of counts
