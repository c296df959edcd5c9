"""Large batches, long sequences, and memory that does not grow with L D Dv."""

import subprocess
import sys
import textwrap

import pytest
import torch

import elattn
from compare import ALL_KERNELS, KERNELS, attention, attention_step, check_same
from elattn.testing import reference_attention


def test_70000_batch_entries() -> None:
    """More than fit a 16-bit grid dimension; entries differ, and the last is as right as the first."""
    batch = 70_000
    q, k, v = torch.randn(batch, 1, 3, 2), torch.randn(batch, 1, 3, 2), torch.randn(batch, 1, 3, 2)
    for kernel in ALL_KERNELS:
        out = attention(q, k, v, kernel=kernel, is_causal=True)
        rows = [0, 1, 32_768, 65_535, 65_536, batch - 1]
        for row in rows:
            x = [y[row : row + 1] for y in (q, k, v)]
            check_same(out[row : row + 1], attention(*x, kernel=kernel, is_causal=True), f"{kernel}: entry {row}")
        state = elattn.new_state(batch, 1, 2, 2, kernel=kernel)
        check_same(attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], state, kernel=kernel), out[:, :, 0], kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_200000_tokens(kernel: str) -> None:
    """The last rows of a long sequence against float64 sums over all of it, and its backward."""
    length, dim = 200_000, 8
    q, k, v = (torch.randn(1, 1, length, dim, requires_grad=True) for _ in "qkv")
    out = elattn.attention(q, k, v, kernel=kernel, is_causal=True)
    with torch.no_grad():
        expected = reference_attention(q[:, :, -1:], k, v, kernel=kernel)
        # math.md, 1.4: 4.9e-5 for sums of a million terms, token by token.
        assert (out[:, :, -1:] - expected).abs().max() < 4.9e-5
        check_same(
            out[:, :, :500], elattn.attention(*(x[:, :, :500] for x in (q, k, v)), kernel=kernel, is_causal=True)
        )
    found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.isfinite(x).all() for x in found)
    # Every row's weights sum to 1, so the gradients of v sum to the number of rows.
    assert abs(found[2].double().sum((0, 1, 2)) / length - 1).max() < 1e-4


def test_averages_of_a_long_sequence_stay_exact() -> None:
    """Equal keys, so that every output is the running mean of v: float32 sums of 200,000 terms."""
    length = 200_000
    v = torch.randn(1, 1, length, 4) + 1
    mean = v.double().cumsum(2) / torch.arange(1, length + 1)[:, None]
    for kernel in ("hadamard_exp", "sum_sq", "sub_sq"):
        q, k = torch.ones(1, 1, length, 4), torch.full((1, 1, length, 4), 0.5)
        out = elattn.attention(q, k, v, kernel=kernel, is_causal=True)
        # math.md, 1.4: 5e-5 for a million tokens, token by token.
        assert (out.double() - mean).abs().max() < 5e-5, kernel


PEAK = """
    import pathlib, sys, torch, elattn
    kernel, length, backward = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "backward"
    torch.set_num_threads(2)

    def inputs(length):
        return [torch.randn(1, 2, length, 64, requires_grad=backward) for _ in range(3)]

    def run(q, k, v):
        out = elattn.attention(q, k, v, kernel=kernel, is_causal=True)
        if backward:
            out.backward(torch.ones_like(out))
        return out

    def status(field):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))

    run(*inputs(256))  # threads, allocator and code are there before anything is measured
    x = inputs(length)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    run(*x)
    print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kernel", ["hadamard_exp", "sum_sq"])
def test_peak_memory(kernel: str, backward: bool) -> None:
    """The new memory of a call is its results (output, and three gradients) and a remainder far below L D Dv."""
    length = 65_536
    arguments = [kernel, str(length), "backward" if backward else "forward"]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    grown = int(run.stdout)
    one = 2 * length * 64 * 4
    # Forward: the output. Backward: also grad_out and three gradients, and per row the normaliser and delta.
    results = 5 * one if backward else one
    assert results * 0.9 <= grown <= results * 1.15, (
        f"{grown / one:.2f} times the size of q, expected {results / one:.0f}"
    )
