"""MemoryLobe: what each scope attends to, its recurrent form, and attaching to models, ours and others."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compare import KERNELS
from elattn.models import ELAConfig, ELATransformer
from elattn.nn import MemoryLobe
from elattn.testing import assert_causal, assert_mixes_tokens, reference_attention
from tolerances import check

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS)
SCOPES = ("depth", "causal", "bidirectional")


def lobe(scope: str = "depth", dtype: torch.dtype = torch.float64, **options: Any) -> MemoryLobe:
    return MemoryLobe(16, 2, scope=scope, **options).to(dtype)


def deltas(count: int = 3, batch: int = 2, length: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, length, 16, dtype=dtype) for _ in range(count)]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, [2, 8])


def reference(module: MemoryLobe, inputs: list[Tensor]) -> Tensor:
    """The definition: one query per token for "depth", one sequence for the others."""
    q, k, v = module.qkv_proj.weight.chunk(3)
    newest = inputs[-1]
    if module.scope == "depth":
        stacked = torch.stack(inputs, 2)  # (B, L, n, d)
        y = reference_attention(
            heads(newest @ q.T).flatten(0, 1)[:, :, None],
            heads(stacked @ k.T).flatten(0, 1).transpose(1, 2),
            heads(stacked @ v.T).flatten(0, 1).transpose(1, 2),
            kernel=module.kernel,
        )
        return y.reshape(newest.shape)
    y = reference_attention(
        *(heads(newest @ matrix.T).transpose(1, 2) for matrix in (q, k, v)),
        kernel=module.kernel,
        is_causal=module.scope == "causal",
    )
    return y.transpose(1, 2).flatten(2)


@EVERY_KERNEL
@pytest.mark.parametrize("scope", SCOPES)
def test_it_is_attention_of_the_newest_delta(scope: str, kernel: str) -> None:
    module = lobe(scope, kernel=kernel)
    for count in (1, 2, 5):
        inputs = deltas(count)
        torch.testing.assert_close(module(inputs), reference(module, inputs), rtol=1e-9, atol=1e-10)


@EVERY_KERNEL
@pytest.mark.parametrize("scope", ["depth", "causal"])
def test_forward_prefill_and_step_agree(scope: str, kernel: str) -> None:
    module, inputs = lobe(scope, kernel=kernel), deltas()
    with torch.no_grad():
        whole = module(inputs)
        for cut in (0, 1, 4, 6):
            empty = module.new_state(2)
            assert len(empty) == (scope == "causal")
            first, state = module.prefill([x[:, :cut] for x in inputs], empty)
            steps = [module.step([x[:, t] for x in inputs], state)[:, None] for t in range(cut, 6)]
            torch.testing.assert_close(torch.cat([first, *steps], 1), whole, rtol=1e-9, atol=1e-10)
            assert all(torch.equal(a, b) for a, b in zip(empty, module.new_state(2), strict=True))


def test_prefill_leaves_padding_out_of_the_state() -> None:
    module, inputs = lobe("causal"), deltas()
    lengths = torch.tensor([6, 3])
    y, (state,) = module.prefill(inputs, module.new_state(2), lengths)
    alone, (short,) = module.prefill([x[1:, :3] for x in inputs], module.new_state(1))
    torch.testing.assert_close(y[1:, :3], alone)
    torch.testing.assert_close(state[1:], short)


@pytest.mark.parametrize("scope", ["causal", "bidirectional"])
def test_masks_and_packing(scope: str) -> None:
    module, inputs = lobe(scope), deltas()
    mask = torch.arange(6) >= torch.tensor([6, 4])[:, None]
    torch.testing.assert_close(module(inputs, mask)[1, :4], module([x[1:, :4] for x in inputs])[0])
    packed = [x.flatten(0, 1)[None] for x in inputs]
    y = module(packed, None, torch.tensor([0, 6, 12]))
    torch.testing.assert_close(y.view(2, 6, 16), module(inputs))


def test_depth_sees_one_token_only() -> None:
    module, inputs = lobe(), deltas()
    before = module(inputs)
    inputs[0][:, 3] += 1
    moved = (module(inputs) - before).abs().amax((0, 2))
    assert moved[3] > 1e-3 and moved.sum() == moved[3]


@EVERY_KERNEL
def test_gradients(kernel: str) -> None:
    module = MemoryLobe(4, 2, kernel=kernel).double()
    inputs = [torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = module.qkv_proj.weight.detach().requires_grad_()

    def answer(weight: Tensor, *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"qkv_proj.weight": weight}, (list(inputs),))

    assert torch.autograd.gradcheck(answer, (weight, *inputs))


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4, 1e18])
def test_depth_survives_large_deltas(size: float) -> None:
    """Exponents of any size: no NaN, and the answer that float64 gives to the same q, k and v."""
    module = lobe(dtype=torch.float32)
    with torch.no_grad():
        module.qkv_proj.weight.copy_(torch.eye(16).repeat(3, 1))  # q = k = v = delta, without rounding
    inputs = [size * x for x in deltas(4, dtype=torch.float32)]
    expected = reference(copy.deepcopy(module).double(), [x.double() for x in inputs])
    with torch.no_grad():
        check(module(inputs) / size, expected / size, "1", scale=max(1.0, 4 * size))
        assert module.step([x[:, 0] for x in inputs], []).isfinite().all()
    inputs = [x.requires_grad_() for x in inputs]
    module(inputs).sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("scope", SCOPES)
def test_torchscript_compile_and_autocast(scope: str) -> None:
    module, inputs = lobe(scope, torch.float32), deltas(dtype=torch.float32)
    scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(inputs), module(inputs))
    if scope != "bidirectional":
        state, scripted_state = module.new_state(2), scripted.new_state(2)
        for t in range(3):
            newest = [x[:, t] for x in inputs]
            torch.testing.assert_close(scripted.step(newest, scripted_state), module.step(newest, state))
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), module(inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(inputs)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(inputs), rtol=0.05, atol=0.05)


def test_refusals() -> None:
    for arguments, message in [
        ({"d_model": 10, "num_heads": 4}, "d_model must be a multiple of num_heads = 4"),
        ({"d_model": 8, "num_heads": 0}, "num_heads must be positive"),
        ({"d_model": 8, "num_heads": 2, "scope": "width"}, "scope must be one of depth, causal, bidirectional"),
        ({"d_model": 8, "num_heads": 2, "kernel": "softmax"}, "kernel must be one of"),
    ]:
        with pytest.raises(ValueError, match=f"MemoryLobe: {message}"):
            MemoryLobe(**arguments)
    for module in (lobe(), lobe("causal")):
        with pytest.raises(ValueError, match="at least one delta"):
            module([])
    module = lobe("bidirectional")
    for call in (
        lambda: module.new_state(2),
        lambda: module.prefill(deltas(), []),
        lambda: module.step([torch.zeros(2, 16, dtype=torch.float64)], []),
    ):
        with pytest.raises(ValueError, match="later tokens"):
            call()


# Attaching


class Tower(nn.Module):
    """A model that is not ours: residual layers that mix tokens by a running mean, or by the mean of all."""

    def __init__(self, is_causal: bool = True, num_layers: int = 3) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block(is_causal) for _ in range(num_layers)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return x

    def delta_modules(self) -> list[nn.Module]:
        return [self.embed, *self.blocks]


class Block(nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_causal:
            mean = x.cumsum(1) / torch.arange(1, x.size(1) + 1)[:, None]
        else:
            mean = x.mean(1, keepdim=True).expand_as(x)
        return F.gelu(self.linear(mean))


def ours(**options: Any) -> ELATransformer:
    sizes = {"vocab_size": 11, "d_model": 16, "num_layers": 3, "num_heads": 2, "d_hidden": 24, "decay": "head"}
    net = ELATransformer(ELAConfig(**(sizes | options)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def models() -> list[nn.Module]:
    return [Tower().double(), ours().double()]


IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 0, 2]])


def test_attach_adds_the_answer_to_each_contribution() -> None:
    model, module = Tower().double(), lobe("causal")
    module.attach(model, [0, 2])
    flow = [model.embed.weight[IDS]]
    x = flow[0]
    for layer, block in enumerate(model.blocks):
        delta = Block.forward(block, x)
        if layer in (0, 2):
            delta = delta + module(flow)
        flow.append(delta)
        x = x + delta
    torch.testing.assert_close(model(IDS), x)


def test_a_lobe_attached_to_our_model_does_what_one_of_the_configuration_does() -> None:
    for scope in ("depth", "causal"):
        net, module = ours(), lobe(scope, torch.float32)
        built_in = ours(memory_lobe=scope)
        weights = net.state_dict()
        for layer in range(3):
            weights[f"layers.{layer}.memory_lobe.qkv_proj.weight"] = module.qkv_proj.weight.detach()
        built_in.load_state_dict(weights)
        module.attach(net)
        assert torch.equal(net(IDS), built_in(IDS))
        assert torch.equal(net.generate(IDS, 5, temperature=0), built_in.generate(IDS, 5, temperature=0))
        torch.testing.assert_close(torch.jit.script(net)(IDS), net(IDS))


def test_lobes_of_the_configuration_are_exchanged_and_saved(tmp_path: Path) -> None:
    net, module = ours(memory_lobe="causal"), lobe("causal", torch.float32)
    before, own = net(IDS), net.memory_lobes()
    for part in own:
        part.detach(net)
    assert net.memory_lobes() == [None] * 3 and not torch.equal(net(IDS), before)
    module.attach(net)
    one_for_all = net(IDS)
    net.save_pretrained(tmp_path)
    assert torch.equal(ELATransformer.from_pretrained(tmp_path)(IDS), one_for_all)
    module.detach(net)
    for layer, part in enumerate(own):
        part.attach(net, [layer])
    assert torch.equal(net(IDS), before)


def test_detach_restores_the_outputs_exactly() -> None:
    for model in models():
        before, names = model(IDS), list(model.state_dict())
        module = lobe("causal")
        for layers in (None, [1]):
            module.attach(model, layers)
            assert not torch.equal(model(IDS), before)
            assert module.detach(model) == (layers or [0, 1, 2])
            assert torch.equal(model(IDS), before)
        assert list(model.state_dict()) == names
        assert not any(m._forward_hooks for m in model.modules()) and not hasattr(model, "_memory_lobes")


def test_swap() -> None:
    """Two memories for one model: each gives its own outputs, whichever was attached before."""
    for model in models():
        first, second = lobe("causal"), lobe("depth")
        first.attach(model, [1, 2])
        one = model(IDS)
        second.attach(model, first.detach(model))
        two = model(IDS)
        first.attach(model, second.detach(model))
        assert torch.equal(model(IDS), one) and not torch.equal(two, one)


def test_two_lobes_of_one_model() -> None:
    for model in models():
        first, second = lobe("causal"), lobe("depth")
        first.attach(model, [0])
        alone = model(IDS)
        second.attach(model, [2])
        both = model(IDS)
        assert second.detach(model) == [2]
        assert torch.equal(model(IDS), alone) and not torch.equal(both, alone)
        with pytest.raises(ValueError, match="layer 0 has a memory lobe already"):
            second.attach(model)
        assert torch.equal(model(IDS), alone)  # the refusal changed nothing


def test_an_attached_lobe_learns() -> None:
    for model in models():
        module = lobe("depth")
        module.attach(model)
        model(IDS).square().sum().backward()
        assert module.qkv_proj.weight.grad.any()
        module.detach(model)


def test_bidirectional_is_refused_by_a_causal_model() -> None:
    for model in models():
        before = model(IDS)
        module = lobe("bidirectional")
        with pytest.raises(ValueError, match="loss falls then because the label is visible"):
            module.attach(model)
        assert torch.equal(model(IDS), before)
        module.attach(model, allow_future=True)
        with pytest.raises(AssertionError, match="sees the future"):
            assert_causal(model, IDS)
        module.detach(model)
        assert_causal(model, IDS)


def test_bidirectional_in_an_encoder_needs_no_permission() -> None:
    model, module = Tower(is_causal=False).double(), lobe("bidirectional")
    module.attach(model)
    assert_mixes_tokens(model, IDS)


def test_attach_refusals() -> None:
    class Silent(nn.Linear):
        is_causal = True

    class Same(Silent):
        def delta_modules(self) -> list[nn.Module]:
            return [self, self]

    class Pairs(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.LSTM(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(torch.zeros(1, 1, 16))[0]

    class Backwards(Tower):
        def delta_modules(self) -> list[nn.Module]:
            return super().delta_modules()[::-1]

    module = lobe(dtype=torch.float32)
    for model, message in [
        (nn.Linear(2, 2), "Linear needs an attribute is_causal: bool"),
        (Silent(2, 2), r"Silent needs a method delta_modules\(\)"),
        (Same(2, 2), "all different"),
    ]:
        with pytest.raises(TypeError, match=message):
            module.attach(model)
    with pytest.raises(ValueError, match=r"layers must be in 0..2 \(got 3\)"):
        module.attach(Tower(), [3])
    with pytest.raises(ValueError, match="not attached to this Tower"):
        module.detach(Tower())
    pairs, backwards = Pairs(), Backwards()
    module.attach(pairs)
    with pytest.raises(TypeError, match=r"delta module 0 must return a tensor \(got tuple\)"):
        pairs(IDS)
    module.attach(backwards)
    with pytest.raises(RuntimeError, match="delta module 3 was called when it was the turn of 0"):
        backwards(IDS)


def test_our_model_with_an_attached_lobe_is_not_saved(tmp_path: Path) -> None:
    net = ours()
    lobe(dtype=torch.float32).attach(net)
    with pytest.raises(ValueError, match="detach memory lobes"):
        net.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
