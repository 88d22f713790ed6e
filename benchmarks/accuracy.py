"""How far draws are from a reference, in units of the reference's own sds.

With a draw of all sites as one row of columns, standardized by the reference's means m and sds s, and the fit's moments
m', s', what :func:`errors` returns is

    mean_max    the largest |m' - m| / s over the columns
    sd_max      the largest |log2(s' / s)|, over the columns whose sd the reference knows
    sw1         the sliced Wasserstein-1 distance: along 200 fixed directions, the mean difference of sorted projections
    sw1_floor   the same between two halves of the reference, so that sw1 / sw1_floor needs no other scale

Draws of the reference's own distribution, as many as it has, score sw1 / sw1_floor of about .7, for they are twice as
many as in its halves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reference", "errors", "sliced_wasserstein", "table"]

_NUM_DIRECTIONS = 200
_MIN_DRAWS = 20
# An sd is known to the reference if the standard error of its log2 is below this. That of 2,000 draws of a normal is
# .02; of a Student t with four degrees of freedom, whose draws have no finite kurtosis, .1 and more.
_MAX_LOG2_SD_ERROR = 0.1


@dataclass(frozen=True)
class Reference:
    """What a posterior's draws are compared with.

    Attributes:
        sites: names of the sites, in the order of the columns.
        log_sites: those whose logarithm is compared.
        names: of the columns, ``site[i,j]``.
        draws: (R, K), float64.
        mean, sd: (K,), perhaps from more draws than are kept.
        sd_is_known: (K,), whether an error of the sd can be told from the reference's own.
    """

    sites: tuple[str, ...]
    log_sites: tuple[str, ...]
    names: tuple[str, ...]
    draws: Tensor
    mean: Tensor
    sd: Tensor
    sd_is_known: Tensor

    @classmethod
    def from_draws(
        cls,
        draws: Mapping[str, Any],
        log_sites: Sequence[str] = (),
        *,
        moments: tuple[Tensor, Tensor] | None = None,
        max_draws: int = 2000,
    ) -> Reference:
        """From draws by site, (R, *site shape); at most ``max_draws`` are kept, evenly spaced.

        Args:
            draws: all of the reference.
            log_sites: sites whose logarithm is compared.
            moments: means and sds of the columns, where they are known better than from ``draws``.
            max_draws: how many to compare distributions with.
        """
        sites = tuple(draws)
        rows, names = table(draws, sites, log_sites), _names(draws, sites)
        mean, sd = (rows.mean(0), rows.std(0)) if moments is None else moments
        kept = rows[torch.linspace(0, len(rows) - 1, min(max_draws, len(rows))).round().long()]
        deviations = (kept - kept.mean(0)) / kept.std(0)
        log2_sd_error = ((deviations**4).mean(0) - 1.0).div(4.0 * len(kept)).sqrt() / math.log(2.0)
        return cls(sites, tuple(log_sites), names, kept, mean, sd, log2_sd_error < _MAX_LOG2_SD_ERROR)


def table(draws: Mapping[str, Any], sites: Sequence[str], log_sites: Sequence[str] = ()) -> Tensor:
    """Draws by site as rows, (S, K) in float64, the logarithm of ``log_sites``."""
    parts = []
    for site in sites:
        values = torch.as_tensor(draws[site]).detach().double()
        parts.append((values.log() if site in log_sites else values).reshape(len(values), -1))
    return torch.cat(parts, 1)


def _names(draws: Mapping[str, Any], sites: Sequence[str]) -> tuple[str, ...]:
    names = []
    for site in sites:
        indices = torch.ones(torch.as_tensor(draws[site]).shape[1:]).nonzero().tolist()
        names += [f"{site}[{','.join(map(str, index))}]" if index else site for index in indices]
    return tuple(names)


def errors(draws: Mapping[str, Any], reference: Reference) -> dict[str, Any]:
    """The errors of draws by site, (S, *site shape), and which columns are worst; see the module docstring.

    ``sd_log2_worst`` has the sign of the worst sd: negative where it is too small. Means and sds are of all the draws,
    distances of at most as many as the reference has. Rows with an infinity or a NaN are left out and counted.

    Raises:
        ValueError: fewer than 20 rows are finite.
    """
    rows = table(draws, reference.sites, reference.log_sites)
    varies = reference.sd > 1e-9 * reference.mean.abs().clamp(min=1e-6)  # a Cholesky factor has entries that do not
    finite = rows[:, varies].isfinite().all(-1)
    if int(finite.sum()) < _MIN_DRAWS:
        raise ValueError(f"only {int(finite.sum())} of {len(rows)} draws are finite")
    names = [name for name, keep in zip(reference.names, varies.tolist()) if keep]
    mean, sd = reference.mean[varies], reference.sd[varies]
    x, y = ((each[:, varies] - mean) / sd for each in (rows[finite], reference.draws))
    mean_error = x.mean(0).abs()
    log2_sd = x.std(0).clamp(min=1e-300).log2()
    sd_error = log2_sd.abs().where(reference.sd_is_known[varies], 0.0)
    worst_mean, worst_sd = int(mean_error.argmax()), int(sd_error.argmax())
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    half = len(y) // 2
    return {
        "sw1": sliced_wasserstein(x[: len(y)], y),
        "sw1_floor": sliced_wasserstein(shuffled[:half], shuffled[half : 2 * half]),
        "mean_max": float(mean_error[worst_mean]),
        "mean_worst": names[worst_mean],
        "sd_max": float(sd_error[worst_sd]),
        "sd_worst": names[worst_sd],
        "sd_log2_worst": float(log2_sd[worst_sd]),
        "num_sds_unknown": int((~reference.sd_is_known[varies]).sum()),
        "num_nonfinite": int((~finite).sum()),
    }


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Of rows x (S, K) and y (R, K), as they are: standardize them first."""
    directions = torch.randn(x.shape[1], _NUM_DIRECTIONS, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    directions = directions / directions.norm(dim=0)
    count = min(len(x), len(y))
    levels = (torch.arange(count, dtype=x.dtype) + 0.5) / count
    along = [(rows @ directions).sort(0).values for rows in (x, y)]
    quantiles = [rows if len(rows) == count else rows.quantile(levels, dim=0) for rows in along]
    return float((quantiles[0] - quantiles[1]).abs().mean())
