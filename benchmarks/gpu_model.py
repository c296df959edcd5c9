"""`python -m benchmarks.gpu_model`: what a GPU allows the CUDA kernels at most. A model; nothing here is measured.

A launch can take no less than its bytes at the GPU's bandwidth, its matrix instructions at the rate of the tensor
cores, its other arithmetic at the FMA rate, and its exponentials at theirs. The largest of the four is the model's
time, and launches follow one another. Of what a launch reads again, half of the cache's size comes from there. Latency,
barriers, occupancy and the instructions that feed these units come on top.

The counts are those of the code. The functions `..._mma` tie those of the tensor cores to the
instruction gate: they must give what tests/cuda_gate/budget.json holds nvcc's output to.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
CHUNK, TILE = 64, 16  # tokens, and rows of an mma (cuda/chunked)
TILES = CHUNK // TILE
MMA_FLOPS = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Gpu:
    name: str
    multiprocessors: int
    bandwidth: float  # byte/s
    tensor: float  # flop/s, bfloat16, dense
    fma: float  # flop/s, float32
    cache: float  # byte

    @property
    def exponentials(self) -> float:
        """Per second: 16 special-function lanes of a multiprocessor beside its 128 for FMA, of two flop each."""
        return self.fma / 16


H100 = Gpu("H100 SXM", 132, 3.35e12, 989e12, 67e12, 50e6)


@dataclass(frozen=True)
class Work:
    """Of a launch, per token and head."""

    bytes: float
    mma: float = 0
    fma: float = 0
    exponentials: float = 0

    def parts(self, gpu: Gpu) -> tuple[float, float, float, float]:
        """Seconds of memory, tensor cores, FMA and exponentials."""
        return (
            self.bytes / gpu.bandwidth,
            self.mma * MMA_FLOPS / gpu.tensor,
            2 * self.fma / gpu.fma,
            self.exponentials / gpu.exponentials,
        )


# The instructions of one warp, in units of mma_m16n8k16: functions of cuda/chunked for a piece of `tiles` tiles. Blocks
# of results are 16 columns wide, so two instructions each; S and its gradient are the sum of two bfloat16.


def _carried_multiply(columns: int, tiles: int) -> int:
    return columns // TILE * tiles * 2 * 2


def _carried_add(columns: int, tiles: int) -> int:
    return columns // TILE * tiles * 2


def _score_block(columns: int) -> int:
    return columns // TILE * 2


def _blocks(tiles: int) -> int:
    """On and below the diagonal."""
    return tiles * (tiles + 1) // 2


def _finish(tiles: int) -> int:
    return _blocks(tiles) * (2 + 1)  # scores times v, and their row sums


def _normalisers(tiles: int) -> int:
    return 2 * (tiles * 2 + (tiles - 1) * 2)  # of each row, and what comes before the next tile; made twice


def forward_mma(dim: int) -> int:
    """How many stand in the code of the forward's output_kernel for head_dim = `dim`, one of 64 and 128."""
    scan = sum(_carried_multiply(dim, n) + _score_block(dim) + _finish(n) + _carried_add(dim, n) for n in (TILES, 1))
    absorb = _carried_add(dim, TILES)
    answer = _carried_multiply(dim, TILES)
    return scan + absorb + answer


def state_mma(columns: int) -> int:
    """In a state_kernel; `columns` is head_dim in the forward, value_dim in the backward."""
    return _carried_add(columns, TILES)


def query_scan_mma(dim: int, value_dim: int) -> int:
    """In a causal chunked::QueryScan."""
    return sum(
        _score_block(value_dim)
        + _score_block(dim)  # of the weights, for what rounding loses
        + _carried_multiply(value_dim, n)
        + _blocks(n) * 2
        + _normalisers(n)
        + _carried_add(value_dim, n)
        for n in (TILES, 1)
    )


def reverse_scan_mma(columns: int) -> int:
    """In a causal chunked::ReverseScan; `columns` is value_dim for the gradient of k, head_dim for that of v."""
    return sum(
        _score_block(columns) + _carried_multiply(columns, n) + _blocks(n) * 2 + _carried_add(columns, n)
        for n in (TILES, 1)
    )


def bidirectional_scan_mma(columns: int) -> int:
    """In any bidirectional scan, with `columns` of what a warp carries."""
    return _carried_add(columns, TILES) + _carried_multiply(columns, TILES)


@dataclass(frozen=True)
class Cut:
    """Of a causal call with D = Dv = `dim` and `heads` of all sequences, as cuda/chunked/plan.h cuts it. Per token and
    head."""

    dim: int
    length: int
    heads: int
    gpu: Gpu

    @property
    def pieces(self) -> int:
        return max(1, min(2 * self.gpu.multiprocessors // self.heads, -(-self.length // CHUNK) // 4))

    @property
    def share(self) -> float:
        """Of the tokens, before the last piece or after the first."""
        return (self.pieces - 1) / self.pieces

    @property
    def state(self) -> float:
        """Bytes of the states of all pieces but one."""
        return 4 * (self.dim * self.dim + 3 * self.dim) * (self.pieces - 1) / self.length

    def add(self, rest: float) -> list[Work]:
        """Two launches: states of pieces from two rows and `rest` bytes of each token, and how they are merged."""
        if self.pieces == 1:
            return []
        mma = self.dim // TILE * _carried_add(self.dim, TILES) / CHUNK
        rows = self.share * (2 * 2 * self.dim + rest)
        return [
            Work(rows + self.state, self.share * mma, exponentials=self.share * self.dim),
            Work(2 * self.state),
        ]

    def begin(self) -> float:
        """Bytes of the launch that comes next, for the states, less those of the two rows that are in the cache."""
        return self.state - min(self.share * 2 * 2 * self.dim, self.gpu.cache / 2 / (self.length * self.heads))


def chunked_forward(dim: int, length: int, heads: int, gpu: Gpu) -> list[Work]:
    """hadamard_exp, bfloat16, causal, D = Dv = `dim`, `heads` of all sequences."""
    cut, warps = Cut(dim, length, heads, gpu), dim // TILE
    mma = _blocks(TILES) * _score_block(dim)
    mma += warps * (_carried_multiply(dim, TILES) + _finish(TILES) + _carried_add(dim, TILES))
    return [*cut.add(0), Work(4 * 2 * dim + cut.begin(), mma / CHUNK, exponentials=2 * dim)]


def chunked_backward(dim: int, length: int, heads: int, gpu: Gpu) -> list[Work]:
    """The same, backward (cuda/chunked/backward.cuh): scans for dq, dk and dv, each of which makes the features. Those
    for dk and dv run side by side and read the same rows.

    Beside rows of tensors they move 16 bytes per token, and the gauge of every chunk.
    """
    cut, row, rest, warps = Cut(dim, length, heads, gpu), 2 * dim, 16 + 4 * dim / CHUNK, dim // TILE
    carried = warps * (_carried_multiply(dim, TILES) + _blocks(TILES) * 2 + _carried_add(dim, TILES))
    scores = _blocks(TILES) * _score_block(dim)
    queries = carried + 2 * scores + warps * _normalisers(TILES)
    reverse = carried + scores

    def scan(rows: int, mma: int, features: int) -> Work:
        return Work(rows * row + rest + cut.begin(), mma / CHUNK, exponentials=features * dim)

    return [
        *cut.add(0),
        scan(4 + 1, queries, 2),  # q, k, v, g -> dq
        *cut.add(rest),
        scan(4 + 2, 2 * reverse, 4),  # q, k, v, g -> dk, dv by neighbouring blocks
    ]


def step(dim: int) -> list[Work]:
    """A token: the float32 state to registers and back, one update and one product."""
    return [Work(2 * 4 * (dim * dim + 3 * dim) + 4 * 2 * dim, fma=2 * dim * dim, exponentials=2 * dim)]


def softmax_forward(dim: int, length: int) -> list[Work]:
    """scaled_dot_product_attention, causal: two products with half of the keys on average, one exponential for each."""
    pairs = length / 2
    return [Work(4 * 2 * dim, 4 * pairs * dim / MMA_FLOPS, exponentials=pairs)]


def seconds(works: list[Work], gpu: Gpu) -> float:
    return sum(max(work.parts(gpu)) for work in works)


def table(gpu: Gpu) -> str:
    """The model as Markdown."""
    lines = []

    def line(what: str, works: list[Work], necessary: float | None = None, goal: str = "") -> None:
        parts = [1e9 * sum(column) for column in zip(*(work.parts(gpu) for work in works), strict=True)]
        total = seconds(works, gpu)
        share = "" if necessary is None else f"{necessary / gpu.bandwidth / total:.2f}"
        moved = sum(work.bytes for work in works)
        lines.append((what, f"{moved:,.0f}", *(f"{x:.3f}" for x in parts), f"{1e9 * total:.3f}", share, goal))

    for dim, goal in ((64, "0.80"), (128, "0.70")):
        forward = chunked_forward(dim, 8192, 64, gpu)
        line(f"forward, D = {dim}", forward, 8 * dim, goal)
        line(f"forward+backward, D = {dim}", [*forward, *chunked_backward(dim, 8192, 64, gpu)], 22 * dim, "0.60")
    for dim in (64, 128):
        line(f"forward, B = 1, H = 8, L = 131,072, D = {dim}", chunked_forward(dim, 131072, 8, gpu), 8 * dim, "0.60")
    for dim in (64, 128):
        line(f"a step, B ≥ 64, D = {dim}", step(dim), 8 * (dim * dim + 3 * dim), "0.85")
    for length in (2048, 32768):
        line(f"`scaled_dot_product_attention`, forward, D = 64, L = {length:,}", softmax_forward(64, length))
    headers = (
        "bfloat16, causal; B = 4, H = 16, L = 8,192", "bytes", "memory", "tensor cores", "FMA", "exponentials",
        "at least", "of the bound", "goal",
    )  # fmt: skip
    return report.markdown_table(headers, lines, range(1, len(headers)))


def markdown(gpu: Gpu) -> str:
    return (
        f"{gpu.name}, by its data sheet: {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.tensor / 1e12:.0f} TFLOP/s bfloat16, "
        f"{gpu.fma / 1e12:.0f} TFLOP/s float32, {gpu.exponentials / 1e12:.1f} T exponentials/s, "
        f"{gpu.cache / 1e6:.0f} MB cache. Times in ns per token and head; of a step per head.\n\n{table(gpu)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-docs", action="store_true", help="also put the table into docs/benchmarks.md")
    options = parser.parse_args()
    text = markdown(H100)
    print(text)
    if options.write_docs:
        report.write_docs(ROOT / "docs/benchmarks.md", text, "GPU model")


if __name__ == "__main__":
    main()
