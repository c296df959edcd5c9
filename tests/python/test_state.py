"""States: layout, views, merging, pools and slots."""

import pytest
import torch
from torch import Tensor

import elattn
from backend import CPU_CONTRACT
from compare import (
    ACCUMULATION,
    ALL_KERNELS,
    KERNELS,
    SQUARED,
    attention,
    attention_step,
    check_same,
    check_state,
    reference,
)
from inputs import DTYPES, qkv
from tolerances import check, relative

EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS)

FIELDS = {
    "hadamard_exp": {"S": "kv", "z": "k", "m": "k", "r": "k"},
    "squared": {"c": "k", "e": "v", "n": "", "sk": "k", "skk": "", "sv": "v", "M": "kv", "T": "v"},
    "features": {"S": "kv", "z": "k"},
}


def fields_of(kernel: str) -> dict[str, str]:
    return FIELDS.get(kernel) or FIELDS["squared" if kernel in SQUARED else "features"]


@EVERY_KERNEL
def test_layout(kernel: str) -> None:
    """Sizes, order and shapes of the fields, and that views share the state's memory."""
    for head_dim, value_dim in [(1, 1), (3, 5), (64, 64), (16, 40)]:
        shapes = {"": (), "k": (head_dim,), "v": (value_dim,), "kv": (head_dim, value_dim)}
        layout = {name: shapes[kind] for name, kind in fields_of(kernel).items()}
        size = sum(int(torch.tensor(shape).prod()) for shape in layout.values())
        assert elattn.state_size(kernel, head_dim, value_dim) == size
        state = torch.arange(2.0 * 3 * size).view(2, 3, size)
        views = elattn.unpack_state(state, head_dim, value_dim, kernel=kernel)
        assert list(views) == list(layout)
        flat = torch.cat([x.reshape(2, 3, -1) for x in views.values()], -1)
        assert torch.equal(flat, state)
        for name, view in views.items():
            assert view.shape == (2, 3, *layout[name]), name
            assert view.untyped_storage().data_ptr() == state.untyped_storage().data_ptr(), name
            view.fill_(-1.0)
        assert torch.equal(state, torch.full_like(state, -1.0))


@EVERY_KERNEL
def test_new_state_is_empty(kernel: str) -> None:
    for dtype in (torch.float32, torch.float64):
        state = elattn.new_state(3, 2, 4, 5, kernel=kernel, dtype=dtype)
        assert state.shape == (3, 2, elattn.state_size(kernel, 4, 5)) and state.dtype == dtype
        for name, view in elattn.unpack_state(state, 4, 5, kernel=kernel).items():
            assert (view == (-torch.inf if name == "m" else 0.0)).all(), name
    assert elattn.new_state(1, 1, 2, 2).dtype == torch.float32
    assert elattn.new_state(0, 2, 4, 5, kernel=kernel).shape[0] == 0
    assert elattn.new_state(2, 2, 4, 5, kernel=kernel, device="meta").device.type == "meta"


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_empty_state_changes_no_bit(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, 30, 16, 8, dtype=dtype)
    empty = elattn.new_state(2, 2, 16, 8, kernel=kernel, dtype=ACCUMULATION[dtype])
    for is_causal in (True, False):
        out, state = attention(q, k, v, kernel=kernel, is_causal=is_causal, return_state=True)
        from_empty, from_empty_state = attention(
            q, k, v, kernel=kernel, is_causal=is_causal, state=empty, return_state=True
        )
        check_same(from_empty, out)
        check_same(from_empty_state, state)


@EVERY_KERNEL
def test_attention_never_modifies_a_state(kernel: str) -> None:
    q, k, v = qkv(2, 2, 30, 16, 8, requires_grad=True)
    _, state = attention(q, k, v, kernel=kernel, return_state=True)
    state = state.detach().requires_grad_()
    before = state.detach().clone()
    for is_causal in (True, False):
        out, after = attention(q, k, v, kernel=kernel, is_causal=is_causal, state=state, return_state=True)
        (out.sum() + after.nan_to_num(neginf=0.0).sum()).backward()
        assert after.data_ptr() != state.data_ptr()
    assert torch.equal(state.detach(), before)
    # Nothing is added by a call without keys, but the state returned is a copy.
    _, after = attention(*(x[:, :, :0] for x in (q, k, v)), kernel=kernel, state=state, return_state=True)
    check_same(after.detach(), before)
    assert after.data_ptr() != state.data_ptr()


@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_merge_is_differentiable(kernel: str) -> None:
    """Gradients through two states and their merge equal those through one call."""
    q, k, v = qkv(2, 2, 40, 16, 8, dtype=torch.float64, requires_grad=True)
    probe = qkv(2, 2, 9, 16, 8, key_len=3, dtype=torch.float64)
    g = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    a, b = (
        attention(*(x[:, :, s] for x in (q, k, v)), kernel=kernel, return_state=True)[1]
        for s in (slice(0, 15), slice(15, 40))
    )
    merged = elattn.merge_states(a, b, 16, 8, kernel=kernel)
    _, expected_state = reference(q, k, v, kernel=kernel, return_state=True)
    check_state(merged.detach(), expected_state.detach(), 16, 8, kernel=kernel, row="21")
    found = torch.autograd.grad(attention(*probe, kernel=kernel, state=merged), (k, v), g)
    whole = reference(probe[0], *(torch.cat([x, y], 2) for x, y in zip((k, v), probe[1:], strict=True)), kernel=kernel)
    for name, actual, expected in zip("kv", found, torch.autograd.grad(whole, (k, v), g), strict=True):
        check(actual, expected, "2", scale=relative(expected), what=f"d{name}")


def pool_of(kernel: str, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """States of different contents, none of them empty."""
    _, pool = attention(*qkv(rows, 2, 5, 8, 12, dtype=dtype), kernel=kernel, return_state=True)
    return pool


@EVERY_KERNEL
@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_slots_choose_rows_of_the_pool(kernel: str, slot_dtype: torch.dtype, dtype: torch.dtype) -> None:
    pool = pool_of(kernel, 7, dtype)
    before = pool.clone()
    slots = torch.tensor([5, -1, 0, 3], dtype=slot_dtype)
    x = [y[:, :, 0] for y in qkv(4, 4, 1, 8, 12, kv_heads=2, dtype=dtype)]
    out = attention_step(*x, pool, kernel=kernel, enable_gqa=True, slots=slots)
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert not out[b].any()
            continue
        row = before[slot : slot + 1].clone()
        check_same(attention_step(*(y[b : b + 1] for y in x), row, kernel=kernel, enable_gqa=True), out[b : b + 1])
        check_same(pool[slot : slot + 1], row, f"row {slot}")
    for untouched in (1, 2, 4, 6):
        check_same(pool[untouched], before[untouched], f"row {untouched}")


@EVERY_KERNEL
def test_a_pool_may_be_larger_than_the_batch(kernel: str) -> None:
    pool = pool_of(kernel, 5)
    before = pool.clone()
    x = [y[:, :, 0] for y in qkv(2, 2, 1, 8, 12)]
    out = attention_step(*x, pool, kernel=kernel)
    rows = before[:2].clone()
    check_same(attention_step(*x, rows, kernel=kernel), out)
    check_same(pool[:2], rows)
    check_same(pool[2:], before[2:], "rows beyond the batch")


@EVERY_KERNEL
def test_inactive_entries_are_not_read(kernel: str) -> None:
    pool = pool_of(kernel, 3)
    before = pool.clone()
    nan = [torch.full_like(y[:, :, 0], torch.nan) for y in qkv(3, 2, 1, 8, 12)]
    out = attention_step(*nan, pool, kernel=kernel, slots=torch.tensor([-1, -1, -1]))
    assert torch.equal(out, torch.zeros_like(out))
    check_same(pool, before)


@CPU_CONTRACT
@EVERY_KERNEL
@pytest.mark.parametrize(
    ("slots", "rule"),
    [([0, 2, 0], "twice|duplicate"), ([0, 5, 1], "5"), ([0, -2, 1], "-2"), ([-1, 2, 2], "twice|duplicate")],
)
def test_bad_slots_are_refused_before_anything_is_written(kernel: str, slots: list[int], rule: str) -> None:
    pool = pool_of(kernel, 5)
    before = pool.clone()
    x = [y[:, :, 0] for y in qkv(3, 2, 1, 8, 12)]
    with pytest.raises(RuntimeError, match=rule):
        attention_step(*x, pool, kernel=kernel, slots=torch.tensor(slots))
    check_same(pool, before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_states_move_between_calls_and_dtypes(kernel: str) -> None:
    """A float32 state made from bfloat16 inputs serves float32 inputs, and after a file it is the same."""
    q, k, v = qkv(1, 2, 20, 8, 12, dtype=torch.bfloat16)
    _, state = elattn.attention(q, k, v, kernel=kernel, is_causal=True, return_state=True)
    wide = [x.float() for x in (q, k, v)]
    _, expected = elattn.attention(*wide, kernel=kernel, is_causal=True, return_state=True)
    check_same(state, expected)
