"""What attention layers have around their attention: projections, short convolution, rotary embedding, gate."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionProjections", "packed_places", "values_readable"]


class AttentionProjections(nn.Module):
    """Base of the attention layers: x (B, L, d_model) to q, k, v, and the heads' output to (B, L, d_model).

    Channels of q, k and v lie side by side, so that one product and one convolution serve all three, and one rotation
    q and k. The recurrent state of this part is the last inputs of the convolution (B, short_conv - 1, channels) and
    the position (B,).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        is_causal: bool,
        rotary: bool,
        bias: bool,
        short_conv: int,
        gate: bool,
    ) -> None:
        super().__init__()
        self.class_name = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._require(num_heads > 0, f"num_heads must be positive (got {num_heads})")
        self._require(
            num_kv_heads > 0 and num_heads % num_kv_heads == 0,
            f"num_heads must be a multiple of num_kv_heads (got {num_heads} and {num_kv_heads})",
        )
        if head_dim is None:
            self._require(
                d_model % num_heads == 0, f"d_model must be a multiple of num_heads (got {d_model}, {num_heads})"
            )
            head_dim = d_model // num_heads
        self._require(short_conv == 0 or short_conv >= 2, f"short_conv must be 0 or at least 2 (got {short_conv})")
        self._require(not rotary or head_dim % 2 == 0, f"rotary needs an even head_dim (got {head_dim})")

        self.d_model = d_model
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.is_causal = is_causal
        self.rotary = rotary
        self.short_conv = short_conv

        self.q_size = num_heads * head_dim
        self.kv_size = num_kv_heads * head_dim
        channels = self.q_size + 2 * self.kv_size
        self.qkv_proj = nn.Linear(d_model, channels, bias=bias)
        self.conv_weight: nn.Parameter | None = nn.Parameter(torch.empty(short_conv, channels)) if short_conv else None
        self.gate_proj = nn.Linear(d_model, self.q_size, bias=bias) if gate else None
        self.out_proj = nn.Linear(self.q_size, d_model, bias=bias)
        self.rotary_turns: Tensor | None
        self.register_buffer(
            "rotary_turns", torch.empty(head_dim, dtype=torch.long) if rotary else None, persistent=False
        )

    def reset_parameters(self) -> None:
        """Initial values of what is no projection: the convolution begins close to passing its input through."""
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -0.1, 0.1)
            with torch.no_grad():
                self.conv_weight[-1] += 1
        if self.rotary_turns is not None:
            # Turns per token in units of 2^-64, so that integer arithmetic, which wraps, leaves the exact fraction of a
            # turn at any position. No floating type: module.to(torch.bfloat16) would round it.
            half = torch.arange(self.head_dim // 2, dtype=torch.float64, device=self.rotary_turns.device)
            frequency = torch.exp(half * (-2.0 * math.log(10000.0) / self.head_dim))
            turns = (frequency * (2.0**64 / (2.0 * math.pi))).round().long()
            self.rotary_turns.copy_(torch.cat([-turns, turns]))

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"is_causal={self.is_causal}, rotary={self.rotary}, short_conv={self.short_conv}"
        )

    def _require(self, condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"{self.class_name}: {rule}")

    def _require_causal(self) -> None:
        if not self.is_causal:
            raise ValueError(f"{self.class_name}: prefill and step need is_causal=True")

    # Whole sequences

    def _project(
        self, x: Tensor, key_padding_mask: Tensor | None, context: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, L, D), k and v (B, Hkv, Lk, D), with the arguments of `forward`."""
        if cu_seqlens is not None:
            self._require(x.size(0) == 1, f"cu_seqlens needs x with batch size 1 (got {x.size(0)})")
            self._require(
                cu_seqlens.dim() == 1 and cu_seqlens.size(0) > 0,
                f"cu_seqlens must have shape (N + 1,) (got {list(cu_seqlens.shape)})",
            )
            self._require(key_padding_mask is None, "key_padding_mask and cu_seqlens exclude each other")
            self._require(context is None, "context and cu_seqlens exclude each other")
        if context is not None:
            return self._project_context(x, context, key_padding_mask)
        if cu_seqlens is not None:
            position = packed_places(cu_seqlens, x.size(1))[1][None]
        else:
            position = _positions(x, key_padding_mask)
        channels = self._convolve_all(self.qkv_proj(x), 0, key_padding_mask, cu_seqlens, position)
        q, k, v = self._heads(channels, position)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _project_context(
        self, x: Tensor, context: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q from x, k and v from context."""
        self._require(not self.is_causal, "context needs is_causal=False")
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        q_bias: Tensor | None = None
        kv_bias: Tensor | None = None
        if bias is not None:
            q_bias, kv_bias = bias[: self.q_size], bias[self.q_size :]
        position, key_position = _positions(x, None), _positions(context, key_padding_mask)
        q = self._convolve_all(F.linear(x, weight[: self.q_size], q_bias), 0, None, None, position)
        kv = F.linear(context, weight[self.q_size :], kv_bias)
        kv = self._convolve_all(kv, self.q_size, key_padding_mask, None, key_position)
        q = self._rotate(q.unflatten(-1, [self.num_heads, self.head_dim]), position)
        k, v = kv.unflatten(-1, [2 * self.num_kv_heads, self.head_dim]).chunk(2, -2)
        return q.transpose(1, 2), self._rotate(k, key_position).transpose(1, 2), v.transpose(1, 2)

    def _convolve_all(
        self,
        channels: Tensor,
        first_channel: int,
        padding: Tensor | None,
        cu_seqlens: Tensor | None,
        position: Tensor,
    ) -> Tensor:
        """The short convolution, if there is one, of whole sequences (B, L, C)."""
        if self.conv_weight is None:
            return channels
        if padding is not None:
            # Padding must look like the nothing before the first token.
            channels = channels.masked_fill(padding[..., None], 0)
        window = F.pad(channels, [0, 0, self.short_conv - 1, 0])
        return self._convolve(window, first_channel, None if cu_seqlens is None else position)

    # Sequences in pieces

    def _new_inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        """The convolution's last inputs and the position before the first token."""
        weight = self.qkv_proj.weight
        last_inputs = weight.new_zeros([batch, max(self.short_conv - 1, 0), self.q_size + 2 * self.kv_size])
        return last_inputs, torch.zeros(batch, dtype=torch.long, device=weight.device)

    def _project_next(
        self, x: Tensor, last_inputs: Tensor, position: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, L, D), k and v (B, Hkv, L, D) of the next tokens, and the convolution's last inputs after them."""
        channels = self.qkv_proj(x)
        if self.conv_weight is not None:
            window = torch.cat([last_inputs.to(channels.dtype), channels], 1)
            channels = self._convolve(window, 0, None)
            if lengths is None:
                last_inputs = window[:, x.size(1) :].clone()
            else:
                index = lengths[:, None] + torch.arange(self.short_conv - 1, device=x.device)  # (B, short_conv - 1)
                last_inputs = window.gather(1, index[..., None].expand(-1, -1, window.size(2)))
        q, k, v = self._heads(channels, position[:, None] + torch.arange(x.size(1), device=x.device))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), last_inputs

    def _project_step(self, x_t: Tensor, last_inputs: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, D), k and v (B, Hkv, D) of the next token (B, d_model), which last_inputs then includes."""
        channels = self.qkv_proj(x_t)
        weight = self.conv_weight
        if weight is not None:
            window = torch.cat([last_inputs.to(channels.dtype), channels.unsqueeze(1)], 1)  # (B, short_conv, C)
            last_inputs.copy_(window.narrow(1, 1, self.short_conv - 1))
            channels = (window * weight).sum(1)
        return self._heads(channels, position)

    # Parts of both

    def _convolve(self, window: Tensor, first_channel: int, position: Tensor | None) -> Tensor:
        """Depthwise convolution of (B, short_conv - 1 + L, C), channels from `first_channel` on, to (B, L, C).

        With `position` (1, L), that of each token in its sequence, no tap reaches before position 0.
        """
        weight = self.conv_weight
        assert weight is not None
        weight = weight[:, first_channel : first_channel + window.size(2)]
        length = window.size(1) - self.short_conv + 1
        out = window[:, self.short_conv - 1 :] * weight[self.short_conv - 1]
        for back in range(1, self.short_conv):
            tap = self.short_conv - 1 - back
            earlier = window[:, tap : tap + length]
            if position is not None:
                earlier = earlier.masked_fill((position < back)[..., None], 0)
            out = torch.addcmul(out, earlier, weight[tap])
        return out

    def _heads(self, channels: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., H, D), k and v (..., Hkv, D) from channels (..., C); q and k rotated by position (...)."""
        # Functions of torch, as the methods of Tensor are wrappers in Python, which a step would notice.
        heads = torch.unflatten(channels, -1, [self.num_heads + 2 * self.num_kv_heads, self.head_dim])
        if self.rotary_turns is None:
            q, k, v = torch.split_with_sizes(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], -2)
        else:
            qk, v = torch.split_with_sizes(heads, [self.num_heads + self.num_kv_heads, self.num_kv_heads], -2)
            qk = self._rotate(qk, position)
            q, k = torch.split_with_sizes(qk, [self.num_heads, self.num_kv_heads], -2)
        return q, k, v

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """The rotary embedding, if there is one, of (..., heads, D) at position (...)."""
        turns = self.rotary_turns
        if turns is None:
            return x
        turns = (
            position.unsqueeze(-1).unsqueeze(-1) * turns
        )  # (..., 1, D), of -a for the first half of D and a for the other
        if x.dtype == torch.float64:
            turns = turns.double()
        angle = turns * (2.0 * math.pi / 2.0**64)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.addcmul(x * cos, x.roll(self.head_dim // 2, -1), sin)

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        """The heads' output (..., H D) gated by x, and projected."""
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.out_proj(y)

    def _padding(self, x: Tensor, lengths: Tensor | None) -> Tensor | None:
        """(B, L) bool: the tokens of x from lengths (B,) on."""
        if lengths is None:
            return None
        batch, most = x.size(0), x.size(1)
        self._require(
            lengths.dim() == 1 and lengths.size(0) == batch,
            f"lengths must have shape (B,) = ({batch},) (got {list(lengths.shape)})",
        )
        if values_readable(lengths) and batch > 0:
            low, high = int(lengths.min()), int(lengths.max())
            self._require(
                0 <= low and high <= most, f"lengths must be 0..{most}, the tokens of x (got {low} to {high})"
            )
        return torch.arange(most, device=x.device) >= lengths[:, None]


def packed_places(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(L,) each: the sequence that a packed token belongs to, and its position there."""
    token = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return sequence, token - cu_seqlens[sequence]


def values_readable(tensor: Tensor, synchronise: bool = False) -> bool:
    """Whether code may depend on values: in no graph, and on a GPU only if told to wait for it."""
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        return False
    return synchronise or tensor.is_cpu


def _positions(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """(B or 1, L): how many tokens that are no padding are before each."""
    if key_padding_mask is None:
        return torch.arange(x.size(1), device=x.device)[None]
    return (~key_padding_mask).cumsum(1) - 1
