"""Three targets in the plane with known densities, fitted by both objectives: KL(q, p), median and spread over seeds.

The densities are those of Yu and Zhang, "Semi-implicit variational inference via score matching" (ICLR 2023, arXiv
2308.10014), written as Pyro models by ``pyro.factor`` and fitted by ``SIVISM.run``, so that what is measured is what
a user gets: preconditioner, default recipe, averaged weights.

``KL(q, p) = E_q[log q - log p]`` is estimated from N draws of q. The density at each draw is an importance-weighted
average of q(x|z) over K mixing draws from N(0, I) and L from a narrow normal around the draw's own z, combined by the
balance heuristic (Veach and Guibas 1995). Given the draw and its z the average is unbiased, so its log errs low, but
hardly: out in q's tails, where no z from N(0, I) reaches x, the local ones do. As a check the plain average with the
draw's own z among the K, which errs high, is reported as ``kl_high``. The standard error is that of the mean over
the N draws; one draw out in a tail can dominate it, which is a property of q, not of the estimate.

    python benchmarks/toys.py                       # 3 targets x 2 objectives x 3 seeds, 3,000 steps x 128 draws
    python benchmarks/toys.py --seeds 5 --out toys.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import pyro_sivism
from pyro_sivism import SIVISM, FisherDivergence, PathGradientKL, SemiImplicitGuide
from pyro_sivism.family import SemiImplicit, SemiImplicitSample

SOURCE = "Yu and Zhang, ICLR 2023, arXiv 2308.10014, section 5.1"
OBJECTIVES = {"PathGradientKL": PathGradientKL, "FisherDivergence": FisherDivergence}


def banana(x: Tensor) -> Tensor:
    """``x = (v1, v1^2 + v2 + 1)``, v normal with unit variances and correlation .9; the map has Jacobian 1."""
    v = torch.stack([x[..., 0], x[..., 1] - x[..., 0].square() - 1.0], -1)
    return _normal(v, (0.0, 0.0), ((1.0, 0.9), (0.9, 1.0)))


def x_shape(x: Tensor) -> Tensor:
    """Equal parts of two normals with variances 2 and covariances 1.8 and -1.8."""
    rising = _normal(x, (0.0, 0.0), ((2.0, 1.8), (1.8, 2.0)))
    falling = _normal(x, (0.0, 0.0), ((2.0, -1.8), (-1.8, 2.0)))
    return torch.logaddexp(rising, falling) - math.log(2.0)


def two_modes(x: Tensor) -> Tensor:
    """Equal parts of two standard normals centred at (-2, 0) and (2, 0)."""
    left, right = (_normal(x, (centre, 0.0), ((1.0, 0.0), (0.0, 1.0))) for centre in (-2.0, 2.0))
    return torch.logaddexp(left, right) - math.log(2.0)


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {"banana": banana, "x_shape": x_shape, "two_modes": two_modes}


@dataclass(frozen=True)
class Row:
    """One fit.

    Attributes:
        kl, kl_high: KL(q, p) in nats, with log q by the weighted average and by one that errs high.
        kl_se: standard error of ``kl``.
        fisher: ``evaluate_loss`` after the fit, in the whitened space.
        share_right: the fraction of draws with x_0 > 0; 1/2 in every target.
        seconds: wall-clock of the whole fit, set-up included.
        error: the exception of a failed fit, whose numbers are NaN.
    """

    target: str
    objective: str
    seed: int
    kl: float
    kl_high: float
    kl_se: float
    fisher: float
    share_right: float
    seconds: float
    error: str | None = None


def fit(target: str, objective: str, seed: int, num_steps: int, num_draws: int, num_mixing: int) -> Row:
    """Fit one target from one seed and measure it."""
    log_density = TARGETS[target]

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("log_density", log_density(x))

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    started = time.perf_counter()
    try:
        # An improper prior cannot be drawn from, so Pyro needs to be told where to start.
        guide = SemiImplicitGuide(model, init_loc_fn=init_to_value(values={"x": torch.zeros(2)}))
        sivism = SIVISM(model, guide, loss=OBJECTIVES[objective](), num_particles=128)
        sivism.run(num_steps, progress_bar=False)
    except pyro_sivism.SivismError as error:
        nan = math.nan
        return Row(target, objective, seed, nan, nan, nan, nan, nan, time.perf_counter() - started, str(error))
    seconds = time.perf_counter() - started
    kl, kl_high, kl_se, share_right = kl_divergence(sivism, log_density, num_draws, num_mixing)
    fisher = statistics.mean(sivism.evaluate_loss() for _ in range(50))
    return Row(target, objective, seed, kl, kl_high, kl_se, fisher, share_right, seconds)


@torch.no_grad()
def kl_divergence(
    sivism: SIVISM, log_density: Callable[[Tensor], Tensor], num_draws: int, num_mixing: int, chunk: int = 250
) -> tuple[float, float, float, float]:
    """KL(q, p), the same erring high, its standard error, and the share of draws with x_0 > 0."""
    family, affine = sivism.guide.family, sivism.guide.affine
    low, high, right = [], [], 0
    for _ in range(num_draws // chunk):
        draw = family.rsample(chunk)
        x = affine.forward(draw.x)
        log_p = log_density(x) + affine.log_abs_det  # of the whitened draw
        low.append(_log_q(family, draw, num_mixing, num_local=300) - log_p)
        high.append(family.log_prob_estimate(draw.x, num_mixing, own_z=draw.z).value - log_p)
        right += int((x[:, 0] > 0).sum())
    from_below, from_above = torch.cat(low), torch.cat(high)
    standard_error = from_below.std() / math.sqrt(len(from_below))
    return from_below.mean().item(), from_above.mean().item(), standard_error.item(), right / len(from_below)


def _log_q(
    family: SemiImplicit, draw: SemiImplicitSample, num_mixing: int, num_local: int, local_sd: float = 0.3
) -> Tensor:
    """``log q(x)`` (B,) at draws, from ``num_mixing`` z ~ N(0, I) and ``num_local`` z around each draw's own."""
    prior = Normal(0.0, 1.0, validate_args=False)
    shared = family.sample_mixing((num_mixing, 1))
    local = draw.z + local_sd * torch.randn(num_local, *draw.z.shape)
    terms = []
    for z in (shared, local):
        log_prior = prior.log_prob(z).sum(-1)
        log_local = Normal(draw.z, local_sd, validate_args=False).log_prob(z).sum(-1)
        log_proposals = torch.logaddexp(log_prior + math.log(num_mixing), log_local + math.log(num_local))
        terms.append((family.conditional(z).log_prob(draw.x) + log_prior - log_proposals).logsumexp(0))
    return torch.logaddexp(*terms)


def _normal(x: Tensor, loc: tuple[float, ...], covariance: tuple[tuple[float, ...], ...]) -> Tensor:
    return MultivariateNormal(x.new_tensor(loc), x.new_tensor(covariance), validate_args=False).log_prob(x)


def _environment() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "pyro_sivism": pyro_sivism.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=10_000, help="draws of q behind the KL, N")
    parser.add_argument("--mixing", type=int, default=5_000, help="mixing draws from N(0, I) behind each log q, K")
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    print(f"{'target':10} {'objective':17} {'KL median':>10} {'min':>9} {'max':>9} {'gap':>8} {'se':>8}  seconds")
    for target in args.targets:
        for objective in args.objectives:
            mine = [fit(target, objective, s, args.steps, args.draws, args.mixing) for s in range(args.seeds)]
            rows += mine
            kls = [row.kl for row in mine]
            print(
                f"{target:10} {objective:17} {statistics.median(kls):10.4f} {min(kls):9.4f} {max(kls):9.4f} "
                f"{max(row.kl_high - row.kl for row in mine):8.1e} {max(row.kl_se for row in mine):8.1e}  "
                f"{statistics.median(row.seconds for row in mine):.0f}",
                flush=True,
            )
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        report = {"source": SOURCE, "environment": _environment(), "settings": settings}
        args.out.write_text(json.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
