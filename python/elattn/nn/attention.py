"""Multi-head exact linear attention with the options that a language model wants (docs/modules.md)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elattn.nn._projections import AttentionProjections
from elattn.ops import kernels

__all__ = ["ExactLinearAttention"]

_DECAYS = ("none", "head", "channel", "token")


class ExactLinearAttention(AttentionProjections):
    """y = W_o attention(W_q x, W_k x, W_v x), with a recurrent form of constant size for generation.

    Args:
        d_model: width of x and y.
        num_heads: query heads H.
        num_kv_heads: key and value heads Hkv, a divisor of H; by default H.
        head_dim: D, by default d_model / num_heads.
        kernel: a name from `elattn.kernels()`.
        scale: multiplies q and k before the kernel.
        is_causal: token i sees tokens 0..i. `prefill` and `step` need it, and so does decay.
        rotary: rotate q and k by their position.
        bias: biases in the projections.
        decay: how old tokens are forgotten (docs/math.md, section 9). "head": a learned rate per key head; "channel":
            per key head and channel, for hadamard_exp; "token": softplus of a projection of x to one number per key
            head, so the model decides what to forget.
        short_conv: width of a depthwise causal convolution on q, k and v; 0 for none.
        gate: multiply the heads' output by silu(W_g x).

    The state is a list of three tensors: the sums of the attention (B, Hkv, state_size), the last inputs of the
    convolution (B, short_conv - 1, channels), and the position (B,). Its batch entries are independent of each other.

    Raises:
        ValueError: an option breaks a rule; the message has the rule and the value met.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kernel: str = "hadamard_exp",
        scale: float = 1.0,
        is_causal: bool = False,
        rotary: bool = False,
        bias: bool = False,
        decay: str = "none",
        short_conv: int = 0,
        gate: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads, num_kv_heads, head_dim, is_causal, rotary, bias, short_conv, gate)
        self._require(kernel in kernels(), f"kernel must be one of {', '.join(kernels())} (got {kernel!r})")
        self._require(decay in _DECAYS, f"decay must be one of {', '.join(_DECAYS)} (got {decay!r})")
        self._require(decay == "none" or is_causal, f"decay needs is_causal=True (got decay={decay!r})")
        self._require(
            decay != "channel" or kernel == "hadamard_exp",
            f'decay="channel" needs kernel="hadamard_exp", whose channels are separate (got {kernel!r})',
        )
        self.kernel = kernel
        self.scale = scale
        self.decay = decay
        self.decay_proj = nn.Linear(d_model, self.num_kv_heads, bias=False) if decay == "token" else None
        self.decay_rate: nn.Parameter | None = None
        if decay != "none":
            shape = (self.num_kv_heads, self.head_dim) if decay == "channel" else (self.num_kv_heads,)
            self.decay_rate = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: the convolution passes its input through, and rates span long and short memories."""
        super().reset_parameters()
        if self.decay_rate is not None:
            # Log-spaced from some hundred tokens to 2, as docs/math.md section 9 found good; the parameter is what
            # `_rates` makes positive.
            slowest = 0.003 if self.decay == "channel" else 0.01
            rates = torch.logspace(math.log10(slowest), math.log10(0.5), self.decay_rate.size(-1))
            raw = torch.log(torch.expm1(rates)) if self.decay == "token" else torch.log(rates)
            with torch.no_grad():
                self.decay_rate.copy_(raw.expand_as(self.decay_rate))
        if self.decay_proj is not None:
            nn.init.zeros_(self.decay_proj.weight)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        context: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attention over the whole of x.

        Args:
            x: (B, L, d_model).
            key_padding_mask: (B, Lk) bool, True for padding in x, or in context if it is given, on either side of the
                tokens. Positions count tokens that are no padding.
            context: (B, Lk, d_model), where keys and values come from instead of x; not for a causal module.
            cu_seqlens: (N + 1,) int32 or int64, the ends of N sequences packed along L, with B = 1. Attention,
                convolution and positions begin anew in each; empty ones are allowed.

        Returns:
            (B, L, d_model).

        Raises:
            ValueError, RuntimeError: an argument breaks a rule; the message has the rule and the value met.
        """
        q, k, v = self._project(x, key_padding_mask, context, cu_seqlens)
        y = torch.ops.elattn.attention(
            q,
            k,
            v,
            kernel=self.kernel,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=True,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            decay=self._rates(x),
        )
        return self._output(y.transpose(1, 2).flatten(2), x)

    @torch.jit.export
    def new_state(self, batch: int) -> list[Tensor]:
        """The state before the first token."""
        weight = self.qkv_proj.weight
        linear = torch.ops.elattn.new_state(
            batch,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim,
            kernel=self.kernel,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            device=weight.device,
        )
        last_inputs, position = self._new_inputs(batch)
        return [linear, last_inputs, position]

    @torch.jit.export
    def prefill(self, x: Tensor, state: list[Tensor], lengths: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """`forward` of the next tokens x (B, L, d_model), and the state after them; the state given is not changed.

        With lengths (B,), int64, row b has lengths[b] <= L tokens and then padding, which does not enter the state.
        The output there is finite and means nothing.

        Raises:
            ValueError, RuntimeError: an argument breaks a rule; the message has the rule and the value met.
        """
        self._require_causal()
        linear, last_inputs, position = state
        padding = self._padding(x, lengths)
        q, k, v, last_inputs = self._project_next(x, last_inputs, position, lengths)
        y, linear = torch.ops.elattn.attention_with_state(
            q,
            k,
            v,
            kernel=self.kernel,
            is_causal=True,
            scale=self.scale,
            enable_gqa=True,
            key_padding_mask=padding,
            decay=self._rates(x),
            state=linear,
        )
        position = position + x.size(1) if lengths is None else position + lengths
        return self._output(y.transpose(1, 2).flatten(2), x), [linear, last_inputs, position]

    @torch.jit.export
    def step(self, x_t: Tensor, state: list[Tensor]) -> Tensor:
        """`forward` of the next token x_t (B, d_model), which `state` then includes: it is updated in place.

        Returns (B, d_model). Runs without gradient.
        """
        self._require_causal()
        with torch.no_grad():
            linear, last_inputs, position = state
            q, k, v = self._project_step(x_t, last_inputs, position)
            y = torch.ops.elattn.attention_step(
                q,
                k,
                v,
                linear,
                kernel=self.kernel,
                scale=self.scale,
                enable_gqa=True,
                decay=self._rates(x_t[:, None]),
            )
            position.add_(1)
            return self._output(y.flatten(1), x_t)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel!r}, scale={self.scale}, decay={self.decay!r}"

    def _rates(self, x: Tensor) -> Tensor | None:
        """Forgetting rates of x (B, L, d_model) in a shape that `elattn.attention` takes."""
        raw = self.decay_rate
        if raw is None:
            return None
        if self.decay_proj is None:
            return raw.exp()
        return F.softplus(self.decay_proj(x) + raw).transpose(1, 2)  # (B, Hkv, L)
