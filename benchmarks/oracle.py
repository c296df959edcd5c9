"""What a result is checked against before its time counts.

The quadratic reference of `elattn.testing` is too slow for the lengths measured here, so there is a second one: the
same sums in float64 and linear time, through features. `check_oracle` holds it against the first in every run.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import registry
from benchmarks.registry import Run
from elattn.testing import reference_attention

CHUNK = 64
ALL_HEADS_UP_TO = 1024  # tokens; beyond, the first and the last head are checked
SOFTMAX_ROWS = 64

# For elattn, 4 times the errors of docs/math.md, section 7, properties 1 and 2; a result stored in bfloat16 has its own
# rounding besides. For the others, what plain float32 arithmetic without compensation reaches.
LIMIT = 4 * 1.6e-6
PEER_LIMIT = 1e-4
# Where the operands of products are bfloat16: 4 times the column "bf16 op" of properties 1 (outputs) and 2 (gradients)
# for elattn; what comes of rounding every intermediate result, states included, for the others.
BFLOAT16_LIMIT = {registry.FORWARD: 4 * 3.9e-3, registry.BOTH: 4 * 8.7e-3}
BFLOAT16_PEER_LIMIT = 5e-2
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}


@dataclass
class Inputs:
    """q, k, v and the gradient that arrives at the output, (B, H, L, D); decay (H, D) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    decay: Tensor | None

    def tensors(self, mode: str) -> list[Tensor]:
        """What the gradients are taken of; nothing in a forward."""
        if mode != registry.BOTH:
            return []
        return [x for x in (self.q, self.k, self.v, self.decay) if x is not None]


def make_inputs(run: Run) -> Inputs:
    """Normal deviates; the peers of a case share them."""
    return _make_inputs(_question(run))


def forget() -> None:
    """Frees what the runs of a case shared."""
    _make_inputs.cache_clear()
    _linear.cache_clear()


def _question(run: Run) -> Run:
    """What is asked, whoever answers."""
    return replace(run, peer=registry.ELATTN, threads=1)


@functools.cache
def _make_inputs(run: Run) -> Inputs:
    generator = torch.Generator(run.device).manual_seed(run.head_dim * 1_000_003 + run.length)
    shape, on_gpu = (run.batch, run.heads, run.length, run.head_dim), run.device == "cuda"
    if on_gpu:  # as projections leave them, (B, L, H, D), so that no peer has to copy
        shape = (run.batch, run.length, run.heads, run.head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator, device=run.device) for _ in range(4))
    if on_gpu:
        q, k, v, grad = (x.transpose(1, 2) for x in (q, k, v, grad))
    if run.kernel == "features":
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    decay = None
    if run.decay:
        decay = torch.logspace(-2.5, -0.4, run.head_dim, device=run.device).repeat(run.heads, 1)
    dtype = getattr(torch, run.dtype)
    inputs = Inputs(q.to(dtype), k.to(dtype), v.to(dtype), grad.to(dtype), decay)
    for x in inputs.tensors(run.mode):
        x.requires_grad_()
    return inputs


def limit(run: Run) -> float:
    rounds_operands = run.device == "cuda" and run.dtype == "bfloat16"
    if not run.peer.startswith(registry.ELATTN):
        return BFLOAT16_PEER_LIMIT if rounds_operands else PEER_LIMIT
    if rounds_operands and run.kernel == "hadamard_exp" and not run.decay and run.mode in BFLOAT16_LIMIT:
        return BFLOAT16_LIMIT[run.mode]
    return LIMIT


def error(run: Run, inputs: Inputs, results: list[Tensor]) -> float:
    """The largest error of the output (in units of v's deviation, 1) and of each gradient (of its largest entry).

    Sums that are not normalised have the unit of gradients.

    `results` is the output and, for forward+backward, the gradients of q, k, v and, if there is one, decay.
    """
    if run.peer == registry.SDPA:
        heads, rows, expected = _softmax(run, inputs)
        results = [x[:, heads][:, :, rows] for x in results[:2]]  # the output and the gradient of q
    else:
        heads = _checked_heads(run)
        expected = _linear(_question(run), run.peer != registry.FLA)
        results = [x[heads] if x.dim() == 2 else x[:, heads] for x in results]
    # The gradient of a rate sums dk - dq over all later tokens, then over tokens: its rounding grows with L.
    growth = max(1.0, run.length / 1024)
    worst = 0.0
    for i, (actual, exact) in enumerate(zip(results, expected, strict=True)):
        relative = i > 0 or run.peer == registry.FLA
        unit = exact.abs().max().item() * (growth if i == 4 else 1.0) if relative else 1.0
        rounding = ROUNDING[run.dtype] * exact.abs() if actual.dtype != torch.float32 else 0.0
        excess = ((actual.detach().double() - exact).abs() - rounding).max().item()
        if not excess == excess:
            return float("inf")
        worst = max(worst, excess / unit)
    return worst


def check_oracle() -> None:
    """Raises AssertionError if the two references differ by more than float64 rounds."""
    for kernel in ("hadamard_exp", "sum_sq", "directional", "elu", "features"):
        for decay in (False, True) if kernel == "hadamard_exp" else (False,):
            run = Run(registry.ELATTN, registry.BOTH, 16, 100, kernel=kernel, decay=decay, heads=2)
            inputs = make_inputs(run)
            args = {"kernel": kernel, "is_causal": True, "decay": inputs.decay}
            out = reference_attention(inputs.q, inputs.k, inputs.v, **args)
            grads = torch.autograd.grad(out, inputs.tensors(run.mode), inputs.grad.double())
            for exact, fast in zip((out, *grads), _linear(run, True), strict=True):
                # The reference's gradients arrive in the dtype of its inputs.
                room = 1e-12 if exact.dtype == torch.float64 else 2.0**-23
                worst = ((exact - fast).abs().max() / exact.abs().max()).item()
                assert worst <= room, f"the references disagree about {kernel}: {worst:.3g}"


def _checked_heads(run: Run) -> list[int]:
    return list(range(run.heads)) if run.length <= ALL_HEADS_UP_TO else [0, run.heads - 1]


@functools.cache
def _linear(run: Run, normalised: bool) -> list[Tensor]:
    inputs, heads = make_inputs(run), _checked_heads(run)
    q, k, v = (x.detach()[:, heads].double() for x in (inputs.q, inputs.k, inputs.v))
    decay = None if inputs.decay is None else inputs.decay.detach()[heads].double()
    leaves = [x for x in (q, k, v, decay) if x is not None]
    both = run.mode == registry.BOTH
    for x in leaves:
        x.requires_grad_(both)
    with torch.set_grad_enabled(both):
        out = _sums(*_features(run.kernel, q, k), v, decay, normalised)
    grads = torch.autograd.grad(out, leaves, inputs.grad[:, heads].double()) if both else ()
    return [out.detach(), *grads]


def _features(kernel: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """kappa = phi . psi for each kernel; float64 has the range for it, as long as the inputs are moderate."""
    if kernel == "hadamard_exp":
        return q.exp(), k.exp()
    if kernel == "elu":
        return torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    if kernel == "features":
        return q, k
    weight = 1.0
    if kernel == "directional":
        weight = k.square().sum(-1, keepdim=True) + 1
        q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    # |q + k|^2 = |q|^2 + 2 q.k + |k|^2
    q2, k2 = q.square().sum(-1, keepdim=True), k.square().sum(-1, keepdim=True)
    one = torch.ones_like(q2)
    return torch.cat([q2, one, 2 * q], -1), weight * torch.cat([one, k2, k], -1)


def _sums(phi: Tensor, psi: Tensor, v: Tensor, decay: Tensor | None, normalised: bool) -> Tensor:
    """phi, psi (B, H, L, F), v (B, H, L, Dv), decay (H, F) per token: the ratio of causal sums, or its numerator."""
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # its last column sums to the normaliser
    state = phi.new_zeros(phi.size(0), phi.size(1), phi.size(3), v.size(3))
    outs = []
    for p, s, w in zip(phi.split(CHUNK, 2), psi.split(CHUNK, 2), v.split(CHUNK, 2), strict=True):
        if decay is not None:
            token = torch.arange(1, p.size(2) + 1, dtype=p.dtype, device=p.device)
            age = decay[None, :, None] * token[:, None]  # (1, H, C, F)
            p, s = p * (-age).exp(), s * age.exp()
        out = (p @ s.transpose(-1, -2)).tril() @ w + p @ state
        outs.append(out[..., :-1] / out[..., -1:] if normalised else out[..., :-1])
        state = state + s.transpose(-1, -2) @ w
        if decay is not None:
            state = state * (-decay[None, ..., None] * p.size(2)).exp()
    return torch.cat(outs, 2)


def _softmax(run: Run, inputs: Inputs) -> tuple[list[int], Tensor, list[Tensor]]:
    """Softmax attention of some rows, the last among them: heads and rows, and their output and gradient of q."""
    rows = torch.linspace(0, run.length - 1, min(SOFTMAX_ROWS, run.length), device=run.device).long()
    heads = list(range(run.heads)) if run.device == "cpu" else [0, run.heads - 1]
    both = run.mode == registry.BOTH
    q = inputs.q.detach()[:, heads][:, :, rows].double().requires_grad_(both)
    k, v = (x.detach()[:, heads].double() for x in (inputs.k, inputs.v))
    scores = (q @ k.transpose(-1, -2)) / run.head_dim**0.5
    hidden = torch.arange(run.length, device=run.device) > rows[:, None]  # (rows, L)
    out = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    grads = torch.autograd.grad(out, [q], inputs.grad[:, heads][:, :, rows].double()) if both else ()
    return heads, rows, [out.detach(), *grads]
