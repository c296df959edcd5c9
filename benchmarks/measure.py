"""Checks a case, then times its runs in turns."""

import gc
import math
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import oracle, peers, registry, steps
from benchmarks.machine import PeakGpuMemory, PeakMemory, launches, seconds
from benchmarks.registry import Case, Run

SAMPLE_SECONDS = 0.01  # what a sample lasts at least, by repeating the call


@dataclass
class Row:
    """The result of one run. Without `seconds` it has none, and `note` says why."""

    case: str
    run: Run
    note: str = ""
    error: float | None = None
    limit: float | None = None
    seconds: float | None = None  # per call, best of the rounds
    median_seconds: float | None = None
    rounds: int = 0
    page_faults: float | None = None  # per call
    launches: int | None = None  # of kernels on the GPU, per call
    grown_bytes: int | None = None  # of the memory in use at its largest, over what it was before the call
    input_bytes: int = 0  # with the gradient that arrives
    output_bytes: int = 0  # with the gradients that leave
    samples: list[float] = field(default_factory=list)

    @property
    def ns(self) -> float | None:
        """Nanoseconds per token and head."""
        run = self.run
        return None if self.seconds is None else self.seconds * 1e9 / (run.batch * run.heads * run.length)

    @property
    def flops(self) -> float | None:
        """The rate, flop/s."""
        return None if self.ns is None else self.run.flops / self.ns * 1e9

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory over inputs, outputs and gradients."""
        if self.grown_bytes is None:
            return None
        return (self.input_bytes + self.grown_bytes) / (self.input_bytes + self.output_bytes)

    @property
    def wrong(self) -> bool:
        return self.error is not None and self.error > self.limit


@dataclass
class Budget:
    seconds: float  # for the rounds of a case
    least_rounds: int
    most_rounds: int


FULL = Budget(2, 3, 25)
QUICK = Budget(0.4, 2, 10)


def measure(case: Case, budget: Budget) -> list[Row]:
    """A row per run. A run whose result is wrong or whose peer is missing gets a note instead of figures."""
    rows, calls = [], []
    for run in case.runs:
        row = Row(case.name, run)
        rows.append(row)
        if reason := peers.missing(run.peer):
            row.note = reason
            continue
        torch.set_num_threads(run.threads)
        prepare = steps.prepare if run.mode == registry.STEP else _prepare
        try:
            call, repeats = prepare(run, row)
        except torch.OutOfMemoryError:
            row.note = f"{run.peer}, {run.mode}, L = {run.length:,}: the GPU has too little memory"
            continue
        if row.wrong:
            row.note = f"wrong: error {row.error:.2g}, limit {row.limit:.2g}"
            continue
        calls.append((row, call, repeats))
    oracle.forget()
    if calls:
        _time_in_turns(calls, case.clock, budget)
    return rows


def _prepare(run: Run, row: Row) -> tuple[Callable[[], Any], int]:
    on_gpu = run.device == "cuda"
    # Loads code, starts threads, compiles: none of it belongs to the memory of a call. What is compiled for a GPU is
    # compiled for a length.
    warm = oracle.make_inputs(run if on_gpu else replace(run, length=peers.CHUNK))
    _call(run, warm)()
    inputs = oracle.make_inputs(run)
    call = _call(run, inputs)
    with PeakGpuMemory() if on_gpu else PeakMemory() as memory:
        results = call()
    if on_gpu:
        row.launches = launches(call)
    row.grown_bytes = memory.grown
    row.input_bytes = _bytes(inputs.q, inputs.k, inputs.v) + (_bytes(inputs.grad) if run.mode == registry.BOTH else 0)
    row.output_bytes = _bytes(*results)
    row.error, row.limit = oracle.error(run, inputs, results), oracle.limit(run)
    return call, 1


def _call(run: Run, inputs: oracle.Inputs) -> Callable[[], list[Tensor]]:
    forward = peers.attention(run, inputs.decay)
    leaves = inputs.tensors(run.mode)

    def call() -> list[Tensor]:
        out = forward(inputs.q, inputs.k, inputs.v)
        return [out, *torch.autograd.grad(out, leaves, inputs.grad)] if leaves else [out]

    return call


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _time_in_turns(calls: list[tuple[Row, Callable[[], Any], int]], clock: str, budget: Budget) -> None:
    """Each call does the work of `repeats` calls that count."""

    def sample(row: Row, call: Callable[[], Any], times: int) -> float:
        def work() -> None:
            for _ in range(times):
                call()

        torch.set_num_threads(row.run.threads)
        return seconds(work, clock)

    # Turns that do not count grow the heap and the caches, and say how long a call takes.
    for _ in range(2):
        first = [sample(row, call, 1) for row, call, _ in calls]
        if sum(first) > 1:
            break
    times = [max(1, math.ceil(SAMPLE_SECONDS / max(one, 1e-7))) for one in first]
    turn = sum(one * n for one, n in zip(first, times, strict=True))
    rounds = min(max(budget.least_rounds, int(budget.seconds / turn)), budget.most_rounds)
    faults = [0] * len(calls)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for i, (row, call, repeats) in enumerate(calls):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            row.samples.append(sample(row, call, times[i]) / (times[i] * repeats))
            faults[i] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    gc.enable()
    for i, (row, _, repeats) in enumerate(calls):
        row.rounds = rounds
        row.seconds, row.median_seconds = min(row.samples), statistics.median(row.samples)
        row.page_faults = faults[i] / (rounds * times[i] * repeats)
