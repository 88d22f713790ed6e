"""How the benchmarks measure cost: side by side, in turns, by process CPU time.

A processor that others share makes wall-clock meaningless, and even CPU time drifts with what they do to the caches.
So what is compared takes turns, each turn some tens of milliseconds; a ratio is the median over the rounds of the
ratios *within* a round, where both sides saw the same neighbours. A GPU is measured by wall-clock, synchronized.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["interleave", "ratio", "seconds_of"]

_MAX_CALLS_PER_TURN = 1000


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def seconds_of(action: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds that one call takes."""
    device = torch.device(device)
    started = _clock(device)
    action()
    return _clock(device) - started


def interleave(
    actions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    turn: float = 0.05,
    warm_up: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Seconds of one call of each action in each round.

    Args:
        actions: what to measure, by name.
        rounds: how many turns each takes. Every other round goes in reverse order.
        turn: seconds a turn lasts at least, in as many calls as that takes.
        warm_up: calls of each that are not measured.
        device: where the work is done.
    """
    device = torch.device(device)
    calls = {}
    for name, action in actions.items():
        for _ in range(warm_up):
            action()
        calls[name] = min(_MAX_CALLS_PER_TURN, 1 + int(turn / max(1e-9, seconds_of(action, device))))
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(rounds):
        for name in list(actions)[:: 1 if i % 2 == 0 else -1]:
            started = _clock(device)
            for _ in range(calls[name]):
                actions[name]()
            seconds[name].append((_clock(device) - started) / calls[name])
    return seconds


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over rounds of ``seconds / baseline``."""
    return statistics.median(a / b for a, b in zip(seconds, baseline))
