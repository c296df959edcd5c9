"""SoftmaxAttention: every way to run every option is its definition; its cache; TorchScript, compile, export."""

import inspect
import io
import itertools
from typing import Any

import pytest
import torch

from elattn.nn import ExactLinearAttention, SoftmaxAttention
from elattn.testing import assert_causal, assert_mixes_tokens
from layers import (
    by_definition,
    check_compile_and_export,
    check_packing,
    check_padded_prefill,
    check_padding_in_forward,
    check_pieces,
    close,
    perturbed,
    steps,
)

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    {},
    {"num_kv_heads": 2},
    {"head_dim": 10, "scale": 0.3},
    {"rotary": True, "bias": True},
    {"short_conv": 4},
    {"gate": True},
    {"num_kv_heads": 1, "rotary": True, "short_conv": 3, "gate": True, "bias": True},
]
EVERY_OPTION = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain"
)


def module(is_causal: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> SoftmaxAttention:
    return perturbed(SoftmaxAttention(32, 4, is_causal=is_causal, **options), dtype)


@EVERY_OPTION
@pytest.mark.parametrize("capacity", [9, 30])
def test_any_split_is_the_definition(options: dict[str, Any], capacity: int) -> None:
    check_pieces(module(**options), torch.randn(3, 9, 32, dtype=torch.float64), {"capacity": capacity})


@EVERY_OPTION
@pytest.mark.parametrize("capacity", [8, 30])  # 8: the rows fit, the padding behind them does not
def test_prefill_of_different_lengths(options: dict[str, Any], capacity: int) -> None:
    check_padded_prefill(module(**options), torch.randn(3, 9, 32, dtype=torch.float64), {"capacity": capacity})


@EVERY_OPTION
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_sequences_are_as_alone(options: dict[str, Any], is_causal: bool) -> None:
    layer = module(is_causal=is_causal, **options)
    check_packing(layer, torch.randn(1, 11, 32, dtype=torch.float64))
    check_packing(layer, torch.randn(1, 11, 32, dtype=torch.float64), max_seqlen=11)


@EVERY_OPTION
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_padding(options: dict[str, Any], is_causal: bool) -> None:
    check_padding_in_forward(module(is_causal=is_causal, **options), torch.randn(3, 9, 32, dtype=torch.float64))


def test_a_row_that_sees_no_key_is_zero() -> None:
    layer, x = module(is_causal=False), torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5])
    y = layer(x, key_padding_mask=mask)
    assert not y[0].any() and y[1].all()
    (grad,) = torch.autograd.grad(y[0].sum(), x)
    assert not grad.any()


@EVERY_OPTION
def test_it_is_causal_and_mixes_tokens(options: dict[str, Any]) -> None:
    layer, x = module(**options), torch.randn(2, 8, 32, dtype=torch.float64)
    assert_causal(layer, x)
    assert_mixes_tokens(layer, x)


@EVERY_OPTION
def test_gradients_through_prefill_are_those_of_forward(options: dict[str, Any]) -> None:
    layer, x = module(**options), torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    parameters = {"x": x, **dict(layer.named_parameters())}
    expected = torch.autograd.grad(layer(x).square().sum(), parameters.values())
    first, state = layer.prefill(x[:, :4], layer.new_state(2, 9))
    second, _ = layer.prefill(x[:, 4:], state)
    found = torch.autograd.grad(torch.cat([first, second], 1).square().sum(), parameters.values())
    for name, one, two in zip(parameters, found, expected, strict=True):
        assert two.any(), name
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_context() -> None:
    layer = module(is_causal=False, num_kv_heads=2, bias=True)
    x, context = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 9, 32, dtype=torch.float64)
    close(layer(x), by_definition(layer, x))
    close(layer(x, context=x), layer(x))
    y = layer(x, context=context)
    close(layer(x, context=context[:, torch.randperm(9)]), y)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 6:] = True
    close(layer(x, context=context, key_padding_mask=mask), layer(x, context=context[:, :6]))


@EVERY_OPTION
def test_torchscript(options: dict[str, Any]) -> None:
    layer, x = module(max_seq_len=9, **options), torch.randn(3, 9, 32, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    with torch.no_grad():
        close(loaded(x), layer(x))
        ends = torch.tensor([0, 2, 2, 9])
        close(loaded(x[:1], None, None, ends), layer(x[:1], cu_seqlens=ends))
        first, state = loaded.prefill(x[:, :3], loaded.new_state(3))
        close(torch.cat([first, steps(loaded, x[:, 3:], state)], 1), layer(x))
        _, state = loaded.prefill(x[:, :3], loaded.new_state(3, 5), torch.tensor([3, 0, 2]))
        close(loaded.step(x[range(3), [3, 0, 2]], state), layer(x)[range(3), [3, 0, 2]])
        with pytest.raises(torch.jit.Error, match="room for 2 tokens"):
            loaded.prefill(x, loaded.new_state(3, 2))


@pytest.mark.parametrize("options", [{}, {"max_seqlen": 6}], ids=["masked", "padded"])
def test_compile_and_export_of_packed_sequences(options: dict[str, Any]) -> None:
    layer = module(dtype=torch.float32, **OPTIONS[-1])
    check_compile_and_export(layer, torch.randn(1, 11, 32), [0, 3, 3, 9, 11], **options)


def test_compile_and_export() -> None:
    torch.compiler.reset()
    layer = module(dtype=torch.float32, **OPTIONS[-1])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in [(2, 7), (3, 12)]:
        x = torch.randn(batch, length, 32)
        mask = torch.arange(length) >= torch.tensor([[length], [3], [5]])[:batch]
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(x, mask), layer(x, mask), rtol=1e-4, atol=1e-5)
    shapes = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=4)},)
    program = torch.export.export(layer, (torch.randn(2, 7, 32),), dynamic_shapes=shapes)
    x = torch.randn(4, 13, 32)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_autocast_and_bfloat16() -> None:
    layer, x = module(dtype=torch.float32, max_seq_len=9, **OPTIONS[-1]), torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for lengths in (None, torch.tensor([8, 7])):
                y, state = layer.prefill(x[:, :8], layer.new_state(2), lengths)
                last = layer.step(x[range(2), state[3]], state)
                torch.testing.assert_close(last.float(), expected[range(2), state[3] - 1], rtol=0.1, atol=0.1)
        low = layer.bfloat16()
        torch.testing.assert_close(low(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)
        y, state = low.prefill(x[:, :8].bfloat16(), low.new_state(2))
        y = torch.cat([y, low.step(x[:, 8].bfloat16(), state)[:, None]], 1)
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads", "groups"])
def test_a_full_cache_is_refused_before_anything_is_written(kv_heads: int) -> None:
    layer, x = module(num_kv_heads=kv_heads, short_conv=3, max_seq_len=4), torch.randn(2, 6, 32, dtype=torch.float64)
    with torch.no_grad():
        for lengths in (None, torch.tensor([2, 4])):
            _, state = layer.prefill(x[:, :4], layer.new_state(2), lengths)
            kept = [s.clone() for s in state]
            with pytest.raises(
                ValueError, match="SoftmaxAttention: the state has room for 4 tokens, its capacity, but would hold 5"
            ):
                layer.step(x[:, 4], state)
            with pytest.raises(ValueError, match="room for 4 tokens, its capacity, but would hold 6"):
                layer.prefill(x[:, :2], state)
            assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_step_reads_and_writes_the_cache_in_place() -> None:
    """Neither a copy of the cache nor of what is used of it: a step allocates less than one head's keys."""
    layer = module(dtype=torch.float32, num_kv_heads=2, max_seq_len=5000)
    _, state = layer.prefill(torch.randn(1, 4000, 32), layer.new_state(1))
    pointers = [s.data_ptr() for s in state]
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        layer.step(torch.randn(1, 32), state)
    assert [s.data_ptr() for s in state] == pointers
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4000 * layer.head_dim * 4, largest


def test_parameters_are_those_of_exact_linear_attention() -> None:
    for options in OPTIONS:
        shapes = [
            {name: tuple(p.shape) for name, p in cls(32, 4, **options).named_parameters()}
            for cls in (SoftmaxAttention, ExactLinearAttention)
            if options.get("scale") is None or cls is SoftmaxAttention
        ]
        assert shapes[0] == shapes[-1]


def test_options_that_do_not_go_together_are_refused() -> None:
    for options, message in [
        ({"num_heads": 0}, r"num_heads must be positive \(got 0\)"),
        ({"num_kv_heads": 3}, r"num_heads must be a multiple of num_kv_heads \(got 4 and 3\)"),
        ({"short_conv": 1}, r"short_conv must be 0 or at least 2 \(got 1\)"),
        ({"rotary": True, "head_dim": 5}, r"rotary needs an even head_dim \(got 5\)"),
        ({"max_seq_len": 0}, r"max_seq_len must be positive \(got 0\)"),
    ]:
        with pytest.raises(ValueError, match=f"SoftmaxAttention: {message}"):
            SoftmaxAttention(32, **({"num_heads": 4} | options))
    layer, x = module(), torch.randn(1, 3, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="context needs is_causal=False"):
        layer(x, context=x)
    with pytest.raises(ValueError, match="new_state needs a capacity, as the module has no max_seq_len"):
        layer.new_state(1)
    with pytest.raises(ValueError, match=r"lengths must be 0..3, the tokens of x \(got 4 to 4\)"):
        layer.prefill(x, layer.new_state(1, 9), torch.tensor([4]))
    for ends, message in [
        ([1, 3], r"cu_seqlens must start at 0 \(got 1\)"),
        ([0, 2], r"cu_seqlens must end at 3, the tokens of x \(got 2\)"),
        ([0, 2, 1, 3], r"cu_seqlens must not decrease \(got a sequence of length -1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(x, cu_seqlens=torch.tensor(ends))
    with pytest.raises(
        ValueError, match=r"max_seqlen must bound every packed sequence \(got 1 for a sequence of length 2\)"
    ):
        layer(x, cu_seqlens=torch.tensor([0, 1, 3]), max_seqlen=1)
    layer = module(is_causal=False, max_seq_len=4)
    for call in (lambda: layer.prefill(x, layer.new_state(1)), lambda: layer.step(x[:, 0], layer.new_state(1))):
        with pytest.raises(ValueError, match="SoftmaxAttention: prefill and step need is_causal=True"):
            call()


def test_empty_batches_and_sequences() -> None:
    layer = module(short_conv=3, rotary=True, max_seq_len=4)
    with torch.no_grad():
        y, state = layer.prefill(torch.randn(0, 3, 32, dtype=torch.float64), layer.new_state(0))
        assert y.shape == (0, 3, 32)
        assert layer.step(torch.randn(0, 32, dtype=torch.float64), state).shape == (0, 32)
        y, state = layer.prefill(torch.randn(2, 0, 32, dtype=torch.float64), layer.new_state(2))
        assert y.shape == (2, 0, 32) and not state[3].any()
        assert layer(torch.randn(2, 0, 32, dtype=torch.float64)).shape == (2, 0, 32)


def test_option_names_cover_the_signature() -> None:
    named = set(itertools.chain.from_iterable(OPTIONS)) | {"d_model", "num_heads", "is_causal", "max_seq_len"}
    assert named == set(inspect.signature(SoftmaxAttention).parameters)
