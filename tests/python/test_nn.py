"""ExactLinearAttention: forward, prefill and step agree for every option; TorchScript, compile, export, padding."""

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from compare import KERNELS
from elattn.nn import ExactLinearAttention
from elattn.testing import assert_causal, assert_mixes_tokens, assert_padding_invariant, reference_attention

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
    """float64 by default, so that what differs by rounding only differs by 1e-12."""
    layer = ExactLinearAttention(32, 4, is_causal=is_causal, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def steps(layer: Any, x: Tensor, state: list[Tensor]) -> Tensor:
    return torch.stack([layer.step(x[:, t], state) for t in range(x.size(1))], 1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@EVERY_OPTION
def test_forward_prefill_and_step_agree(options: dict[str, Any]) -> None:
    layer, x = module(**options), torch.randn(3, 11, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        for cut in (0, 1, 2, 6, 11):
            empty = layer.new_state(3)
            kept = [s.clone() for s in empty]
            first, state = layer.prefill(x[:, :cut], empty)
            assert all(torch.equal(a, b) for a, b in zip(empty, kept, strict=True)), "prefill changed the state given"
            kept = [s.clone() for s in state]
            second, _ = layer.prefill(x[:, cut:], state)
            close(torch.cat([first, second], 1), whole)
            assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True)), "prefill changed the state given"
            if cut < 11:
                close(steps(layer, x[:, cut:], state), whole[:, cut:])


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
    layer = module(is_causal=is_causal, **options)
    assert_padding_invariant(
        lambda x, mask: layer(x, key_padding_mask=mask), torch.randn(3, 9, 32, dtype=torch.float64), [9, 4, 1]
    )


def test_the_plain_module_is_the_formula() -> None:
    layer, x = module(num_kv_heads=2, scale=0.5), torch.randn(2, 6, 32, dtype=torch.float64)
    q, k, v = layer.qkv_proj(x).split([32, 16, 16], -1)
    q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (q, k, v))
    y = reference_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    close(layer(x), layer.out_proj(y.transpose(1, 2).flatten(2)))


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
    layer = module(is_causal=False)
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
