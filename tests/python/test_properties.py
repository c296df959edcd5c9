"""The oracle properties of docs/math.md, section 7: a test per row, named by its number, at 4x the table's figure.

Where the CPU promises more than the table (rows 3, 4, 5, 12: bit for bit, token by token), more is asked.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import elattn
from compare import (
    ACCUMULATION,
    KERNELS,
    SQUARED,
    attention,
    check_forward,
    check_promise,
    check_same,
    check_state,
    check_state_promise,
    gradients,
    reference,
    same,
)
from elattn.testing import reference_attention
from inputs import qkv, three_scales
from tolerances import check, check_rms, limit, relative, rounding

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
WIDE = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, BFLOAT16], ids=["float32", "float64", "bfloat16"])
MODES = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
DISTANCES = pytest.mark.parametrize("kernel", ["sum_sq", "sub_sq"])
SIGN = {"sum_sq": 1.0, "sub_sq": -1.0}
CUTS = (1, 16, 47, 64, 63, 129)


def grads(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*leaves, **options), leaves, grad_out)


def grad_like(q: Tensor, v: Tensor) -> Tensor:
    return torch.randn(*q.shape[:-1], v.size(-1), dtype=FLOAT64).to(q.dtype)


def on_grid(x: Tensor, step: float) -> Tensor:
    return (x / step).round() * step


def in_pieces(q: Tensor, k: Tensor, v: Tensor, cuts: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    """One causal call per piece, handing the state on."""
    outs, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, q.size(2)], strict=True):
        piece = [x[:, :, start:stop] for x in (q, k, v)]
        out, state = attention(*piece, is_causal=True, state=state, return_state=True, **options)
        outs.append(out)
    return torch.cat(outs, 2), state


def token_by_token(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    state = elattn.new_state(q.size(0), k.size(1), k.size(3), v.size(3), kernel=kernel, dtype=ACCUMULATION[q.dtype])
    steps = [elattn.attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state, kernel=kernel) for t in range(q.size(2))]
    return torch.stack(steps, 2)


@DTYPES
@MODES
def test_01_output_is_the_quadratic_form(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    check(elattn.attention(q, k, v, is_causal=is_causal), reference(q, k, v, is_causal=is_causal), "1")


@DTYPES
@MODES
def test_02_gradients_are_those_of_the_quadratic_form(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(length=130, dtype=dtype)
    g = grad_like(q, v)
    options = {"kernel": "hadamard_exp", "is_causal": is_causal}
    expected = gradients(reference, {"q": q, "k": k, "v": v}, g, None, dtype=FLOAT64, **options)
    for name, actual in zip("qkv", grads(q, k, v, g, **options), strict=True):
        check(actual, expected[name], "2", scale=relative(expected[name]), what=f"d{name}")


@DTYPES
def test_03_prefill_in_two_calls(dtype: torch.dtype) -> None:
    q, k, v = three_scales(dtype=dtype)
    whole = elattn.attention(q, k, v, is_causal=True)
    _, expected = reference(q, k, v, is_causal=True, return_state=True)
    for cut in CUTS:
        out, state = in_pieces(q, k, v, [cut])
        check_promise(out, whole, "3", f"split at {cut}")
        check_state(state, expected, 16, 16, kernel="hadamard_exp", dtype=dtype, what=f"split at {cut}")


@DTYPES
def test_04_token_by_token(dtype: torch.dtype) -> None:
    q, k, v = three_scales(length=130, dtype=dtype)
    check_promise(token_by_token(q, k, v, "hadamard_exp"), elattn.attention(q, k, v, is_causal=True), "4")


@DTYPES
def test_05_piece_size(dtype: torch.dtype) -> None:
    q, k, v = three_scales(length=257, dtype=dtype)
    expected, expected_state = in_pieces(q, k, v, list(range(64, 257, 64)))
    for size in (16, 32, 128):
        out, state = in_pieces(q, k, v, list(range(size, 257, size)))
        check_promise(out, expected, "5", f"pieces of {size}")
        check_state_promise(state, expected_state, 16, 16, "hadamard_exp", dtype, f"state, pieces of {size}")


@DTYPES
@MODES
def test_06_adding_a_constant_to_a_query_changes_no_bit(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    q, k = (on_grid(x.clamp(-8, 8), 0.125) for x in (q, k))  # sums are then exact, q + c in bfloat16 too
    c = torch.randint(-16, 17, (*q.shape[:3], 1)).to(dtype)
    check_same(elattn.attention(q + c, k, v, is_causal=is_causal), elattn.attention(q, k, v, is_causal=is_causal))


@WIDE
@MODES
def test_07_channel_gauge(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    q, k = on_grid(q, 2.0**-8), on_grid(k, 2.0**-8)
    a = on_grid(4 * torch.randn(16, dtype=dtype), 2.0**-8)
    check(
        elattn.attention(q - a, k + a, v, is_causal=is_causal),
        elattn.attention(q, k, v, is_causal=is_causal).double(),
        "7",
    )


@DTYPES
@MODES
def test_08_constant_values(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    constant = torch.randn(16, dtype=dtype).expand_as(v)
    check(elattn.attention(q, k, constant, is_causal=is_causal), constant, "8")
    if is_causal:
        check(elattn.attention(q, k, v, is_causal=True)[:, :, 0], v[:, :, 0], "8-first")


@DTYPES
@MODES
def test_09_outputs_lie_between_the_smallest_and_the_largest_visible_value(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    out = elattn.attention(q, k, v, is_causal=is_causal)
    low = v.cummin(2).values if is_causal else v.amin(2, keepdim=True).expand_as(v)
    high = v.cummax(2).values if is_causal else v.amax(2, keepdim=True).expand_as(v)
    # Rounding to a stored type is monotone, so it cannot leave the interval.
    slack = limit("9", dtype) * v.double().abs().max()
    assert (low.double() - out.double()).max() <= slack
    assert (out.double() - high.double()).max() <= slack


@WIDE
@MODES
def test_10_affine_in_the_values(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    out = elattn.attention(q, k, v, is_causal=is_causal)
    check(elattn.attention(q, k, 2 * v + 5, is_causal=is_causal), 2 * out.double() + 5, "10")


@DTYPES
@pytest.mark.parametrize("kernel", KERNELS)
def test_11_bidirectional_is_a_function_of_the_set_of_tokens(dtype: torch.dtype, kernel: str) -> None:
    q, k, v = three_scales(dtype=dtype)
    out = elattn.attention(q, k, v, kernel=kernel)
    order = torch.randperm(200)
    check(elattn.attention(q, k[:, :, order], v[:, :, order], kernel=kernel), out, "11-permutation", roundings=2)
    twice = [torch.cat([x, x], 2) for x in (k, v)]
    check(elattn.attention(q, *twice, kernel=kernel), out, "11-twice", roundings=2)
    causal = elattn.attention(q, k, v, kernel=kernel, is_causal=True)
    check(causal[:, :, -1], out[:, :, -1], "11-last-row", roundings=2)


@DTYPES
@pytest.mark.parametrize("kernel", KERNELS)
def test_12_causality(dtype: torch.dtype, kernel: str) -> None:
    q, k, v = three_scales(length=130, dtype=dtype)
    for t in (1, 64, 100, 129):
        changed = [torch.cat([x[:, :, :t], 100 * x[:, :, t:] + 3], 2) for x in (q, k, v)]
        out, other = (elattn.attention(*x, kernel=kernel, is_causal=True) for x in ((q, k, v), changed))
        check_promise(out[:, :, :t], other[:, :, :t], "12", f"rows before {t}")
        assert not same(out[:, :, t:], other[:, :, t:])
        g = grad_like(q, v)
        g[:, :, t:] = 0
        dq, dk, dv = grads(q, k, v, g, kernel=kernel, is_causal=True)
        for name, gradient in {"q": dq, "k": dk, "v": dv}.items():
            assert not gradient[:, :, t:].any(), f"d{name} from row {t} on, which the loss does not see"
        assert dk[:, :, :t].any() or t == 1
        assert dv[:, :, :t].any()


@DTYPES
@MODES
def test_13_query_gradients_sum_to_zero_over_channels(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    dq = grads(q, k, v, grad_like(q, v), is_causal=is_causal)[0].double()
    size = dq.abs().sum(-1)
    bound = limit("13", dtype) * size.max() + rounding(size, dtype)
    assert (dq.sum(-1).abs() <= bound).all()


@WIDE
@MODES
def test_14_gradients_of_queries_and_keys_have_equal_sums(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    g = grad_like(q, v)
    dq, dk, dv = (x.double() for x in grads(q, k, v, g, is_causal=is_causal))
    check(dk.sum(2), dq.sum(2), "14-qk", dtype=dtype, scale=dq.abs().sum(2).max())
    check(dv.sum(2), g.double().sum(2), "14-v", dtype=dtype, scale=g.double().abs().sum(2).max())


@WIDE
@MODES
def test_15_values_matter_up_to_a_constant(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    g = grad_like(q, v)
    constant = torch.randn(16, dtype=dtype).expand_as(v)
    dq, dk, _ = grads(q, k, constant, g, is_causal=is_causal)
    unit = (g * constant).sum(-1).abs().max().item()
    check(dq, torch.zeros_like(dq), "15-constant", scale=unit)
    # A key collects the rounding of every query that sees it, weighted by at most 1 each.
    check(dk, torch.zeros_like(dk), "15-constant", scale=unit * math.sqrt(q.size(2)))
    v = on_grid(v, 2.0**-16)
    for before, after in zip(
        grads(q, k, v, g, is_causal=is_causal)[:2], grads(q, k, v + 8, g, is_causal=is_causal)[:2], strict=True
    ):
        check(after, before, "15-shift", scale=relative(before))


@WIDE
@MODES
def test_16_the_value_gradient_is_the_adjoint(dtype: torch.dtype, is_causal: bool) -> None:
    # What is left are roundings of both signs, relative to a sum that grows faster: many rows, as in the table.
    size = {"heads": 8, "length": 512, "dtype": dtype}
    q, k, v = three_scales(**size)
    g = grad_like(q, v)
    _, state = elattn.attention(*three_scales(heads=8, length=20, dtype=dtype), is_causal=True, return_state=True)
    v, state = v.requires_grad_(), state.requires_grad_()
    out = elattn.attention(q, k, v, is_causal=is_causal, state=state)
    dv, d_state = torch.autograd.grad(out, (v, state), g)
    sums, d_sums = (elattn.unpack_state(x, 16, 16)["S"].double() for x in (state, d_state))
    left = g.double() * out.double()
    right = (dv.double() * v.double()).sum() + (d_sums * sums).sum()
    check(right, left.sum(), "16", dtype=dtype, scale=left.abs().sum())


@DTYPES
@MODES
def test_17_gauge_of_the_state(dtype: torch.dtype, is_causal: bool) -> None:
    _, state = elattn.attention(*three_scales(length=20, dtype=dtype), is_causal=True, return_state=True)
    q, k, v = three_scales(length=50, dtype=dtype)
    g = grad_like(q, v)
    c = on_grid(torch.rand(3, 2, 16, dtype=FLOAT64) * 8 - 4, 2.0**-4)
    moved = state.clone()
    fields = elattn.unpack_state(moved, 16, 16)
    fields["S"].mul_(torch.exp(-c)[..., None])
    fields["z"].mul_(torch.exp(-c))
    fields["m"].add_(c)

    def run(initial: Tensor) -> tuple[Tensor, Tensor]:
        initial = initial.clone().requires_grad_()
        out = elattn.attention(q, k, v, is_causal=is_causal, state=initial)
        return out, torch.autograd.grad(out, initial, g)[0]

    (out, grad), (moved_out, moved_grad) = run(state), run(moved)
    check(moved_out, out, "17", roundings=2)
    grad, moved_grad = (elattn.unpack_state(x.double(), 16, 16) for x in (grad, moved_grad))
    for name, factor in (("S", torch.exp(c)[..., None]), ("z", torch.exp(c))):
        expected = factor * grad[name]
        check(
            moved_grad[name],
            expected,
            "17-gradient",
            dtype=dtype,
            scale=relative(expected),
            roundings=0,
        )


@WIDE
@pytest.mark.parametrize("kernel", KERNELS)
def test_18_gradients_through_a_split(dtype: torch.dtype, kernel: str) -> None:
    """The table's figure is 0 for equal cuts; the CPU's backward keeps its own, so rounding (row 2) is what remains."""
    q, k, v = three_scales(length=130, dtype=dtype)
    g = grad_like(q, v)
    expected = grads(q, k, v, g, kernel=kernel, is_causal=True)
    for cut in (1, 47, 64, 129):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = in_pieces(*leaves, [cut], kernel=kernel)
        for name, actual, want in zip("qkv", torch.autograd.grad(out, leaves, g), expected, strict=True):
            check(actual, want, "2", scale=relative(want), what=f"d{name}, split at {cut}")


@DTYPES
@MODES
def test_19_duplicated_channels_and_deleted_tokens(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    out = elattn.attention(q, k, v, is_causal=is_causal)
    double = elattn.attention(torch.cat([q, q], -1), torch.cat([k, k], -1), v, is_causal=is_causal)
    check(double, out, "19-duplication", roundings=2)
    gone = torch.zeros(200, dtype=torch.bool)
    gone[torch.randperm(199)[:40] + 1] = True
    hidden = k.masked_fill(gone[:, None], -1e4)
    remaining = elattn.attention(*(x[:, :, ~gone] for x in (q, k, v)), is_causal=is_causal)
    check(elattn.attention(q, hidden, v, is_causal=is_causal)[:, :, ~gone], remaining, "19-deletion", roundings=2)
    _, dk, dv = grads(q, hidden, v, grad_like(q, v), is_causal=is_causal)
    assert not dk[:, :, gone].any() and not dv[:, :, gone].any()


@WIDE
@pytest.mark.parametrize("kernel", KERNELS)
@MODES
def test_20_directional_derivative(dtype: torch.dtype, kernel: str, is_causal: bool) -> None:
    q, k, v = qkv(2, 2, 60, dtype=dtype)
    g = grad_like(q, v)
    actual = [x.double() for x in grads(q, k, v, g, kernel=kernel, is_causal=is_causal)]
    length = torch.cat([x.flatten() for x in actual]).norm()
    direction = [x / length for x in actual]

    def loss(step: float) -> Tensor:
        moved = [x.double() + step * d for x, d in zip((q, k, v), direction, strict=True)]
        return (g.double() * reference(*moved, kernel=kernel, is_causal=is_causal)).sum()

    h = 1e-3  # fourth order: truncation and cancellation are both near 1e-11
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    found = sum((a * d).sum() for a, d in zip(actual, direction, strict=True))
    tolerance = limit("20", dtype) + 1e-9  # what the difference quotient itself is good for
    assert abs(found - slope) <= tolerance * slope.abs()


@WIDE
@pytest.mark.parametrize("kernel", [*KERNELS, "features"])
def test_21_merging_states(dtype: torch.dtype, kernel: str) -> None:
    def state(length: int, mean: float) -> Tensor:
        q, k, v = three_scales(length=length, dtype=dtype)
        return attention(q, k + mean, v, kernel=kernel, return_state=True)[1]

    def merge(a: Tensor, b: Tensor) -> Tensor:
        return elattn.merge_states(a, b, 16, 16, kernel=kernel)

    def close(a: Tensor, b: Tensor, what: str) -> None:
        check_state(a, b, 16, 16, kernel=kernel, row="21", what=what)

    a, b, c, d = state(30, 0.0), state(1, 2.0), state(64, -1.0), state(7, 0.0)
    left, right = merge(merge(merge(a, b), c), d), merge(a, merge(b, merge(c, d)))
    close(left, right, "left fold = right fold")
    close(merge(merge(a, b), merge(c, d)), left, "tree = left fold")
    close(merge(a, b), merge(b, a), "order")
    empty = elattn.new_state(3, 2, 16, 16, kernel=kernel, dtype=dtype)
    check_same(merge(a, empty), a)
    check_same(merge(empty, a), a)
    check_same(merge(empty, empty), empty)


MAGNITUDES = torch.tensor([0, 1e-30, -1e-30, 1, -1, 88, -88, 104, -104, 1e4, -1e4, 6.5e4, -6.5e4], dtype=FLOAT64)


@WIDE
@pytest.mark.parametrize("kernel", KERNELS)
@MODES
def test_22_fuzz_of_magnitudes(dtype: torch.dtype, kernel: str, is_causal: bool) -> None:
    for _ in range(10):
        length, head_dim = int(torch.randint(1, 40, ())), int(torch.randint(1, 9, ()))
        q, k = (MAGNITUDES[torch.randint(len(MAGNITUDES), (4, 2, length, head_dim))].to(dtype) for _ in "qk")
        v = torch.randn(4, 2, length, 5, dtype=dtype)
        out = elattn.attention(q, k, v, kernel=kernel, is_causal=is_causal)
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(x).all() for x in grads(q, k, v, grad_like(q, v), kernel=kernel, is_causal=is_causal))
        if kernel == "hadamard_exp":
            check(out, reference(q, k, v, is_causal=is_causal), "22", scale=v.abs().max())


@DTYPES
@pytest.mark.parametrize("kernel", SQUARED)
@MODES
def test_s1_squared_kernels_are_the_quadratic_form(dtype: torch.dtype, kernel: str, is_causal: bool) -> None:
    q, k, v = three_scales(length=130, dtype=dtype)
    options = {"kernel": kernel, "is_causal": is_causal}
    check_forward(q, k, v, **options)
    g = grad_like(q, v)
    expected = gradients(reference, {"q": q, "k": k, "v": v}, g, None, dtype=FLOAT64, **options)
    for name, actual in zip("qkv", grads(q, k, v, g, **options), strict=True):
        for b in range(3):  # the three scales have gradients of three magnitudes
            want = expected[name][b]
            check(actual[b], want, "2", scale=relative(want), what=f"d{name}[{b}]")
            if dtype != BFLOAT16:
                check_rms(actual[b], want, "S1-gradient", what=f"d{name}[{b}]")


@WIDE
@DISTANCES
@MODES
def test_s2_translation(dtype: torch.dtype, kernel: str, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    q, k = on_grid(q, 2.0**-8), on_grid(k, 2.0**-8)
    t = on_grid(200 * torch.randn(16, dtype=dtype), 2.0**-8)
    moved = elattn.attention(q - SIGN[kernel] * t, k + t, v, kernel=kernel, is_causal=is_causal)
    check(moved, elattn.attention(q, k, v, kernel=kernel, is_causal=is_causal), "S2")


@DTYPES
@DISTANCES
@MODES
def test_s3_scaling_rotation_and_sign(dtype: torch.dtype, kernel: str, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    options = {"kernel": kernel, "is_causal": is_causal}
    out = elattn.attention(q, k, v, **options)
    check_same(elattn.attention(128 * q, 128 * k, v, **options), out)
    other = "sub_sq" if kernel == "sum_sq" else "sum_sq"
    check_same(elattn.attention(-q, k, v, kernel=other, is_causal=is_causal), out)
    if dtype != BFLOAT16:  # there the rotated inputs are rounded
        rotation = torch.linalg.qr(torch.randn(16, 16, dtype=FLOAT64)).Q
        rotated = [(x.double() @ rotation).to(dtype) for x in (q, k)]
        check(elattn.attention(*rotated, v, **options), out, "S3-rotation")


@WIDE
@DISTANCES
@MODES
def test_s4_sums_of_gradients(dtype: torch.dtype, kernel: str, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    g = grad_like(q, v)
    dq, dk, dv = (x.double() for x in grads(q, k, v, g, kernel=kernel, is_causal=is_causal))
    check(SIGN[kernel] * dk.sum(2), dq.sum(2), "S4-qk", dtype=dtype, scale=dq.abs().sum(2).max())
    euler = (dq * q.double()).sum() + (dk * k.double()).sum()
    check(euler, torch.zeros_like(euler), "S4-euler", dtype=dtype, scale=(dq * q).abs().sum() + (dk * k).abs().sum())
    check(dv.sum(2), g.double().sum(2), "S4-v", dtype=dtype, scale=g.double().abs().sum(2).max())


@DTYPES
@pytest.mark.parametrize("kernel", SQUARED)
@MODES
def test_s5_constant_values_exactly(dtype: torch.dtype, kernel: str, is_causal: bool) -> None:
    q, k, v = three_scales(dtype=dtype)
    constant = torch.randn(16, dtype=dtype).expand_as(v)
    check_same(elattn.attention(q, k, constant, kernel=kernel, is_causal=is_causal), constant)
    dq, dk, _ = grads(q, k, constant, grad_like(q, v), kernel=kernel, is_causal=is_causal)
    assert not dq.any() and not dk.any()


def shifted(state: Tensor, kernel: str, d: Tensor, h: Tensor) -> Tensor:
    """The same state in the gauge (c + d, e + h): docs/math.md, 3.2."""
    moved = state.double()
    f = elattn.unpack_state(moved, 16, 16, kernel=kernel)
    f["T"] += -2 * (d[..., None, :] @ f["M"]).squeeze(-2) + d.square().sum(-1, keepdim=True) * f["sv"]
    f["M"] -= d[..., None] * f["sv"][..., None, :]
    f["skk"] += -2 * (d * f["sk"]).sum(-1) + f["n"] * d.square().sum(-1)
    f["sk"] -= f["n"][..., None] * d
    f["T"] -= f["skk"][..., None] * h
    f["M"] -= f["sk"][..., None] * h[..., None, :]
    f["sv"] -= f["n"][..., None] * h
    f["c"] += d
    f["e"] += h
    return moved.to(state.dtype)


@DTYPES
@pytest.mark.parametrize("kernel", SQUARED)
def test_s6_pieces_steps_and_gauge_of_squared_states(dtype: torch.dtype, kernel: str) -> None:
    q, k, v = three_scales(dtype=dtype)
    whole, state = elattn.attention(q, k, v, kernel=kernel, is_causal=True, return_state=True)
    for cut in CUTS:
        out, final = in_pieces(q, k, v, [cut], kernel=kernel)
        check_promise(out, whole, "S6", f"split at {cut}")
        check_state_promise(final, state, 16, 16, kernel, dtype, f"state, split at {cut}")
    check_promise(token_by_token(q, k, v, kernel), whole, "S6")
    std = torch.tensor([0.5, 2.0, 8.0], dtype=FLOAT64).view(3, 1, 1)
    d = on_grid((0.1 if kernel == "directional" else std) * torch.randn(3, 2, 16, dtype=FLOAT64), 2.0**-6)
    h = on_grid(torch.randn(3, 2, 16, dtype=FLOAT64), 2.0**-6)
    q, k, v = three_scales(length=50, dtype=dtype)
    for is_causal in (True, False):
        out, moved = (
            elattn.attention(q, k, v, kernel=kernel, is_causal=is_causal, state=s)
            for s in (state, shifted(state, kernel, d, h))
        )
        check(moved, out, "S6", roundings=2, what=f"causal {is_causal}")


@WIDE
@DISTANCES
@MODES
def test_s7_zero_denominators(dtype: torch.dtype, kernel: str, is_causal: bool) -> None:
    point = torch.randn(1, 2, 1, 16, dtype=dtype)
    q, k = (-SIGN[kernel] * point).expand(1, 2, 20, 16), point.expand(1, 2, 20, 16)
    v = torch.randn(1, 2, 20, 8, dtype=dtype)
    g = grad_like(q, v)
    options = {"kernel": kernel, "is_causal": is_causal}
    assert not elattn.attention(q, k, v, **options).any()
    assert not any(x.any() for x in grads(q, k, v, g, **options))
    for distance in (1e-2, 1e-4):  # the gradient grows as 1 / distance, the output stays an average
        near = q + distance * torch.randn_like(q)
        check(elattn.attention(near, k, v, **options), reference(near, k, v, **options), "S1", what=f"{distance}")
        assert all(torch.isfinite(x).all() for x in grads(near, k, v, g, **options))
    mean = v.double().cumsum(2) / torch.arange(1, 21).view(20, 1) if is_causal else v.double().mean(2, keepdim=True)
    check(elattn.attention(q, k, v, eps=1e-6, **options), mean.expand(1, 2, 20, 8), "S1", what="eps")


@WIDE
@MODES
def test_e1_directional(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = three_scales(length=130, dtype=dtype)
    options = {"kernel": "directional", "is_causal": is_causal}
    out = elattn.attention(q, k, v, **options)
    size = torch.exp2(torch.randint(-40, 40, (*q.shape[:3], 1))).to(dtype)
    check(elattn.attention(q * size, k, v, **options), out, "E1", what="norm of q")
    zero = torch.zeros_like(q)  # the unit vector of 0 is 0, so every weight is that of the key alone
    weights = k.double().square().sum(-1, keepdim=True) + 1
    kappa = weights * k.double().norm(dim=-1, keepdim=True).sign()
    expected = (
        (kappa * v.double()).cumsum(2) / kappa.cumsum(2)
        if is_causal
        else (kappa * v.double()).sum(2, keepdim=True) / kappa.sum(2, keepdim=True)
    )
    check(elattn.attention(zero, k, v, **options), expected.expand_as(v), "E1", what="q = 0")
    dq, _, _ = grads(q, k, v, grad_like(q, v), **options)
    dot = (dq.double() * q.double()).sum(-1)
    assert (dot.abs() <= limit("E1", dtype) * (dq.double() * q.double()).abs().sum(-1).amax(-1, keepdim=True)).all()
    unit = [x.double() / x.double().norm(dim=-1, keepdim=True) for x in (q, k)]
    pairs = (unit[0][:, :, :, None] + unit[1][:, :, None]).square().sum(-1) * weights.transpose(-1, -2)
    pairs = pairs.tril() if is_causal else pairs
    check(out, (pairs @ v.double()) / pairs.sum(-1, keepdim=True), "E1", what="weighted sum_sq on unit vectors")


@DTYPES
@MODES
def test_d1_features(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = qkv(2, 2, 65, dtype=dtype)
    phi, psi = q.abs(), k.abs()
    out = elattn.feature_attention(phi, psi, v, is_causal=is_causal)
    check(out, reference_attention(phi, psi, v, kernel="features", is_causal=is_causal), "1")
    row_scale = torch.exp2(torch.randint(-30, 30, (2, 2, 65, 1))).to(dtype)
    check_same(elattn.feature_attention(phi * row_scale, psi, v, is_causal=is_causal), out)

    phi[:, :, 10] = 0  # a row whose denominator is 0
    leaves = [x.clone().requires_grad_() for x in (phi, psi, v)]
    out = elattn.feature_attention(*leaves, is_causal=is_causal)
    assert not out[:, :, 10].any()
    found = torch.autograd.grad(out, leaves, grad_like(q, v))
    assert all(torch.isfinite(x).all() for x in found)
    assert not found[0][:, :, 10].any()
