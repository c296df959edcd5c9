"""Timing in turns: a slow moment of the machine meets everything that is compared."""

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def take_turns(calls: dict[Name, Callable[[], Any]], rounds: int) -> dict[Name, list[float]]:
    """Seconds of each call in each round, after one call of each that does not count."""
    for call in calls.values():
        call()
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(seconds(call))
    return samples


def seconds(call: Callable[[], Any]) -> float:
    """Time of the process on one thread, which leaves out what other processes take; wall time on several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    call()
    return clock() - began


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of the quotient of two times."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
