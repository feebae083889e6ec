"""Timing of calls that take turns."""

from collections.abc import Callable
from timeit import timeit

import numpy as np


def interleave(
    calls: dict[str, Callable[[], object]], rounds: int, turn: float
) -> dict[str, np.ndarray]:
    """Seconds for one call, in each round. A call must return only when its result is ready.

    In each round every call is repeated for about ``turn`` seconds, one after the other, so that
    other work on the machine slows all of them alike. Short calls run once before they are timed,
    to fill the processor's caches.
    """
    names, seconds = list(calls), {name: np.zeros(rounds) for name in calls}
    repeats = {name: max(1, round(turn / timeit(call, number=1))) for name, call in calls.items()}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if repeats[name] > 1:
                calls[name]()
            seconds[name][i] = timeit(calls[name], number=repeats[name]) / repeats[name]
    return seconds
