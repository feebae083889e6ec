"""Interleaved runs."""

from collections.abc import Callable
from timeit import timeit

import numpy as np


def interleave(
    calls: dict[str, Callable[[], object]], rounds: int, turn: float
) -> dict[str, np.ndarray]:
    """Seconds per call, one number for each round, of calls that return when they are done.

    In each round every call has one turn of about ``turn`` seconds, so that what else the machine
    does strikes all alike; short calls are preceded by one that is not timed, for the caches.
    """
    names, seconds = list(calls), {name: np.zeros(rounds) for name in calls}
    repeats = {name: max(1, round(turn / timeit(call, number=1))) for name, call in calls.items()}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if repeats[name] > 1:
                calls[name]()
            seconds[name][i] = timeit(calls[name], number=repeats[name]) / repeats[name]
    return seconds
