"""ExactLinearAttention: every way to run every option is its definition; TorchScript, compile, export, padding."""

import io
import itertools
from typing import Any

import pytest
import torch

from compare import KERNELS
from elattn.nn import ExactLinearAttention
from elattn.testing import assert_causal, assert_mixes_tokens, assert_padding_invariant
from layers import (
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
    {"head_dim": 10},
    {"scale": 0.25, "bias": True},
    {"rotary": True},
    {"decay": "head"},
    {"decay": "channel"},
    {"decay": "token"},
    {"short_conv": 4},
    {"gate": True},
    {"num_kv_heads": 1, "rotary": True, "decay": "channel", "short_conv": 3, "gate": True, "bias": True},
    {"num_kv_heads": 2, "rotary": True, "decay": "token", "short_conv": 2, "gate": True},
    *({"kernel": kernel} for kernel in KERNELS[1:]),
    {"kernel": "sum_sq", "decay": "head", "short_conv": 4},
    {"kernel": "elu", "decay": "token", "rotary": True, "gate": True, "num_kv_heads": 2},
]  # fmt: skip
EVERY_OPTION = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain"
)


def module(is_causal: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> ExactLinearAttention:
    return perturbed(ExactLinearAttention(32, 4, is_causal=is_causal, **options), dtype)


@EVERY_OPTION
def test_any_split_is_the_quadratic_form(options: dict[str, Any]) -> None:
    check_pieces(module(**options), torch.randn(3, 9, 32, dtype=torch.float64), {})


@EVERY_OPTION
def test_prefill_of_different_lengths(options: dict[str, Any]) -> None:
    check_padded_prefill(module(**options), torch.randn(3, 9, 32, dtype=torch.float64), {})


@EVERY_OPTION
def test_packed_sequences_are_as_alone(options: dict[str, Any]) -> None:
    check_packing(module(**options), torch.randn(1, 11, 32, dtype=torch.float64))


def test_packed_sequences_of_a_bidirectional_layer() -> None:
    layer = module(is_causal=False, num_kv_heads=2, rotary=True, short_conv=3, gate=True)
    check_packing(layer, torch.randn(1, 11, 32, dtype=torch.float64))


@EVERY_OPTION
def test_it_is_causal_and_mixes_tokens(options: dict[str, Any]) -> None:
    layer, x = module(**options), torch.randn(2, 8, 32, dtype=torch.float64)
    assert_causal(layer, x)
    assert_mixes_tokens(layer, x)


@EVERY_OPTION
def test_torchscript(options: dict[str, Any]) -> None:
    layer, x = module(**options), torch.randn(2, 7, 32, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for _ in range(2):
        y = loaded(x)
        close(y, layer(x))
        parameters = dict(layer.named_parameters())
        found = torch.autograd.grad(y.square().sum(), dict(loaded.named_parameters()).values())
        expected = torch.autograd.grad(layer(x).square().sum(), parameters.values())
        for name, one, two in zip(parameters, found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():
        first, state = loaded.prefill(x[:, :3], loaded.new_state(2))
        close(torch.cat([first, steps(loaded, x[:, 3:], state)], 1), layer(x))


@EVERY_OPTION
def test_every_parameter_gets_a_gradient(options: dict[str, Any]) -> None:
    layer, x = module(**options), torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any() and torch.isfinite(parameter.grad).all(), name
    assert x.grad.any()
    # The same through prefill, in pieces.
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    first, state = layer.prefill(x[:, :4], layer.new_state(2))
    second, _ = layer.prefill(x[:, 4:], state)
    torch.cat([first, second], 1).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


@EVERY_OPTION
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_padding(options: dict[str, Any], is_causal: bool) -> None:
    if not is_causal and "decay" in options:
        options = {name: value for name, value in options.items() if name != "decay"}
    layer, x = module(is_causal=is_causal, **options), torch.randn(3, 9, 32, dtype=torch.float64)
    assert_padding_invariant(lambda x, mask: layer(x, key_padding_mask=mask), x, [9, 4, 1])
    check_padding_in_forward(layer, x)


def test_rotary_depends_on_distances_only() -> None:
    """Scores under rotary embedding are those of relative positions: shifting the whole sequence changes nothing."""
    layer, x = module(rotary=True), torch.randn(2, 6, 32, dtype=torch.float64)
    state = layer.new_state(2)
    state[2].add_(5)
    with torch.no_grad():
        moved, _ = layer.prefill(x, state)
        # hadamard_exp is no function of q . k, so the shift shows: the position counts.
        assert not torch.allclose(moved, layer(x))
        other = module(rotary=True, kernel="sum_sq")  # |q + k|^2 holds q . k only
        state = other.new_state(2)
        state[2].add_(5)
        close(other.prefill(x, state)[0], other(x))


def test_rotary_is_exact_far_out_and_in_low_precision() -> None:
    layer = module(rotary=True, scale=0.25)
    x = torch.randn(2, 5, 32, dtype=torch.float64)

    def far_out(layer: ExactLinearAttention, x: torch.Tensor) -> torch.Tensor:
        state = layer.new_state(2)
        state[2].add_(1_000_000)
        return layer.prefill(x, state)[0]

    with torch.no_grad():
        expected = far_out(layer, x)
        parameters = {name: p.clone() for name, p in layer.named_parameters()}
        torch.testing.assert_close(far_out(layer.float(), x.float()).double(), expected, rtol=1e-5, atol=1e-5)
        layer.bfloat16().double().load_state_dict(parameters)
        assert torch.equal(far_out(layer, x), expected), "the conversion changed frequencies"
        position = torch.tensor([1_000_000])
        angle = 1_000_000 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        unit = torch.cat([torch.ones(4), torch.zeros(4)]).double()[None, None]
        close(layer._rotate(unit, position).flatten(), torch.cat([angle.cos(), angle.sin()]))


def test_context() -> None:
    layer = module(is_causal=False, num_kv_heads=2, bias=True)
    x, context = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 9, 32, dtype=torch.float64)
    close(layer(x, context=x), layer(x))
    y = layer(x, context=context)
    order = torch.randperm(9)
    close(layer(x, context=context[:, order]), y)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 6:] = True
    close(layer(x, context=context, key_padding_mask=mask), layer(x, context=context[:, :6]))


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[10]], ids=["plain", "everything"])
def test_compile_and_export(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    layer = module(dtype=torch.float32, **options)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch, length in [(2, 7), (3, 12)]:
        x = torch.randn(batch, length, 32)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 7, 32)
    shapes = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=4)},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    x = torch.randn(4, 13, 32)
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("options", [OPTIONS[10], OPTIONS[11]], ids=["channel", "token"])
def test_compile_and_export_of_packed_sequences(options: dict[str, Any]) -> None:
    check_compile_and_export(module(dtype=torch.float32, **options), torch.randn(1, 11, 32), [0, 3, 3, 9, 11])


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[10], OPTIONS[11]], ids=["plain", "channel", "token"])
def test_autocast_and_bfloat16(options: dict[str, Any]) -> None:
    layer, x = module(dtype=torch.float32, **options), torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = layer.prefill(x[:, :8], layer.new_state(2))
            last = layer.step(x[:, 8], state)
        assert y.dtype == torch.bfloat16 and state[0].dtype == torch.float32
        torch.testing.assert_close(torch.cat([y, last[:, None]], 1).float(), expected, rtol=0.1, atol=0.1)
        low = layer.bfloat16()
        torch.testing.assert_close(low(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


def test_options_that_do_not_go_together_are_refused() -> None:
    for options, message in [
        ({"num_heads": 0}, r"num_heads must be positive \(got 0\)"),
        ({"num_kv_heads": 3}, r"num_heads must be a multiple of num_kv_heads \(got 4 and 3\)"),
        ({"num_heads": 5}, r"d_model must be a multiple of num_heads \(got 32, 5\)"),
        ({"kernel": "softmax"}, "kernel must be one of hadamard_exp, .* 'softmax'"),
        ({"decay": "yes", "is_causal": True}, "decay must be one of none, head, channel, token"),
        ({"decay": "head"}, "decay needs is_causal=True"),
        ({"decay": "channel", "kernel": "elu", "is_causal": True}, 'decay="channel" needs kernel="hadamard_exp"'),
        ({"short_conv": 1}, r"short_conv must be 0 or at least 2 \(got 1\)"),
        ({"rotary": True, "head_dim": 5}, r"rotary needs an even head_dim \(got 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ExactLinearAttention(32, **({"num_heads": 4} | options))
    layer, x = module(), torch.randn(1, 3, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="context needs is_causal=False"):
        layer(x, context=x)
    for arguments, message in [
        ({"cu_seqlens": torch.tensor([0, 3]), "key_padding_mask": torch.zeros(1, 3).bool()}, "exclude each other"),
        ({"cu_seqlens": torch.tensor([[0, 3]])}, r"cu_seqlens must have shape \(N \+ 1,\) \(got \[1, 2\]\)"),
        (
            {"cu_seqlens": torch.tensor([0, 3]), "x": x.expand(2, -1, -1)},
            r"cu_seqlens needs x with batch size 1 \(got 2",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(**({"x": x} | arguments))
    for ends, message in [([1, 3], "must start at 0"), ([0, 2], "must end at"), ([0, 2, 1, 3], "must not decrease")]:
        with pytest.raises(RuntimeError, match=f"cu_seqlens {message}"):
            layer(x, cu_seqlens=torch.tensor(ends))
    for lengths, message in [
        ([4], r"lengths must be 0..3, the tokens of x \(got 4 to 4\)"),
        ([-1], r"got -1 to -1"),
        ([1, 1], r"lengths must have shape \(B,\) = \(1,\) \(got \[2\]\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.prefill(x, layer.new_state(1), torch.tensor(lengths))
    layer = module(is_causal=False)
    with pytest.raises(ValueError, match="context and cu_seqlens exclude each other"):
        layer(x, context=x, cu_seqlens=torch.tensor([0, 3]))
    for call in (lambda: layer.prefill(x, layer.new_state(1)), lambda: layer.step(x[:, 0], layer.new_state(1))):
        with pytest.raises(ValueError, match="need is_causal=True"):
            call()


def test_state_does_not_grow() -> None:
    layer = module(**OPTIONS[10])
    sizes = []
    for length in (1, 50):
        with torch.no_grad():
            _, state = layer.prefill(torch.randn(2, length, 32, dtype=torch.float64), layer.new_state(2))
        sizes.append([s.numel() for s in state])
    assert sizes[0] == sizes[1] == [s.numel() for s in layer.new_state(2)]


def test_entries_of_the_state_are_independent() -> None:
    """Sequences at different positions in one batch: rows of two states, joined, go on as they would alone."""
    layer = module(**OPTIONS[10])
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    with torch.no_grad():
        _, short = layer.prefill(x[:1, :3], layer.new_state(1))
        _, long = layer.prefill(x[1:, :7], layer.new_state(1))
        joined = [torch.cat(pair) for pair in zip(short, long, strict=True)]
        y = layer.step(torch.stack([x[0, 3], x[1, 7]]), joined)
        close(y[0], layer(x[:1])[0, 3])
        close(y[1], layer(x[1:])[0, 7])


def test_option_names_cover_the_signature() -> None:
    import inspect

    named = set(itertools.chain.from_iterable(OPTIONS)) | {"d_model", "num_heads", "is_causal"}
    assert named == set(inspect.signature(ExactLinearAttention).parameters)
