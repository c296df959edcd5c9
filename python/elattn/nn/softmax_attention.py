"""Multi-head softmax attention with the options and methods of `ExactLinearAttention` (docs/modules.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elattn.nn._projections import AttentionProjections, packed_places, values_readable

__all__ = ["SoftmaxAttention"]


class SoftmaxAttention(AttentionProjections):
    """y = W_o softmax(scale Q K^T) V, the layer that exact linear attention is compared with and mixed with.

    Parameters, their names and their number are those of `ExactLinearAttention` without decay.

    Args:
        d_model: width of x and y.
        num_heads: query heads H.
        num_kv_heads: key and value heads Hkv, a divisor of H; by default H.
        head_dim: D, by default d_model / num_heads.
        scale: multiplies q . k; by default 1 / sqrt(D).
        is_causal: token i sees tokens 0..i. `prefill` and `step` need it.
        rotary: rotate q and k by their position.
        bias: biases in the projections.
        short_conv: width of a depthwise causal convolution on q, k and v; 0 for none.
        gate: multiply the heads' output by silu(W_g x).
        max_seq_len: tokens that a state has room for, if `new_state` is not told otherwise.

    The state is a list of four tensors: keys and values (B, Hkv, capacity, D), the last inputs of the convolution
    (B, short_conv - 1, channels), and the position (B,). Its batch entries are independent of each other.

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
        scale: float | None = None,
        is_causal: bool = False,
        rotary: bool = False,
        bias: bool = False,
        short_conv: int = 0,
        gate: bool = False,
        max_seq_len: int | None = None,
    ) -> None:
        super().__init__(d_model, num_heads, num_kv_heads, head_dim, is_causal, rotary, bias, short_conv, gate)
        self._require(max_seq_len is None or max_seq_len > 0, f"max_seq_len must be positive (got {max_seq_len})")
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        self.max_seq_len = max_seq_len
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        context: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attention over the whole of x.

        Args:
            x: (B, L, d_model).
            key_padding_mask: (B, Lk) bool, True for padding in x, or in context if it is given, on either side of the
                tokens. Positions count tokens that are no padding. A row that sees no key is 0.
            context: (B, Lk, d_model), where keys and values come from instead of x; not for a causal module.
            cu_seqlens: (N + 1,) int32 or int64, the ends of N sequences packed along L, with B = 1. Attention,
                convolution and positions begin anew in each; empty ones are allowed.
            max_seqlen: a bound of the length of the packed sequences. Without it the longest is read from cu_seqlens,
                which synchronises with a GPU, and under torch.compile and torch.export, where a shape cannot depend on
                values, all pairs of tokens are computed and those of different sequences masked.

        Returns:
            (B, L, d_model).

        Raises:
            ValueError: an argument breaks a rule; the message has the rule and the value met.
        """
        q, k, v = self._project(x, key_padding_mask, context, cu_seqlens)
        if cu_seqlens is not None:
            y = self._packed(q, k, v, cu_seqlens, max_seqlen)
        elif key_padding_mask is not None:
            k, v = _blank(k, key_padding_mask), _blank(v, key_padding_mask)
            mask = ~key_padding_mask[:, None, None]  # (B, 1, 1, Lk)
            if self.is_causal:
                mask = mask & torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
            y = self._attend(q, k, v, mask, False)
        else:
            y = self._attend(q, k, v, None, self.is_causal)
        return self._output(y.transpose(1, 2).flatten(2), x)

    @torch.jit.export
    def new_state(self, batch: int, capacity: int | None = None) -> list[Tensor]:
        """The state before the first token, with room for `capacity` tokens, by default max_seq_len.

        Raises:
            ValueError: neither is given.
        """
        if capacity is None:
            capacity = self.max_seq_len
        if capacity is None:
            raise ValueError("SoftmaxAttention: new_state needs a capacity, as the module has no max_seq_len")
        weight = self.qkv_proj.weight
        keys = weight.new_zeros([batch, self.num_kv_heads, capacity, self.head_dim])
        last_inputs, position = self._new_inputs(batch)
        return [keys, torch.zeros_like(keys), last_inputs, position]

    @torch.jit.export
    def prefill(self, x: Tensor, state: list[Tensor], lengths: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """`forward` of the next tokens x (B, L, d_model), and the state after them; the state given is not changed.

        With lengths (B,), int64, row b has lengths[b] <= L tokens and then padding, which does not enter the state.
        The output there is finite and means nothing. Reads the position, so it synchronises with a GPU. The state
        returned has a cache of its own, into which the tokens that were seen are copied.

        Raises:
            ValueError: an argument breaks a rule, or the cache has no room for x; the message has the rule and the
                value met.
        """
        self._require_causal()
        old_keys, old_values, last_inputs, position = state
        batch, length = x.size(0), x.size(1)
        padding = self._padding(x, lengths)
        after = position + length if lengths is None else position + lengths
        first, past = _bounds(position)
        _, end = _bounds(after)
        self._require_room(end, old_keys)

        q, k, v, last_inputs = self._project_next(x, last_inputs, position, lengths)
        if padding is not None:
            k, v = _blank(k, padding), _blank(v, padding)
        keys, values = torch.zeros_like(old_keys), torch.zeros_like(old_values)
        keys[:, :, :past] = old_keys[:, :, :past]
        values[:, :, :past] = old_values[:, :, :past]
        slots = position[:, None] + torch.arange(length, device=x.device)  # (B, L)
        if first == past and past + length <= keys.size(2):
            keys[:, :, past : past + length] = k
            values[:, :, past : past + length] = v
        else:
            real = torch.ones_like(slots, dtype=torch.bool) if padding is None else ~padding
            rows = torch.arange(batch, device=x.device)[:, None].expand_as(slots)[real]
            keys[rows, :, slots[real]] = k.transpose(1, 2)[real].to(keys.dtype)
            values[rows, :, slots[real]] = v.transpose(1, 2)[real].to(values.dtype)
        if past == 0:
            y = self._attend(q, k, v, None, True)
        else:
            last = slots[:1] if first == past else slots  # (1 or B, L): what each query sees
            mask = (torch.arange(end, device=x.device) <= last[..., None])[:, None]
            y = self._attend(q, keys[:, :, :end], values[:, :, :end], mask, False)
        return self._output(y.transpose(1, 2).flatten(2), x), [keys, values, last_inputs, after]

    @torch.jit.export
    def step(self, x_t: Tensor, state: list[Tensor]) -> Tensor:
        """`forward` of the next token x_t (B, d_model), which `state` then includes: it is updated in place.

        Returns (B, d_model). Runs without gradient. Reads the position, so it synchronises with a GPU.

        Raises:
            ValueError: the cache is full; the message has its capacity. Nothing is written then.
        """
        self._require_causal()
        with torch.no_grad():
            keys, values, last_inputs, position = state
            # In a graph no shape can depend on values: there all of the cache is read, and what no token fills masked.
            end, aligned = keys.size(2), False
            if values_readable(position, synchronise=True):
                first, past = _bounds(position)
                self._require_room(past + 1, keys)
                end, aligned = past + 1, first == past
            q, k, v = self._project_step(x_t, last_inputs, position)
            mask: Tensor | None = None
            if aligned:
                keys[:, :, end - 1] = k
                values[:, :, end - 1] = v
            else:
                rows = torch.arange(x_t.size(0), device=x_t.device)
                keys[rows, :, position] = k.to(keys.dtype)
                values[rows, :, position] = v.to(values.dtype)
                mask = (torch.arange(end, device=x_t.device) <= position[:, None])[:, None, None]
            # The heads of a group are rows of one query, so that keys and values are read once.
            q = q.unflatten(1, [self.num_kv_heads, self.num_heads // self.num_kv_heads])
            y = self._attend(q, keys[:, :, :end], values[:, :, :end], mask, False)
            position.add_(1)
            return self._output(y.flatten(1), x_t)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.4g}, max_seq_len={self.max_seq_len}"

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
        )

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
        """Attention (1, H, L, D) of packed sequences: as a batch of padded ones, or masked where that is cheaper."""
        length, count = q.size(2), cu_seqlens.size(0) - 1
        if values_readable(cu_seqlens, synchronise=max_seqlen is None):
            max_seqlen = self._longest(cu_seqlens, length, max_seqlen)

        sequence, position = packed_places(cu_seqlens, length)
        if max_seqlen is None or count * max_seqlen * max_seqlen > length * length:
            mask = sequence[:, None] == sequence
            if self.is_causal:
                mask = mask.tril()
            return self._attend(q, k, v, mask, False)

        lengths = cu_seqlens.diff()
        token = torch.arange(max_seqlen, device=q.device)
        # Padding repeats the last token of its sequence, so that nothing crosses from one to another.
        index = cu_seqlens[:-1, None] + torch.minimum(token, lengths[:, None] - 1)  # (N, max_seqlen)
        index = index.clamp(0, max(length - 1, 0))
        padding_mask: Tensor | None = None
        if not self.is_causal:
            padding_mask = (token < lengths[:, None])[:, None, None]
        y = self._attend(_take(q, index), _take(k, index), _take(v, index), padding_mask, self.is_causal)
        y = y.transpose(1, 2).flatten(0, 1).index_select(0, sequence * max_seqlen + position)  # (L, H, D)
        return y.transpose(0, 1)[None]

    def _longest(self, cu_seqlens: Tensor, length: int, max_seqlen: int | None) -> int:
        """Length of the longest packed sequence, by cu_seqlens that keep the rules of `elattn.attention`."""
        shortest, longest = _bounds(cu_seqlens.diff())
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        self._require(first == 0, f"cu_seqlens must start at 0 (got {first})")
        self._require(shortest >= 0, f"cu_seqlens must not decrease (got a sequence of length {shortest})")
        self._require(last == length, f"cu_seqlens must end at {length}, the tokens of x (got {last})")
        self._require(
            max_seqlen is None or longest <= max_seqlen,
            f"max_seqlen must bound every packed sequence (got {max_seqlen} for a sequence of length {longest})",
        )
        return longest

    def _require_room(self, tokens: int, keys: Tensor) -> None:
        if tokens > keys.size(2):
            raise ValueError(
                f"SoftmaxAttention: the state has room for {keys.size(2)} tokens, its capacity, but would hold {tokens}"
            )


def _bounds(position: Tensor) -> tuple[int, int]:
    """The smallest and the largest position (B,)."""
    if position.size(0) == 0:
        return 0, 0
    if position.size(0) == 1:
        only = int(position)
        return only, only
    low, high = position.aminmax()
    return int(low), int(high)


def _blank(x: Tensor, padding: Tensor) -> Tensor:
    """x (B, heads, L, D) with 0 where padding (B, L) is: weights of 0 do not hide a NaN."""
    return x.masked_fill(padding[:, None, :, None], 0)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(N, heads, M, D): the tokens index (N, M) of x (1, heads, L, D)."""
    rows = x[0].transpose(0, 1).index_select(0, index.flatten())  # (N M, heads, D)
    return rows.unflatten(0, [index.size(0), index.size(1)]).transpose(1, 2)
