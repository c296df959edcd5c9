"""Multi-head exact linear attention with the options that a language model wants (docs/modules.md)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elattn.ops import kernels

__all__ = ["ExactLinearAttention"]

_DECAYS = ("none", "head", "channel", "token")


class ExactLinearAttention(nn.Module):
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
            per key head and channel, for hadamard_exp; "token": softplus of a projection of x, one per key head, added
            to a learned offset per channel (per head for other kernels), so the model decides what to forget.
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
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _require(num_heads > 0, f"num_heads must be positive (got {num_heads})")
        _require(
            num_kv_heads > 0 and num_heads % num_kv_heads == 0,
            f"num_heads must be a multiple of num_kv_heads (got {num_heads} and {num_kv_heads})",
        )
        if head_dim is None:
            _require(d_model % num_heads == 0, f"d_model must be a multiple of num_heads (got {d_model}, {num_heads})")
            head_dim = d_model // num_heads
        _require(kernel in kernels(), f"kernel must be one of {', '.join(kernels())} (got {kernel!r})")
        _require(decay in _DECAYS, f"decay must be one of {', '.join(_DECAYS)} (got {decay!r})")
        _require(decay == "none" or is_causal, f"decay needs is_causal=True (got decay={decay!r})")
        _require(
            decay != "channel" or kernel == "hadamard_exp",
            f'decay="channel" needs kernel="hadamard_exp", whose channels are separate (got {kernel!r})',
        )
        _require(short_conv == 0 or short_conv >= 2, f"short_conv must be 0 or at least 2 (got {short_conv})")
        _require(not rotary or head_dim % 2 == 0, f"rotary needs an even head_dim (got {head_dim})")

        self.d_model = d_model
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kernel = kernel
        self.scale = scale
        self.is_causal = is_causal
        self.rotary = rotary
        self.decay = decay
        self.short_conv = short_conv

        # Channels of q, k and v lie side by side, so that one product and one convolution serve all three.
        self.q_size = num_heads * head_dim
        self.kv_size = num_kv_heads * head_dim
        channels = self.q_size + 2 * self.kv_size
        self.qkv_proj = nn.Linear(d_model, channels, bias=bias)
        self.conv_weight: nn.Parameter | None = nn.Parameter(torch.empty(short_conv, channels)) if short_conv else None
        self.decay_proj = nn.Linear(d_model, num_kv_heads, bias=False) if decay == "token" else None
        self.decay_rate: nn.Parameter | None = None
        if decay != "none":
            per_channel = decay != "head" and kernel == "hadamard_exp"
            shape = (num_kv_heads, head_dim) if per_channel else (num_kv_heads,)
            self.decay_rate = nn.Parameter(torch.empty(shape))
        self.gate_proj = nn.Linear(d_model, self.q_size, bias=bias) if gate else None
        self.out_proj = nn.Linear(self.q_size, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: the convolution passes its input through, and rates span long and short memories."""
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -0.1, 0.1)
            with torch.no_grad():
                self.conv_weight[-1] += 1
        if self.decay_rate is not None:
            # Log-spaced from about 300 tokens to 2, as docs/math.md section 9 found good; the parameter is what
            # `_rates` makes positive.
            rates = torch.logspace(
                math.log10(0.003 if self.decay_rate.dim() == 2 else 0.01), math.log10(0.5), self.decay_rate.size(-1)
            )
            raw = torch.log(torch.expm1(rates)) if self.decay == "token" else torch.log(rates)
            with torch.no_grad():
                self.decay_rate.copy_(raw.expand_as(self.decay_rate))
        if self.decay_proj is not None:
            nn.init.zeros_(self.decay_proj.weight)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Attention over the whole of x.

        Args:
            x: (B, L, d_model).
            key_padding_mask: (B, Lk) bool, True for padding in x, or in context if it is given.
            context: (B, Lk, d_model), where keys and values come from instead of x; not for a causal module.

        Returns:
            (B, L, d_model).
        """
        if context is None:
            channels = self._convolve_all(self.qkv_proj(x), key_padding_mask, 0)
            q, k, v = channels.split([self.q_size, self.kv_size, self.kv_size], -1)
        else:
            q, k, v = self._project_context(x, context, key_padding_mask)
        q, k, v = self._heads(q, k, v, torch.zeros(1, dtype=torch.long, device=x.device))
        y = torch.ops.elattn.attention(
            q,
            k,
            v,
            kernel=self.kernel,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=True,
            key_padding_mask=key_padding_mask,
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
        last_inputs = weight.new_zeros([batch, max(self.short_conv - 1, 0), self.q_size + 2 * self.kv_size])
        return [linear, last_inputs, torch.zeros(batch, dtype=torch.long, device=weight.device)]

    @torch.jit.export
    def prefill(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`forward` of the next tokens x (B, L, d_model), and the state after them; the state given is not changed."""
        self._require_causal()
        linear, last_inputs, position = state
        qkv = self.qkv_proj(x)
        if self.conv_weight is not None:
            window = torch.cat([last_inputs.to(qkv.dtype), qkv], 1)
            qkv = self._convolve(window, 0)
            last_inputs = window[:, window.size(1) - self.short_conv + 1 :].clone()
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], -1)
        q, k, v = self._heads(q, k, v, position)
        y, linear = torch.ops.elattn.attention_with_state(
            q,
            k,
            v,
            kernel=self.kernel,
            is_causal=True,
            scale=self.scale,
            enable_gqa=True,
            decay=self._rates(x),
            state=linear,
        )
        return self._output(y.transpose(1, 2).flatten(2), x), [linear, last_inputs, position + x.size(1)]

    @torch.jit.export
    def step(self, x_t: Tensor, state: list[Tensor]) -> Tensor:
        """`forward` of the next token x_t (B, d_model), which `state` then includes: it is updated in place.

        Returns (B, d_model). Runs without gradient.
        """
        self._require_causal()
        with torch.no_grad():
            linear, last_inputs, position = state
            x = x_t[:, None]
            qkv = self.qkv_proj(x)
            if self.conv_weight is not None:
                window = torch.cat([last_inputs.to(qkv.dtype), qkv], 1)
                qkv = self._convolve(window, 0)
                last_inputs.copy_(window[:, 1:])
            q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], -1)
            q, k, v = self._heads(q, k, v, position)
            rates = self._rates(x)
            if rates is not None and self.decay == "token" and rates.dim() == 4:
                rates = rates.squeeze(2)
            y = torch.ops.elattn.attention_step(
                q.squeeze(2),
                k.squeeze(2),
                v.squeeze(2),
                linear,
                kernel=self.kernel,
                scale=self.scale,
                enable_gqa=True,
                decay=rates,
            )
            position.add_(1)
            return self._output(y.flatten(1), x_t)

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"kernel={self.kernel!r}, scale={self.scale}, is_causal={self.is_causal}, rotary={self.rotary}, "
            f"decay={self.decay!r}, short_conv={self.short_conv}"
        )

    def _require_causal(self) -> None:
        if not self.is_causal:
            raise ValueError("ExactLinearAttention: prefill and step need is_causal=True")

    def _project_context(
        self, x: Tensor, context: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Channels of q from x, and of k and v from context."""
        if self.is_causal:
            raise ValueError("ExactLinearAttention: context needs is_causal=False")
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        q_bias: Tensor | None = None
        kv_bias: Tensor | None = None
        if bias is not None:
            q_bias, kv_bias = bias[: self.q_size], bias[self.q_size :]
        q = self._convolve_all(F.linear(x, weight[: self.q_size], q_bias), None, 0)
        kv = self._convolve_all(F.linear(context, weight[self.q_size :], kv_bias), key_padding_mask, self.q_size)
        k, v = kv.chunk(2, -1)
        return q, k, v

    def _convolve_all(self, channels: Tensor, padding: Tensor | None, first_channel: int) -> Tensor:
        """The short convolution, if there is one, of a whole sequence (B, L, C)."""
        if self.conv_weight is None:
            return channels
        if padding is not None:
            # Padding must look like the nothing before the first token.
            channels = channels.masked_fill(padding[:, :, None], 0)
        return self._convolve(F.pad(channels, [0, 0, self.short_conv - 1, 0]), first_channel)

    def _convolve(self, window: Tensor, first_channel: int) -> Tensor:
        """Depthwise convolution of (B, short_conv - 1 + L, C), channels from `first_channel` on, to (B, L, C)."""
        weight = self.conv_weight
        assert weight is not None
        weight = weight[:, first_channel : first_channel + window.size(2)]
        length = window.size(1) - self.short_conv + 1
        out = window[:, :length] * weight[0]
        for tap in range(1, self.short_conv):
            out = torch.addcmul(out, window[:, tap : tap + length], weight[tap])
        return out

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the channels as (B, H, L, D) and (B, Hkv, Lk, D); q and k rotated."""
        q = q.unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)
        k = k.unflatten(-1, [self.num_kv_heads, self.head_dim]).transpose(1, 2)
        v = v.unflatten(-1, [self.num_kv_heads, self.head_dim]).transpose(1, 2)
        if self.rotary:
            q, k = self._rotate(q, position), self._rotate(k, position)
        return q, k, v

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotary embedding of (B, heads, L, D) whose first token is at `position` (B or 1,)."""
        # Angles in float64: at position 1,000,000 a float32 angle is wrong by 0.06.
        half = torch.arange(self.head_dim // 2, dtype=torch.float64, device=x.device)
        frequency = torch.exp(half * (-2.0 * math.log(10000.0) / self.head_dim))
        positions = position[:, None] + torch.arange(x.size(2), device=x.device)  # (B, L)
        angle = (positions[..., None] * frequency)[:, None]  # (B, 1, L, D / 2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def _rates(self, x: Tensor) -> Tensor | None:
        """Forgetting rates, in a shape that `elattn.attention` takes."""
        raw = self.decay_rate
        if raw is None:
            return None
        if self.decay_proj is None:
            return raw.exp()
        per_head = self.decay_proj(x).transpose(1, 2)  # (B, Hkv, L)
        if raw.dim() == 1:
            return F.softplus(per_head + raw[:, None])
        return F.softplus(per_head[..., None] + raw[:, None])  # (B, Hkv, L, D)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.out_proj(y)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(f"ExactLinearAttention: {rule}")
