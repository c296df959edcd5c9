"""What is measured: every case, as data."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

FORWARD = "forward"
BOTH = "forward+backward"
STEP = "step"

# Peers of `elattn`. Those of a step are `step_peers`.
SDPA = "scaled_dot_product_attention"
SCAN = "PyTorch scan"
SCAN_COMPILED = "PyTorch scan, compiled"
FAST_TRANSFORMERS = "fast-transformers"
ELATTN = "elattn"
ELATTN_CPP = "elattn from C++"
NO_OP = "operator that does nothing"
PLAIN_STEP = "PyTorch"
PLAIN_STEP_COMPILED = "PyTorch, compiled"

LENGTHS = (128, 512, 1024, 4096, 8192, 65536)
HEAD_DIMS = (64, 128)
# Beyond these a call takes seconds, or gigabytes.
LONGEST = {
    (SDPA, FORWARD): 8192,
    (SDPA, BOTH): 8192,
    (SCAN, BOTH): 8192,
    (SCAN_COMPILED, BOTH): 8192,
    (FAST_TRANSFORMERS, BOTH): 8192,
}


@dataclass(frozen=True)
class Run:
    """One row: a peer on inputs (1, heads, length, head_dim), value_dim = head_dim, causal."""

    peer: str
    mode: str
    head_dim: int
    length: int
    kernel: str = "hadamard_exp"
    dtype: str = "float32"
    decay: bool = False
    heads: int = 8
    threads: int = 1

    @property
    def flops(self) -> int:
        """The arithmetic that counts, per token and head: state update and read-out, and their gradients."""
        return (14 if self.mode == BOTH else 4) * self.head_dim**2

    @property
    def affordable(self) -> bool:
        return self.length <= LONGEST.get((self.peer, self.mode), self.length)


@dataclass(frozen=True)
class Case:
    """Runs that are compared with each other, so measured in turns, on the same inputs and by the same clock."""

    name: str
    runs: tuple[Run, ...]
    clock: str = "cpu"  # "cpu": time of the process, for one thread; "wall": for several


def cases(quick: bool = False) -> list[Case]:
    """Every case, those with one thread first: threads that a parallel region leaves behind use processor time."""
    one, several = _one_thread(quick), _two_threads(quick)
    return [*one, *several]


def _one_thread(quick: bool) -> Iterator[Case]:
    dims = HEAD_DIMS[:1] if quick else HEAD_DIMS
    lengths = (128, 1024, 4096) if quick else LENGTHS
    peers = (ELATTN, SDPA, SCAN, FAST_TRANSFORMERS) if quick else (ELATTN, SDPA, SCAN, SCAN_COMPILED, FAST_TRANSFORMERS)
    for mode in (FORWARD, BOTH):
        for head_dim in dims:
            for length in lengths:
                runs = [Run(peer, mode, head_dim, length) for peer in peers]
                if length >= 512:
                    runs.append(replace(runs[0], dtype="bfloat16"))
                yield Case("peers", tuple(run for run in runs if run.affordable))
            base = Run(ELATTN, mode, head_dim, 4096)
            kernels = ("sum_sq", "directional", "elu", "features")
            runs = [replace(base, kernel=kernel) for kernel in kernels]
            yield Case("kernels", (*runs, replace(base, decay=True)))
    for head_dim in dims:
        step_peers = (ELATTN, ELATTN_CPP, NO_OP, PLAIN_STEP) + (() if quick else (PLAIN_STEP_COMPILED,))
        runs = [Run(peer, STEP, head_dim, 1) for peer in step_peers]
        yield Case("step", (*runs, replace(runs[0], decay=True)))


def _two_threads(quick: bool) -> Iterator[Case]:
    for mode in (FORWARD, BOTH):
        for heads, length in ((1, 8192), (2, 4096), (8, 4096)):
            for head_dim in HEAD_DIMS[:1] if quick else HEAD_DIMS:
                one = Run(ELATTN, mode, head_dim, length // 2 if quick else length, heads=heads)
                yield Case("threads", (one, replace(one, threads=2)), clock="wall")
