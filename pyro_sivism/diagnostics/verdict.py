"""One verdict from all the instruments: good, suspect or bad, and a sentence that says what is wrong and where.

Every instrument's findings are put beside the thresholds of one table, :class:`Thresholds`; the worst one gives the
level and the sentence. Errors of means and sds count with what is left of them after two standard errors, far ends with
what is left after one, so that Monte Carlo noise does not raise an alarm. ``benchmarks/verdict.py`` measures what the
levels are worth against true errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sivism.diagnostics.drift import DriftStatistics
from pyro_sivism.diagnostics.fisher import FisherStatistics
from pyro_sivism.diagnostics.modes import Mode, ModeSearch
from pyro_sivism.diagnostics.moments import CUT_OFF, NUM_STANDARD_ERRORS, MomentErrors
from pyro_sivism.diagnostics.stein import SteinStatistics, WorstDirection
from pyro_sivism.diagnostics.tails import TailIndices

__all__ = ["Finding", "Thresholds", "Verdict", "is_alarming", "judge"]

LEVELS = ("good", "suspect", "bad")


@dataclass(frozen=True)
class Thresholds:
    """From where on a finding makes a fit (suspect, bad).

    Attributes:
        moment: the error of a mean in posterior sds, or of an sd in log2, beyond two standard errors; that of a far end
            beyond one, and never bad.
        fisher: the Fisher divergence beyond two standard errors, in the frame of q; times D / 32 beyond D = 32, where
            as much is spread over more directions and the errors of the moments say which is wrong. That of all draws
            makes a fit suspect, as the ends of a curved ridge show nowhere else, but only that of their bulk makes it
            bad: a few draws beyond a wall of p have huge scores.
        ruled_out: an error of a moment, and a distance of distribution functions. Where chains rule them out, only a
            Fisher divergence that would be bad counts: walls of p give large ones where q is right to all purposes.
        mode: the share of the mass in a lost mode.
        weight: how far the weights of separate modes are off, their total variation distance.
        tail: one over the tail index of a tail that the draws lack, which is the degrees of freedom of a Student-t
            tail; at 2 its variance is infinite.
        nonfinite: the fraction of draws at which the target is not finite.
        stuck: the fraction of chains that never move, as q has draws where p falls off a wall or into a neck.
        correlation: of where the chains end with where they start; beyond it nothing can be vouched for, which is
            suspect but never bad.
    """

    moment: tuple[float, float] = (0.17, 0.5)
    fisher: tuple[float, float] = (1.0, 10.0)
    ruled_out: tuple[float, float] = (0.2, 0.05)
    mode: tuple[float, float] = (0.01, 0.1)
    weight: tuple[float, float] = (0.08, 0.25)
    tail: tuple[float, float] = (0.2, 0.5)
    nonfinite: tuple[float, float] = (0.002, 0.05)
    stuck: tuple[float, float] = (0.05, 0.5)
    correlation: float = 0.8


@dataclass(frozen=True)
class Finding:
    """One thing an instrument found.

    Attributes:
        instrument: "stein", "drift", "decentered", "fisher", "modes", "tails" or "draws".
        sites: where: the coordinate's or coordinates' names; empty where the finding is about all.
        size: in the units of the threshold.
        severity: 1 at the suspect threshold, 2 at the bad one, in proportion to the logarithm between and beyond.
        text: in words, the sites included.
    """

    instrument: str
    sites: tuple[str, ...]
    size: float
    severity: float
    text: str

    @property
    def level(self) -> str:
        return LEVELS[min(2, max(0, math.floor(self.severity)))]


@dataclass(frozen=True)
class Verdict:
    """Whether a fit can be trusted.

    Attributes:
        level: "good": no instrument found an error that matters; "suspect": use with care; "bad": do not use.
        sentence: what is worst and where, in words.
        findings: everything at or above "suspect", worst first.
        stein, fisher, drift, modes, tails: the statistics behind it, None where an instrument was not used.
        decentered: the errors that chains found in decentered coordinates, None where none were run.
    """

    level: str
    sentence: str
    findings: tuple[Finding, ...]
    stein: SteinStatistics
    fisher: FisherStatistics | None = None
    drift: DriftStatistics | None = None
    modes: ModeSearch | None = None
    tails: TailIndices | None = None
    decentered: MomentErrors | None = None

    def __str__(self) -> str:
        return f"{self.level}: {self.sentence}"

    @property
    def worst(self) -> Finding | None:
        return self.findings[0] if self.findings else None

    def as_dict(self) -> dict[str, float | str]:
        """The verdict as plain values, for the attributes of a file."""
        values: dict[str, float | str] = {"verdict": self.level, "verdict_sentence": self.sentence}
        drift = None if self.drift is None else self.drift.coordinates
        for name, errors in (("stein", self.stein.coordinates), ("drift", drift), ("decentered", self.decentered)):
            if errors is not None:
                values[f"{name}_mean_max"] = errors.mean.abs().max().item()
                values[f"{name}_log2_sd_max"] = errors.log2_sd.abs().max().item()
        if self.drift is not None:
            values["drift_far_max"] = self.drift.far.max().item()
        if self.fisher is not None:
            values["fisher_divergence"], values["fisher_divergence_se"] = self.fisher.total, self.fisher.total_se
            values["fisher_divergence_bulk"] = self.fisher.bulk
        if self.modes is not None:
            values["num_modes"], values["num_lost_modes"] = len(self.modes.modes), len(self.modes.lost)
        if self.tails is not None:
            values["tail_index_min"] = self.tails.index.min().item()
        return values


def judge(
    stein: SteinStatistics,
    *,
    fisher: FisherStatistics | None = None,
    drift: DriftStatistics | None = None,
    decentered: MomentErrors | None = None,
    modes: ModeSearch | None = None,
    tails: TailIndices | None = None,
    labels: Sequence[str] | Callable[[int], str] | None = None,
    thresholds: Thresholds | None = None,
) -> Verdict:
    """Combine the instruments that were used into one verdict.

    Stein's statistics and the Fisher divergence cost one score a draw and serve while a fit is going on; the others
    cost more, and belong at its end.

    Args:
        stein, fisher, drift, modes, tails: what the instruments returned.
        decentered: the errors of x's coordinates that chains found in other coordinates, in which a funnel is none.
        labels: names of the coordinates of x, or a function from a coordinate's index to its name.
        thresholds: the table of thresholds; the calibrated one if None.

    Example:

        >>> from pyro_sivism.diagnostics import stein_statistics
        >>> _ = torch.manual_seed(0)
        >>> x = 0.7 * torch.randn(4096, 1)  # q = N(0, .49) against p = N(0, 1)
        >>> print(judge(stein_statistics(x, -x), labels=["tau"]))
        bad: tau: sd probably 30% too small
    """
    table = Thresholds() if thresholds is None else thresholds
    name = _namer(labels)
    stein_errors = stein.coordinates if drift is None else drift.limit(stein.coordinates)
    found = _moment_findings("stein", stein_errors, stein.direction, name, table.moment)
    if drift is not None:
        seen = _moment_findings("drift", drift.coordinates, drift.direction, name, table.moment)
        # Where chains went is so; where q is narrow and far off, what Stein's identity extrapolates may be of the wrong
        # sign. It counts for what chains do not find at least as bad.
        found = [each for each in found if not any(_covers(other, each) for other in seen)] + seen
        text = (
            f"{drift.stuck:.0%} of q's draws are where chains cannot move: at a wall of the density, or in a neck of it"
        )
        found.append(_finding("drift", (), drift.stuck, table.stuck, text))
        found.append(_far_finding(drift, name, table.moment))
        found += _unjudged(drift, modes, name, table.correlation)
    if decentered is not None:
        found += _moment_findings("decentered", decentered, None, name, table.moment)
    num_draws = stein.num_draws + stein.num_nonfinite
    found.append(
        _finding(
            "draws",
            (),
            stein.num_nonfinite / num_draws,
            table.nonfinite,
            f"the model's density is not finite at {stein.num_nonfinite} of {num_draws} draws",
        )
    )
    if fisher is not None:
        finding = _fisher_finding(fisher, name, table.fisher)
        if finding.level == "bad" or drift is None or not drift.rules_out(*table.ruled_out):
            found.append(finding)
    if modes is not None:
        found += _mode_findings(modes, name, table)
    if tails is not None:
        found.append(_tail_finding(tails, name, table.tail))
    # Of findings of one level those come first that say what is wrong with which moment, tail or mode.
    found.sort(key=lambda finding: (-LEVELS.index(finding.level), finding.instrument == "fisher", -finding.severity))
    alarms = tuple(finding for finding in found if finding.level != "good")
    level = alarms[0].level if alarms else "good"
    sentence = alarms[0].text if alarms else _all_clear(stein_errors, modes)
    return Verdict(level, sentence, alarms, stein, fisher, drift, modes, tails, decentered)


def is_alarming(fisher: FisherStatistics) -> bool:
    """Whether a Fisher divergence makes a fit suspect, unless chains say better."""
    return _fisher_finding(fisher, str, Thresholds().fisher).level != "good"


# --- findings -----------------------------------------------------------------------------------------

_COORDINATE_BONUS = (
    1.25  # a coordinate's name reads better than a direction's: it is named unless much less is wrong there
)
_NUM_NAMED = 3
_MIN_LOADING = 0.3
_MIN_TAIL_INDEX = 0.5  # below it even the mean is infinite, and how far below says nothing more


def _namer(labels: Sequence[str] | Callable[[int], str] | None) -> Callable[[int], str]:
    if labels is None:
        return "x[{}]".format
    return labels if callable(labels) else labels.__getitem__


def _finding(
    instrument: str, sites: tuple[str, ...], size: float, thresholds: tuple[float, float], text: str
) -> Finding:
    suspect, bad = thresholds
    severity = 1.0 + math.log(max(size, 1e-9) / suspect) / math.log(bad / suspect)
    return Finding(instrument, sites, size, severity, text)


def _covers(finding: Finding, other: Finding) -> bool:
    """Whether a finding says at least as bad a thing of the same sites."""
    return finding.sites == other.sites and LEVELS.index(finding.level) >= LEVELS.index(other.level)


def _moment_findings(
    instrument: str,
    coordinates: MomentErrors,
    direction: WorstDirection | None,
    name: Callable[[int], str],
    thresholds: tuple[float, float],
) -> list[Finding]:
    """The worst coordinate, and the worst direction unless a coordinate says as much."""
    size, i = _sizes(coordinates).max(0)
    sites: tuple[str, ...] = (name(int(i)),)
    found = [_finding(instrument, sites, size.item(), thresholds, f"{sites[0]}: {_moment_text(coordinates, int(i))}")]
    if direction is not None:
        along = _sizes(direction.errors).item()
        if along > _COORDINATE_BONUS * size.item():
            sites, combination = _named(direction.loadings, name)
            text = f"along {combination}: {_moment_text(direction.errors, 0)}"
            found.append(_finding(instrument, sites, along, thresholds, text))
    return found


def _far_finding(drift: DriftStatistics, name: Callable[[int], str], thresholds: tuple[float, float]) -> Finding:
    """The far end that q lacks; suspect, not bad, for what a few chains that have come there know."""
    size, i = drift.far.max(0)
    site = name(int(i))
    text = (
        f"{site}: chains are over {CUT_OFF:.0f} sds from the draws' mean {_percent(drift.far_share[i].item())} of the "
        f"time, q's draws {_percent(drift.far_share_of_draws[i].item())}"
    )
    return _finding("drift", (site,), min(size.item(), 0.99 * thresholds[1]), thresholds, text)


def _unjudged(
    drift: DriftStatistics, modes: ModeSearch | None, name: Callable[[int], str], threshold: float
) -> list[Finding]:
    """The coordinate in which the chains hardly moved; none where that is from one mode to another, whose weights are
    judged by their masses.
    """
    correlation, i = drift.correlation.max(0)
    weighs_modes = modes is not None and len(modes.modes) > 1 and not math.isnan(modes.weight_error)
    if correlation <= threshold or weighs_modes:
        return []
    site = name(int(i))
    text = (
        f"{site}: cannot be vouched for, as chains hardly moved from q's draws (they still correlate by "
        f"{correlation:.2f})"
    )
    return [Finding("drift", (site,), correlation.item(), 1.0, text)]


def _sizes(errors: MomentErrors) -> Tensor:
    """The larger error of mean and sd. Beyond a factor of 3 an sd is wrong, and a mean many sds off is what to name."""
    return torch.maximum(errors.sure_mean.abs(), errors.sure_log2_sd.abs().clamp(max=math.log2(3.0)))


def _moment_text(errors: MomentErrors, i: int) -> str:
    """Which of the two errors is larger, in words."""
    mean, log2_sd = errors.mean[i].item(), errors.log2_sd[i].item()
    if abs(errors.sure_mean[i]) > abs(errors.sure_log2_sd[i]):
        side = "high" if mean > 0 else "low"
        return f"mean more than 3 sds too {side}" if abs(mean) > 3 else f"mean probably {abs(mean):.1f} sds too {side}"
    ratio = 2.0**log2_sd
    if ratio < 1.0 / 3.0:
        return "sd less than a third of what it should be"
    if ratio > 3.0:
        return "sd more than three times what it should be"
    return f"sd probably {abs(ratio - 1.0):.0%} too {'large' if ratio > 1 else 'small'}"


def _named(loadings: Tensor, name: Callable[[int], str]) -> tuple[tuple[str, ...], str]:
    """The coordinates that a direction moves most, and the combination in words: ``mu - 0.7 tau``."""
    loadings = loadings / loadings.abs().max()
    order = loadings.abs().argsort(descending=True)[:_NUM_NAMED].tolist()
    order = [i for i in order if abs(loadings[i]) >= _MIN_LOADING]
    loadings = loadings * loadings[order[0]].sign()
    text = name(order[0])
    for i in order[1:]:
        weight = loadings[i].item()
        size = "" if abs(weight) > 0.95 else f"{abs(weight):.1f} "
        text += f" {'+' if weight > 0 else '-'} {size}{name(i)}"
    return tuple(name(i) for i in order), text


def _fisher_finding(fisher: FisherStatistics, name: Callable[[int], str], thresholds: tuple[float, float]) -> Finding:
    factor = max(1.0, len(fisher.coordinates) / 32.0)
    suspect, bad = factor * thresholds[0], factor * thresholds[1]
    bulk = fisher.bulk - NUM_STANDARD_ERRORS * fisher.bulk_se
    # Not less the noise: where a few draws make up the mean, that is as large as the mean, which is no less true.
    noise = NUM_STANDARD_ERRORS * fisher.total_se
    total = fisher.total**2 / (fisher.total + noise) if fisher.total > 0 else 0.0
    site = name(int(fisher.coordinates.argmax()))
    text = (
        f"the scores of q and of the model differ by {fisher.total:.2g} (mean square, where q has sd 1), most in {site}"
    )
    return _finding("fisher", (site,), max(bulk, min(total, 0.99 * bad)), (suspect, bad), text)


def _tail_finding(tails: TailIndices, name: Callable[[int], str], thresholds: tuple[float, float]) -> Finding:
    index, i = tails.lacking.min(0)
    site = name(int(i))
    if index > 0.0:
        text = f"{site}: tails as heavy as Student's t with {index:.1f} degrees of freedom, whose ends have no draws"
    else:  # no tail of a density that can be normalised: q stands aside of the mass, or there is no end to it
        text = f"{site}: 4 to 16 sds from the draws' mean the density rises, or hardly falls"
    return _finding("tails", (site,), 1.0 / max(index.item(), _MIN_TAIL_INDEX), thresholds, text)


def _mode_findings(modes: ModeSearch, name: Callable[[int], str], table: Thresholds) -> list[Finding]:
    found = []
    for mode in modes.lost:
        sites, where = _where(mode, name)
        text = f"another mode with about {_percent(mode.share)} of the posterior's mass has no draws: {where}"
        # A small mode far away can ruin an sd: suspect, not bad, for what is known of so small a mass.
        small = _finding("modes", sites, min(mode.effect, 0.99 * table.moment[1]), table.moment, text)
        found.append(max(_finding("modes", sites, mode.share, table.mode, text), small, key=lambda each: each.severity))
    if len(modes.modes) > 1 and modes.weight_error > 0:
        mode = max(modes.modes, key=lambda mode: abs(mode.share - mode.draw_share))
        sites, where = _where(mode, name)
        text = f"{mode.draw_share:.0%} of the draws are in a mode with about {mode.share:.0%} of the mass: {where}"
        found.append(_finding("modes", sites, modes.weight_error, table.weight, text))
    return found


def _percent(share: float) -> str:
    return f"{share:.0%}" if share > 0.01 else f"{100.0 * share:.2g}%"


def _where(mode: Mode, name: Callable[[int], str]) -> tuple[tuple[str, ...], str]:
    """The coordinates in which a mode is furthest from q's mean, and how far, in words."""
    order = mode.displacement.abs().argsort(descending=True)[:_NUM_NAMED].tolist()
    order = [i for i in order if abs(mode.displacement[i]) >= _MIN_LOADING * abs(mode.displacement[order[0]])]
    steps = ", ".join(f"{name(i)} by {mode.displacement[i]:+.1f} sds" for i in order)
    return tuple(name(i) for i in order), f"{steps} from the draws' mean"


def _all_clear(errors: MomentErrors, modes: ModeSearch | None) -> str:
    """What the evidence for a good fit comes to."""
    mean, log2_sd = errors.mean.abs().max().item(), errors.log2_sd.abs().max().item()
    if modes is None:
        searched = ""
    elif modes.modes:
        searched = f"; {modes.num_starts} climbs found no lost mode"
    else:
        searched = "; other modes could not be looked for"
    return f"means right to about {max(mean, 0.01):.2f} sds, sds to about {max(2.0**log2_sd - 1, 0.01):.0%}{searched}"
