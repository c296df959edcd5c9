"""Attention to the flow of the representation through the layers (docs/paper-modules.md)."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elattn.ops import kernels

__all__ = ["MemoryLobe"]

_SCOPES = ("depth", "causal", "bidirectional")


class MemoryLobe(nn.Module):
    """Linear attention over the flow: delta_j = x_j - x_{j-1}, what layer j added to the representation.

    q, k, v = Q(delta), K(delta), V(delta), three matrices (d_model, d_model) without bias, and no output projection.
    The answer belongs to the newest delta; a model adds it to what its next layer contributes.

    Args:
        d_model: width of the deltas, a multiple of num_heads.
        num_heads: heads H.
        scope: what the newest delta attends to. "depth": all deltas of the same token, so no token sees another one.
            "causal": the newest deltas of this and earlier tokens. "bidirectional": those of all tokens, for encoders
            and vision; in a causal model every token would see the later ones.
        kernel: a name from `elattn.kernels()`.

    Source: arXiv 2605.18848, transformation flow and Memory Lobe.

    Raises:
        ValueError: an option breaks a rule; the message has the rule and the value met.
    """

    def __init__(self, d_model: int, num_heads: int, *, scope: str = "depth", kernel: str = "hadamard_exp") -> None:
        super().__init__()
        _require(num_heads > 0, f"num_heads must be positive (got {num_heads})")
        _require(d_model % num_heads == 0, f"d_model must be a multiple of num_heads = {num_heads} (got {d_model})")
        _require(scope in _SCOPES, f"scope must be one of {', '.join(_SCOPES)} (got {scope!r})")
        _require(kernel in kernels(), f"kernel must be one of {', '.join(kernels())} (got {kernel!r})")
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.scope = scope
        self.kernel = kernel
        # The matrices of q, k and v one below the other.
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)

    def forward(
        self, deltas: list[Tensor], key_padding_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The answer (B, L, d_model) to the newest delta.

        Args:
            deltas: delta_0 (the embedding) to the newest, each (B, L, d_model). Scopes other than "depth" read the
                newest only.
            key_padding_mask: (B, L) bool, True for padding. It and cu_seqlens say which tokens there are to attend
                to, so "depth" needs neither.
            cu_seqlens: (N + 1,) int32 or int64, the ends of sequences packed along L, with B = 1.

        Raises:
            ValueError: there is no delta.
        """
        self._require_deltas(deltas)
        if self.scope == "depth":
            return self._over_depth(deltas, by_operator=self.kernel != "hadamard_exp")
        q, k, v = self._project(deltas[-1])  # (B, L, H, D)
        y = torch.ops.elattn.attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            kernel=self.kernel,
            is_causal=self.scope == "causal",
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
        )
        return y.transpose(1, 2).flatten(2)

    @torch.jit.export
    def new_state(self, batch: int) -> list[Tensor]:
        """The state before the first token: none for "depth", for "causal" one tensor (batch, H, state_size)."""
        if self.scope == "bidirectional":
            raise ValueError('MemoryLobe: scope="bidirectional" sees later tokens, so it has no recurrent state')
        state: list[Tensor] = []
        if self.scope == "causal":
            weight = self.qkv_proj.weight
            state.append(
                torch.ops.elattn.new_state(
                    batch,
                    self.num_heads,
                    self.head_dim,
                    self.head_dim,
                    kernel=self.kernel,
                    dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
                    device=weight.device,
                )
            )
        return state

    @torch.jit.export
    def prefill(
        self, deltas: list[Tensor], state: list[Tensor], lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`forward` of the next tokens, and the state after them; the state given is not changed.

        lengths (B,) int64: row b has lengths[b] tokens, and the rest of it is padding, which no state includes.
        """
        self._require_deltas(deltas)
        if self.scope == "depth":
            return self._over_depth(deltas, by_operator=self.kernel != "hadamard_exp"), state
        self._require_recurrent()
        q, k, v = self._project(deltas[-1])
        padding: Tensor | None = None
        if lengths is not None:
            padding = torch.arange(q.size(1), device=q.device) >= lengths[:, None]
        y, linear = torch.ops.elattn.attention_with_state(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            kernel=self.kernel,
            is_causal=True,
            key_padding_mask=padding,
            state=state[0],
        )
        return y.transpose(1, 2).flatten(2), [linear]

    @torch.jit.export
    def step(self, deltas: list[Tensor], state: list[Tensor]) -> Tensor:
        """The answer (B, d_model) to the newest of deltas (B, d_model). Updates `state` in place, without gradient."""
        with torch.no_grad():
            self._require_deltas(deltas)
            if self.scope == "depth":
                return self._over_depth(deltas, by_operator=True)
            self._require_recurrent()
            q, k, v = self._project(deltas[-1])
            return torch.ops.elattn.attention_step(q, k, v, state[0], kernel=self.kernel).flatten(1)

    @torch.jit.unused
    def attach(self, model: nn.Module, layers: Iterable[int] | None = None, *, allow_future: bool = False) -> None:
        """Adds the lobe's answers to the contributions of a model's layers, until `detach`.

        The model says what its deltas are (docs/paper-modules.md has the protocol in full):

        - `model.delta_modules()`: a sequence of modules that `forward` calls once each, in this order. The first
          returns delta_0, the embedding, and number j the contribution of layer j - 1; all tensors (B, L, d_model).
        - `model.is_causal`: whether a token must not see later ones.

        The answer to delta_0, ..., delta_j is added to delta_{j+1}. `ELATransformer` has places for lobes of its own
        instead, which serve prefill, step and generate too. The lobe does not become a part of a model that has
        none: train it through its own parameters, and keep it in a file of its own.

        Args:
            layers: numbers of the layers whose contributions it adds to; by default all.
            allow_future: attach a lobe of scope "bidirectional" to a causal model all the same.

        Raises:
            TypeError: the model does not follow the protocol.
            ValueError: a layer does not exist or has a lobe, or the lobe would show later tokens to a causal model.
        """
        if not isinstance(getattr(model, "is_causal", None), bool):
            raise TypeError(f"MemoryLobe.attach: {type(model).__name__} needs an attribute is_causal: bool")
        if self.scope == "bidirectional" and model.is_causal and not allow_future:
            raise ValueError(
                f'MemoryLobe.attach: scope="bidirectional" in the causal model {type(model).__name__} would show every '
                "token the ones after it. The training loss falls then because the label is visible, and not because "
                'the model learns. Use scope="depth" or "causal", or allow_future=True if that is what you want'
            )
        places = _places(model)
        chosen = list(range(len(places.lobes))) if layers is None else list(layers)
        for layer in chosen:
            if not 0 <= layer < len(places.lobes):
                raise ValueError(f"MemoryLobe.attach: layers must be in 0..{len(places.lobes) - 1} (got {layer})")
            if places.lobes[layer] is not None:
                raise ValueError(f"MemoryLobe.attach: layer {layer} has a memory lobe already; detach it first")
        for layer in chosen:
            places.put(layer, self)

    @torch.jit.unused
    def detach(self, model: nn.Module) -> list[int]:
        """Undoes `attach`: the model computes what it did before. Returns the layers that the lobe was attached to.

        To swap lobes: `other.attach(model, lobe.detach(model))`.

        Raises:
            ValueError: the lobe is not attached to this model.
        """
        places = _places(model)
        layers = [layer for layer, lobe in enumerate(places.lobes) if lobe is self]
        if not layers:
            raise ValueError(f"MemoryLobe.detach: the lobe is not attached to this {type(model).__name__}")
        for layer in layers:
            places.put(layer, None)
        return layers

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.num_heads}, scope={self.scope!r}, kernel={self.kernel!r}"

    def _require_deltas(self, deltas: list[Tensor]) -> None:
        if len(deltas) == 0:
            raise ValueError("MemoryLobe: needs at least one delta, the embedding (got none)")

    def _require_recurrent(self) -> None:
        if self.scope == "bidirectional":
            raise ValueError('MemoryLobe: scope="bidirectional" sees later tokens: it has neither prefill nor step')

    def _project(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (..., H, D) of delta (..., d_model)."""
        q, k, v = self.qkv_proj(delta).unflatten(-1, [3, self.num_heads, self.head_dim]).unbind(-3)
        return q, k, v

    def _over_depth(self, deltas: list[Tensor], by_operator: bool) -> Tensor:
        """The answer (..., d_model) of a token's newest delta to the n deltas of that token.

        One query per token makes the quadratic form the cheaper one, n (D + Dv) against n D Dv: for hadamard_exp
        `by_operator=False` computes it, in log-space, 5 times quicker with its gradients. The operator serves the
        other kernels, and a few tokens, for which it needs fewer calls.
        """
        weight = self.qkv_proj.weight
        q = F.linear(deltas[-1], weight[: self.d_model]).unflatten(-1, [self.num_heads, self.head_dim])
        kv = F.linear(torch.stack(deltas), weight[self.d_model :])
        k, v = kv.unflatten(-1, [2, self.num_heads, self.head_dim]).unbind(-3)  # (n, ..., H, D)
        if by_operator:
            y = torch.ops.elattn.attention(
                q.flatten(0, -3)[:, :, None],  # (tokens, H, 1, D)
                k.flatten(1, -3).permute(1, 2, 0, 3),  # (tokens, H, n, D)
                v.flatten(1, -3).permute(1, 2, 0, 3),
                kernel=self.kernel,
            )
            return y.reshape(deltas[-1].shape)
        if q.dtype != torch.float64:
            q = q.float()
        # log sum_d exp(q_d + k_d) cannot overflow, and softmax over the deltas divides by the sum of the weights.
        weights = (q + k).logsumexp(-1, keepdim=True).softmax(0)  # (n, ..., H, 1)
        return (weights * v).sum(0).to(v.dtype).flatten(-2)


class _HookedDeltas:
    """Forward hooks that collect the deltas of a model and add the answers of lobes to them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: Sequence[nn.Module] = list(model.delta_modules())
        if len(set(self.modules)) != len(self.modules) or len(self.modules) < 2:
            raise TypeError(
                "MemoryLobe.attach: delta_modules() must return at least two modules, all different "
                f"(got {len(self.modules)})"
            )
        self.lobes: list[MemoryLobe | None] = [None] * (len(self.modules) - 1)
        self.deltas: list[Tensor] = []
        self.handles: list[Any] = []

    def put(self, layer: int, lobe: MemoryLobe | None) -> None:
        self.lobes[layer] = lobe
        if any(self.lobes) and not self.handles:
            self.handles = [
                module.register_forward_hook(partial(self._collect, index)) for index, module in enumerate(self.modules)
            ]
            self.model._memory_lobes = self
        elif not any(self.lobes) and self.handles:
            for handle in self.handles:
                handle.remove()
            self.handles, self.deltas = [], []
            del self.model._memory_lobes

    def _collect(self, index: int, module: nn.Module, arguments: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"MemoryLobe: delta module {index} must return a tensor (got {type(output).__name__})")
        if index == 0:
            self.deltas = []
        if index != len(self.deltas):
            raise RuntimeError(
                f"MemoryLobe: delta module {index} was called when it was the turn of {len(self.deltas)}"
            )
        lobe = self.lobes[index - 1] if index > 0 else None
        if lobe is not None:
            output = output + lobe(self.deltas)
        self.deltas.append(output)
        return output


class _OwnPlaces:
    """The places that a model has for lobes itself."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lobes: list[MemoryLobe | None] = model.memory_lobes()

    def put(self, layer: int, lobe: MemoryLobe | None) -> None:
        self.model.set_memory_lobe(layer, lobe)


def _places(model: nn.Module) -> _HookedDeltas | _OwnPlaces:
    if hasattr(model, "set_memory_lobe"):
        return _OwnPlaces(model)
    if not callable(getattr(model, "delta_modules", None)):
        raise TypeError(f"MemoryLobe.attach: {type(model).__name__} needs a method delta_modules()")
    return getattr(model, "_memory_lobes", None) or _HookedDeltas(model)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(f"MemoryLobe: {rule}")
