"""Runs that each leave a JSON file: resumed where they stopped, several at a time."""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import machine
from elattn._files import write_file


@dataclass(frozen=True)
class Job:
    """A form and a seed; `run(**identity)` gives what `path` will hold. All of it can be pickled.

    The identity is everything that the result depends on, so a file that has another one is computed again.
    """

    path: Path
    form: str
    seed: int
    identity: dict[str, Any]
    run: Callable[..., dict[str, Any]]

    def result(self) -> dict[str, Any] | None:
        """What the file holds, if it is the result of this very job."""
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        # Compared as JSON, in which a tuple is a list.
        return content if content["identity"] == json.loads(json.dumps(self.identity)) else None


def execute(jobs: list[Job], workers: int, console: Console) -> int:
    """Runs the jobs that have no result yet, in `workers` processes of one thread each; returns how many failed."""
    missing = [job for job in jobs if job.result() is None]
    if len(missing) < len(jobs):
        console.print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there already.")
    began, failures = time.perf_counter(), 0
    for done, (job, outcome) in enumerate(_outcomes(missing, workers), 1):
        left = (time.perf_counter() - began) / done * (len(missing) - done)
        if isinstance(outcome, Exception):
            failures += 1
            said = f"failed: {type(outcome).__name__}: {outcome}"
        else:
            said = f"{outcome['summary']}, {outcome['seconds']:.0f} s"
        console.print(
            f"{done:>3}/{len(missing)}  {job.path.stem}: {said}  ({left / 60:.0f} min left)",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return failures


def _outcomes(jobs: list[Job], workers: int) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    """The jobs as they end, each with its result or what it raised."""
    if workers == 1:
        for job in jobs:
            with _one_thread():
                try:
                    outcome: dict[str, Any] | Exception = _run(job)
                except Exception as error:
                    outcome = error
            yield job, outcome
        return
    # Started afresh: a fork of a process whose OpenMP threads have run may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(_run, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], error if isinstance(error, Exception) else future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(job: Job) -> dict[str, Any]:
    began = time.perf_counter()
    result = {"form": job.form, "seed": job.seed, "identity": job.identity} | job.run(**job.identity)
    result |= {"seconds": time.perf_counter() - began, "machine": machine.describe()}
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_file(job.path, json.dumps(result, indent=1) + "\n")
    return result
