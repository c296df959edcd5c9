"""ELATransformer: forward, prefill and step agree; generation; TorchScript, compile, export, files."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elattn.models import ELAConfig, ELATransformer, export_torchscript
from elattn.testing import assert_causal, assert_mixes_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    {},
    {"kernel": "sum_sq"},
    {"num_kv_heads": 2, "rotary": True, "final_norm": True, "tie_embeddings": False},
    {"decay": "channel", "short_conv": 4, "gate": True, "final_norm": True},
    {"decay": "token", "short_conv": 3, "kernel": "elu"},
]
EVERY_OPTION = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain"
)


def config(**options: Any) -> ELAConfig:
    return ELAConfig(**({"vocab_size": 23, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_hidden": 48} | options))


def model(dtype: torch.dtype = torch.float64, **options: Any) -> ELATransformer:
    """Weights larger than at the start of training, so that every part counts."""
    net = ELATransformer(config(**options)).to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def some_ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(23, (batch, length))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@EVERY_OPTION
def test_forward_prefill_and_step_agree(options: dict[str, Any]) -> None:
    net, ids = model(**options), some_ids()
    with torch.no_grad():
        logits = net(ids)
        assert logits.shape == (2, 9, 23)
        for cut in (1, 4, 9):
            first, state = net.prefill(ids[:, :cut], net.new_state(2))
            kept = [s.clone() for s in state]
            second, _ = net.prefill(ids[:, cut:], state)
            close(torch.cat([first, second], 1), logits)
            assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
            steps = [net.step(ids[:, t], state) for t in range(cut, 9)]
            close(torch.stack([*first.unbind(1), *steps], 1), logits)


@EVERY_OPTION
def test_it_is_causal_and_mixes_tokens(options: dict[str, Any]) -> None:
    net = model(**options)
    assert_causal(net, some_ids())
    assert_mixes_tokens(net, some_ids())


@EVERY_OPTION
def test_loss_and_gradients(options: dict[str, Any]) -> None:
    net, ids = model(**options), some_ids()
    targets = some_ids()
    loss = net.loss(ids, targets)
    expected = -net(ids).log_softmax(-1).gather(-1, targets[..., None]).mean()
    close(loss, expected)
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
        first, state = loaded.prefill(ids[:, :4], loaded.new_state(2))
        steps = [loaded.step(ids[:, t], state) for t in range(4, 9)]
        torch.testing.assert_close(torch.stack([*first.unbind(1), *steps], 1), logits, rtol=1e-4, atol=1e-5)


def test_compile_and_export() -> None:
    torch.compiler.reset()
    net = model(torch.float32, **OPTIONS[3])
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, length in [(2, 9), (3, 14)]:
            ids = some_ids(batch, length)
            torch.testing.assert_close(compiled(ids), net(ids), rtol=1e-4, atol=1e-5)
        shapes = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=4)},)
        exported = torch.export.export(net, (some_ids(),), dynamic_shapes=shapes)
        buffer = io.BytesIO()
        torch.export.save(exported, buffer)
        buffer.seek(0)
        ids = some_ids(4, 17)
        torch.testing.assert_close(torch.export.load(buffer).module()(ids), net(ids), rtol=1e-4, atol=1e-5)


def test_compiled_training_has_the_gradients_of_eager() -> None:
    torch.compiler.reset()
    net, ids, targets = model(torch.float32, **OPTIONS[3]), some_ids(), some_ids()
    parameters = list(net.parameters())
    expected = torch.autograd.grad(net.loss(ids, targets), parameters)
    found = torch.autograd.grad(torch.compile(net.loss, fullgraph=True)(ids, targets), parameters)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


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


def test_config_json() -> None:
    for options in OPTIONS:
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
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ELAConfig: {message}"):
        config(**options)


# Generation


@EVERY_OPTION
def test_greedy_generation_is_repeated_argmax(options: dict[str, Any]) -> None:
    net, ids = model(**options), some_ids(3, 4)
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, net(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    found = net.generate(ids, 6, temperature=0)
    assert torch.equal(found, expected)
    assert torch.equal(net.generate(ids, 6, temperature=0), found)
    for row in range(3):  # a batch is as its members alone
        assert torch.equal(net.generate(ids[row : row + 1], 6, temperature=0)[0], found[row])
    assert not found.requires_grad


def test_sampling_depends_on_the_generator_only() -> None:
    net, ids = model(), some_ids(4, 3)
    draws = [net.generate(ids, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0][:, :3], ids)


def test_sampling_filters() -> None:
    net, ids = model(), some_ids(64, 3)
    probabilities = net(ids)[:, -1].softmax(-1).detach()

    def drawn(**options: Any) -> Tensor:
        return net.generate(ids, 1, generator=torch.Generator().manual_seed(0), **options)[:, -1]

    greedy = probabilities.argmax(-1)
    assert torch.equal(drawn(top_k=1), greedy)
    assert torch.equal(drawn(top_p=1e-6), greedy)
    rank = (probabilities > probabilities.gather(1, drawn(top_k=3)[:, None])).sum(1)
    assert rank.max() == 2
    before = (probabilities * (probabilities > probabilities.gather(1, drawn(top_p=0.5)[:, None]))).sum(1)
    assert (before < 0.5).all() and before.max() > 0.1
    assert torch.equal(drawn(top_k=23, top_p=1.0), drawn())
    assert (drawn(temperature=1e-3) == greedy).float().mean() > 0.9


def test_eos_fills_the_rest_of_a_row() -> None:
    net, ids = model(), some_ids(8, 2)
    free = net.generate(ids, 12, temperature=0)
    eos = int(free[0, 4])  # a token that row 0 meets after two more
    found = net.generate(ids, 12, temperature=0, eos_id=eos)
    for row in range(8):
        new = free[row, 2:].tolist()
        stop = new.index(eos) if eos in new else len(new)
        expected = new[: stop + 1] + [eos] * (len(new) - stop - 1)
        assert found[row, 2:].tolist() == expected[: found.size(1) - 2]
    alone = net.generate(ids[:1], 12, temperature=0, eos_id=eos)
    assert alone.size(1) <= 2 + 3 and alone[0, -1] == eos  # generation stops when all rows have ended


def test_generate_refuses() -> None:
    net = model()
    for arguments, message in [
        ((some_ids(2, 0), 3), "at least one token"),
        ((some_ids(2, 3)[0], 3), "at least one token"),
        ((some_ids(), -1), "max_new_tokens must not be negative"),
        ((some_ids(), 3, -0.5), "temperature must not be negative"),
        ((some_ids(), 3, 1.0, 0), "top_k must be at least 1"),
        ((some_ids(), 3, 1.0, None, 0.0), "top_p must be in"),
        ((some_ids(), 3, 1.0, None, 1.5), "top_p must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            net.generate(*arguments)
    ids = some_ids()
    assert torch.equal(net.generate(ids, 0), ids)


def test_it_learns() -> None:
    """A few steps on one repeated line take the loss well below that of the best constant guess."""
    net = ELATransformer(config(decay="channel", short_conv=4))
    line = torch.arange(23).repeat(2)[None, :32]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = net.loss(line[:, :-1], line[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
