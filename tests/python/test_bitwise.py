"""What holds bit for bit on the CPU: threads, splits, steps, packing, batch composition, repeated calls."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import elattn
from compare import ACCUMULATION, ALL_KERNELS, KERNELS, attention, attention_step, check_same
from inputs import DTYPES, decay_shapes, padding_mask, qkv

EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
MODES = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


def decays(
    kernel: str, dtype: torch.dtype, batch: int, heads: int, length: int, head_dim: int
) -> Iterator[Tensor | None]:
    """No decay, then one of each shape. Rates of about 1 make the gauge move often."""
    yield None
    if kernel != "features":
        for shape in decay_shapes(batch, heads, length, head_dim, kernel):
            yield torch.rand(shape, dtype=ACCUMULATION[dtype])


def part(decay: Tensor | None, tokens: slice) -> Tensor | None:
    return decay if decay is None or decay.dim() <= 2 else decay[:, :, tokens]


def options(kernel: str, decay: Tensor | None) -> dict[str, Any]:
    return {"kernel": kernel} if decay is None else {"kernel": kernel, "decay": decay}


@EVERY_KERNEL
@EVERY_DTYPE
def test_every_split_of_a_prefill(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 4, 38, 16, 21, kv_heads=2, dtype=dtype, std=2.0)
    for decay in decays(kernel, dtype, 2, 2, 38, 16):
        common = {"is_causal": True, "enable_gqa": True, "return_state": True}
        whole, last = attention(q, k, v, **common, **options(kernel, decay))
        for cut in range(39):
            outs, state = [], None
            for tokens in (slice(0, cut), slice(cut, 38)):
                piece = [x[:, :, tokens] for x in (q, k, v)]
                out, state = attention(*piece, state=state, **common, **options(kernel, part(decay, tokens)))
                outs.append(out)
            what = f"split at {cut}, decay {None if decay is None else tuple(decay.shape)}"
            check_same(torch.cat(outs, 2), whole, what)
            check_same(state, last, f"state, {what}")


@EVERY_KERNEL
@EVERY_DTYPE
def test_step_by_step_is_the_causal_call(kernel: str, dtype: torch.dtype) -> None:
    for heads, kv_heads, head_dim, value_dim in [(4, 2, 16, 21), (3, 3, 40, 64), (4, 1, 7, 130)]:
        q, k, v = qkv(2, heads, 38, head_dim, value_dim, kv_heads=kv_heads, dtype=dtype, std=2.0)
        for decay in decays(kernel, dtype, 2, kv_heads, 38, head_dim):
            whole, last = attention(
                q, k, v, is_causal=True, enable_gqa=True, return_state=True, **options(kernel, decay)
            )
            state = elattn.new_state(2, kv_heads, head_dim, value_dim, kernel=kernel, dtype=ACCUMULATION[dtype])
            for t in range(38):
                rate = decay
                if decay is not None and decay.dim() == 3:
                    rate = decay[:, :, t : t + 1]
                if decay is not None and decay.dim() == 4:
                    rate = decay[:, :, t]
                out = attention_step(
                    q[:, :, t], k[:, :, t], v[:, :, t], state, enable_gqa=True, **options(kernel, rate)
                )
                what = f"D={head_dim} Dv={value_dim} token {t}, decay {None if decay is None else tuple(decay.shape)}"
                check_same(out, whole[:, :, t], what)
            check_same(state, last, f"state after the steps, D={head_dim}")


def test_prefill_then_steps_over_many_tokens() -> None:
    """Longer than the lengths at which gauges move or blocks end."""
    q, k, v = qkv(1, 1, 1000, 16, 16, std=3.0)
    for kernel in ALL_KERNELS:
        whole = attention(q, k, v, kernel=kernel, is_causal=True)
        _, state = attention(*(x[:, :, :700] for x in (q, k, v)), kernel=kernel, is_causal=True, return_state=True)
        steps = [attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state, kernel=kernel) for t in range(700, 1000)]
        check_same(torch.stack(steps, 2), whole[:, :, 700:], kernel)


@EVERY_KERNEL
@MODES
def test_threads(kernel: str, is_causal: bool, restore_threads: None) -> None:
    """Also with one batch entry and head, where threads share the value columns."""
    for batch, heads, value_dim in [(1, 1, 16), (1, 1, 128), (3, 2, 24), (1, 1, 300)]:
        q, k, v = qkv(batch, heads, 130, 16, value_dim, requires_grad=True)
        g = torch.randn(batch, heads, 130, value_dim)
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, state = attention(q, k, v, kernel=kernel, is_causal=is_causal, return_state=True)
            found.append((out, state, *torch.autograd.grad(out, (q, k, v), g)))
        for name, one, two in zip(["output", "state", "dq", "dk", "dv"], *found, strict=True):
            check_same(two, one, f"{kernel} B={batch} H={heads} Dv={value_dim}: {name} with 2 threads")


@EVERY_KERNEL
@EVERY_DTYPE
def test_threads_that_share_a_head(kernel: str, dtype: torch.dtype, restore_threads: None) -> None:
    """Long causal calls with fewer heads than threads: padding, groups, states and every shape of decay."""
    length, head_dim, value_dim = 2500, 64, 72
    for std in (1.0, 16.0):
        q, k, v = qkv(1, 2, length, head_dim, value_dim, kv_heads=1, dtype=dtype, std=std, requires_grad=True)
        g = torch.randn(1, 2, length, value_dim).to(dtype)
        mask = padding_mask(1, length)
        start = [x[:, :, :50].detach() for x in (q, k, v)]
        _, state = attention(*start, kernel=kernel, is_causal=True, enable_gqa=True, return_state=True)
        grad_state = torch.randn_like(state)
        for decay in decays(kernel, dtype, 1, 1, length, head_dim):
            inputs = [q, k, v, state.requires_grad_()] + ([] if decay is None else [decay.requires_grad_()])
            common = {"is_causal": True, "enable_gqa": True, "key_padding_mask": mask, "state": state}
            found = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                outputs = attention(q, k, v, return_state=True, **common, **options(kernel, decay))
                found.append((*outputs, *torch.autograd.grad(outputs, inputs, (g, grad_state))))
            names = ["output", "final state", "dq", "dk", "dv", "dstate", "ddecay"]
            for threads, again in zip((2, 3, 5), found[1:], strict=True):
                for name, one, many in zip(names, found[0], again, strict=False):
                    shape = None if decay is None else tuple(decay.shape)
                    check_same(many, one, f"{kernel} std={std} decay={shape}: {name} with {threads} threads")


def test_threads_that_share_packed_sequences(restore_threads: None) -> None:
    """Two sequences by four threads each; one ends within a block, one has a single token."""
    for ends in ([0, 2500, 5000], [0, 4999, 5000]):
        q, k, v = qkv(1, 1, 5000, 64, 64, requires_grad=True)
        decay = torch.rand(1, 1, 5000).requires_grad_()
        g = torch.randn(1, 1, 5000, 64)
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            out = attention(q, k, v, is_causal=True, cu_seqlens=torch.tensor(ends), decay=decay)
            found.append((out, *torch.autograd.grad(out, (q, k, v, decay), g)))
        for name, one, four in zip(["output", "dq", "dk", "dv", "ddecay"], *found, strict=True):
            check_same(four, one, f"{ends}: {name} with 4 threads")


@EVERY_KERNEL
def test_threads_of_a_step(kernel: str, restore_threads: None) -> None:
    q, k, v = (x[:, :, 0] for x in qkv(40, 4, 1, 32, 64))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = elattn.new_state(40, 4, 32, 64, kernel=kernel)
        found.append([attention_step(q, k, v, state, kernel=kernel) for _ in range(3)] + [state])
    for one, two in zip(*found, strict=True):
        check_same(two, one, kernel)


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_batch_composition(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    """An entry's output, state and gradients do not depend on the other members of the batch or on other heads."""
    q, k, v = qkv(3, 2, 70, 16, 24, dtype=dtype, requires_grad=True)
    g = torch.randn(3, 2, 70, 24).to(dtype)
    out, state = attention(q, k, v, kernel=kernel, is_causal=is_causal, return_state=True)
    together = (out, state, *torch.autograd.grad(out, (q, k, v), g))
    for b in range(3):
        for heads in (slice(0, 2), slice(1, 2)):
            alone = [x[b : b + 1, heads].detach().requires_grad_() for x in (q, k, v)]
            out, state = attention(*alone, kernel=kernel, is_causal=is_causal, return_state=True)
            found = (out, state, *torch.autograd.grad(out, alone, g[b : b + 1, heads]))
            for name, actual, expected in zip(["output", "state", "dq", "dk", "dv"], found, together, strict=True):
                check_same(actual, expected[b : b + 1, heads], f"entry {b} alone: {name}")


@EVERY_KERNEL
@MODES
@EVERY_DTYPE
def test_packing(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    """Packed sequences, empty ones included, give what each gives alone: output, state and gradients."""
    lengths = [5, 0, 64, 1, 0, 30]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = qkv(1, 4, 100, 16, 24, kv_heads=2, dtype=dtype, requires_grad=True)
    g = torch.randn(1, 4, 100, 24).to(dtype)
    _, initial = attention(*qkv(6, 2, 9, 16, 24, dtype=dtype), kernel=kernel, return_state=True)
    for start in (None, initial):
        common = {"kernel": kernel, "is_causal": is_causal, "enable_gqa": True, "return_state": True}
        out, state = attention(q, k, v, cu_seqlens=ends, state=start, **common)
        found = torch.autograd.grad(out, (q, k, v), g)
        for n, (begin, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
            alone = [x[:, :, begin:end].detach().requires_grad_() for x in (q, k, v)]
            one, one_state = attention(*alone, state=None if start is None else start[n : n + 1], **common)
            check_same(out[:, :, begin:end], one, f"sequence {n}")
            check_same(state[n : n + 1], one_state, f"state of sequence {n}")
            for x, actual, expected in zip(
                "qkv", found, torch.autograd.grad(one, alone, g[:, :, begin:end]), strict=True
            ):
                check_same(actual[:, :, begin:end], expected, f"d{x} of sequence {n}")


@pytest.mark.parametrize("kernel", KERNELS)
def test_packing_with_decay(kernel: str) -> None:
    q, k, v = qkv(1, 2, 60, 16, 24)
    ends = torch.tensor([0, 7, 7, 40, 60])
    for decay in decays(kernel, torch.float32, 1, 2, 60, 16):
        out = attention(q, k, v, is_causal=True, cu_seqlens=ends, **options(kernel, decay))
        for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            tokens = slice(begin, end)
            alone = attention(
                *(x[:, :, tokens] for x in (q, k, v)), is_causal=True, **options(kernel, part(decay, tokens))
            )
            check_same(out[:, :, tokens], alone, f"tokens {begin} to {end}")


@EVERY_KERNEL
@MODES
def test_equal_calls_give_equal_results(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(2, 4, 130, 16, 24, kv_heads=2, requires_grad=True)
    g = torch.randn(2, 4, 130, 24)
    mask = padding_mask(2, 130)
    found = []
    for _ in range(3):
        out = attention(q, k, v, kernel=kernel, is_causal=is_causal, enable_gqa=True, key_padding_mask=mask)
        found.append((out, *torch.autograd.grad(out, (q, k, v), g)))
    for again in found[1:]:
        for one, two in zip(found[0], again, strict=True):
            check_same(two, one, kernel)


def test_alignment_and_strides_of_states() -> None:
    """A state that is a slice of a larger tensor, at an address of its own."""
    for kernel in ALL_KERNELS:
        q, k, v = qkv(2, 2, 20, 16, 24)
        _, state = attention(q, k, v, kernel=kernel, is_causal=True, return_state=True)
        expected = attention(q, k, v, kernel=kernel, is_causal=True, state=state)
        wide = torch.full((4, 3, state.size(-1) + 7), torch.nan)
        inside = wide[1:3, 1:, 3:-4].copy_(state)
        check_same(attention(q, k, v, kernel=kernel, is_causal=True, state=inside), expected, kernel)
        stepped, inside_stepped = state.clone(), inside
        x = (q[:, :, 0], k[:, :, 0], v[:, :, 0])
        check_same(
            attention_step(*x, inside_stepped, kernel=kernel),
            attention_step(*x, stepped, kernel=kernel),
            f"{kernel}: step",
        )
        check_same(inside_stepped, stepped, f"{kernel}: state after a step")
        assert wide[0].isnan().all() and wide[3].isnan().all() and wide[:, 0].isnan().all()
