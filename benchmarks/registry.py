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
FLA = "flash-linear-attention"  # without dividing by the normaliser
FLA_NORMALISED = "flash-linear-attention, normalised"
ELATTN = "elattn"
ELATTN_CPP = "elattn from C++"
ELATTN_GRAPH = "elattn in a CUDA graph"
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
    """One row: a peer on inputs (batch, heads, length, head_dim), value_dim = head_dim, causal."""

    peer: str
    mode: str
    head_dim: int
    length: int
    kernel: str = "hadamard_exp"
    dtype: str = "float32"
    decay: bool = False
    heads: int = 8
    threads: int = 1
    batch: int = 1
    device: str = "cpu"

    @property
    def flops(self) -> int:
        """The arithmetic that counts, per token and head: state update and read-out, and their gradients."""
        return (14 if self.mode == BOTH else 4) * self.head_dim**2

    @property
    def traffic(self) -> int:
        """Bytes that must move between the GPU and its memory, per token and head.

        Forward: q, k, v and the output. Backward: these three again, the gradient that arrives and three that leave.
        A step reads and writes a float32 state.
        """
        if self.mode == STEP:
            return 8 * (self.head_dim**2 + 3 * self.head_dim)
        return (11 if self.mode == BOTH else 4) * self.head_dim * (4 if self.dtype == "float32" else 2)

    @property
    def affordable(self) -> bool:
        return self.length <= LONGEST.get((self.peer, self.mode), self.length)


@dataclass(frozen=True)
class Case:
    """Runs that are compared with each other, so measured in turns, on the same inputs and by the same clock."""

    name: str
    runs: tuple[Run, ...]
    clock: str = "cpu"  # "cpu": time of the process, for one thread; "wall": for several; "cuda": of the GPU


def cases(quick: bool = False) -> list[Case]:
    """Every case, those with one thread first: threads that a parallel region leaves behind use processor time."""
    one, several = _one_thread(quick), _two_threads(quick)
    return [*one, *several]


def gpu_cases(quick: bool = False) -> list[Case]:
    """Every case on a GPU: bfloat16, B = 4, H = 16 unless the case says otherwise."""
    return list(_on_gpu(quick))


def _on_gpu(quick: bool) -> Iterator[Case]:
    dims = HEAD_DIMS[:1] if quick else HEAD_DIMS
    common = {"dtype": "bfloat16", "heads": 16, "device": "cuda"}
    for mode in (FORWARD, BOTH):
        for head_dim in dims:
            for length in (2048, 8192) if quick else (512, 2048, 8192, 32768):
                elattn = Run(ELATTN, mode, head_dim, length, batch=4, **common)
                runs = [elattn, replace(elattn, peer=SDPA)]
                runs += [replace(elattn, peer=peer, kernel="features") for peer in (FLA, FLA_NORMALISED)]
                if length == 8192:  # elsewhere its compilation takes longer than everything else
                    runs.append(replace(elattn, peer=SCAN_COMPILED))
                yield Case("peers", tuple(runs), clock="cuda")
            base = Run(ELATTN, mode, head_dim, 8192, batch=4, **common)
            kernels = [replace(base, kernel=kernel) for kernel in ("sum_sq", "directional", "elu", "features")]
            runs = [*kernels, replace(base, decay=True), replace(base, dtype="float32")]
            yield Case("kernels", tuple(runs), clock="cuda")
            yield Case("long", (replace(base, batch=1, heads=8, length=16384 if quick else 131072),), clock="cuda")
    for head_dim in dims:
        for batch in (1, 64) if quick else (1, 8, 64, 256):
            step = Run(ELATTN_GRAPH, STEP, head_dim, 1, batch=batch, **common)
            yield Case("step", (step, replace(step, peer=ELATTN)), clock="cuda")


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
