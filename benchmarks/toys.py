"""Three targets in the plane with known densities, fitted by both objectives: KL(q, p), median and spread over seeds.

The densities are those of Yu and Zhang, "Semi-implicit variational inference via score matching" (ICLR 2023, arXiv
2308.10014), written as Pyro models by ``pyro.factor`` and fitted by ``SIVISM.run``, so that what is measured is what
a user gets: preconditioner, default recipe, averaged weights.

``KL(q, p)`` is a sum over a grid in the whitened plane, where the map from there to x leaves it as it is:

    KL = sum_ij q(y_ij) (log q(y_ij) - log p(y_ij)) dA,    q(y) = 1/K sum_k N(y_1; z_k) N(y_2; z_k),

with K mixing draws z_k. Both factors are matrices of grid points by draws, so that q on the whole grid is one matrix
product. The conditional sds are at least .3 there, several times the grid's spacing, for which the sum is exact to
many digits; the masses of q and p on the grid are reported to show it. The finite K makes the estimate too high, by
about half as much as one from K/2 draws: ``kl_error`` is the larger distance of the two half-samples' figures.

    python benchmarks/toys.py                       # 3 targets x 2 objectives x 3 seeds, the default steps
    python benchmarks/toys.py --steps 3000 --out toys.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_value
from record import versions
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import pyro_sivism
from pyro_sivism import SIVISM, FisherDivergence, PathGradientKL, SemiImplicitGuide

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
        kl: KL(q, p) in nats.
        kl_error: how far the figures of the two half-samples are from it, at most.
        mass_q, mass_p: of the two densities on the grid; q's is 1, p's may be less where q has no draws.
        fisher: ``evaluate_loss`` after the fit, in the whitened space.
        share_right: the fraction of draws with x_0 > 0; 1/2 in every target.
        seconds: wall-clock of the whole fit, set-up included.
        error: the exception of a failed fit, whose numbers are NaN.
    """

    target: str
    objective: str
    seed: int
    kl: float
    kl_error: float
    mass_q: float
    mass_p: float
    fisher: float
    share_right: float
    seconds: float
    error: str | None = None


def fit(target: str, objective: str, seed: int, num_steps: int | None, num_mixing: int) -> Row:
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
        sivism = SIVISM(model, guide, loss=OBJECTIVES[objective]())
        sivism.run(num_steps, progress_bar=False)
    except pyro_sivism.SivismError as error:
        nan = math.nan
        return Row(target, objective, seed, nan, nan, nan, nan, nan, nan, time.perf_counter() - started, str(error))
    seconds = time.perf_counter() - started
    kl, kl_error, mass_q, mass_p = kl_divergence(sivism, log_density, num_mixing)
    share_right = (sivism.sample(num_mixing)["x"][:, 0] > 0).double().mean().item()
    fisher = statistics.mean(sivism.evaluate_loss() for _ in range(50))
    return Row(target, objective, seed, kl, kl_error, mass_q, mass_p, fisher, share_right, seconds)


@torch.no_grad()
def kl_divergence(
    sivism: SIVISM, log_density: Callable[[Tensor], Tensor], num_mixing: int, num_points: int = 400
) -> tuple[float, float, float, float]:
    """KL(q, p), its error, and the masses of q and p on a grid of ``num_points`` squared that holds all of q."""
    family, affine = sivism.guide.family, sivism.guide.affine.to(torch.float64)
    conditional = family.conditional(family.sample_mixing(num_mixing)).base_dist
    loc, scale = (values.double().T[:, :, None] for values in (conditional.loc, conditional.scale))  # each (2, K, 1)
    low, high = (loc - 6.0 * scale).amin((1, 2)), (loc + 6.0 * scale).amax((1, 2))
    axes = low[:, None] + (high - low)[:, None] * torch.linspace(0.0, 1.0, num_points, dtype=low.dtype)
    area = (axes[:, 1] - axes[:, 0]).prod()
    factors = Normal(loc, scale).log_prob(axes[:, None, :]).exp()  # (2, K, points)

    y = torch.cartesian_prod(*axes)
    log_p = log_density(affine.forward(y)) + affine.log_abs_det

    def kl_of(rows: slice) -> tuple[float, float]:
        q = (factors[0, rows].mT @ factors[1, rows]).flatten() / factors[0, rows].shape[0]
        return (area * (torch.xlogy(q, q) - q * log_p).sum()).item(), (area * q.sum()).item()

    kl, mass_q = kl_of(slice(None))
    halves = [kl_of(slice(i, None, 2))[0] for i in (0, 1)]
    return kl, max(abs(half - kl) for half in halves), mass_q, (area * log_p.exp().sum()).item()


def _normal(x: Tensor, loc: tuple[float, ...], covariance: tuple[tuple[float, ...], ...]) -> Tensor:
    return MultivariateNormal(x.new_tensor(loc), x.new_tensor(covariance), validate_args=False).log_prob(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="the recipe's if not given")
    parser.add_argument("--mixing", type=int, default=20_000, help="mixing draws behind q on the grid, K")
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    header = f"{'KL median':>10} {'min':>9} {'max':>9} {'error':>8} {'mass q':>8} {'mass p':>8}  seconds"
    print(f"{'target':10} {'objective':17} {header}")
    for target in args.targets:
        for objective in args.objectives:
            mine = [fit(target, objective, s, args.steps, args.mixing) for s in range(args.seeds)]
            rows += mine
            kls = [row.kl for row in mine]
            print(
                f"{target:10} {objective:17} {statistics.median(kls):10.4f} {min(kls):9.4f} {max(kls):9.4f} "
                f"{max(row.kl_error for row in mine):8.1e} {min(row.mass_q for row in mine):8.5f} "
                f"{min(row.mass_p for row in mine):8.5f}  "
                f"{statistics.median(row.seconds for row in mine):.0f}",
                flush=True,
            )
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        report = {"source": SOURCE, "versions": versions(), "settings": settings}
        args.out.write_text(json.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
