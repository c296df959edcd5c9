"""Wrappers of `torch.ops.elattn.*`, with documentation and Python's defaults.

In `torch.jit.script` call `torch.ops.elattn.*` itself, whose arguments have the same names and defaults: TorchScript
compiles no Python function with optional keyword-only arguments, nor one that returns a tensor or a pair. There,
`torch.ops.elattn.attention_with_state` is `attention(..., return_state=True)`, and likewise for features.

Shapes: B batch, H query heads, Hkv key and value heads, L tokens, D head dimension, Dv value dimension; E groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

__all__ = [
    "FeatureKernel",
    "attention",
    "attention_step",
    "feature_attention",
    "feature_attention_step",
    "grouped_linear",
    "kernels",
    "merge_states",
    "new_state",
    "state_fields",
    "state_size",
    "unpack_state",
]


# Read once: torch.compile does not trace operators that return strings.
_KERNELS = tuple(torch.ops.elattn.kernels())
_FIELDS = {kernel: tuple(torch.ops.elattn.state_fields(kernel)) for kernel in (*_KERNELS, "features")}


@dataclass(frozen=True)
class FeatureKernel:
    """A kernel of one's own, kappa(q, k) = phi(q) . psi(k), for `attention(kernel=...)`.

    phi and psi map (..., D) to (..., F) with the same F; both must be non-negative, or rows of weights may sum to
    zero. `elattn.testing.check_kernel` checks a pair against the kappa it stands for.
    """

    phi: Callable[[Tensor], Tensor]
    psi: Callable[[Tensor], Tensor]


# fmt: off
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: str | FeatureKernel = ..., is_causal: bool = ..., scale: float = ...,
    eps: float = ..., enable_gqa: bool = ..., key_padding_mask: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    decay: Tensor | None = ..., state: Tensor | None = ..., return_state: Literal[False] = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: str | FeatureKernel = ..., is_causal: bool = ..., scale: float = ...,
    eps: float = ..., enable_gqa: bool = ..., key_padding_mask: Tensor | None = ..., cu_seqlens: Tensor | None = ...,
    decay: Tensor | None = ..., state: Tensor | None = ..., return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str | FeatureKernel = "hadamard_exp",
    is_causal: bool = False,
    scale: float = 1.0,
    eps: float = 0.0,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact linear attention: y_i = sum_j kappa(q_i, k_j) v_j / sum_j kappa(q_i, k_j), in time linear in L.

    The layout is that of `torch.nn.functional.scaled_dot_product_attention`. float32, float64, bfloat16 or float16,
    q, k and v alike; sums, normaliser and state are float32 (float64 for float64). Differentiable once in q, k, v,
    decay and state.

    Args:
        q: (B, H, Lq, D). Any strides with a contiguous last dimension are read in place.
        k: (B, Hkv, Lk, D).
        v: (B, Hkv, Lk, Dv).
        kernel: a name from `kernels()`, or a `FeatureKernel`.
        is_causal: row i sees keys 0..i, after what `state` holds; Lq = Lk then. Otherwise every row sees every key.
        scale: multiplies q and k before the kernel.
        eps: added inside the squared kernels, kappa = w (|q +- k|^2 + eps); the others refuse it.
        enable_gqa: H may be a multiple of Hkv; groups of query heads share a key head and its state.
        key_padding_mask: (B, Lk) bool, True for padding, which is never read and does not decay.
        cu_seqlens: (N + 1,) int32 or int64, the ends of sequences packed along L, with B = 1; the state has batch N.
        decay: causal only. Rates >= 0 by which old keys are forgotten: each weight of (i, j) is multiplied by
            exp(-sum of decay over tokens j+1..i). (Hkv,), (Hkv, D), (B, Hkv, L) or (B, Hkv, L, D); the forms with D for
            hadamard_exp only.
        state: (B, Hkv, state_size), stands for keys before the first; not modified.
        return_state: also return the state after the last key.

    Returns:
        (B, H, Lq, Dv) in the dtype of q; with `return_state`, that and the state. A row that sees no key is 0.

    Raises:
        RuntimeError: an argument breaks a rule; the message has the rule and the value met.

    See docs/math.md, sections 1 to 4 and 9.
    """
    if isinstance(kernel, FeatureKernel):
        if eps != 0 or decay is not None:
            raise ValueError("elattn.attention: a FeatureKernel takes neither eps nor decay")
        q, k = (q, k) if scale == 1 else (q * scale, k * scale)
        return feature_attention(
            kernel.phi(q),
            kernel.psi(k),
            v,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
        )
    op = torch.ops.elattn.attention_with_state if return_state else torch.ops.elattn.attention
    return op(
        q,
        k,
        v,
        kernel=kernel,
        is_causal=is_causal,
        scale=scale,
        eps=eps,
        enable_gqa=enable_gqa,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        decay=decay,
        state=state,
    )


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    kernel: str = "hadamard_exp",
    scale: float = 1.0,
    eps: float = 0.0,
    enable_gqa: bool = False,
    decay: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """One token of causal `attention`; `state` is updated in place. On the CPU, bit for bit what `attention` gives.

    Args:
        q: (B, H, D).
        k: (B, Hkv, D).
        v: (B, Hkv, Dv).
        state: (P, Hkv, state_size), a pool of P >= B states.
        decay: (Hkv,), (Hkv, D), (B, Hkv, 1) or (B, Hkv, D).
        slots: (B,) int64 or int32, the row of the pool of each batch entry, -1 for an inactive one (its output is 0
            and nothing is touched). By default entry b uses row b.

    Returns:
        (B, H, Dv). The rest is as in `attention`.

    Raises:
        RuntimeError: an argument breaks a rule, or an input requires a gradient: a step has none.
    """
    return torch.ops.elattn.attention_step(
        q, k, v, state, kernel=kernel, scale=scale, eps=eps, enable_gqa=enable_gqa, decay=decay, slots=slots
    )


# fmt: off
@overload
def feature_attention(
    phi: Tensor, psi: Tensor, v: Tensor, *, is_causal: bool = ..., enable_gqa: bool = ...,
    key_padding_mask: Tensor | None = ..., cu_seqlens: Tensor | None = ..., state: Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...
@overload
def feature_attention(
    phi: Tensor, psi: Tensor, v: Tensor, *, is_causal: bool = ..., enable_gqa: bool = ...,
    key_padding_mask: Tensor | None = ..., cu_seqlens: Tensor | None = ..., state: Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def feature_attention(
    phi: Tensor,
    psi: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` with kappa = phi . psi for features that the caller computes: (B, H, Lq, F) and (B, Hkv, Lk, F).

    Both must be non-negative: it is not checked, and the relative error of the result grows as the sum of |phi| |psi|
    over the sum of phi psi. The kernel name of its states is "features". See docs/math.md, section 4.
    """
    op = torch.ops.elattn.feature_attention_with_state if return_state else torch.ops.elattn.feature_attention
    return op(
        phi,
        psi,
        v,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        state=state,
    )


def feature_attention_step(
    phi: Tensor,
    psi: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    enable_gqa: bool = False,
    slots: Tensor | None = None,
) -> Tensor:
    """One token of causal `feature_attention`; `state` is updated in place.

    phi (B, H, F), psi (B, Hkv, F), v (B, Hkv, Dv); the rest is as in `attention_step`.
    """
    return torch.ops.elattn.feature_attention_step(phi, psi, v, state, enable_gqa=enable_gqa, slots=slots)


def new_state(
    batch: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    *,
    kernel: str = "hadamard_exp",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The state before any key: (batch, heads, state_size). `heads` is Hkv; dtype float64 goes with float64 inputs."""
    device = torch.empty(0).device if device is None else device  # the default device, in a form that compiles
    return torch.ops.elattn.new_state(batch, heads, head_dim, value_dim, kernel=kernel, dtype=dtype, device=device)


def state_size(kernel: str, head_dim: int, value_dim: int) -> int:
    """Elements of a state per batch entry and head."""
    return torch.ops.elattn.state_size(kernel, head_dim, value_dim)


def state_fields(kernel: str) -> list[str]:
    """Names of the fields of a state, in memory order."""
    return list(_FIELDS[kernel]) if kernel in _FIELDS else torch.ops.elattn.state_fields(kernel)


def unpack_state(state: Tensor, head_dim: int, value_dim: int, *, kernel: str = "hadamard_exp") -> dict[str, Tensor]:
    """The fields of a state (B, Hkv, state_size) as named views, without a copy.

    hadamard_exp: S (B, Hkv, D, Dv), z, m, r (B, Hkv, D). elu and features: S, z. Squared kernels and directional:
    c, sk (B, Hkv, D), e, sv, T (B, Hkv, Dv), M (B, Hkv, D, Dv), n, skk (B, Hkv). See docs/math.md, sections 1, 3.2, 9.
    """
    views = torch.ops.elattn.unpack_state(state, head_dim, value_dim, kernel=kernel)
    return dict(zip(state_fields(kernel), views, strict=True))


def merge_states(
    a: Tensor,
    b: Tensor,
    head_dim: int,
    value_dim: int,
    *,
    kernel: str = "hadamard_exp",
    decay: Tensor | None = None,
) -> Tensor:
    """The state of the tokens of `a` followed by those of `b`. Associative; the empty state is its identity.

    `decay` is the total over the tokens of b, (Hkv,), (Hkv, D) or (B, Hkv, D). Differentiable.
    See docs/math.md, section 5.
    """
    return torch.ops.elattn.merge_states(a, b, head_dim, value_dim, kernel=kernel, decay=decay)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Linear layers of groups of rows: rows offsets[e-1] to offsets[e] of x are multiplied by weight[e]^T.

    float32, float64, bfloat16 or float16, x and weight alike; autocast casts both, as it does for
    `torch.nn.functional.linear`. Differentiable any number of times; x, weight and gradients of any strides.

    Args:
        x: (T, in), the rows of one group after those of the other.
        weight: (E, out, in).
        offsets: (E,) int32, the ends of the groups, as in `torch.nn.functional.grouped_mm`; groups may be empty, and
            the last one ends at T.

    Returns:
        (T, out) in the dtype of x.

    Raises:
        RuntimeError: an argument breaks a rule; the message has the rule and the value met.
    """
    return torch.ops.elattn.grouped_linear(x, weight, offsets)


def kernels() -> list[str]:
    """Names of the built-in kernels."""
    return list(_KERNELS)
