"""Reference draws of the zoo's posteriors: exact ones where there are, and otherwise long chains kept in a folder.

Chains are NUTS in float64, four of them, each with its own adapted mass matrix, started at draws of the Gaussian that a
fit begins with. What they sample is checked against Pyro's own potential at their draws, so that a reference and a fit
do not share a wrong density. Chains that do not agree, by rank-normalized split R-hat (Vehtari, Gelman, Simpson,
Carpenter and Buerkner, Bayesian Analysis 16, 2021), or are too short, by their effective sample size, are refused.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from accuracy import Reference, table
from posterior_zoo import Posterior
from pyro.infer import MCMC
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.stats import split_gelman_rubin
from record import versions
from torch import Tensor

from pyro_sivism import SIVISM, nuts_from
from pyro_sivism.inference_data import effective_sample_size

__all__ = ["default_folder", "load_reference", "make_reference", "split_r_hat"]

NUM_CHAINS, WARMUP_STEPS, TARGET_ACCEPT = 4, 300, 0.9
NUM_EXACT, NUM_KEPT = 50_000, 2000
MAX_R_HAT, MIN_ESS = 1.01, 1000.0
LENGTHS = (600, 1500, 4000)  # of a chain; the next where one does not do


def default_folder() -> Path:
    """``pyro_sivism/references`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_sivism" / "references"


def load_reference(posterior: Posterior, folder: Path) -> Reference:
    """The exact reference, or that of the folder.

    Raises:
        FileNotFoundError: it has not been made yet.
        ValueError: it is of another model or other data, or one that is refused.
    """
    if posterior.exact is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Reference.from_draws(posterior.exact(NUM_EXACT), posterior.log_sites, max_draws=NUM_KEPT)
    path = folder / f"{posterior.name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"no reference {path}; make it with --make-references --names {posterior.name}")
    saved = torch.load(path)
    if saved["fingerprint"] != _fingerprint(posterior):
        raise ValueError(f"{path} is of another model or other data; make it anew with --make-references")
    if saved["refused"]:
        raise ValueError(f"{path} is refused: {saved['refused']}")
    moments = (saved["mean"], saved["sd"])
    return Reference.from_draws(saved["draws"], posterior.log_sites, moments=moments, max_draws=NUM_KEPT)


def make_reference(posterior: Posterior, folder: Path) -> dict[str, Any]:
    """Run the chains, write what they drew, and return how they went; exact posteriors need none.

    Torch's default dtype must be float64.
    """
    started = time.perf_counter()
    for num_samples in LENGTHS:
        runs = [_run_chain(posterior, chain, num_samples) for chain in range(NUM_CHAINS)]
        chains = {site: torch.stack([draws[site] for draws, _ in runs]) for site in runs[0][0]}
        rows = torch.stack([table(draws, tuple(chains), posterior.log_sites) for draws, _ in runs])
        mean, sd = rows.flatten(0, 1).mean(0), rows.flatten(0, 1).std(0)
        varies = sd > 1e-9 * mean.abs().clamp(min=1e-6)
        r_hat = float(split_r_hat(rows[..., varies]).max())
        centered = rows[..., varies] - mean[varies]
        ess = float(min(effective_sample_size(each.numpy()).min() for each in (centered, centered**2)))
        refused = _reason_to_refuse(r_hat, ess)
        if not refused:
            break
    flat = {site: values.flatten(0, 1) for site, values in chains.items()}
    kept = torch.linspace(0, NUM_CHAINS * num_samples - 1, NUM_KEPT).round().long()
    report = {
        "r_hat": r_hat,
        "min_ess": ess,
        "refused": refused,
        "num_draws": NUM_CHAINS * num_samples,
        "num_divergences": sum(divergences for _, divergences in runs),
        "potential_difference": _potential_difference(posterior, {s: v[kept[::100]] for s, v in flat.items()}),
        "seconds": time.perf_counter() - started,
    }
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        **report,
        "draws": {site: values[kept].float() for site, values in flat.items()},
        "mean": mean,
        "sd": sd,
        "fingerprint": _fingerprint(posterior),
        "versions": {name: str(version) for name, version in versions().items()},
    }
    torch.save(saved, folder / f"{posterior.name}.pt")
    return report


def split_r_hat(chains: Tensor) -> Tensor:
    """Rank-normalized split R-hat of chains (C, S, K): (K,)."""
    ranks = chains.flatten(0, 1).argsort(0).argsort(0).double() + 1.0
    normal = torch.special.ndtri((ranks - 0.375) / (len(ranks) + 0.25)).reshape(chains.shape)
    return split_gelman_rubin(normal, chain_dim=0, sample_dim=1)


def _reason_to_refuse(r_hat: float, ess: float) -> str:
    """Why a reference is not to be used; empty if it is."""
    if not r_hat <= MAX_R_HAT:
        return f"R-hat {r_hat:.3f} exceeds {MAX_R_HAT}"
    return "" if ess >= MIN_ESS else f"an effective sample size of {ess:.0f} is below {MIN_ESS:.0f}"


def _run_chain(posterior: Posterior, chain: int, num_samples: int) -> tuple[dict[str, Tensor], int]:
    """Draws by site, and how many transitions diverged."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1000 + chain)
    sivism = SIVISM(posterior.model).setup(*posterior.args)
    kernel = nuts_from(sivism, target_accept_prob=TARGET_ACCEPT)
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=WARMUP_STEPS, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(), len(mcmc._diagnostics[0]["divergences"])


def _potential_difference(posterior: Posterior, draws: dict[str, Tensor]) -> float:
    """The largest relative difference of our log density from Pyro's potential at some draws.

    Raises:
        RuntimeError: it is more than rounding.
    """
    pyro.clear_param_store()
    sivism = SIVISM(posterior.model).setup(*posterior.args)
    _, potential, transforms, _ = initialize_model(posterior.model, posterior.args)
    ours = sivism.target.log_density(sivism.guide.layout.pack(draws))
    theirs = [
        -potential({site: transforms[site](values[i]) for site, values in draws.items()}) for i in range(len(ours))
    ]
    difference = ((ours - torch.stack(theirs)) / ours.abs().clamp(min=1.0)).abs().max().item()
    if not difference < 1e-6:
        raise RuntimeError(f"{posterior.name}: log densities differ from Pyro's by {difference:.1e} of their size")
    return difference


def _fingerprint(posterior: Posterior) -> str:
    """Of the model's source and its data."""
    digest = hashlib.sha256(inspect.getsource(posterior.model).encode())
    for arg in posterior.args:
        values = arg.float() if torch.is_tensor(arg) and arg.is_floating_point() else arg
        digest.update(repr(values.tolist() if torch.is_tensor(values) else values).encode())
    return digest.hexdigest()[:16]
