"""The contestants: each gives the function that one row of the table times."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import elattn
from benchmarks import registry
from benchmarks.registry import Run

CHUNK = 64  # the fastest of 16, 32, 64 and 128

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def missing(peer: str) -> str | None:
    """Why a peer cannot run on this machine; None if it can."""
    if peer == registry.FAST_TRANSFORMERS:
        try:
            from fast_transformers.causal_product import causal_dot_product  # noqa: F401
        except ImportError as error:
            return f"pytorch-fast-transformers: {error}"
    if peer in (registry.FLA, registry.FLA_NORMALISED):
        try:
            from fla.ops.linear_attn import chunk_linear_attn  # noqa: F401
        except ImportError as error:
            return f"flash-linear-attention: {error}"
    if peer in (registry.ELATTN_CPP, registry.NO_OP) and not hasattr(torch.ops.elattn_bench, "no_op"):
        return "no C++ compiler"
    return None


def attention(run: Run, decay: Tensor | None) -> Attention:
    """The forward function of a row, (q, k, v) -> out, each (B, H, L, D)."""
    if run.peer == registry.SDPA:
        return _flash if run.device == "cuda" else functools.partial(scaled_dot_product_attention, is_causal=True)
    if run.peer == registry.SCAN_COMPILED and run.device == "cuda":
        return _compile(_all_chunks, f"chunks_{run.head_dim}_{run.mode.replace('+', '_')}")
    if run.peer in (registry.FLA, registry.FLA_NORMALISED):
        return functools.partial(_fla, normalize=run.peer == registry.FLA_NORMALISED)
    if run.peer == registry.SCAN:
        return functools.partial(_scan, chunk=_chunk)
    if run.peer == registry.SCAN_COMPILED:
        return functools.partial(_scan, chunk=_compiled_chunk(run.head_dim, run.mode))
    if run.peer == registry.FAST_TRANSFORMERS:
        return _fast_transformers
    if run.kernel == "features":
        return functools.partial(elattn.feature_attention, is_causal=True)
    return functools.partial(elattn.attention, kernel=run.kernel, is_causal=True, decay=decay)


def _features(q: Tensor, k: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """phi, psi of kappa = sum_d exp(q_d + k_d), shifted by m, the largest key, and by the largest entry of each row."""
    psi = (k - m).exp()
    x = q + m
    return (x - x.detach().amax(-1, keepdim=True)).exp(), psi


def _chunk(q: Tensor, k: Tensor, v: Tensor, m: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    phi, psi = _features(q, k, m)  # (B, H, C, D)
    scores = (phi @ psi.transpose(-1, -2)).tril()  # (B, H, C, C)
    num = scores @ v + phi @ S
    den = scores.sum(-1, keepdim=True) + phi @ z
    return num / den, S + psi.transpose(-1, -2) @ v, z + psi.sum(-2)[..., None]


@functools.cache
def _compiled_chunk(head_dim: int, mode: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return _compile(_chunk, f"chunk_{head_dim}_{mode.replace('+', '_')}")


def _scan(q: Tensor, k: Tensor, v: Tensor, *, chunk: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Linear attention as one writes it in PyTorch: quadratic inside chunks, a state between them. hadamard_exp."""
    batch, heads, _, head_dim = k.shape
    m = k.detach().amax(-2, keepdim=True)
    S = q.new_zeros(batch, heads, head_dim, v.size(-1), requires_grad=q.requires_grad)
    z = q.new_zeros(batch, heads, head_dim, 1, requires_grad=q.requires_grad)
    outs = []
    for part in zip(q.split(CHUNK, 2), k.split(CHUNK, 2), v.split(CHUNK, 2), strict=True):
        out, S, z = chunk(*part, m, S, z)
        outs.append(out)
    return torch.cat(outs, 2)


def _all_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for a GPU: all chunks at once, and their states by a cumulative sum. bfloat16 products, float32 sums."""
    features = _features(q.float(), k.float(), k.detach().amax(-2, keepdim=True).float())
    phi, psi, v = (x.to(v.dtype).unflatten(2, (-1, CHUNK)) for x in (*features, v))  # (B, H, N, C, D)
    states = (psi.transpose(-1, -2) @ torch.cat([v, torch.ones_like(v[..., :1])], -1)).float()  # (B, H, N, D, Dv + 1)
    past = phi @ (states.cumsum(2) - states).to(phi.dtype)
    scores = (phi @ psi.transpose(-1, -2)).tril()
    den = scores.sum(-1, keepdim=True) + past[..., -1:]
    return ((scores @ v + past[..., :-1]) / den).flatten(2, 3)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def _fla(phi: Tensor, psi: Tensor, v: Tensor, *, normalize: bool) -> Tensor:
    """Triton kernels for given features, in the layout (B, L, H, D)."""
    from fla.ops.linear_attn import chunk_linear_attn

    out, _ = chunk_linear_attn(*(x.transpose(1, 2) for x in (phi, psi, v)), scale=1.0, normalize=normalize)
    return out.transpose(1, 2)


def _fast_transformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same kernel with the causal product of pytorch-fast-transformers, in the layout that it wants."""
    from fast_transformers.causal_product import causal_dot_product

    phi, psi = _features(q, k, k.detach().amax(-2, keepdim=True))
    den = (phi * psi.cumsum(-2)).sum(-1, keepdim=True)
    return causal_dot_product(phi, psi, v) / den


def plain_step(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """One token of hadamard_exp in PyTorch: q, k, v (B, H, D), S (B, H, D, Dv), z and m (B, H, D) -> out, S, z, m.

    Not in place: torch.compile (PyTorch 2.11) then reads m after it was overwritten.
    """
    largest = torch.maximum(m, k)
    kept, psi = (m - largest).exp(), (k - largest).exp()
    S = S * kept[..., None] + psi[..., None] * v[..., None, :]
    z = z * kept + psi
    x = q + largest
    phi = (x - x.amax(-1, keepdim=True)).exp()
    out = (phi[..., None, :] @ S)[..., 0, :] / (phi * z).sum(-1, keepdim=True)
    return out, S, z, largest


@functools.cache
def compiled_step(head_dim: int) -> Callable[..., tuple[Tensor, ...]]:
    return _compile(plain_step, f"step_{head_dim}")


def _compile(function: types.FunctionType, name: str) -> Callable[..., Any]:
    # A code object for each use: those that share one share a limit of recompilations and generalise their sizes.
    return torch.compile(types.FunctionType(function.__code__.replace(co_name=name), globals()), fullgraph=True)
