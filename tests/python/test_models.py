"""ELATransformer: forward, prefill and step agree; parameters, initial values, TorchScript, compile, export, files."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elattn.models import ELAConfig, ELATransformer, export_torchscript
from tiny_models import OPTIONS, close, config, model, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
CAPACITY = 20


@EVERY_OPTION
def test_forward_prefill_and_step_agree(options: dict[str, Any]) -> None:
    net, ids = model(**options), some_ids()
    with torch.no_grad():
        logits = net(ids)
        assert logits.shape == (2, 9, 23)
        for cut in (1, 4, 9):
            first, state = net.prefill(ids[:, :cut], net.new_state(2, CAPACITY))
            kept = [s.clone() for s in state]
            second, _ = net.prefill(ids[:, cut:], state)
            close(torch.cat([first, second], 1), logits)
            assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
            steps = [net.step(ids[:, t], state) for t in range(cut, 9)]
            close(torch.stack([*first.unbind(1), *steps], 1), logits)


@EVERY_OPTION
def test_prefill_leaves_padding_out(options: dict[str, Any]) -> None:
    net, ids = model(**options), some_ids(2, 6)
    with torch.no_grad():
        logits, state = net.prefill(ids, net.new_state(2, CAPACITY), torch.tensor([6, 4]))
        alone, state_alone = net.prefill(ids[1:, :4], net.new_state(1, CAPACITY))
        close(logits[1:, :4], alone)
        token = some_ids(2, 1)[:, 0]
        close(net.step(token, state)[1:], net.step(token[1:], state_alone))


@EVERY_OPTION
def test_packed_sequences_are_those_alone(options: dict[str, Any]) -> None:
    net, ids, targets = model(**options), some_ids(1, 12), some_ids(1, 12)
    ends = torch.tensor([0, 5, 5, 12])
    logits = net(ids, ends)
    close(logits, torch.cat([net(ids[:, :5]), net(ids[:, 5:])], 1))
    close(net.loss(ids, targets, ends) - _balance(net, ids, ends), F.cross_entropy(logits[0], targets[0]))


def _balance(net: ELATransformer, ids: Tensor, ends: Tensor | None = None) -> Tensor:
    """aux_coef times the mean of the layers' balance losses, as the layers return them."""
    losses: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda *call: losses.append(call[2][1]))
        for m in net.modules()
        if type(m).__name__ == "MoE"
    ]
    net(ids, ends)
    for hook in hooks:
        hook.remove()
    return 0.01 * sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)


@EVERY_OPTION
def test_loss_and_gradients(options: dict[str, Any]) -> None:
    net, ids, targets = model(**options), some_ids(4), some_ids(4)
    targets[0, 3:] = -100
    loss = net.loss(ids, targets)
    counted = targets != -100
    expected = -net(ids).log_softmax(-1)[counted].gather(-1, targets[counted][:, None]).mean()
    close(loss, expected + _balance(net, ids))
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@EVERY_OPTION
def test_torchscript(options: dict[str, Any], tmp_path: Path) -> None:
    net, ids = model(torch.float32, **options), some_ids()
    export_torchscript(net, tmp_path / "model.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    loaded = torch.jit.load(tmp_path / "model.pt")
    with torch.no_grad():
        logits = net(ids)
        torch.testing.assert_close(loaded(ids), logits)
        first, state = loaded.prefill(ids[:, :4], loaded.new_state(2, CAPACITY))
        steps = [loaded.step(ids[:, t], state) for t in range(4, 9)]
        torch.testing.assert_close(torch.stack([*first.unbind(1), *steps], 1), logits, rtol=1e-4, atol=1e-5)


COMPILED = pytest.mark.parametrize("name", ["hybrid", "gated-experts"])


@COMPILED
def test_compile_and_export(name: str) -> None:
    torch.compiler.reset()
    net = model(torch.float32, **OPTIONS[name])
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch, length in [(2, 9), (3, 14)]:
            ids = some_ids(batch, length)
            torch.testing.assert_close(compiled(ids), net(ids), rtol=1e-4, atol=1e-5)
        shapes = {"ids": {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=4, max=40)}}
        exported = torch.export.export(net, (some_ids(),), dynamic_shapes=shapes)
        buffer = io.BytesIO()
        torch.export.save(exported, buffer)
        buffer.seek(0)
        ids = some_ids(4, 17)
        torch.testing.assert_close(torch.export.load(buffer).module()(ids), net(ids), rtol=1e-4, atol=1e-5)


@COMPILED
def test_compiled_training_has_the_gradients_of_eager(name: str) -> None:
    torch.compiler.reset()
    net, ids, targets = model(torch.float32, **OPTIONS[name]), some_ids(), some_ids()
    parameters = list(net.parameters())
    expected = torch.autograd.grad(net.loss(ids, targets), parameters)
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(ids, targets), parameters)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_autocast_trains_in_bfloat16() -> None:
    for name in ("decay-conv-gate", "gated-experts", "lobe-causal"):
        net, ids, targets = model(torch.float32, **OPTIONS[name]), some_ids(), some_ids()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net.loss(ids, targets)
        loss.backward()
        torch.testing.assert_close(loss, net.loss(ids, targets), rtol=0.05, atol=0.05)
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_loss_of_no_target_is_zero() -> None:
    net, ids = model(), some_ids()
    loss = net.loss(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in net.parameters())
    assert net.loss(ids[:, :0], ids[:, :0]).item() == 0


# Parameters


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 5_838_864),
        ({"hyper_link": "sum"}, 5_837_840),
        ({"memory_lobe": "depth"}, 6_624_272),
        ({"memory_lobe": "causal"}, 6_624_272),
        ({"attention": "softmax"}, 5_838_864),
        ({"moe_bias": "none"}, 5_838_864),
        ({"moe_bias": "inner"}, 5_838_864),
        ({"tie_labels": False}, 5_838_864 + 4 * 4 * 256),
        ({"hyper_link": "dense"}, 5_837_840 + 14),
        ({"final_norm": True}, 5_838_864 + 256),
    ],
)
def test_number_of_parameters_of_the_paper(options: dict[str, Any], number: int) -> None:
    with torch.device("meta"):
        assert count(ELATransformer(ELAConfig.paper(**options))) == number


def test_parameter_groups() -> None:
    for options in OPTIONS.values():
        net = model(**options)
        matrices, others = net.parameter_groups(0.1)
        assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        names = {id(p): name for name, p in net.named_parameters()}
        decayed = {names[id(p)] for p in matrices["params"]}
        kept = {names[id(p)] for p in others["params"]}
        assert decayed | kept == set(names.values()) and not decayed & kept
        for part in ("norm", "embedding", "bias", "labels", "conv_weight", "decay", "link"):
            assert not [name for name in decayed if part in name], part
        for part in ("qkv_proj", "out_proj", "gate_proj", "gate_up", "down", "memory_lobe", "output"):
            assert not [name for name in kept if part in name], part
        torch.optim.AdamW(net.parameter_groups(0.1))


@EVERY_OPTION
def test_initial_values(options: dict[str, Any]) -> None:
    """Matrices keep the size of what they are applied to; what is added to the representation is smaller."""
    net = ELATransformer(config(**(options | {"d_model": 64, "num_layers": 4, "d_hidden": 100})))
    for name, parameter in net.named_parameters():
        part = [p for p in name.split(".") if p not in ("weight", "layers")][-1]
        expected = {
            "embedding": 1 / 8, "qkv_proj": 1 / 8, "gate_proj": 1 / 8, "gate_up": 1 / 8, "output": 1 / 8,
            "out_proj": 1 / 8 / math.sqrt(8), "down": 1 / 10 / math.sqrt(8),
        }.get(part)  # fmt: skip
        if expected is not None:
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        if part == "decay_proj":
            assert not parameter.any()  # rates begin independent of the token
    ids, targets = some_ids(4, 32), some_ids(4, 32)
    assert float(net.loss(ids, targets).detach()) < math.log(23) + 2


def test_hyper_link_modes_begin_as_the_sum() -> None:
    ids = some_ids()
    torch.manual_seed(0)
    plain = ELATransformer(config(hyper_link="sum"))
    for mode in ("dense", "gated"):
        torch.manual_seed(0)
        assert torch.equal(ELATransformer(config(hyper_link=mode))(ids), plain(ids))


# Files


@EVERY_OPTION
def test_save_and_load(options: dict[str, Any], tmp_path: Path) -> None:
    net = model(torch.float32, **options)
    net.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    loaded = ELATransformer.from_pretrained(tmp_path / "a" / "b").eval()
    assert loaded.config == net.config
    ids = some_ids()
    assert torch.equal(loaded(ids), net(ids))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ELATransformer.from_pretrained(tmp_path)
    model(torch.float32).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" * 200):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or of another model"):
            ELATransformer.from_pretrained(tmp_path)
    model(torch.float32, d_hidden=16).save_pretrained(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="damaged or of another model"):
        ELATransformer.from_pretrained(tmp_path)
    weights.write_bytes(content)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        ELATransformer.from_pretrained(tmp_path)


# Configuration


def test_config_json() -> None:
    for options in OPTIONS.values():
        c = config(**options)
        assert ELAConfig.from_json(c.to_json()) == c
    fields = json.loads(config().to_json())
    for text, message in [
        (json.dumps(fields | {"layers": 3}), "unknown key 'layers'"),
        (json.dumps({k: v for k, v in fields.items() if k != "d_model"}), "missing key 'd_model'"),
        ("[]", "must hold an object"),
        ("nonsense", "not JSON"),
        (json.dumps(fields | {"d_model": "32"}), "d_model must be of type int"),
        (json.dumps(fields | {"rotary": 1}), "rotary must be of type bool"),
        (json.dumps(fields | {"d_model": True}), "d_model must be of type int"),
    ]:
        with pytest.raises(ValueError, match=message):
            ELAConfig.from_json(text)


def test_config_without_newer_keys_has_their_defaults() -> None:
    old = {"vocab_size": 256, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_hidden": 48, "decay": "head"}
    assert ELAConfig.from_json(json.dumps(old)) == ELAConfig(**old)


def test_config_hash() -> None:
    c = config(decay="head")
    assert len(c.hash()) == 64 and ELAConfig.from_json(c.to_json()).hash() == c.hash()
    hashes = {config(**options).hash() for options in OPTIONS.values()}
    assert len(hashes) == len(OPTIONS)
    # A field at its default leaves the hash alone, so that old models keep theirs when fields are added.
    assert c.hash() == config(decay="head", aux_coef=0.01, hyper_link="residual").hash()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 30}, r"d_model must be a multiple of num_heads = 4 \(got 30\)"),
        ({"num_layers": 0}, r"num_layers must be positive \(got 0\)"),
        ({"num_kv_heads": 3}, "num_kv_heads must be a divisor of num_heads = 4"),
        ({"kernel": "softmax"}, "kernel must be one of"),
        ({"decay": "often"}, "decay must be one of none, head, channel, token"),
        ({"decay": "channel", "kernel": "elu"}, 'decay = "channel" needs kernel = "hadamard_exp"'),
        ({"short_conv": 1}, "short_conv must be 0 or at least 2"),
        ({"rotary": True, "d_model": 12}, "rotary needs an even d_model / num_heads"),
        ({"num_experts": 4, "top_k": 5}, r"top_k must be 1..num_experts = 4 \(got 5\)"),
        ({"num_experts": 0}, "num_experts must be positive"),
        ({"moe_bias": "outer"}, "moe_bias needs num_experts of at least 2"),
        ({"num_experts": 2, "tie_labels": False}, 'tie_labels = False needs moe_bias "inner" or "outer"'),
        ({"num_experts": 2, "moe_bias": "middle"}, "moe_bias must be one of none, inner, outer"),
        ({"attention": "flash"}, "attention must be one of linear, softmax"),
        ({"attention": "softmax", "decay": "head"}, "decay is for linear attention"),
        ({"attention": "softmax", "full_attention_every": 2}, 'full_attention_every is for attention = "linear"'),
        ({"full_attention_every": 3}, r"full_attention_every must be 0..num_layers = 2 \(got 3\)"),
        ({"hyper_link": "none"}, "hyper_link must be one of residual, sum, dense, gated"),
        ({"memory_lobe": "bidirectional"}, "memory_lobe must be one of None, depth, causal"),
        ({"aux_coef": -0.1}, "aux_coef must not be negative"),
        ({"aux_coef": math.nan}, "aux_coef must not be negative"),
        ({"max_seq_len": 0}, "max_seq_len must be positive or None"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ELAConfig: {message}"):
        config(**options)


def test_vocabulary_of_a_tokenizer() -> None:
    config().require_vocabulary(23)
    with pytest.raises(ValueError, match=r"vocab_size must be at least that of the tokenizer, 24 \(got 23\)"):
        config().require_vocabulary(24)


def test_presets_take_overrides() -> None:
    assert ELAConfig.paper(d_model=64).d_model == 64
    assert ELAConfig.paper(memory_lobe="depth").hyper_link == "sum"
    assert ELAConfig.paper(memory_lobe="depth", hyper_link="gated").hyper_link == "gated"
    assert ELAConfig.recommended(decay="none").decay == "none"


# Wrong arguments


def test_sequences_longer_than_a_softmax_layer_takes() -> None:
    net = model(attention="softmax", max_seq_len=8)
    with pytest.raises(ValueError, match=r"at most max_seq_len = 8 tokens \(got 9\)"):
        net(some_ids(1, 9))
    assert net(some_ids(1, 9), torch.tensor([0, 4, 9])).shape == (1, 9, 23)  # each of the packed ones is shorter
    with pytest.raises(ValueError, match=r"at most max_seq_len = 8 tokens \(got 9\)"):
        net(some_ids(1, 10), torch.tensor([0, 1, 10]))
    with pytest.raises(ValueError, match=r"capacity must be at most max_seq_len = 8 \(got 9\)"):
        net.new_state(1, 9)
    with pytest.raises(ValueError, match="has room for 8 tokens"):
        net.prefill(some_ids(1, 9), net.new_state(1))
    _, full = net.prefill(some_ids(1, 8), net.new_state(1))
    kept = [x.clone() for x in full]
    with pytest.raises(ValueError, match="has room for 8 tokens"):
        net.step(some_ids(1, 1)[0], full)
    assert all(torch.equal(a, b) for a, b in zip(full, kept, strict=True))
    with pytest.raises(ValueError, match="new_state needs a capacity"):
        model(attention="softmax").new_state(1)


def test_ids_out_of_the_vocabulary() -> None:
    net = model()
    for bad in (-1, 23):
        with pytest.raises(ValueError, match=r"ids must be in 0..vocab_size - 1 = 22 \(got"):
            net.prefill(torch.tensor([[3, bad]]), net.new_state(1))


def test_states_of_other_models_are_refused() -> None:
    net, ids = model(short_conv=3), some_ids()
    for other, message in [
        (model(short_conv=3, num_layers=3), "it has 9 tensors, this model's has 6"),
        (model(attention="softmax", max_seq_len=8), "it has 8 tensors, this model's has 6"),
        (model(short_conv=3, num_heads=2), r"tensor 0 has shape \[2, 2, 304\], this model's has \[batch, 4, 88\]"),
        (model(short_conv=4), "tensor 1 has shape"),
    ]:
        for call in (lambda s: net.prefill(ids, s), lambda s: net.step(ids[:, 0], s)):
            with pytest.raises(ValueError, match=f"the state is of another model: {message}"):
                call(other.new_state(2))
    for call in (lambda s: net.prefill(ids, s), lambda s: net.step(ids[:, 0], s)):
        with pytest.raises(ValueError, match="the state is of 3 sequences, but ids of 2"):
            call(net.new_state(3))


def test_it_learns() -> None:
    """A few steps on one repeated line take the loss well below that of the best constant guess."""
    for options in ({"decay": "channel", "short_conv": 4}, {"hyper_link": "gated", "short_conv": 4, "num_experts": 2}):
        net = ELATransformer(config(**options))
        line = torch.arange(23).repeat(2)[None, :32]
        optimizer = torch.optim.Adam(net.parameter_groups(0.0), 1e-2)
        for _ in range(80):
            optimizer.zero_grad()
            loss = net.loss(line[:, :-1], line[:, 1:])
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.5
