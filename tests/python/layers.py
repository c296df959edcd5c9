"""What every attention layer is tested for: its definition, and that all ways to run it agree with it."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elattn.nn import ExactLinearAttention, SoftmaxAttention
from elattn.testing import reference_attention


def perturbed(layer: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Away from initial values, at which parts do nothing. In float64 what differs by rounding differs by 1e-12."""
    layer = layer.to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def steps(layer: Any, x: Tensor, state: list[Tensor]) -> Tensor:
    return torch.stack([layer.step(x[:, t], state) for t in range(x.size(1))], 1)


def by_definition(layer: Any, x: Tensor) -> Tensor:
    """A layer's output for x (B, L, d_model) in float64: pair by pair, with other formulas for the rest."""
    heads, kv_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_dim
    channels = layer.qkv_proj(x)
    if layer.conv_weight is not None:
        width, count = layer.conv_weight.shape
        padded = F.pad(channels.mT, (width - 1, 0))
        channels = F.conv1d(padded, layer.conv_weight.T[:, None], groups=count).mT
    q, k, v = (
        y.unflatten(-1, (-1, size)).transpose(1, 2)
        for y in channels.split([heads * size, kv_heads * size, kv_heads * size], -1)
    )
    if layer.rotary:
        frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        turn = torch.polar(torch.ones(()).double(), torch.arange(x.size(1))[:, None] * frequency)  # (L, D / 2)

        def rotated(y: Tensor) -> Tensor:
            z = torch.complex(*y.chunk(2, -1)) * turn
            return torch.cat([z.real, z.imag], -1)

        q, k = rotated(q), rotated(k)
    if isinstance(layer, SoftmaxAttention):
        k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
        scores = layer.scale * q @ k.mT
        if layer.is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
        y = scores.softmax(-1) @ v
    else:
        assert isinstance(layer, ExactLinearAttention)
        decay = None
        if layer.decay in ("head", "channel"):
            decay = layer.decay_rate.exp()
        elif layer.decay == "token":
            raw = x @ layer.decay_proj.weight.T + layer.decay_rate  # (B, L, Hkv)
            decay = torch.log1p(raw.exp()).transpose(1, 2)
        y = reference_attention(
            q,
            k,
            v,
            kernel=layer.kernel,
            is_causal=layer.is_causal,
            scale=layer.scale,
            enable_gqa=True,
            decay=decay,
        )
    y = y.transpose(1, 2).flatten(2)
    if layer.gate_proj is not None:
        gate = layer.gate_proj(x)
        y = y * gate * torch.sigmoid(gate)
    return layer.out_proj(y)


@torch.no_grad()
def check_pieces(layer: Any, x: Tensor, state_options: dict[str, int]) -> None:
    """Any split into prefill, prefill and steps is the definition, and prefill leaves the state it is given."""
    whole, length = by_definition(layer, x), x.size(1)
    close(layer(x), whole)
    for one, two in ((0, 1), (1, 3), (4, 4), (2, length), (length, length)):
        outputs, state = [], layer.new_state(x.size(0), **state_options)
        for piece in (x[:, :one], x[:, one:two]):
            kept = [s.clone() for s in state]
            y, after = layer.prefill(piece, state)
            assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True)), "prefill changed the state given"
            outputs.append(y)
            state = after
        if two < length:
            outputs.append(steps(layer, x[:, two:], state))
        close(torch.cat(outputs, 1), whole)


@torch.no_grad()
def check_padded_prefill(layer: Any, x: Tensor, state_options: dict[str, int]) -> None:
    """Rows of different lengths in one prefill, twice, then steps, are the definition; padding is nothing."""
    whole = by_definition(layer, x)
    batch = x.size(0)
    results = []
    for padding in (0.0, 7.0, float("nan")):
        begin = torch.zeros(batch, dtype=torch.long)
        state = layer.new_state(batch, **state_options)
        results.append([])
        for lengths in (torch.tensor([4, 0, 2]), torch.tensor([1, 3, 0])):
            piece = torch.full((batch, 5, x.size(2)), padding, dtype=x.dtype)
            for b in range(batch):
                piece[b, : lengths[b]] = x[b, begin[b] : begin[b] + lengths[b]]
            y, state = layer.prefill(piece, state, lengths)
            for b in range(batch):
                real = y[b, : lengths[b]]
                close(real, whole[b, begin[b] : begin[b] + lengths[b]])
                results[-1].append(real)
            assert padding != padding or torch.isfinite(y).all()
            begin += lengths
        results[-1].extend(s.clone() for s in state)
        for _ in range(3):
            y = layer.step(x[range(batch), begin], state)
            close(y, whole[range(batch), begin])
            begin += 1
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), "padding changed a bit"


@torch.no_grad()
def check_padding_in_forward(layer: Any, x: Tensor) -> None:
    """Padding on either side, whatever its value, leaves each sequence as it is alone."""
    length = x.size(1)
    places = [(0, 4), (3, length), (length - 1, length)]
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    for b, (begin, end) in enumerate(places):
        mask[b, begin:end] = False
    for padding in (7.0, float("nan")):
        y = layer(x.masked_fill(mask[..., None], padding), key_padding_mask=mask)
        for b, (begin, end) in enumerate(places):
            close(y[b : b + 1, begin:end], by_definition(layer, x[b : b + 1, begin:end]))


def check_packing(layer: Any, x: Tensor, **options: Any) -> None:
    """Packed sequences x (1, 11, d_model) are each as alone, and so are the gradients."""
    length = x.size(1)
    x = x.requires_grad_()
    parameters = [x, *layer.parameters()]
    # About equal lengths are padded by a softmax layer, very different ones masked.
    for ends in ([0, length], [0, 4, 4, 7, length], [0, 0, 1, 2, length - 1, length]):
        for dtype in (torch.int32, torch.int64):
            y = layer(x, cu_seqlens=torch.tensor(ends, dtype=dtype), **options)
            alone = [by_definition(layer, x[:, begin:end]) for begin, end in itertools.pairwise(ends) if begin < end]
            close(y, torch.cat(alone, 1))
        expected = torch.autograd.grad(torch.cat(alone, 1).square().sum(), parameters)
        for one, two in zip(torch.autograd.grad(y.square().sum(), parameters), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-8)
    assert layer(x[:, :0], cu_seqlens=torch.zeros(1, dtype=torch.long), **options).shape == (1, 0, x.size(2))
    assert layer(x[:, :0], cu_seqlens=torch.zeros(3, dtype=torch.long), **options).shape == (1, 0, x.size(2))


def check_compile_and_export(layer: Any, x: Tensor, ends: list[int], **options: Any) -> None:
    """A layer of float32 and packed x (1, L, d_model) in one graph, for other lengths and numbers of sequences."""
    torch.compiler.reset()
    cu_seqlens = torch.tensor(ends)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for some, cu in ((x, cu_seqlens), (x[:, :7], torch.tensor([0, 3, 7]))):
        torch.testing.assert_close(
            compiled(some, cu_seqlens=cu, **options), layer(some, cu_seqlens=cu), rtol=1e-4, atol=1e-5
        )
    shapes = {"x": {1: torch.export.Dim("length", min=4)}, "cu_seqlens": {0: torch.export.Dim("ends", min=3)}}
    kwargs = {"cu_seqlens": cu_seqlens, **options}
    shapes |= dict.fromkeys(options)
    program = torch.export.export(layer, (x,), kwargs, dynamic_shapes=shapes)
    kwargs["cu_seqlens"] = torch.tensor([0, 3, 7])
    torch.testing.assert_close(program.module()(x[:, :7], **kwargs), layer(x[:, :7], **kwargs))
