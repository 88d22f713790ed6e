"""From a fit to MCMC: a Pyro NUTS kernel that starts where other chains arrive after their warm-up.

What NUTS spends its warm-up on is finding the posterior and learning its scales. A fit q knows both, and what it has
wrong short Hamiltonian chains from its draws mend, 512 of them at once for little more than the price of one: where
they arrive NUTS starts, and their covariance on the unconstrained space is its inverse mass matrix, so that only the
step size is left to adapt, in about a hundred iterations. Beyond 256 dimensions, and where draws are scored one by one,
it is q's own draws. The chain's law is the model's whatever q is; a poor q costs time, not truth, except that a chain
started in one of two separate modes seldom finds the other, from q's draws as from any start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import NUTS
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from torch import Tensor

from pyro_sivism.assessment import chains_from
from pyro_sivism.errors import ArgumentError, ModelError, NonFiniteError, NotSetUpError
from pyro_sivism.guide import SemiImplicitGuide
from pyro_sivism.layout import LatentLayout
from pyro_sivism.sivism import SIVISM
from pyro_sivism.target import Target
from pyro_sivism.target.density import PATHS
from pyro_sivism.target.starts import check_finite_start

__all__ = ["FittedNUTS", "nuts_from", "require_fit"]

_MAX_DENSE_DIM = 256
_NUM_DRAWS = 6144
_DRAWS_PER_DIM = 100  # eigenvalues of a covariance from so many are right to about 2 / sqrt(100) = 20%
# Of each of 512 chains. The second half counts: 8,192 points, by which standardized variances in 90 dimensions are
# right to 20% in every direction. From a Gaussian alone, whose scale of 85 groups had too small an sd, NUTS had an ESS
# of 15 to 31 of 500 there; from the chains 220 to 240, and from a complete fit 115 to 195.
_NUM_TRAJECTORIES = 32
_NUM_STARTS = 64
_JOINED = "_pyro_sivism_unconstrained"  # in the place of the sites' names


def nuts_from(sivism: SIVISM, *args: Any, full_mass: bool | list | None = None, **kwargs: Any) -> FittedNUTS:
    """A ``pyro.infer.NUTS`` kernel that starts at the draws of a fit, with their covariance as inverse mass matrix.

    The draws are first taken on by 32 trajectories of Hamiltonian Monte Carlo, 512 at once, which mends what a rough
    fit has wrong; not beyond 256 dimensions, nor where scores are computed one by one. So where only NUTS's draws are
    wanted ``sivism.setup(*args)`` alone serves, often: the Gaussian that a fit begins with. What they evaluate counts
    in ``sivism.target.num_evaluations``, with the fit's.

    Each chain starts at its own draw. Only the step size is adapted, so that a warm-up of about 100 steps does. The
    potential is the model's :class:`Target`, which replays its graph where it can: the kernel takes every model that
    the fit took, discrete latents included, and ``mcmc.run()`` needs no arguments.

    The chain moves in the coordinates of the model as it was given. Where the fit decentered latents, which is where
    NUTS is slow in these, give it the model decentered: ``nuts_from(SIVISM(decenter(model, *args)).setup(*args))``.

    Args:
        sivism: a fit.
        args: the model's arguments; those of the fit's last step if none.
        full_mass: as for NUTS: True for one dense matrix, False for a diagonal one, or a list of tuples of sites that
            get a dense block each. If None, dense up to 256 dimensions.
        kwargs: keyword arguments of ``pyro.infer.NUTS`` other than ``model``, ``potential_fn``, ``transforms`` and
            those of its compilation and initialization; and any other keyword, which goes to the model (a model's
            keyword of a name that NUTS has too is to be given by position).
            ``adapt_mass_matrix`` is False unless given: with True the warm-up goes on from the fit's covariance, which
            helps where the fit is poor and the warm-up several hundred steps long.

    Returns:
        a kernel for ``pyro.infer.MCMC``, which draws the model's sites on their own supports.

    Raises:
        NotSetUpError: the fit has not been run, or has seen no arguments.
        ModelError: the model draws random minibatches, on which NUTS would not be right.
        ArgumentError: a keyword that the kernel sets itself.

    Source: Hoffman and Gelman, The No-U-Turn Sampler, JMLR 15 (2014); a variational fit as the start and the metric:
    Zhang, Carpenter, Gelman and Vehtari, Pathfinder, JMLR 23 (2022).

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import MCMC
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> sivism = SIVISM(model)
        >>> fit = sivism.run(20, torch.ones(100), progress_bar=False)
        >>> mcmc = MCMC(nuts_from(sivism), num_samples=50, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["mu"].shape
        torch.Size([50])
    """
    options: dict[str, Any] = {name: kwargs.pop(name) for name in _NUTS_OPTIONS if name in kwargs}
    refused = sorted(_SET_HERE.intersection(kwargs))
    if refused:
        raise ArgumentError(
            f"nuts_from sets {', '.join(refused)} itself; expected keyword arguments of the model or among "
            f"{', '.join(_NUTS_OPTIONS)}. For a kernel of your own use pyro.infer.NUTS with initial_params from "
            "sivism.sample_unconstrained."
        )
    args, kwargs = require_fit(sivism, args, kwargs)
    guide = sivism.guide
    if full_mass is None:
        full_mass = guide.layout.dim <= _MAX_DENSE_DIM
    num_draws = max(_NUM_DRAWS, _DRAWS_PER_DIM * guide.layout.dim) if full_mass else _NUM_DRAWS
    draws = _taken_on(sivism.target, sivism.sample_unconstrained(num_draws))
    if guide.reparams:  # the chain is to draw the model's own sites
        fitted, guide = guide, SemiImplicitGuide(sivism.own_model, init_loc_fn=guide.init_loc_fn)
        guide.setup(*args, **kwargs)
        draws = guide.layout.pack(fitted.constrain(draws, *args, **kwargs))
    options.setdefault("adapt_mass_matrix", False)
    return FittedNUTS(sivism.own_model, guide, draws, args, kwargs, paths=sivism.paths, full_mass=full_mass, **options)


@torch.no_grad()
def _taken_on(target: Target, draws: Tensor) -> Tensor:
    """Where Hamiltonian chains take the draws; the draws themselves where none can be run, or none that is cheap."""
    if target.is_subsampled or target.dim > _MAX_DENSE_DIM or target.path.name == "loop":
        return draws
    try:
        chains = chains_from(target, draws).run(_NUM_TRAJECTORIES)
    except (ArgumentError, NonFiniteError):  # no spread in the draws, or few where the model is finite
        return draws
    return chains.frame.affine.forward(chains.late.flatten(0, 1)).to(draws)


_NUTS_OPTIONS = (
    "step_size",
    "adapt_step_size",
    "adapt_mass_matrix",
    "use_multinomial_sampling",
    "target_accept_prob",
    "max_tree_depth",
)
_SET_HERE = frozenset(
    {
        "potential_fn",
        "transforms",
        "max_plate_nesting",
        "jit_compile",
        "jit_options",
        "ignore_jit_warnings",
        "init_strategy",
    }
)


def require_fit(sivism: SIVISM, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The model's arguments, those of the last step if none are given.

    Raises:
        ArgumentError: it is no SIVISM.
        NotSetUpError: it has not been fitted, or has no arguments.
    """
    if not isinstance(sivism, SIVISM):
        raise ArgumentError(f"got a {type(sivism).__name__}; expected the SIVISM whose run made the fit")
    if not sivism.guide.is_set_up or not sivism.guide.is_fitted:
        raise NotSetUpError("this SIVISM has not been fitted yet. Call sivism.run(None, *args) first.")
    if args or kwargs:
        sivism.setup(*args, **kwargs)  # a fit read from a file puts the model's learned parameters back
        return args, kwargs
    return sivism.target.arguments


class FittedNUTS(NUTS):
    """What :func:`nuts_from` returns: NUTS on a fit's target, from the fit's draws, in the fit's covariance.

    ``mcmc.run(*args)`` with arguments of the model takes those; the latents must be the same.

    Args:
        model, guide: the model, and the guide that was fitted to it.
        draws: of the unconstrained vector, (S, D): the chains' starts, and what the mass matrix is estimated from.
        args, kwargs: the model's arguments.
        nuts_options: as for ``pyro.infer.NUTS``.
    """

    # Pyro's NUTS works on each site's tensor by itself. In the middle of a run this one gives it all of them as one: of
    # the 2.4 ms that a leapfrog step took in a hierarchy of 85 groups with five sites, .4 went into that.

    # Set by Pyro's base classes.
    potential_fn: Callable | None
    _initial_params: dict[str, Tensor] | None

    def __init__(
        self,
        model: Callable,
        guide: SemiImplicitGuide,
        draws: Tensor,
        args: Sequence,
        kwargs: Mapping[str, Any],
        *,
        paths: Sequence[str] = PATHS,
        **nuts_options: Any,
    ) -> None:
        transforms = {site.name: site.transform.inv for site in guide.layout.sites}
        super().__init__(model, transforms=transforms, **nuts_options)
        self._guide, self._draws = guide, draws
        self._target = Target(model, guide.layout, self._trace(args, kwargs), args, kwargs, paths=paths)
        self._check_full_data()
        self._evaluations_before = self._target.num_evaluations
        self.mass_matrix_adapter = _FittedMassMatrix(guide.layout, draws)

    @property
    def num_evaluations(self) -> int:
        """Log densities with their gradients that the current or last chain has taken."""
        return self._target.num_evaluations - self._evaluations_before

    def diagnostics(self) -> dict[str, Any]:
        return {**super().diagnostics(), "evaluations": self.num_evaluations}

    def _trace(self, args: Sequence, kwargs: Mapping[str, Any]) -> Any:
        trace = self._guide.trace_model(*args, **kwargs)
        self._guide.layout.check_same(LatentLayout.from_trace(trace))
        return trace

    def _check_full_data(self) -> None:
        if self._target.is_subsampled:
            plates = ", ".join(f"'{name}'" for name in self._target.subsamples)
            raise ModelError(
                f"the model draws random minibatches (plate {plates}), so that its density changes from step to step "
                "and NUTS would not sample the posterior. Give the plate all of its data (no subsample_size)."
            )

    def _initialize_model_properties(self, model_args: Sequence, model_kwargs: Mapping[str, Any]) -> None:
        """What Pyro's set-up of each chain asks for: the potential, and where the chain starts."""
        if (model_args or model_kwargs) and not self._target.rebind(model_args, model_kwargs):
            self._target.bind(self._trace(model_args, model_kwargs), model_args, model_kwargs)
            self._check_full_data()
        self.potential_fn = self._potential
        self._evaluations_before = self._target.num_evaluations
        if self._initial_params is None:
            candidates = self._draws[torch.randint(len(self._draws), (_NUM_STARTS,))]
            (start,) = check_finite_start(self._target, candidates)[:1]
            self._initial_params = {site.name: value.clone() for site, value in self._guide.layout.split(start)}

    def _potential(self, params: Mapping[str, Tensor]) -> Tensor:
        """``-log p(x)`` of unconstrained sites, a scalar."""
        return _NegativeLogDensity.apply(self._joined(params)[_JOINED], self._target)

    def _joined(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sites' values, or gradients, as the one tensor (D,)."""
        if _JOINED in params:
            return dict(params)
        return {_JOINED: torch.cat([params[site.name].reshape(-1) for site in self._guide.layout.sites])}

    def _cache(self, z: Mapping[str, Tensor], potential_energy: Tensor, z_grads: Any = None) -> None:
        super()._cache(self._joined(z), potential_energy, None if z_grads is None else self._joined(z_grads))

    def _find_reasonable_step_size(self, z: Mapping[str, Tensor]) -> float:
        return super()._find_reasonable_step_size(self._joined(z))

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next draw of the unconstrained sites."""
        x = super().sample(self._joined(params))[_JOINED]
        return {site.name: value for site, value in self._guide.layout.split(x)}

    def cleanup(self) -> None:
        super().cleanup()
        self.potential_fn = None  # MCMC takes a kernel that has one for a kernel without a model


class _NegativeLogDensity(torch.autograd.Function):
    """``-log p(x)`` with its gradient from one evaluation of the target."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Target) -> Tensor:
        log_density, score = target.log_density_and_score(x.detach()[None])
        ctx.save_for_backward(score[0])
        return -log_density[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (score,) = ctx.saved_tensors
        return -grad * score, None


class _FittedMassMatrix(BlockMassMatrix):
    """A mass matrix in Pyro's blocks, from draws of the unconstrained vector, for momenta of that vector.

    Pyro calls :meth:`configure` when a chain is set up, before it looks for a step size. A block stands for a tuple
    of sites, whose flattened values it lists in that order.
    """

    def __init__(self, layout: LatentLayout, draws: Tensor) -> None:
        super().__init__()
        self._layout, self._draws = layout, draws
        self._columns: dict[Any, Tensor] = {}  # of the unconstrained vector, by block
        self._places = torch.empty(0)  # of its coordinates in all the blocks, one after the other

    def configure(self, mass_matrix_shape: Any, adapt_mass_matrix: bool = True, options: Any = None) -> None:
        super().configure(mass_matrix_shape, adapt_mass_matrix, options or {})
        self._columns = {names: self._columns_of(names) for names in mass_matrix_shape}
        self._places = torch.cat(list(self._columns.values())).argsort()
        self.inverse_mass_matrix = {
            names: self._covariance(self._columns[names], is_dense=len(shape) == 2).to(self._draws.dtype)
            for names, shape in mass_matrix_shape.items()
        }

    def update(self, z: Mapping[str, Tensor], z_grad: Any) -> None:
        super().update({site.name: value for site, value in self._layout.split(z[_JOINED])}, z_grad)

    def kinetic_grad(self, r: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._from_blocks(self._times(self._inverse_mass_matrix, self._to_blocks(r)))

    def scale(self, r_unscaled: Mapping[Any, Tensor], r_prototype: Any) -> dict[str, Tensor]:
        return self._from_blocks(self._times(self._mass_matrix_sqrt, r_unscaled))

    def unscale(self, r: Mapping[str, Tensor]) -> dict[Any, Tensor]:
        return self._times(self._mass_matrix_sqrt_inverse, self._to_blocks(r))

    def _to_blocks(self, r: Mapping[str, Tensor]) -> dict[Any, Tensor]:
        return {names: r[_JOINED].index_select(0, columns) for names, columns in self._columns.items()}

    def _from_blocks(self, blocks: Mapping[Any, Tensor]) -> dict[str, Tensor]:
        return {_JOINED: torch.cat([blocks[names] for names in self._columns]).index_select(0, self._places)}

    @staticmethod
    def _times(matrices: Mapping[Any, Tensor], vectors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """The products by block, whose matrix may be diagonal."""
        return {
            names: matrix * vectors[names] if matrix.dim() == 1 else matrix @ vectors[names]
            for names, matrix in matrices.items()
        }

    def _columns_of(self, names: Sequence[str]) -> Tensor:
        sites = [self._layout[name] for name in names]
        columns = torch.cat([torch.arange(site.offset, site.offset + site.size) for site in sites])
        return columns.to(self._draws.device)

    def _covariance(self, columns: Tensor, is_dense: bool) -> Tensor:
        """The covariance of some coordinates, or their variances; safe to factor in the draws' own dtype."""
        values = self._draws[:, columns].double()
        if not is_dense:
            return values.var(0)
        covariance = values.mT.cov()
        covariance = covariance.reshape(len(columns), len(columns))  # that of one coordinate comes as a number
        rounding = len(columns) * torch.finfo(self._draws.dtype).eps
        return covariance + rounding * covariance.diagonal().diag()
