"""Attention by its definition: quadratic, in float64, differentiable. The oracle of the tests, never fast."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["gauge_free", "reference_attention"]

# Field shapes in memory order: "" scalar, "k" (D,), "v" (Dv,), "kv" (D, Dv).
_HADAMARD = (("S", "kv"), ("z", "k"), ("m", "k"), ("r", "k"))
_SQUARED = (("c", "k"), ("e", "v"), ("n", ""), ("sk", "k"), ("skk", ""), ("sv", "v"), ("M", "kv"), ("T", "v"))
_FEATURES = (("S", "kv"), ("z", "k"))
_FIELDS = {
    "hadamard_exp": _HADAMARD,
    "sum_sq": _SQUARED,
    "sub_sq": _SQUARED,
    "directional": _SQUARED,
    "elu": _FEATURES,
    "features": _FEATURES,
}
_GAUGE = ("m", "r", "c", "e")


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: str | Callable[[Tensor, Tensor], Tensor] | Any = "hadamard_exp",
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
    """What `elattn.attention` promises, computed pair by pair in float64 (docs/math.md, sections 1, 3, 4 and 9).

    Takes the arguments of `elattn.attention` and returns float64. Every weight kappa(q_i, k_j) is formed on its own: in
    log-space for "hadamard_exp", from the difference of the two vectors for the squared kernels. Memory grows with
    Lq * Lk * D, so keep L in the hundreds.

    `kernel` may also be "features" (q and k are then phi and psi), an `elattn.FeatureKernel`, or a function kappa(q, k)
    that broadcasts (..., D) with (..., D) to (...); a function has no state.

    The state returned has the flat layout of the operators, in float64, but a gauge of its own: compare states through
    `gauge_free`. As in the operators, gradients of a state are taken at fixed gauge: its entries m, r, c, e get zero.
    """
    q, k, v = q.double(), k.double(), v.double()
    state = None if state is None else state.double()
    decay = None if decay is None else decay.double()
    if not enable_gqa and q.size(1) != k.size(1):
        raise ValueError(f"reference_attention: q has {q.size(1)} heads but k has {k.size(1)}; set enable_gqa=True")

    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        outs, states = [], []
        for n, (begin, end) in enumerate(itertools.pairwise(ends)):
            part = slice(begin, end)
            out, last = reference_attention(
                q[:, :, part],
                k[:, :, part],
                v[:, :, part],
                kernel=kernel,
                is_causal=is_causal,
                scale=scale,
                eps=eps,
                enable_gqa=enable_gqa,
                decay=decay[:, :, part] if decay is not None and decay.dim() > 2 else decay,
                state=None if state is None else state[n : n + 1],
                return_state=True,
            )
            outs.append(out)
            states.append(last)
        out = torch.cat(outs, 2) if outs else q.new_zeros(*q.shape[:3], v.size(3))
        if not return_state:
            return out
        return out, torch.cat(states) if states else q.new_zeros(0, k.size(1), 0)

    q, k = q * scale, k * scale
    if hasattr(kernel, "phi"):
        q, k, kernel = kernel.phi(q), kernel.psi(k), "features"

    batch, kv_heads, key_len, head_dim = k.shape
    group = q.size(1) // kv_heads if kv_heads else 1
    query_len = q.size(2)

    visible = torch.ones(batch, 1, query_len, key_len, dtype=torch.bool, device=q.device)
    if is_causal:
        visible = visible.tril()
    if key_padding_mask is not None:
        present = ~key_padding_mask[:, None, :]  # (B, 1, Lk)
        visible = visible & present[:, :, None, :]
        k = k.masked_fill(~present[..., None], 0)
        v = v.masked_fill(~present[..., None], 0)
    else:
        present = torch.ones(batch, 1, key_len, dtype=torch.bool, device=q.device)

    # Total of the rates up to and including each token, (B, Hkv, L, D or 1).
    total = k.new_zeros(batch, kv_heads, key_len, 1)
    if decay is not None:
        rates = {
            1: lambda r: r[None, :, None, None],
            2: lambda r: r[None, :, None, :],
            3: lambda r: r[..., None],
            4: lambda r: r,
        }[decay.dim()](decay)
        rates = rates.expand(batch, kv_heads, key_len, rates.size(-1)).masked_fill(~present[..., None], 0)
        total = rates.cumsum(2)
    # What the state has lost when row i reads it; a bidirectional call has no decay.
    lost = total if is_causal else k.new_zeros(batch, kv_heads, query_len, 1)
    end = total[:, :, -1:] if key_len else k.new_zeros(batch, kv_heads, 1, 1)

    fields = None
    if state is not None:
        fields = {
            name: value.detach() if name in _GAUGE else value
            for name, value in _unpack(state, head_dim, v.size(3), kernel).items()
        }

    heads = {"repeats": group, "dim": 1}
    args = (
        q,
        k.repeat_interleave(**heads),
        v.repeat_interleave(**heads),
        visible,
        lost.repeat_interleave(**heads),
        total.repeat_interleave(**heads),
        None if fields is None else {name: x.repeat_interleave(**heads) for name, x in fields.items()},
    )
    out = _hadamard_rows(*args) if kernel == "hadamard_exp" else _weighted_rows(*args, kernel=kernel, eps=eps)
    if not return_state:
        return out
    return out, _final_state(k, v, present, end - total, end, fields, kernel)


def gauge_free(state: Tensor, head_dim: int, value_dim: int, *, kernel: str = "hadamard_exp") -> dict[str, Tensor]:
    """What a state (B, Hkv, state_size) means, whatever gauge it is written in: float64, differentiable.

    Two states of the same keys and values have equal quantities, though their raw entries may differ.

    - hadamard_exp: U (B, Hkv, D, Dv), the average of v in each channel; ell (B, Hkv, D) = log sum exp k, -inf if empty;
    - squared kernels and directional: n, the sum of weights; mean_k, mean_v; and the central moments skk, M, T;
    - elu and features: S, z as they are.
    """
    f = _unpack(state.double(), head_dim, value_dim, kernel)
    if kernel == "hadamard_exp":
        empty = f["z"] == 0
        z = f["z"].masked_fill(empty, 1)
        ell = (torch.nan_to_num(f["m"], neginf=0) + f["r"] + z.log()).masked_fill(empty, float("-inf"))
        return {"U": f["S"] / z[..., None], "ell": ell}
    if kernel in ("elu", "features"):
        return f
    n = f["n"]
    weight = n.masked_fill(n == 0, 1)
    dk, dv = f["sk"] / weight[..., None], f["sv"] / weight[..., None]
    # Shift of the gauge to the means (docs/math.md, 3.2), keys before values.
    moment_t = f["T"] - 2 * (dk[..., None] * f["M"]).sum(-2) + dk.square().sum(-1, keepdim=True) * f["sv"]
    moment_m = f["M"] - dk[..., None] * f["sv"][..., None, :]
    skk = f["skk"] - (dk * f["sk"]).sum(-1)
    return {
        "n": n,
        "mean_k": f["c"] + dk,
        "mean_v": f["e"] + dv,
        "skk": skk,
        "M": moment_m,  # the sum of k' is 0 about the mean, so moving e leaves M as it is
        "T": moment_t - skk[..., None] * dv,
    }


def _unpack(state: Tensor, head_dim: int, value_dim: int, kernel: str) -> dict[str, Tensor]:
    sizes = {"": 1, "k": head_dim, "v": value_dim, "kv": head_dim * value_dim}
    shapes = {"": (), "k": (head_dim,), "v": (value_dim,), "kv": (head_dim, value_dim)}
    layout = _FIELDS[kernel]
    parts = state.split([sizes[kind] for _, kind in layout], -1)
    return {name: x.reshape(*x.shape[:-1], *shapes[kind]) for (name, kind), x in zip(layout, parts, strict=True)}


def _pack(fields: dict[str, Tensor], kernel: str) -> Tensor:
    parts = [fields[name] for name, _ in _FIELDS[kernel]]
    return torch.cat([x[..., None] if x.dim() == 2 else x.flatten(2) for x in parts], -1)


def _divide(num: Tensor, den: Tensor) -> Tensor:
    """num / den, and 0 with zero gradients in rows whose weights sum to 0."""
    zero = den == 0
    return (num / den.masked_fill(zero, 1)).masked_fill(zero, 0)


def _largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Maximum over dims, kept, as a constant; 0 where there is none."""
    if 0 in [x.size(d) for d in dims]:
        return x.new_zeros([1 if d % x.dim() in [e % x.dim() for e in dims] else n for d, n in enumerate(x.shape)])
    largest = x.detach().amax(dims, keepdim=True)
    return largest.masked_fill(largest == float("-inf"), 0)


def _hadamard_rows(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, lost: Tensor, total: Tensor, fields: dict[str, Tensor] | None
) -> Tensor:
    # log of each weight, channel by channel: (B, H, Lq, Lk, D)
    logs = q[:, :, :, None] + k[:, :, None] - (lost[:, :, :, None] - total[:, :, None])
    logs = logs.masked_fill(~visible[..., None], float("-inf"))
    if fields is not None:
        empty = (fields["z"] == 0)[:, :, None]
        state_logs = q + torch.nan_to_num(fields["m"], neginf=0)[:, :, None] + fields["r"][:, :, None] - lost
        state_logs = state_logs.masked_fill(empty, float("-inf"))  # (B, H, Lq, D)
        logs_and_state = torch.cat([logs.detach(), state_logs.detach()[:, :, :, None]], 3)
        row = _largest(logs_and_state, (3, 4))
    else:
        row = _largest(logs, (3, 4))
    weights = (logs - row).exp().sum(-1)  # (B, H, Lq, Lk)
    num, den = weights @ v, weights.sum(-1, keepdim=True)
    if fields is not None:
        phi = (state_logs - row[..., 0]).exp()
        num = num + phi @ fields["S"]
        den = den + (phi * fields["z"][:, :, None]).sum(-1, keepdim=True)
    return _divide(num, den)


def _weighted_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    lost: Tensor,
    total: Tensor,
    fields: dict[str, Tensor] | None,
    *,
    kernel: str | Callable[[Tensor, Tensor], Tensor],
    eps: float,
) -> Tensor:
    state_den = None
    if kernel in ("sum_sq", "sub_sq", "directional"):
        sign = -1.0 if kernel == "sub_sq" else 1.0
        weight = k.new_ones(k.shape[:-1])
        if kernel == "directional":
            q, k, weight = _unit(q), _unit(k), k.square().sum(-1) + 1
        kappa = ((q[:, :, :, None] + sign * k[:, :, None]).square().sum(-1) + eps) * weight[:, :, None]
        if fields is not None:
            central = gauge_free(_pack(fields, kernel), k.size(-1), v.size(-1), kernel=kernel)
            from_mean = q + sign * central["mean_k"][:, :, None]  # (B, H, Lq, D)
            n, skk = central["n"][:, :, None, None], central["skk"][:, :, None, None]
            state_den = n * (from_mean.square().sum(-1, keepdim=True) + eps) + skk
            state_num = 2 * sign * from_mean @ central["M"] + central["T"][:, :, None]
            state_num = state_num + state_den * central["mean_v"][:, :, None]
    elif kernel in ("elu", "features"):
        if kernel == "elu":
            q, k = _elu_plus_one(q), _elu_plus_one(k)
        kappa = q @ k.transpose(-1, -2)
        if fields is not None:
            state_den = (q * fields["z"][:, :, None]).sum(-1, keepdim=True)
            state_num = q @ fields["S"]
    else:
        kappa = kernel(q[:, :, :, None], k[:, :, None])

    # Old weights are expressed relative to the youngest that counts, so a long silence does not underflow.
    age = (lost - total.transpose(-1, -2)).masked_fill(~visible, float("inf"))  # (B, H, Lq, Lk)
    exponents = (-age).masked_fill(kappa == 0, float("-inf"))
    if state_den is not None:
        exponents = torch.cat([exponents, (-lost).masked_fill(state_den == 0, float("-inf"))], -1)
    row = _largest(exponents, (-1,))
    weights = kappa.masked_fill(~visible, 0) * (-age - row).clamp(max=0).exp()
    num, den = weights @ v, weights.sum(-1, keepdim=True)
    if state_den is not None:
        remaining = (-lost - row).clamp(max=0).exp()
        num, den = num + remaining * state_num, den + remaining * state_den
    return _divide(num, den)


def _final_state(
    k: Tensor,
    v: Tensor,
    present: Tensor,
    age: Tensor,
    end: Tensor,
    fields: dict[str, Tensor] | None,
    kernel: str | Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The sums over all keys; `age` (B, Hkv, L, D or 1) is the decay of each key until the end, `end` the state's."""
    if kernel == "hadamard_exp":
        logs = (k - age).masked_fill(~present[..., None], float("-inf"))  # (B, Hkv, L, D)
        before = None
        if fields is not None:
            before = torch.nan_to_num(fields["m"], neginf=0) + fields["r"] - end[:, :, 0]
            before = before.masked_fill(fields["z"] == 0, float("-inf"))
        everything = logs if before is None else torch.cat([logs, before[:, :, None]], 2)
        m = _largest(everything, (2,))
        psi = (logs - m).exp()
        big_s, z = psi.transpose(-1, -2) @ v, psi.sum(2)
        if before is not None:
            kept = (before - m[:, :, 0]).exp()
            big_s, z = big_s + kept[..., None] * fields["S"], z + kept * fields["z"]
        m = m[:, :, 0].expand_as(z).masked_fill(z.detach() == 0, float("-inf"))
        return _pack({"S": big_s, "z": z, "m": m, "r": torch.zeros_like(z)}, kernel)

    fade = (-age).exp().masked_fill(~present[..., None], 0)  # (B, Hkv, L, 1)
    remaining = (-end).exp()[:, :, 0]  # (B, Hkv, 1)
    if kernel in ("elu", "features"):
        psi = fade * (_elu_plus_one(k) if kernel == "elu" else k)
        big_s, z = psi.transpose(-1, -2) @ v, psi.sum(2)
        if fields is not None:
            big_s, z = big_s + remaining[..., None] * fields["S"], z + remaining * fields["z"]
        return _pack({"S": big_s, "z": z}, kernel)
    if kernel not in _FIELDS:
        raise ValueError("reference_attention: a kernel given as a function has no state")

    weight = fade[..., 0]
    if kernel == "directional":
        k, weight = _unit(k), weight * (k.square().sum(-1) + 1)
    # The gauge: where the state is, else the mean key and value, so that nothing large cancels.
    count = present.sum(-1)[..., None].clamp(min=1)
    mean_k = (k * present[..., None]).detach().sum(2) / count
    mean_v = (v * present[..., None]).detach().sum(2) / count
    c, e = mean_k, mean_v
    if fields is not None:
        used = (fields["n"] != 0)[..., None]
        c, e = torch.where(used, fields["c"], mean_k), torch.where(used, fields["e"], mean_v)
    dk, dv = k - c[:, :, None], v - e[:, :, None]
    squares = weight * dk.square().sum(-1)
    weighted = weight[..., None] * dk
    sums = {
        "n": weight.sum(2),
        "sk": weighted.sum(2),
        "skk": squares.sum(2),
        "sv": (weight[..., None] * dv).sum(2),
        "M": weighted.transpose(-1, -2) @ dv,
        "T": (squares[..., None] * dv).sum(2),
    }
    if fields is not None:
        for name, value in sums.items():
            shape = remaining.reshape(*remaining.shape[:2], *[1] * (value.dim() - 2))
            sums[name] = value + shape * fields[name]
    return _pack({"c": c, "e": e, **sums}, kernel)


def _unit(x: Tensor) -> Tensor:
    """x / |x|, and 0 for 0."""
    square = x.square().sum(-1, keepdim=True)
    zero = square == 0
    return x / square.masked_fill(zero, 1).sqrt() * ~zero  # not rsqrt: in one dimension the unit is exactly 1


def _elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
