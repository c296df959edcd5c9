"""The figures that elattn is held to, and whether this run reached them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import registry
from benchmarks.machine import GpuCeilings
from benchmarks.measure import Row
from benchmarks.registry import BOTH, ELATTN, ELATTN_GRAPH, FORWARD, STEP


@dataclass
class Goal:
    what: str
    target: str
    measured: str = "not measured"
    reached: bool | None = None


@dataclass
class Extras:
    """Figures that are not rows."""

    step_seconds_by_position: dict[int, float]
    call_overhead_seconds: float | None
    import_seconds: float | None


def evaluate(rows: list[Row], extras: Extras, fma: float | None) -> list[Goal]:
    timed = [row for row in rows if row.seconds is not None]
    return [
        *_peak_fractions(timed, fma),
        *_against_peers(timed),
        _bfloat16(timed),
        *_steps(timed, extras),
        _threads(timed),
        *_memory(timed),
        _at_most("`import elattn` after `import torch`", 50, "ms", [extras.import_seconds * 1e3]),
    ]


def evaluate_gpu(rows: list[Row], extras: Extras, ceilings: GpuCeilings) -> list[Goal]:
    timed = [row for row in rows if row.seconds is not None]
    plain = {"peer": ELATTN, "kernel": "hadamard_exp", "dtype": "bfloat16", "decay": False}

    def own(case: str, **wanted: Any) -> list[Row]:
        return [row for row in _select(timed, **plain, **wanted) if row.case == case]

    def of_bound(case: str, **wanted: Any) -> list[float]:
        return [ceilings.of_bound(row) for row in own(case, **wanted)]

    def faster_than(peer: str, **wanted: Any) -> list[float]:
        found = []
        for row in own("peers", **wanted):
            same = {"mode": row.run.mode, "head_dim": row.run.head_dim, "length": row.run.length}
            found += [other.seconds / row.seconds for other in _select(timed, peer=peer, **same)]
        return found

    def steps(head_dims: tuple[int, ...], **wanted: Any) -> list[Row]:
        return [row for dim in head_dims for row in _select(timed, peer=ELATTN_GRAPH, head_dim=dim, **wanted)]

    large = [row for batch in (64, 256) for row in steps(registry.HEAD_DIMS, batch=batch)]
    flat = Goal("a step in a graph, B = 1, at position 1,000,000 over 1,000", "0.9 to 1.1")
    if by := extras.step_seconds_by_position:
        ratio = by[1_000_000] / by[1_000]
        flat.measured, flat.reached = f"{ratio:.2f}", 0.9 <= ratio <= 1.1
    memory = [row.memory_ratio for row in own("peers", mode=BOTH) if row.run.length >= 8192 and row.memory_ratio]
    bound, where = " of the bound", "bfloat16, B = 4, H = 16, L = 8,192"
    return [
        _at_least(f"forward, D = 64, {where}", 0.8, bound, of_bound("peers", mode=FORWARD, head_dim=64, length=8192)),
        _at_least(f"forward, D = 128, {where}", 0.7, bound, of_bound("peers", mode=FORWARD, head_dim=128, length=8192)),
        _at_least(f"forward+backward, {where}", 0.6, bound, of_bound("peers", mode=BOTH, length=8192)),
        _at_least("few heads, B = 1, H = 8, L = 131,072", 0.6, bound, of_bound("long", length=131072)),
        _at_least("flash-linear-attention, L = 8,192", 1.2, "x", faster_than(registry.FLA, length=8192)),
        _at_least("the same with its normaliser", 2, "x", faster_than(registry.FLA_NORMALISED, length=8192)),
        _at_least(
            "scaled_dot_product_attention, D = 64, L = 2,048", 1, "x",
            faster_than(registry.SDPA, head_dim=64, length=2048),
        ),
        _at_least(
            "scaled_dot_product_attention, D = 64, L = 32,768", 10, "x",
            faster_than(registry.SDPA, head_dim=64, length=32768),
        ),
        _at_least("compiled PyTorch, L = 8,192", 1, "x", faster_than(registry.SCAN_COMPILED, length=8192)),
        _at_least("a step, B ≥ 64, in a graph", 0.85, " of the bandwidth", [ceilings.fractions(r)[0] for r in large]),
        _at_most("a step, B = 1, in a graph", 5, "µs", [r.seconds * 1e6 for r in steps((64, 128), batch=1)]),
        flat,
        _at_most("peak memory of forward+backward over inputs, outputs and gradients, L ≥ 8,192", 1.1, "", memory, 2),
    ]  # fmt: skip


def _select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(getattr(row.run, key) == value for key, value in wanted.items())]


def _at_least(what: str, target: float, unit: str, values: list[float], digits: int = 2) -> Goal:
    """Reached if each value is, to the digits shown; several are shown as their range."""
    goal = Goal(what, f"≥ {target:g}{unit}")
    if values:
        goal.measured, goal.reached = _range(values, unit, digits), round(min(values), digits) >= target
    return goal


def _at_most(what: str, target: float, unit: str, values: list[float], digits: int = 1) -> Goal:
    goal = Goal(what, f"≤ {target:g} {unit}".rstrip())
    if values:
        shown = _range(values, f" {unit}" if unit else "", digits)
        goal.measured, goal.reached = shown, round(max(values), digits) <= target
    return goal


def _range(values: list[float], unit: str, digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return (low if low == high else f"{low} to {high}") + unit


def _peak_fractions(rows: list[Row], fma: float | None) -> list[Goal]:
    def fractions(**wanted: Any) -> list[float]:
        chosen = _select(rows, peer=ELATTN, length=4096, dtype="float32", heads=8, threads=1, **wanted)
        return [row.flops / fma for row in chosen if row.case != "threads"] if fma else []

    hadamard = {"kernel": "hadamard_exp", "decay": False}
    squared = [x for kernel in ("sum_sq", "directional") for x in fractions(kernel=kernel, mode=BOTH)]
    unit = " of the FMA peak"
    return [
        *(
            _at_least(f"{mode}, D = {dim}, L = 4,096", target, unit, fractions(mode=mode, head_dim=dim, **hadamard))
            for mode, target in ((FORWARD, 0.7), (BOTH, 0.6))
            for dim in registry.HEAD_DIMS
        ),
        _at_least(f"{BOTH}, squared kernels, L = 4,096", 0.45, unit, squared),
        _at_least(f"{BOTH}, with decay, L = 4,096", 0.5, unit, fractions(mode=BOTH, decay=True)),
    ]


def _against_peers(rows: list[Row]) -> list[Goal]:
    def ratios(others: tuple[str, ...], **wanted: Any) -> list[float]:
        """Time of the fastest of the others over that of elattn, in each case that has both."""
        found = []
        for row in _select(rows, peer=ELATTN, kernel="hadamard_exp", dtype="float32", decay=False, **wanted):
            same = {"mode": row.run.mode, "head_dim": row.run.head_dim, "length": row.run.length}
            times = [r.seconds for other in others for r in _select(rows, peer=other, **same)]
            if row.case == "peers" and times:
                found.append(min(times) / row.seconds)
        return found

    plain = (registry.SCAN, registry.SCAN_COMPILED)
    sdpa = Goal("scaled_dot_product_attention, L ≥ 128, forward and forward+backward", "slower than elattn")
    if values := ratios((registry.SDPA,)):
        sdpa.measured, sdpa.reached = f"{_range(values, 'x', 1)} the time of elattn", min(values) > 1
    return [
        _at_least("best plain PyTorch, D = 64, L = 1,024", 4, "x", ratios(plain, head_dim=64, length=1024), 1),
        _at_least("best plain PyTorch, D = 128, L = 1,024", 3, "x", ratios(plain, head_dim=128, length=1024), 1),
        _at_least("pytorch-fast-transformers", 6, "x", ratios((registry.FAST_TRANSFORMERS,)), 1),
        sdpa,
        _at_least("scaled_dot_product_attention, L = 8,192", 40, "x", ratios((registry.SDPA,), length=8192), 1),
    ]


def _bfloat16(rows: list[Row]) -> Goal:
    ratios = []
    for row in _select(rows, peer=ELATTN, dtype="bfloat16"):
        same = {"mode": row.run.mode, "head_dim": row.run.head_dim, "length": row.run.length}
        single = [r for r in _select(rows, peer=ELATTN, dtype="float32", **same) if r.case == row.case]
        ratios += [row.seconds / r.seconds for r in single]
    return _at_most("bfloat16 over float32, L ≥ 512", 1, "", ratios, 2)


def _steps(rows: list[Row], extras: Extras) -> list[Goal]:
    def microseconds(peer: str) -> list[float]:
        return [r.seconds * 1e6 for r in _select(rows, peer=peer, mode=STEP, head_dim=64, decay=False)]

    where = "a step, B = 1, H = 8, D = 64"
    flat = Goal(f"{where}, at position 1,000,000 over 1,000", "0.9 to 1.1")
    if by := extras.step_seconds_by_position:
        ratio = by[1_000_000] / by[1_000]
        flat.measured, flat.reached = f"{ratio:.2f}", 0.9 <= ratio <= 1.1
    overhead = [] if extras.call_overhead_seconds is None else [extras.call_overhead_seconds * 1e6]
    return [
        _at_most(f"{where}, from C++", 8, "µs", microseconds(registry.ELATTN_CPP)),
        _at_most(f"{where}, from Python", 12, "µs", microseconds(ELATTN)),
        flat,
        _at_most("call of a step over that of an operator that does nothing", 5, "µs", overhead),
    ]


def _threads(rows: list[Row]) -> Goal:
    speedups = []
    for row in rows:
        if row.case == "threads" and row.run.threads == 2:
            same = {key: value for key, value in vars(row.run).items() if key != "threads"}
            speedups += [r.seconds / row.seconds for r in _select(rows, threads=1, **same) if r.case == "threads"]
    return _at_least("two threads over one, B·H = 1, 2 and 8", 1.8, "x", speedups)


def _memory(rows: list[Row]) -> list[Goal]:
    def longest(mode: str) -> list[Row]:
        chosen = _select(rows, peer=ELATTN, mode=mode, kernel="hadamard_exp", dtype="float32", decay=False, threads=1)
        return [r for r in chosen if r.case == "peers" and r.run.length >= 8192 and r.grown_bytes is not None]

    beyond = [(r.grown_bytes - r.output_bytes) / r.run.heads / 1024 for r in longest(FORWARD)]
    ratios = [r.memory_ratio for r in longest(BOTH)]
    return [
        _at_most("memory of a forward beyond its output, per head, L = 8,192 and 65,536", 256, "KiB", beyond, 0),
        _at_most("peak memory of forward+backward over inputs, outputs and gradients, L ≥ 8,192", 1.1, "", ratios, 2),
    ]
