"""A fit beside MCMC, in numbers: every latent's mean, sd and distribution, the joint distribution, and what each cost.

An error is in units of NUTS's posterior sds and comes with its Monte Carlo standard error. That of NUTS's own moments
is by the effective sample size (ESS) of its draws, and is mostly the larger part: draws of the fit are independent.
With m, s and k the mean, sd and kurtosis of an element, and n the ESS of the values (for k those of the squared
deviations), the errors by the delta method are

    d = (m_fit - m_nuts) / s_nuts           se(d)^2 = (s_fit / s_nuts)^2 / n_fit + 1 / n_nuts + d^2 se(log s_nuts)^2
    r = s_fit / s_nuts                      se(r)^2 = r^2 (se(log s_fit)^2 + se(log s_nuts)^2)
    se(log s)^2 = (k - 1) / (4 n).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

from pyro_sivism.diagnostics.two_sample import (
    ClassifierTest,
    classifier_test,
    kolmogorov_smirnov,
    sliced_wasserstein,
)
from pyro_sivism.errors import ArgumentError, ModelError
from pyro_sivism.inference_data import effective_sample_size
from pyro_sivism.labels import as_numpy
from pyro_sivism.nuts import require_fit
from pyro_sivism.own_sites import OwnSites
from pyro_sivism.sites import Site
from pyro_sivism.sivism import SIVISM

__all__ = ["Comparison", "Cost", "ElementComparison", "compare_with_nuts"]

_KS_5_PERCENT = 1.358  # quantile .95 of the Kolmogorov distribution
_MAX_SITES_SHOWN = 20
_MIN_DRAWS = 20


class ElementComparison(NamedTuple):
    """One number of one latent site; rows of :attr:`Comparison.table`.

    Attributes:
        site: its name.
        element: the name of this number, ``theta[3]``; that of the site where it is all of it.
        mean_difference: the fit's mean less NUTS's, in NUTS's sds.
        mean_difference_se: its standard error.
        sd_ratio: the fit's sd over NUTS's.
        sd_ratio_se: its standard error.
        ks: the Kolmogorov-Smirnov distance of the two marginals.
        ks_noise: what it exceeds by chance in 5 of 100 cases where the marginals are the same.
        ess: NUTS's effective sample size for the mean.
    """

    site: str
    element: str
    mean_difference: float
    mean_difference_se: float
    sd_ratio: float
    sd_ratio_se: float
    ks: float
    ks_noise: float
    ess: float

    @property
    def sure_error(self) -> float:
        """The larger of the errors of mean and log2 sd, less two standard errors: below 0 where noise would do."""
        log2_se = self.sd_ratio_se / (self.sd_ratio * math.log(2.0)) if self.sd_ratio > 0.0 else math.inf
        log2_ratio = abs(math.log2(self.sd_ratio)) if self.sd_ratio > 0.0 else math.inf
        of_sd = log2_ratio - 2.0 * log2_se if math.isfinite(log2_ratio) else math.inf
        return max(abs(self.mean_difference) - 2.0 * self.mean_difference_se, of_sd)


class Cost(NamedTuple):
    """What draws cost.

    Attributes:
        num_draws: how many are compared.
        seconds: wall-clock, everything counted; None where it is not known.
        num_evaluations: scores of single points (gradients of the log density); None where it is not known.
    """

    num_draws: int
    seconds: float | None
    num_evaluations: int | None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_with_nuts` found; ``print`` it for a summary by site.

    Attributes:
        table: a row for each element of each site that varies; ``pandas.DataFrame(comparison.table)`` has the fields
            of :class:`ElementComparison` as columns.
        sliced_wasserstein: sliced Wasserstein-1 distance of the joint distributions, each element in NUTS's sds.
        sliced_wasserstein_floor: the same between the first and the second halves of NUTS's chains. A distance below it
            tells of no error: exact draws, as many as NUTS's and these independent, would be at about .7 of it.
        classifier: accuracy of a classifier that is to tell the fit's draws from NUTS's; 0.5 if it cannot.
        fit, nuts: what each cost.
        num_divergences: NUTS's divergent transitions; None where they are not known.
        num_nonfinite: draws of the fit that are left out because a site overflowed.
        left_out: latent sites that NUTS's draws do not have.
        draws, reference: the draws of each element that are compared, by its name: (S,) and (R,).
    """

    table: tuple[ElementComparison, ...]
    sliced_wasserstein: float
    sliced_wasserstein_floor: float
    classifier: ClassifierTest
    fit: Cost
    nuts: Cost
    num_divergences: int | None = None
    num_nonfinite: int = 0
    left_out: tuple[str, ...] = ()
    draws: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    reference: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def worst(self) -> tuple[ElementComparison, ...]:
        """The worst element of each site, the worst site first, by error beyond Monte Carlo noise."""
        of_site: dict[str, ElementComparison] = {}
        for row in sorted(self.table, key=lambda row: -row.sure_error):
            of_site.setdefault(row.site, row)
        return tuple(of_site.values())

    def __str__(self) -> str:
        rows = self.worst[:_MAX_SITES_SHOWN]
        width = max(len("worst element"), *(len(row.element) for row in rows))
        header = f"  {'mean difference':16}  {'sd ratio':16}  {'KS (noise)':14}  {'NUTS ESS':>9}"
        lines = [f"{'worst element':{width}}{header}"]
        for row in rows:
            lines.append(
                f"{row.element:{width}}  {row.mean_difference:+6.3f} +- {row.mean_difference_se:<6.3f}"
                f"  {row.sd_ratio:6.3f} +- {row.sd_ratio_se:<6.3f}  {row.ks:6.3f} ({row.ks_noise:.3f})"
                f"  {row.ess:9.0f}"
            )
        if len(self.worst) > len(rows):
            lines.append(f"and {len(self.worst) - len(rows)} more sites with smaller errors")
        lines += [
            f"sliced Wasserstein distance {self.sliced_wasserstein:.3f} sds, between halves of NUTS's draws "
            f"{self.sliced_wasserstein_floor:.3f}",
            f"a classifier tells the draws apart with accuracy {self.classifier.accuracy:.3f} +- "
            f"{self.classifier.se:.3f} (0.5 if it cannot)",
            f"SIVISM: {_cost_text(self.fit)}",
            f"NUTS: {_cost_text(self.nuts)}",
        ]
        if self.num_divergences:
            lines.append(f"divergent transitions of NUTS: {self.num_divergences}; its draws may miss a part as well")
        if self.num_nonfinite:
            lines.append(f"left out: {self.num_nonfinite} draws of SIVISM that are not finite")
        if self.left_out:
            lines.append(f"not compared, for want of draws: {', '.join(self.left_out)}")
        return "\n".join(lines)


def compare_with_nuts(
    sivism: SIVISM,
    *args: Any,
    num_samples: int = 1000,
    warmup_steps: int = 1000,
    num_chains: int = 1,
    nuts: Any = None,
    kernel: MCMCKernel | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Comparison:
    """Run NUTS on the fit's model, or take draws that are there, and put the fit beside it.

    NUTS starts where Pyro starts it and not from the fit, so that it can find what the fit has lost. The comparison is
    on the sites' own supports, and of a reparametrized model at its own sites: a decentered model can be compared with
    draws of the centered one. It is only as good as NUTS's draws: look at the ESS, and at R-hat of several chains.

    Args:
        sivism: a fit; as many draws are taken from it as there are of NUTS.
        args, kwargs: the model's arguments; those of the fit's last step if none.
        num_samples, warmup_steps, num_chains: as for ``pyro.infer.MCMC``.
        nuts: reference draws in the place of a run: an ArviZ ``InferenceData`` or ``DataTree`` with a ``posterior``, a
            ``pyro.infer.MCMC`` that has run, or a dict from site to draws (S, *site shape) or (C, S, *site shape).
        kernel: a Pyro kernel in the place of ``NUTS(model)``, e.g. ``NUTS(model, jit_compile=True)``, or that of
            :func:`~pyro_sivism.nuts_from` for a cheaper but less independent reference.
        progress_bar: show NUTS's progress.

    Raises:
        NotSetUpError: the fit has not been run, or has seen no arguments.
        ModelError: the model draws random minibatches, which NUTS cannot run on; give its draws by ``nuts``.
        ArgumentError: the reference draws have other shapes than the sites, too few of them, or are not finite.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> sivism = SIVISM(model)
        >>> fit = sivism.run(20, torch.ones(100), progress_bar=False)
        >>> exact = torch.distributions.Normal(1.0, 0.1).sample((1000,))
        >>> comparison = compare_with_nuts(sivism, nuts={"mu": exact})
        >>> comparison.worst[0].element, abs(comparison.worst[0].mean_difference) < 0.2
        ('mu', True)
    """
    args, kwargs = require_fit(sivism, args, kwargs)
    if nuts is None:
        run = _run_nuts(sivism, args, kwargs, num_samples, warmup_steps, num_chains, kernel, progress_bar)
    else:
        run = _Reference(nuts, _stored_seconds(nuts), None, None)
    own = OwnSites(sivism.model, sivism.guide.layout, sivism.guide.trace_model(*args, **kwargs), args, kwargs)
    chains, left_out = _chains_by_site(run.source, own)
    sites = [site for site in own.sites if site.name in chains]
    names = [name for site in sites for name in _element_names(site)]
    reference = np.concatenate([chains[site.name] for site in sites], -1)  # (C, R, K)
    if reference.shape[1] < _MIN_DRAWS or not np.isfinite(reference).all():
        raise ArgumentError(
            f"NUTS's draws are {reference.shape[1]} in a chain, with {int((~np.isfinite(reference)).sum())} numbers "
            f"that are not finite; expected at least {_MIN_DRAWS}, all finite"
        )
    num_draws = reference.shape[0] * reference.shape[1]
    sampled = own.draws(sivism.guide.layout.constrain(sivism.sample_unconstrained(num_draws)))
    draws = np.concatenate([as_numpy(sampled[site.name]).reshape(num_draws, -1) for site in sites], -1)
    seconds = sum(sivism._seconds.values())
    return _compare(
        names=names,
        site_names=[site.name for site in sites for _ in _element_names(site)],
        draws=draws.astype(np.float64),
        reference=reference,
        fit=Cost(num_draws, seconds, sivism.target.num_evaluations),
        nuts=Cost(num_draws, run.seconds, run.num_evaluations),
        num_divergences=run.num_divergences,
        left_out=left_out,
    )


# --- the numbers ------------------------------------------------------------------------------------


def _compare(
    names: Sequence[str], site_names: Sequence[str], draws: np.ndarray, reference: np.ndarray, **known: Any
) -> Comparison:
    """From draws of the fit (S, K) and of NUTS (C, R, K)."""
    pooled = reference.reshape(-1, reference.shape[-1])
    mean, sd = pooled.mean(0), pooled.std(0, ddof=1)
    varies = sd > 1e-9 * np.maximum(np.abs(mean), 1e-6)  # a Cholesky factor has entries that do not
    if not varies.any():
        raise ArgumentError("none of the compared sites varies in NUTS's draws")
    names, site_names = ([name for name, keep in zip(each, varies) if keep] for each in (names, site_names))
    draws, reference, pooled, mean, sd = (each[..., varies] for each in (draws, reference, pooled, mean, sd))

    finite = np.isfinite(draws).all(-1)
    if finite.sum() < _MIN_DRAWS:
        raise ArgumentError(f"{len(draws) - finite.sum()} of {len(draws)} draws of the fit are not finite")
    draws = draws[finite]
    # All that follows is in NUTS's sds, about NUTS's means.
    q, p, chains = (draws - mean) / sd, (pooled - mean) / sd, (reference - mean) / sd
    ess_mean, ess_square = effective_sample_size(chains), effective_sample_size(chains**2)
    log_sd_variance = (_kurtosis(p) - 1.0) / (4.0 * ess_square)
    difference, ratio = q.mean(0), q.std(0, ddof=1)
    difference_se = np.sqrt(ratio**2 / len(q) + 1.0 / ess_mean + difference**2 * log_sd_variance)
    ratio_se = ratio * np.sqrt((_kurtosis(q) - 1.0) / (4.0 * len(q)) + log_sd_variance)
    ks = kolmogorov_smirnov(torch.from_numpy(q), torch.from_numpy(p)).numpy()
    ks_noise = _KS_5_PERCENT * np.sqrt(1.0 / len(q) + 1.0 / ess_mean)
    columns = (difference, difference_se, ratio, ratio_se, ks, ks_noise, ess_mean)
    table = tuple(
        ElementComparison(site, name, *map(float, numbers)) for site, name, *numbers in zip(site_names, names, *columns)
    )
    half = chains.shape[1] // 2
    early, late = (torch.from_numpy(part.reshape(-1, part.shape[-1])) for part in (chains[:, :half], chains[:, half:]))
    return Comparison(
        table=table,
        sliced_wasserstein=sliced_wasserstein(torch.from_numpy(q), torch.from_numpy(p)),
        sliced_wasserstein_floor=sliced_wasserstein(early, late),
        classifier=classifier_test(torch.from_numpy(q), torch.from_numpy(p)),
        num_nonfinite=int((~finite).sum()),
        draws=dict(zip(names, draws.T)),
        reference=dict(zip(names, pooled.T)),
        **known,
    )


def _kurtosis(draws: np.ndarray) -> np.ndarray:
    """The fourth central moment over the squared variance, (K,); 1 where nothing varies."""
    centered = draws - draws.mean(0)
    variance = (centered**2).mean(0)
    return np.divide((centered**4).mean(0), variance**2, out=np.ones_like(variance), where=variance > 0.0)


def _cost_text(cost: Cost) -> str:
    parts = [f"{cost.num_draws} draws"]
    parts.append("time not known" if cost.seconds is None else f"{cost.seconds:.1f} s")
    parts.append("evaluations not known" if cost.num_evaluations is None else f"{cost.num_evaluations:,} scores")
    return ", ".join(parts)


# --- NUTS's draws -----------------------------------------------------------------------------------


class _Reference(NamedTuple):
    source: Any
    seconds: float | None
    num_evaluations: int | None
    num_divergences: int | None


class _CountingNUTS(NUTS):
    """NUTS that counts the evaluations of its potential, without the few by which a chain is set up."""

    potential_fn: Callable
    _num_evaluations: int

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        self._num_evaluations, potential_fn = 0, self.potential_fn

        def counted(params: Mapping[str, torch.Tensor]) -> torch.Tensor:
            self._num_evaluations += 1
            return potential_fn(params)

        self.potential_fn = counted

    def diagnostics(self) -> dict[str, Any]:
        return {**super().diagnostics(), "evaluations": self._num_evaluations}


def _run_nuts(
    sivism: SIVISM,
    args: Sequence,
    kwargs: Mapping[str, Any],
    num_samples: int,
    warmup_steps: int,
    num_chains: int,
    kernel: MCMCKernel | None,
    progress_bar: bool,
) -> _Reference:
    if sivism.target.is_subsampled:
        raise ModelError(
            "the model draws random minibatches, on which NUTS cannot run. Give the plate all of its data, or pass "
            "draws from elsewhere by nuts=."
        )
    mcmc = MCMC(
        _CountingNUTS(sivism.model) if kernel is None else kernel,
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        num_chains=num_chains,
        disable_progbar=not progress_bar,
    )
    started = time.perf_counter()
    mcmc.run(*args, **kwargs)
    seconds = time.perf_counter() - started
    of_chains: list[dict[str, Any]] = mcmc._diagnostics  # the public method computes R-hat and ESS of all sites first
    evaluations = [each["evaluations"] for each in of_chains if "evaluations" in each]
    divergences = [len(each["divergences"]) for each in of_chains if "divergences" in each]
    return _Reference(mcmc, seconds, sum(evaluations) or None, sum(divergences) if divergences else None)


def _stored_seconds(source: Any) -> float | None:
    """The time that samplers note in an InferenceData."""
    try:
        return float(source["posterior"].attrs["sampling_time"])
    except (AttributeError, KeyError, TypeError, IndexError):
        return None


def _chains_by_site(source: Any, own: OwnSites) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Each of the model's own sites' draws as (C, R, site size), and the names of the sites that have none."""
    available = dict(_named_draws(source))
    latents = own.layout.sites
    found = {
        site.name: _as_chains(available[site.name], site) for site in (*latents, *own.sites) if site.name in available
    }
    lengths = {values.shape[:2] for values in found.values()}
    if len(lengths) > 1:
        raise ArgumentError(f"NUTS's draws are of unequal (chains, draws): {sorted(lengths)}")
    missing = [site.name for site in own.sites if site.name not in found]
    if missing and all(site.name in found for site in latents):  # NUTS draws latents, and nothing computed from them
        dtype, device, (shape,) = own.layout.dtype, own.layout.device, lengths
        flat = {site.name: torch.as_tensor(found[site.name], dtype=dtype, device=device) for site in latents}
        computed = own.draws({site.name: flat[site.name].reshape(-1, *site.shape) for site in latents})
        found |= {name: as_numpy(computed[name]).astype(np.float64).reshape(*shape, -1) for name in missing}
        missing = []
    found = {site.name: found[site.name] for site in own.sites if site.name in found}
    if not found:
        raise ArgumentError(
            f"NUTS's draws have none of the model's latent sites {[site.name for site in own.sites]}; they have "
            f"{sorted(available)}"
        )
    return found, tuple(missing)


def _as_chains(draws: Any, site: Site) -> np.ndarray:
    """A site's draws as (C, R, site size)."""
    values = as_numpy(draws).astype(np.float64)
    num_sample_dims = values.ndim - len(site.shape)
    if num_sample_dims not in (1, 2) or values.shape[num_sample_dims:] != tuple(site.shape):
        expected = "".join(f", {size}" for size in site.shape)
        raise ArgumentError(
            f"NUTS's draws of '{site.name}' have shape {values.shape}; expected (chains, draws{expected}) or "
            f"(draws{expected})"
        )
    values = values[None] if num_sample_dims == 1 else values
    return values.reshape(*values.shape[:2], -1)


def _named_draws(source: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(source, MCMC):
        yield from source.get_samples(group_by_chain=True).items()
    elif isinstance(source, Mapping) and "posterior" not in source:
        yield from source.items()
    else:
        try:
            posterior = source["posterior"]
            yield from ((str(name), posterior[name].values) for name in posterior.data_vars)
        except (AttributeError, IndexError, KeyError, TypeError):
            raise ArgumentError(
                f"nuts is a {type(source).__name__}; expected an InferenceData or DataTree with a posterior, an MCMC "
                "that has run, or a dict from site to draws"
            ) from None


def _element_names(site: Site) -> list[str]:
    if not site.shape:
        return [site.name]
    return [f"{site.name}[{','.join(map(str, index))}]" for index in np.ndindex(*site.shape)]
