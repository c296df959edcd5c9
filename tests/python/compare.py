"""Runs an operator and its float64 reference on the same values, and compares outputs, states and gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import elattn
from backend import BACKEND
from elattn.testing import gauge_free, reference_attention
from tolerances import STORAGE_ROUNDOFF, check, check_rms, limit, relative

KERNELS = ("hadamard_exp", "sum_sq", "sub_sq", "directional", "elu")
ALL_KERNELS = (*KERNELS, "features")
SQUARED = ("sum_sq", "sub_sq", "directional")
ACCUMULATION = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def number(kernel: str) -> str:
    """Row of docs/math.md, section 7, that bounds the error of a kernel's output; row 2 bounds all gradients."""
    return "S1" if kernel in SQUARED else "1"


def attention(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "hadamard_exp", **options: Any) -> Any:
    """`elattn.attention`, or `elattn.feature_attention` of |q| and |k| for kernel "features"."""
    if kernel == "features":
        return elattn.feature_attention(q.abs(), k.abs(), v, **options)
    return elattn.attention(q, k, v, kernel=kernel, **options)


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, kernel: str = "hadamard_exp", **options: Any
) -> Tensor:
    if kernel == "features":
        return elattn.feature_attention_step(q.abs(), k.abs(), v, state, **options)
    return elattn.attention_step(q, k, v, state, kernel=kernel, **options)


def reference(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "hadamard_exp", **options: Any) -> Any:
    if kernel == "features":
        q, k = q.abs(), k.abs()
    return reference_attention(q, k, v, kernel=kernel, **options)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but for the sign of a zero."""
    return a.dtype == b.dtype and torch.equal(a, b)


def check_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Assert `same`, with a short message."""
    if not same(actual, expected):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
            f"{what}: {actual.dtype} {tuple(actual.shape)}"
        )
        differ = (actual != expected).nonzero()
        first = tuple(differ[0].tolist())
        raise AssertionError(
            f"{what}: {len(differ)} of {actual.numel()} entries differ, the first at {first}: "
            f"{actual[first].item()!r} instead of {expected[first].item()!r}"
        )


def check_promise(actual: Tensor, expected: Tensor, number: str, what: str = "") -> None:
    """What the CPU promises bit for bit, and the CUDA kernels to the tolerance of a property."""
    if BACKEND == "cpu":
        check_same(actual, expected, what)
    else:
        check(actual, expected, number, roundings=2, what=what)


def check_state_promise(
    state: Tensor, expected: Tensor, head_dim: int, value_dim: int, kernel: str, dtype: torch.dtype, what: str = ""
) -> None:
    """`check_promise` for states, whose gauges may differ on CUDA."""
    if BACKEND == "cpu":
        check_same(state, expected, what)
    else:
        check_state(state, expected, head_dim, value_dim, kernel=kernel, dtype=dtype, what=what)


def _units(content: dict[str, Tensor], kernel: str) -> dict[str, Tensor]:
    """What rounding of each part of a state refers to, for v ~ N(0, 1): the sum of the absolute values of its terms."""
    if kernel == "hadamard_exp":
        return {"U": torch.ones(()), "ell": torch.ones(())}
    if kernel in SQUARED:
        n, skk = content["n"], content["skk"].abs()
        spread = (skk / torch.where(n > 0, n, 1.0)).sqrt() + 1e-3
        k, v = content["mean_k"].abs().amax(-1), content["mean_v"].abs().amax(-1)
        units = {
            "n": n,
            "mean_k": k + spread,
            "mean_v": v + 1,
            "skk": n * spread**2,
            "M": n * spread,
            "T": n * spread**2,
        }
        return {name: unit.reshape(*unit.shape, *[1] * (content[name].dim() - 2)) for name, unit in units.items()}
    return {"S": content["z"][..., None], "z": content["z"]}


def check_state(
    state: Tensor, expected: Tensor, head_dim: int, value_dim: int, *, kernel: str, row: str = "3-state",
    scale_tolerance: float = 1.0, dtype: torch.dtype | None = None, what: str = "",
) -> None:  # fmt: skip
    """What the states mean, whatever their gauges; `dtype` is that of the inputs that they come from."""
    content = gauge_free(state, head_dim, value_dim, kernel=kernel)
    expected_content = gauge_free(expected, head_dim, value_dim, kernel=kernel)
    units = _units(expected_content, kernel)
    for name, part in content.items():
        want = expected_content[name]
        assert torch.equal(part.isinf(), want.isinf()), f"{kernel} {what}: state {name}"
        part, want = part.nan_to_num(neginf=0.0), want.nan_to_num(neginf=0.0)
        check(
            part,
            want,
            row,
            dtype=dtype or state.dtype,
            scale=scale_tolerance * units[name],
            roundings=0,
            what=f"{kernel} {what}: state {name}",
        )


def check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str = "hadamard_exp",
    scale_tolerance: float = 1.0,
    what: str = "",
    **options: Any,
) -> None:
    """Output, and the gauge-free content of the final state, against the reference."""
    out, state = attention(q, k, v, kernel=kernel, return_state=True, **options)
    expected, expected_state = reference(q, k, v, kernel=kernel, return_state=True, **options)
    assert out.dtype == q.dtype and state.dtype == ACCUMULATION[q.dtype], what
    check(out, expected, number(kernel), scale=scale_tolerance, what=f"{kernel} {what}: output")
    check_same(attention(q, k, v, kernel=kernel, **options), out, f"{kernel} {what}: without return_state")
    check_state(
        state,
        expected_state,
        k.size(-1),
        v.size(-1),
        kernel=kernel,
        scale_tolerance=scale_tolerance,
        dtype=q.dtype,
        what=what,
    )


def gradients(
    fn: Callable[..., Any], inputs: dict[str, Tensor | None], grad_out: Tensor, state_weights: dict[str, Tensor] | None,
    *, kernel: str, dtype: torch.dtype | None = None, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of <grad_out, out> + <state_weights, gauge-free final state> for each input that is not None."""
    leaves = {
        n: (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()
        for n, x in inputs.items()
        if x is not None
    }
    out, state = fn(kernel=kernel, return_state=True, **leaves, **options)
    loss = (out.double() * grad_out.double()).sum()
    if state_weights is not None:
        k, v = inputs["k"], inputs["v"]
        content = gauge_free(state, k.size(-1), v.size(-1), kernel=kernel)
        loss = loss + sum((state_weights[name] * part).sum() for name, part in content.items())
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def check_backward(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "hadamard_exp", decay: Tensor | None = None,
    state: Tensor | None = None, final: bool = False, cancels: bool = False,
    scale_tolerance: float = 1.0, what: str = "", **options: Any,
) -> None:  # fmt: skip
    """Gradients of q, k, v, decay and state; `final`: a gradient arrives at the final state as well.

    `cancels`: gradients of q and k may be nearly zero because one key dominates. Row 15 then says what rounding leaves
    of g . (v - y), times the root of the number of rows that a dominating key collects it from.
    """
    inputs = {"q": q, "k": k, "v": v, "decay": decay, "state": state}
    grad_out = torch.randn(*q.shape[:-1], v.size(-1), dtype=torch.float64).to(q.dtype)
    weights = None
    if final:
        _, last = reference(q, k, v, kernel=kernel, decay=decay, state=state, return_state=True, **options)
        content = gauge_free(last, k.size(-1), v.size(-1), kernel=kernel)
        weights = {name: torch.randn_like(part) / relative(part) for name, part in content.items()}
    actual = gradients(attention, inputs, grad_out, weights, kernel=kernel, **options)
    expected = gradients(reference, inputs, grad_out, weights, kernel=kernel, dtype=torch.float64, **options)
    for name, gradient in actual.items():
        want, row, unit = expected[name], "2", relative(expected[name])
        if cancels and name in ("q", "k"):
            size = (grad_out.double() @ v.double().transpose(-1, -2)).abs().max().item()
            size *= 1.0 if name == "q" else q.size(2) ** 0.5
            if limit("15-constant", q.dtype) * size > limit(row, q.dtype) * unit:
                row, unit = "15-constant", size
        if name == "decay" and decay.dim() <= 2:
            # A sum over the tokens, whose rounding refers to the sum of absolute values.
            shape = (k.size(0), k.size(1), k.size(2), *decay.shape[1:])
            each = decay.reshape(1, decay.size(0), 1, *decay.shape[1:]).expand(shape)
            terms = gradients(
                reference, inputs | {"decay": each}, grad_out, weights, kernel=kernel, dtype=torch.float64, **options
            )
            unit = relative(terms["decay"].abs().sum((0, 2)))
        assert gradient.dtype == inputs[name].dtype, name
        message = f"{kernel} {what}: gradient of {name}"
        # That of a state is never stored in the inputs' dtype, but it is computed from them.
        of_state = {"dtype": q.dtype, "roundings": 0} if name == "state" else {}
        check(gradient, want, row, scale=scale_tolerance * unit, what=message, **of_state)
        if kernel in SQUARED and name in ("q", "k", "v") and STORAGE_ROUNDOFF[gradient.dtype] == 0:
            check_rms(gradient, want, "S1-gradient", scale=scale_tolerance, what=message)
