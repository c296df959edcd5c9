"""States as values and files: forks, and conversations that are saved, resumed bit for bit, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from elattn.models import ELATransformer, fork_state
from elattn.nn import MemoryLobe
from tiny_models import OPTIONS, config, model, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
CAPACITY = 20


def after_prompt(net: ELATransformer, ids: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    with torch.no_grad():
        return net.prefill(ids, net.new_state(ids.size(0), CAPACITY), lengths)[1]


def continued(net: ELATransformer, state: list[Tensor], ids: Tensor) -> Tensor:
    return torch.stack([net.step(token, state) for token in ids.unbind(1)], 1)


@EVERY_OPTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_conversation_is_resumed_bit_for_bit(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    net, more = model(dtype, **options), some_ids(2, 5)
    state = after_prompt(net, some_ids(2, 6), torch.tensor([6, 4]))
    net.save_state(tmp_path / "state", state)
    net.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "state"]

    resumed = ELATransformer.from_pretrained(tmp_path / "model").to(dtype).eval().load_state(tmp_path / "state")
    for one, two in zip(state, resumed, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
    assert torch.equal(continued(net, resumed, more), continued(net, state, more))


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    net = model(**OPTIONS["lobe-residual-hybrid"])
    net.save_state(tmp_path / "state", after_prompt(net, some_ids(2, 6), torch.tensor([6, 4])))
    with safetensors.safe_open(tmp_path / "state", "pt") as file:
        facts, names = file.metadata(), set(file.keys())
        keys = file.get_tensor("layers.1.attention.keys")
    assert names == set(net.state_names()) and "layers.0.memory_lobe.linear" in names
    assert keys.shape == (2, 4, 6, 8)  # as many places as there are tokens, not the whole capacity
    assert facts["format"] == "elattn-state-1" and facts["config_hash"] == net.config.hash()
    assert (facts["kernel"], facts["layout"]) == ("hadamard_exp", "S z m r")
    assert json.loads(facts["tokens"]) == [6, 4] and facts["capacity"] == "20"


def test_more_room_after_loading(tmp_path: Path) -> None:
    net, ids, more = model(attention="softmax"), some_ids(1, 6), some_ids(1, 3)
    net.save_state(tmp_path / "state", net.prefill(ids, net.new_state(1, 7))[1])
    state = net.load_state(tmp_path / "state", capacity=9)
    logits = continued(net, state, more)
    torch.testing.assert_close(logits, net(torch.cat([ids, more], 1))[:, 6:])
    with pytest.raises(ValueError, match="has room for 9 tokens"):
        net.step(more[:, 0], state)
    with pytest.raises(ValueError, match="holds 6 tokens, more than the capacity 5"):
        net.load_state(tmp_path / "state", capacity=5)


def test_states_of_other_models_are_refused(tmp_path: Path) -> None:
    net = model(short_conv=3)
    net.save_state(tmp_path / "state", after_prompt(net, some_ids()))
    for options, message in [
        ({"short_conv": 4}, "short_conv is 3 there, and 4 in this model"),
        ({"short_conv": 3, "num_layers": 3}, "num_layers is 2 there, and 3 in this model"),
        ({"short_conv": 3, "kernel": "elu"}, "kernel is 'hadamard_exp' there, and 'elu' in this model"),
    ]:
        with pytest.raises(ValueError, match=f"is of another model: {message}"):
            model(**options).load_state(tmp_path / "state")
    with pytest.raises(ValueError, match=r"linear is torch.float64 \[2, 4, 88\], this model's is torch.float32"):
        model(torch.float32, short_conv=3).load_state(tmp_path / "state")
    with pytest.raises(ValueError, match="the state is of another model: it has 6 tensors, this model's has 9"):
        model(num_layers=3).save_state(tmp_path / "other", net.new_state(2))
    MemoryLobe(32, 4, scope="causal").double().attach(net)
    with pytest.raises(ValueError, match=r"only one of the two has layers.0.memory_lobe.linear"):
        net.load_state(tmp_path / "state")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    net, path = model(torch.float32), tmp_path / "state"
    with pytest.raises(FileNotFoundError, match="there is no state file"):
        net.load_state(path)
    net.save_state(path, after_prompt(net, some_ids()))
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for damaged in (b"", b"x" * 200, content[: len(content) // 2], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no state file, or is damaged"):
            net.load_state(path)
    for position in (header, header + 1000, len(content) - 1):  # one bit of one number
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(ValueError, match="is damaged: its checksum"):
            net.load_state(path)
    path.write_bytes(content.replace(b'"[9, 9]"', b'"[9, 8]"'))
    with pytest.raises(ValueError, match="is damaged: its checksum"):
        net.load_state(path)
    net.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is no state file that this version reads: its format is None"):
        net.load_state(tmp_path / "model" / "model.safetensors")


def test_a_failed_save_leaves_the_older_file(tmp_path: Path) -> None:
    net, path = model(torch.float32), tmp_path / "state"
    net.save_state(path, after_prompt(net, some_ids()))
    content = path.read_bytes()
    with pytest.raises(ValueError, match="of another model"):
        net.save_state(path, after_prompt(net, some_ids())[:-1])
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["state"]


@EVERY_OPTION
def test_forks_continue_on_their_own(options: dict[str, Any]) -> None:
    net, more = model(**options), some_ids(6, 4)
    state = after_prompt(net, some_ids(2, 5))
    kept = [x.clone() for x in state]
    forks = fork_state(state, 3)
    logits = continued(net, forks, more)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    for row in range(6):
        alone = [x[row // 3 : row // 3 + 1].clone() for x in kept]
        torch.testing.assert_close(logits[row : row + 1], continued(net, alone, more[row : row + 1]))


def test_fork_copies_even_once() -> None:
    net = model()
    state = net.new_state(2)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(state, fork_state(state), strict=True) if a.numel())
    with pytest.raises(ValueError, match=r"copies must be positive \(got 0\)"):
        fork_state(state, 0)


def test_empty_batches() -> None:
    net = ELATransformer(config(**OPTIONS["hybrid"]))
    state = net.new_state(0, 4)
    assert net.step(torch.zeros(0, dtype=torch.long), state).shape == (0, 23)
