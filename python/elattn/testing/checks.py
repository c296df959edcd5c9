"""Assertions about models and kernels of one's own. Each raises AssertionError with what it found, and where."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elattn.ops import FeatureKernel, attention
from elattn.testing.reference import reference_attention

__all__ = ["assert_causal", "assert_mixes_tokens", "assert_padding_invariant", "check_kernel"]


def assert_causal(fn: Callable[[Tensor], Tensor], ids: Tensor, *, tolerance: float = 1e-5) -> None:
    """Asserts that no output of `fn` depends on a later token.

    Args:
        fn: maps ids to outputs (B, L, ...), for example a language model to its logits; without randomness.
        ids: (B, L) token ids of which at least two differ, or (B, L, C) real numbers.
        tolerance: largest change allowed, relative to the largest output.

    Every token is changed in turn (32 of them if there are more), and the outputs before it must stay.
    """
    with torch.no_grad():
        before = fn(ids)
        for changed in _positions(1, ids.size(1)):
            moved = _moved(before, fn(_with_other_token(ids, changed)))[:changed]
            _require(
                not bool((moved > tolerance).any()),
                f"output {int(moved.argmax())} sees the future: it changed by {float(moved.max()):.2g} "
                f"of the largest output when token {changed} changed",
            )


def assert_mixes_tokens(fn: Callable[[Tensor], Tensor], ids: Tensor, *, tolerance: float = 1e-5) -> None:
    """Asserts that tokens reach the outputs of other positions: that attention attends to tokens, and not to heads.

    Arguments as in `assert_causal`. Every token but the last is changed in turn (32 of them if there are more), and
    some output at a later position must move by more than `tolerance` of the largest output.
    """
    with torch.no_grad():
        before = fn(ids)
        for changed in _positions(0, ids.size(1) - 1):
            moved = _moved(before, fn(_with_other_token(ids, changed)))[changed + 1 :]
            _require(
                bool((moved > tolerance).any()),
                f"no later output notices token {changed}: the largest change is {float(moved.max()):.2g} "
                "of the largest output",
            )


def assert_padding_invariant(
    fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, lengths: Sequence[int], *, tolerance: float = 1e-5
) -> None:
    """Asserts that padding at the end of a sequence changes nothing before it.

    Args:
        fn: maps x and a key padding mask (B, L), True for padding, to outputs (B, L, ...).
        x: (B, L) token ids or (B, L, C) real numbers.
        lengths: for each of the B sequences how many of its tokens are no padding.
        tolerance: largest difference allowed, relative to the largest output.

    The outputs must be those of each sequence on its own, and stay when the padding is filled with something else.
    """
    if len(lengths) != x.size(0):
        raise ValueError(f"assert_padding_invariant: x has batch {x.size(0)} but there are {len(lengths)} lengths")
    mask = torch.arange(x.size(1), device=x.device) >= torch.tensor(list(lengths), device=x.device)[:, None]
    other = x.flip(1) if x.dim() == 2 else x.flip(1) * 3 + 1
    refilled = torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), other, x)
    with torch.no_grad():
        out, again = fn(x, mask), fn(refilled, mask)
        for b, length in enumerate(lengths):
            if length == 0:
                continue
            alone = fn(x[b : b + 1, :length], mask[b : b + 1, :length])
            for found, what in ((again[b : b + 1, :length], "depends on"), (alone, "changes with the presence of")):
                moved = _moved(out[b : b + 1, :length], found)
                _require(
                    not bool((moved > tolerance).any()),
                    f"output {int(moved.argmax())} of sequence {b} {what} the padding: it changed by "
                    f"{float(moved.max()):.2g} of the largest output",
                )


def check_kernel(
    phi: Callable[[Tensor], Tensor],
    psi: Callable[[Tensor], Tensor],
    kappa: Callable[[Tensor, Tensor], Tensor],
    *,
    head_dim: int = 8,
    tolerance: float = 1e-9,
) -> None:
    """Asserts that phi and psi are an exact, usable factorisation of the kernel kappa.

    Args:
        phi, psi: map (..., D) to (..., F).
        kappa: broadcasts q (..., D) with k (..., D) to (...).
        head_dim: D of the vectors tried.
        tolerance: largest error allowed in float64, relative to the largest value.

    Three things are checked in float64, on normal vectors of standard deviation 0.5, 2 and 8: that
    phi(q) . psi(k) = kappa(q, k); that no feature is negative; and that causal attention by
    `FeatureKernel(phi, psi)` has the output and the gradients of the quadratic form with kappa.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for deviation in (0.5, 2.0, 8.0):
        q, k, v = (deviation * normal(1, 2, 16, head_dim) for _ in range(3))
        features = {"phi": phi(q), "psi": psi(k)}
        for name, value in features.items():
            _require(not bool((value < 0).any()), f"{name} is negative: {float(value.min())}")
        expected = kappa(q[:, :, :, None], k[:, :, None])
        product = features["phi"] @ features["psi"].transpose(-1, -2)
        error = float(((product - expected).abs().amax()) / expected.abs().amax())
        _require(
            error <= tolerance,
            f"phi . psi differs from kappa by {error:.2g} of its largest value at standard deviation {deviation}",
        )
        inputs = [x.requires_grad_() for x in (q, k, v)]
        grad = normal(1, 2, 16, head_dim)
        results = []
        for out in (
            attention(*inputs, kernel=FeatureKernel(phi, psi), is_causal=True),
            reference_attention(*inputs, kernel=kappa, is_causal=True),
        ):
            grads = torch.autograd.grad(out, inputs, grad, allow_unused=True, materialize_grads=True)
            results.append([out.detach(), *grads])
        for name, found, expected in zip(
            ("output", "gradient of q", "gradient of k", "gradient of v"), *results, strict=True
        ):
            error = float((found - expected).abs().amax() / expected.abs().amax().clamp(min=1e-30))
            _require(
                error <= tolerance,
                f"the {name} differs from the quadratic form by {error:.2g} of its largest value "
                f"at standard deviation {deviation}",
            )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _positions(begin: int, end: int, most: int = 32) -> list[int]:
    """All of begin..end-1, or `most` of them, evenly spread, with both ends."""
    if end - begin <= most:
        return list(range(begin, end))
    return sorted({begin + (end - 1 - begin) * i // (most - 1) for i in range(most)})


def _with_other_token(ids: Tensor, position: int) -> Tensor:
    """A copy in which the tokens at `position` have another value of those that occur."""
    other = ids.clone()
    token = other[:, position]
    if ids.is_floating_point():
        # Neither a shift nor a multiple, which a norm would undo.
        other[:, position] = token + torch.linspace(1, 2, token.size(-1), dtype=token.dtype, device=token.device)
        return other
    low, high = ids.amin(), ids.amax()
    if bool(low == high):
        raise ValueError("elattn.testing: ids must hold at least two different tokens")
    other[:, position] = torch.where(token == low, high, low)
    return other


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Largest change at each position, (L,), relative to the largest output; infinite where NaN comes or goes."""
    scale = torch.nan_to_num(before.detach()).abs().amax().clamp(min=torch.finfo(before.dtype).tiny)
    same_nan = before.isnan() & after.isnan()
    change = ((after - before).abs() / scale).masked_fill(same_nan, 0).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return change.transpose(0, 1).flatten(1).amax(1)
