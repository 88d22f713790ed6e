"""The verdict on a fit: fresh draws of q, the model's scores there, and the instruments of ``diagnostics``.

:func:`assess` is what a run ends with. :func:`gather_evidence` is the part of it from which a run decides whether to
go on, and :func:`distance_to_chains` what it then goes on with.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyro_sivism.diagnostics import (
    Chains,
    DriftStatistics,
    FisherStatistics,
    Verdict,
    drift_statistics,
    find_modes,
    fisher_statistics,
    is_alarming,
    judge,
    stein_statistics,
    tail_indices,
)
from pyro_sivism.diagnostics.moments import LARGE_ERROR, MomentErrors
from pyro_sivism.errors import ArgumentError, NonFiniteError, SivismError
from pyro_sivism.family import AffineMap, GaussianFit, SemiImplicit
from pyro_sivism.layout import LatentLayout
from pyro_sivism.objectives import Objective, SlicedDistance
from pyro_sivism.reparametrization import decentered_target
from pyro_sivism.stopping import Evidence, StoppingRule
from pyro_sivism.target import Target
from pyro_sivism.target.anchored import AnchoredTarget

__all__ = ["assess", "can_follow_chains", "chains_from", "distance_to_chains", "gather_evidence"]

_MIN_DRAWS, _MAX_DRAWS, _DRAWS_PER_DIM = 2048, 8192, 64
_NUM_UNSCORED_DRAWS = 6144  # which cost nothing: what chains are compared with is then known better than they are
_NUM_CHAINS = 512
_NUM_LARGE_CHAINS = 96  # beyond D = 256, where each of their steps costs more: more than the fit otherwise
_NUM_DECIDING_TRAJECTORIES = 32  # of chains that decide where scores disagree
_NUM_DECENTERED_CHAINS = 1024  # of which the sd of a scale is known to .04 (log2)
_NUM_DECENTERED_TRAJECTORIES = 8  # a neck is entered in as many, or not at all
_EVIDENCE = {"max_trajectories": 4}
_PROOF = {"min_trajectories": _NUM_DECIDING_TRAJECTORIES // 2, "large_error": 0.05}  # the verdict runs them on
_RULED_OUT = (0.14, 0.04)  # an error of a moment, in sds or log2, and a distance: what the verdict asks for is less
_NUM_MINIBATCHES = 16
_MAX_PROVEN_DIM = 256  # beyond, chains are too few to rule much out
_NUM_TRAJECTORIES_TO_FOLLOW = 16
_MAX_MODE_SEARCH_DIM = 256  # beyond, climbs from everywhere cost more than the fit


@torch.no_grad()
def assess(
    target: Target | AnchoredTarget,
    affine: AffineMap,
    family: SemiImplicit,
    objective: Objective,
    gaussian: GaussianFit | None,
    chains: Chains | None = None,
) -> Verdict:
    """Judge q from 2,048 draws with scores, in 33 to 256 dimensions up to 8,192, and from 512 chains, beyond 256
    dimensions 96; where latents are fitted centered from 1,024 chains in decentered coordinates, too.

    Where the model draws random minibatches the chains and the searches for modes and tails, which need exact
    densities, are left out, and the other instruments allow for the minibatches' noise.

    Args:
        target: the model's density, on the arguments it was fitted to.
        affine: x from the whitened y, in which ``family`` draws.
        family: q.
        objective: holds the critic.
        gaussian: the fit that q started from, whose paths may have ended in other modes; None if there is none.
        chains: from q's draws, which are run on; new ones if None.

    Raises:
        ArgumentError: a coordinate of the draws does not vary.
        NonFiniteError: most scores are not finite.
    """
    sample = family.rsample(_num_draws(target.dim))
    x = affine.forward(sample.x)
    num_blocks = _NUM_MINIBATCHES if target.is_subsampled else 1
    score = _scores(target, x, num_blocks)
    draws = _with_more(x, affine, family)
    exact = not target.is_subsampled
    seeks_modes = exact and target.dim <= _MAX_MODE_SEARCH_DIM
    ends = gaussian.path_ends if gaussian is not None and len(gaussian.path_ends) else None
    fisher = _fisher(target, affine, objective.critic, objective, sample.x, x, score, sample.conditional_score)
    return judge(
        stein_statistics(x, score, num_blocks=num_blocks),
        fisher=fisher,
        drift=_drift(chains_from(target, draws) if chains is None else chains, is_alarming(fisher)) if exact else None,
        decentered=_decentered_errors(target, x[:_NUM_DECENTERED_CHAINS]),
        modes=find_modes(target, draws, extra_starts=ends) if seeks_modes else None,
        tails=tail_indices(target, draws) if seeks_modes else None,
        labels=target.layout.coordinate_names,
    )


def _drift(chains: Chains, is_alarming: bool) -> DriftStatistics:
    """What new trajectories of the chains say, long ones all told where the Fisher divergence is alarming.

    A run that ends when chains find nothing has been chosen for what these, by chance, miss: where they went before
    does not count again. Where they started still does, of which there is less chance: 8,192 draws to 512 chains.
    """
    min_trajectories = max(0, _NUM_DECIDING_TRAJECTORIES - chains.num_trajectories) if is_alarming else 0
    return drift_statistics(chains.forget(), min_trajectories=min_trajectories)


def _decentered_errors(target: Target | AnchoredTarget, x: Tensor) -> MomentErrors | None:
    """The errors that chains in decentered coordinates find in those coordinates of x that these have, too, such as a
    scale, and 0 in the others; None where no site is centered, or the chains cannot be run.

    In a funnel's neck chains need steps that are too short for them ever to come there. Decentered it is none. Each of
    the draws costs a run of the model, so that models that are scored one point after the other are left out.
    """
    if not isinstance(target, Target) or not can_follow_chains(target) or target.params() or target.path.name == "loop":
        return None
    try:
        found = decentered_target(target, x)
    except Exception:  # whatever a model may raise in coordinates that its author never saw: it is judged without
        return None
    if found is None:
        return None
    other, points = found
    try:
        errors = drift_statistics(Chains(other, points), max_trajectories=_NUM_DECENTERED_TRAJECTORIES).coordinates
    except SivismError:  # too few points where the density is finite, or no spread in them
        return None
    target.num_evaluations += other.num_evaluations  # they are part of what the fit costs
    return errors.at_places(*_shared_coordinates(target.layout, other.layout), target.dim)


def _shared_coordinates(layout: LatentLayout, other: LatentLayout) -> tuple[list[int], list[int]]:
    """Where the sites that both have are, in each."""
    sites = [(site, other[site.name]) for site in layout.sites if site.name in other.names]
    own = [site.offset + i for site, _ in sites for i in range(site.size)]
    return own, [twin.offset + i for site, twin in sites for i in range(site.size)]


def _fisher(
    target: Target | AnchoredTarget,
    affine: AffineMap,
    critic: nn.Module,
    objective: Objective,
    y: Tensor,
    x: Tensor,
    score: Tensor,
    conditional_score: Tensor,
) -> FisherStatistics:
    """The Fisher divergence by the trained critic, in the whitened space."""
    num_blocks = _NUM_MINIBATCHES if target.is_subsampled else 1
    whitened = affine.pull_back(score)
    critic_score = whitened - objective.critic_value(y, whitened)
    second = affine.pull_back(_scores(target, x, num_blocks)) if target.is_subsampled else None
    return fisher_statistics(y, whitened, critic_score, conditional_score, second_score=second, num_blocks=num_blocks)


def _num_draws(dim: int) -> int:
    """Enough for Stein's least squares: from 2,048 draws they found errors of .12 sds in good fits of 90 dimensions,
    from 8,192 of .02. Beyond D = 256 the least squares are small, and scores dear.
    """
    return max(_MIN_DRAWS, min(_MAX_DRAWS, _DRAWS_PER_DIM * dim)) if dim <= 256 else _MIN_DRAWS


def _with_more(x: Tensor, affine: AffineMap, family: SemiImplicit) -> Tensor:
    """The draws ``x`` of q, which have been scored, and more that have not."""
    return torch.cat([x, affine.forward(family.rsample(_NUM_UNSCORED_DRAWS).x)])


def chains_from(target: Target | AnchoredTarget, draws: Tensor) -> Chains:
    """Chains from the first of q's draws.

    Raises:
        ArgumentError: a coordinate of the draws does not vary.
        NonFiniteError: the target is not finite at most draws.
    """
    return Chains(target, draws, _NUM_CHAINS if target.dim <= 256 else _NUM_LARGE_CHAINS)


def _scores(target: Target | AnchoredTarget, x: Tensor, num_blocks: int) -> Tensor:
    """The model's scores, of one minibatch for each of so many consecutive blocks of draws."""
    scores = []
    for block in x.chunk(num_blocks):
        target.resample_minibatch()
        scores.append(target.score(block))
    return torch.cat(scores)


@torch.no_grad()
def gather_evidence(
    target: Target | AnchoredTarget,
    affine: AffineMap,
    family: SemiImplicit,
    objective: Objective,
    num_steps: int,
    rule: StoppingRule,
) -> tuple[Evidence, Chains | None]:
    """How far q is from the posterior after ``num_steps`` steps; infinitely far where the target is not finite at most
    draws. The other arguments are those of :func:`assess`, of whose instruments it uses those that look at moments.
    And the chains that have run, if any.

    Chains, which are dear, run only where they decide whether the run ends, and are short where scores agree.
    """
    sample = family.rsample(_num_draws(target.dim))
    x = affine.forward(sample.x)
    num_blocks = _NUM_MINIBATCHES if target.is_subsampled else 1
    try:
        score = _scores(target, x, num_blocks)
        errors = stein_statistics(x, score, num_blocks=num_blocks).coordinates
        fisher = _fisher(target, affine, objective.critic, objective, sample.x, x, score, sample.conditional_score)
        evidence = Evidence(num_steps, errors.largest(), fisher.bulk)
        wants_proof = rule.wants_proof(evidence) and target.dim <= _MAX_PROVEN_DIM
        if target.is_subsampled or evidence.moment_error >= LARGE_ERROR or not (wants_proof or rule.may_end(evidence)):
            return evidence, None
        chains = chains_from(target, _with_more(x, affine, family))
        drift = drift_statistics(chains, **(_PROOF if wants_proof else _EVIDENCE))
    except (ArgumentError, NonFiniteError):  # too few draws left, or no spread in them
        return Evidence(num_steps, moment_error=math.inf, divergence=math.inf), None
    moment_error = max(drift.limit(errors).largest(), drift.largest())
    is_ruled_out = wants_proof and drift.rules_out(*_RULED_OUT)
    return replace(evidence, moment_error=moment_error, by_chains=True, is_ruled_out=is_ruled_out), chains


def can_follow_chains(target: Target | AnchoredTarget) -> bool:
    """Not in the noise of minibatches, nor in more than 256 dimensions, of which so few chains say too little."""
    return not target.is_subsampled and target.dim <= _MAX_PROVEN_DIM


@torch.no_grad()
def distance_to_chains(
    target: Target | AnchoredTarget,
    affine: AffineMap,
    family: SemiImplicit,
    num_draws: int,
    chains: Chains | None = None,
) -> SlicedDistance | None:
    """How far ``num_draws`` draws of q are from where chains go from such draws, in the whitened space.

    Every trajectory brings the law of the chains nearer to the posterior, so that this is a way for q to go (Li,
    Turner, Liu, "Approximate inference with amortised MCMC", arXiv 1702.08343). None where no chains can be run, as the
    target is not finite at most draws.

    Args:
        target: the model's density, of which :func:`can_follow_chains` is true.
        affine: x from the whitened y, in which ``family`` draws.
        family: q.
        num_draws: in a batch of the guide's.
        chains: from q's draws, which are run on if they are short; new ones if None.
    """
    try:
        if chains is None:
            chains = chains_from(target, affine.forward(family.rsample(_NUM_UNSCORED_DRAWS).x))
    except (ArgumentError, NonFiniteError):  # no spread in the draws, or too few left
        return None
    late = chains.run(_NUM_TRAJECTORIES_TO_FOLLOW).late.flatten(0, 1)
    points = affine.inverse(chains.frame.affine.forward(late).to(affine.loc))
    # A step along v in y moves x_i by (A v)_i: most along row i of A.
    rows = affine.linear(torch.eye(target.dim).to(affine.loc)).mT
    return SlicedDistance(points, rows / rows.norm(dim=-1, keepdim=True), num_draws)
