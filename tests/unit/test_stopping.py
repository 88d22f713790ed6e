"""When a run without a length ends, and which q it keeps."""

from __future__ import annotations

import math

import pytest

from pyro_sivism.stopping import Evidence, StoppingRule

FAR, NEAR, RIGHT = (0.4, 3.0), (0.08, 0.6), (0.02, 0.05)


def cycles(*found: tuple[float, float], dim: int = 10, max_steps: int = 1200, **options: bool) -> list[int]:
    """The lengths of the cycles after each (moment error, divergence)."""
    rule = StoppingRule(dim, max_steps, **options)
    return [rule.next_cycle(Evidence(0, moment_error, divergence)) for moment_error, divergence in found]


def test_cycles_double_until_the_most_steps():
    improving = [(0.4 / 2**k, 3.0 / 2**k) for k in range(5)]
    assert cycles(*improving[:5]) == [150, 150, 300, 600, 0]
    assert cycles(*improving[:4], max_steps=500) == [150, 150, 200, 0]


def test_a_run_ends_when_it_has_settled():
    assert cycles(FAR, RIGHT) == [150, 0]
    assert cycles(FAR, (0.02, 1.0)) == [150, 150]  # shapes may be wrong where moments are right
    assert cycles(FAR, (0.3, 0.05)) == [150, 150]


def test_a_run_ends_when_it_has_stalled():
    assert cycles(FAR, NEAR, NEAR) == [150, 150, 0]
    assert cycles(FAR, NEAR, (0.05, 0.6)) == [150, 150, 300]
    assert cycles(FAR, NEAR, (0.08, 0.46)) == [150, 150, 0]
    assert cycles(FAR, NEAR, (0.08, 0.44)) == [150, 150, 300]
    assert cycles(FAR, (0.02, 4.0)) == [150, 150]  # the first cycle may leave more than there was
    assert cycles((0.02, 0.5), (0.02, 0.6), (0.02, 0.6)) == [150, 150, 0]


def test_a_moment_that_may_matter_has_to_stall_twice():
    assert cycles(FAR, (0.1, 0.6), (0.1, 0.6), (0.1, 0.6)) == [150, 150, 300, 0]
    assert cycles(FAR, (0.1, 0.6), (0.1, 0.6), (0.1, 0.4)) == [150, 150, 300, 600]
    assert cycles(FAR, (0.1, 0.6), (0.1, 0.4), (0.1, 0.4), max_steps=4800) == [150, 150, 300, 600]
    assert cycles(FAR, (0.14, 0.6), (0.1, 0.6), (0.12, 0.6)) == [150, 150, 300, 0]  # nothing came of two together
    assert cycles(FAR, (0.1, 0.4), (0.14, 0.6), (0.1, 0.4)) == [150, 150, 300, 600]  # the last one brought something
    assert cycles(FAR, (0.1, 0.6), (0.08, 0.6)) == [150, 150, 0]


def test_a_run_does_not_end_where_its_verdict_would_be_bad():
    assert cycles(FAR, FAR, FAR, FAR, FAR) == [150, 150, 300, 600, 0]
    assert cycles(*[(0.02, 2.0)] * 5) == [150, 150, 300, 600, 0]


def test_a_divergence_is_tolerable_up_to_the_verdicts_threshold():
    def stalls(divergence: float, dim: int) -> bool:
        return cycles(FAR, (0.02, divergence), (0.02, divergence), dim=dim)[-1] == 0

    assert stalls(0.7, dim=10)
    assert not stalls(0.8, dim=10)
    assert stalls(3.0, dim=96)
    assert not stalls(3.1, dim=96)


def test_what_may_end_a_run_does_not_depend_on_moments_yet_to_be_measured():
    rule = StoppingRule(10, 1200)
    assert rule.may_end(Evidence(0, 0.3, 1e-3))
    assert not rule.may_end(Evidence(0, 0.0, 0.1))
    rule.next_cycle(Evidence(0, *FAR))
    assert rule.may_end(Evidence(150, 0.3, 0.1))
    assert not rule.may_end(Evidence(150, 0.0, 0.5))
    rule.next_cycle(Evidence(150, *NEAR))
    assert rule.may_end(Evidence(300, *NEAR)), "it has stalled"
    assert rule.next_cycle(Evidence(300, *NEAR)) == 0, "asking has changed nothing"


def test_chains_are_asked_where_the_divergence_alone_keeps_a_run_from_ending():
    rule = StoppingRule(10, 1200)
    assert not rule.wants_proof(Evidence(0, 0.02, 0.5)), "a Gaussian is polished in any case"
    rule.next_cycle(Evidence(0, *FAR))
    assert rule.wants_proof(Evidence(150, 0.05, 0.6))
    assert rule.wants_proof(Evidence(150, 0.0, 50.0))
    assert rule.wants_proof(Evidence(150, 0.17, 0.6)), "chains know moments better"
    assert not rule.wants_proof(Evidence(150, 0.18, 0.6)), "a moment is off"
    assert rule.wants_proof(Evidence(150, *RIGHT)), "it has settled only now"
    rule.next_cycle(Evidence(150, 0.02, 0.6))
    assert not rule.wants_proof(Evidence(300, 0.02, 0.6)), "it has stalled"
    assert rule.wants_proof(Evidence(300, 0.02, 0.8))
    assert rule.next_cycle(Evidence(300, 0.02, 0.8)) == 300, "asking has changed nothing"
    assert rule.next_cycle(Evidence(600, 0.02, 0.4)) == 600
    assert not rule.wants_proof(Evidence(1200, 0.02, 0.8)), "it ends in any case"
    rule = StoppingRule(10, 1200)
    rule.next_cycle(Evidence(0, 0.04, 0.15))
    assert not rule.wants_proof(Evidence(150, *RIGHT)), "it was settled before"


def test_chains_are_followed_where_q_is_not_settled():
    rule = StoppingRule(10, 1200)
    assert rule.is_settled(Evidence(0, 0.04, 0.19))
    assert not rule.is_settled(Evidence(0, 0.06, 0.19))
    assert not rule.is_settled(Evidence(0, 0.04, 0.21))


def test_a_run_ends_when_chains_rule_out_that_its_divergence_matters():
    def lengths(at: int, **options: bool) -> list[int]:
        rule = StoppingRule(10, 1200)
        found = [Evidence(0, 0.02, 5.0, by_chains=k == at, is_ruled_out=k == at) for k in range(at + 1)]
        return [rule.next_cycle(evidence, **options) for evidence in found]

    assert lengths(1) == [150, 0]
    assert lengths(2) == [150, 150, 0]
    assert lengths(0) == [150], "what the Gaussian is like is for its divergence to say"
    assert lengths(1, is_moving=True) == [150, 150]


def test_noise_of_errors_too_small_to_matter_is_no_gain():
    assert cycles(FAR, (0.04, 0.6), (0.0, 0.6)) == [150, 150, 0]
    assert cycles(FAR, (0.08, 0.2), (0.08, 0.01)) == [150, 150, 0]


def test_a_gaussian_that_is_the_posterior_takes_no_step_unless_it_is_to_go_on():
    assert cycles((0.01, 1e-4)) == [0]
    assert cycles((0.01, 1e-4), goes_on=True) == [150]
    assert cycles((0.01, 0.1)) == [150]  # near it, but not right
    assert cycles((0.2, 1e-4)) == [150]


def test_a_gaussian_matches_up_to_the_noise_of_1000_draws():
    assert cycles((0.01, 0.0049), dim=5) == [0]
    assert cycles((0.01, 0.0051), dim=5) == [150]
    assert cycles((0.01, 0.009), dim=1000) == [0]
    assert cycles((0.01, 0.011), dim=1000) == [150]


def test_a_gaussian_that_is_nearly_right_takes_cycles_like_any_other():
    assert cycles((0.05, 0.2), RIGHT) == [150, 0]
    assert cycles((0.05, 0.2), NEAR, NEAR) == [150, 150, 0]
    assert cycles((0.05, 0.2), FAR, FAR, FAR, FAR, FAR) == cycles(FAR, FAR, FAR, FAR, FAR, FAR)


def test_divergences_are_small_in_proportion_to_the_dimension():
    assert cycles(FAR, (0.02, 0.5), dim=10) == [150, 150]
    assert cycles(FAR, (0.02, 0.5), dim=96) == [150, 0]
    # 96 dimensions: 1.92 is small, and 3 tolerable
    assert cycles(FAR, (0.08, 2.5), (0.08, 2.5), dim=96) == [150, 150, 0]
    assert cycles(FAR, (0.1, 3.5), (0.1, 3.5), dim=96) == [150, 150, 300]


def test_a_posterior_that_moves_is_followed():
    rule = StoppingRule(10, 1200)
    assert rule.next_cycle(Evidence(0, *FAR)) == 150
    assert rule.next_cycle(Evidence(150, *RIGHT), is_moving=True) == 150
    assert rule.next_cycle(Evidence(300, *NEAR), is_moving=True) == 300
    assert rule.last_is_best, "what was best was best for another posterior"


@pytest.mark.parametrize(
    ("found", "is_best"),
    [
        ((0.04, 0.5), True),
        ((0.2, 0.5), True),  # within the noise of instruments
        ((0.1, 1.5), True),
        ((0.3, 0.5), False),
        ((0.1, 3.0), False),
        ((0.06, 30.0), True),  # scores are huge in necks that a worse q does not reach
        ((0.07, 30.0), False),
        ((math.inf, math.inf), False),
    ],
)
def test_the_last_q_is_kept_unless_one_before_was_clearly_better(found, is_best):
    rule = StoppingRule(10, 1200)
    rule.next_cycle(Evidence(0, *FAR))
    rule.next_cycle(Evidence(150, *NEAR))
    assert rule.last_is_best
    rule.next_cycle(Evidence(300, *found))
    assert rule.last_is_best == is_best


@pytest.mark.parametrize(
    ("best", "last"),
    [
        (Evidence(150, 0.04, 0.3), Evidence(300, 0.02, 300.0)),  # noise of errors too small to matter
        (Evidence(150, 0.2, 0.3, by_chains=True), Evidence(300, 0.14, 300.0)),  # of two instruments
    ],
)
def test_a_huge_divergence_is_no_better_for_a_gain_that_is_none(best, last):
    rule = StoppingRule(10, 1200)
    rule.next_cycle(Evidence(0, *FAR))
    rule.next_cycle(best)
    rule.next_cycle(last)
    assert not rule.last_is_best


def test_what_only_one_qs_chains_have_seen_does_not_make_it_worse():
    rule = StoppingRule(10, 1200)
    rule.next_cycle(Evidence(0, 0.1, 0.5))
    rule.next_cycle(Evidence(150, 0.4, 0.5, by_chains=True))
    assert rule.last_is_best
    rule.next_cycle(Evidence(300, 0.9, 0.5, by_chains=True))
    assert not rule.last_is_best


def test_a_q_that_could_not_be_judged_is_gone_on_with():
    lost = (math.inf, math.inf)
    assert cycles(lost, lost, NEAR, RIGHT) == [150, 150, 300, 0]
