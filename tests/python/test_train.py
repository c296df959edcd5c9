"""The training loop: exact resumption, accumulation, evaluation, and what a failed run leaves alone."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elattn.data import Documents, load_corpus
from elattn.errors import UserError
from elattn.models import ELAConfig, ELATransformer
from elattn.train import Interrupted, TrainConfig, TrainResult, evaluate, load_model, select_device, train
from elattn.train import loop as loop_module

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ELAConfig(
    vocab_size=256, d_model=16, num_layers=1, num_heads=2, d_hidden=16, decay="channel", short_conv=4, final_norm=True
)
EXPERTS = replace(MODEL, vocab_size=300, num_experts=3, moe_bias="outer", hyper_link="gated", memory_lobe="causal")
CONFIG = TrainConfig(steps=22, batch_size=4, context=24, eval_every=8, warmup=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of 1 to 60 words."""
    random = np.random.default_rng(0)
    words = np.array("the cat sat on a mat. dog ran to und 🙂 größer".split())
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    texts = (" ".join(random.choice(words, random.integers(1, 60))) for _ in range(200))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def interrupt_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Presses Ctrl-C during an update."""
    update = loop_module._Run._update

    def interrupted_update(run: Any, loss: Any, interrupted: Any) -> bool:
        if run.step == steps - 1:
            interrupted.set()
        return update(run, loss, interrupted)

    patch.setattr(loop_module._Run, "_update", interrupted_update)


def curve(result: TrainResult) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in result.log]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {}),
        (MODEL, {"precision": "bfloat16", "accumulate": 2}),
        (EXPERTS, {"vocab_size": 300, "accumulate": 2}),
    ],
    ids=["plain", "bfloat16", "experts"],
)
def test_a_run_stopped_twice_equals_a_run_never_stopped(
    model: ELAConfig, options: dict[str, Any], data: str, tmp_path: Path
) -> None:
    config = replace(CONFIG, data=data, **options)
    whole = train(model, config, tmp_path / "whole", plot=False)
    for i, steps in enumerate((5, 19)):  # before the first checkpoint, and between two
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stop:
            interrupt_after(steps, patch)
            train(model, config, tmp_path / "stopped", resume=i > 0, plot=False)
        assert stop.value.step == steps
        load_model(tmp_path / "stopped")
    resumed = train(model, config, tmp_path / "stopped", resume=True, plot=False)
    assert curve(resumed) == curve(whole)
    assert resumed.bits_per_byte == whole.bits_per_byte
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    written = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert written == resumed.log


def test_a_run_killed_after_a_checkpoint_goes_on_from_it(data: str, tmp_path: Path) -> None:
    config = replace(CONFIG, data=data)
    whole = train(MODEL, config, tmp_path / "whole", plot=False)
    update = loop_module._Run._update

    def killed_update(run: Any, *arguments: Any) -> bool:
        if run.step == 13:
            raise MemoryError
        return update(run, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(loop_module._Run, "_update", killed_update)
        train(MODEL, config, tmp_path / "killed", plot=False)
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # a line cut short
    assert curve(train(MODEL, config, tmp_path / "killed", resume=True, plot=False)) == curve(whole)


def test_accumulated_batches_equal_one_batch_of_all_rows(data: str, tmp_path: Path) -> None:
    """Though documents end in the rows, so that they differ in their number of targets."""
    config = replace(CONFIG, data=data, steps=6)
    whole = train(MODEL, config, tmp_path / "1", plot=False)
    parts = train(MODEL, replace(config, batch_size=1, accumulate=4), tmp_path / "4", plot=False)
    for a, b in zip(curve(whole), curve(parts), strict=True):
        assert a == pytest.approx(b, rel=2e-4)


def test_the_log_has_the_schedule_and_what_happened(data: str, tmp_path: Path) -> None:
    config = replace(CONFIG, data=data, vocab_size=300)
    result = train(EXPERTS, config, tmp_path / "run")
    assert [entry["step"] for entry in result.log] == [8, 10, 16, 20, 22]
    for entry in result.log:
        done = (entry["step"] - 1 - config.warmup) / (config.steps - config.warmup)
        rate = config.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
        assert entry["lr"] == pytest.approx(rate)
        assert entry["grad_norm"] > 0 and entry["tokens_per_second"] > 0
        assert ("bits_per_byte" in entry) == ("aux" in entry) == (entry["step"] in (8, 16, 22))
    assert all(1 <= entry["aux"] < 3 for entry in result.log if "aux" in entry)  # 1: the experts have equal loads
    assert result.bits_per_byte == min(e["bits_per_byte"] for e in result.log if "bits_per_byte" in e)
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("", "best", "last"):
        assert (tmp_path / "run" / folder / "tokenizer.json").exists()


def test_a_quiet_run_prints_and_draws_nothing(data: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(MODEL, replace(CONFIG, data=data, steps=2), tmp_path / "run", cache=tmp_path / "cache", plot=False)
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"best", "last", "log.jsonl"}


def uniform(vocab_size: int) -> ELATransformer:
    model = ELATransformer(replace(MODEL, vocab_size=vocab_size))
    torch.nn.init.zeros_(model.embedding.weight)
    return model


def test_bits_per_byte_count_bytes_whatever_the_tokens(data: str) -> None:
    held_out = load_corpus(data).held_out
    result = evaluate(uniform(256), held_out, 16)
    assert result.loss == pytest.approx(math.log(256)) and result.bits_per_byte == pytest.approx(8)
    subwords = load_corpus(data, vocab_size=300)
    part = subwords.held_out
    result = evaluate(uniform(512), part, 16)
    assert result.bits_per_byte == pytest.approx(9 * part.predicted_tokens / part.predicted_bytes)
    first = sum(len(subwords.tokenizer.decode([part.tokens[i]]).encode()) for i in part.offsets[:-1])
    text = subwords.tokenizer.decode(part.tokens.tolist())
    assert part.predicted_bytes == len(text.encode()) - first


def test_evaluation_predicts_each_token_once() -> None:
    model = ELATransformer(MODEL)
    lengths = [5, 30, 2, 17]
    tokens = np.random.default_rng(1).integers(256, size=sum(lengths), dtype=np.uint8)
    documents = Documents(tokens, np.cumsum([0, *lengths]), 1)
    whole = evaluate(model, documents, 100)
    ids = [torch.from_numpy(part.astype(np.int64))[None] for part in np.split(tokens, documents.offsets[1:-1])]
    expected = sum(float(model.loss(x[:, :-1], x[:, 1:]).detach()) * (x.numel() - 1) for x in ids)
    assert whole.loss == pytest.approx(expected / documents.predicted_tokens)
    windows = [evaluate(model, documents, 7, batch_size=size).loss for size in (1, 3, 100)]
    assert windows == pytest.approx([windows[0]] * 3) and windows[0] != pytest.approx(whole.loss, rel=1e-6)


def test_every_batch_compiles_to_the_same_graph(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend=backend, fullgraph=True))
    config = replace(CONFIG, data=data, steps=8)
    compiled = train(MODEL, replace(config, compile=True), tmp_path / "compiled", plot=False)
    assert len(graphs) == 1
    assert curve(compiled) == curve(train(MODEL, config, tmp_path / "eager", plot=False))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_failed_run_overwrites_nothing(data: str, tmp_path: Path) -> None:
    config, out = replace(CONFIG, data=data, steps=4), tmp_path / "run"
    train(MODEL, config, out)
    before = contents(out)
    cases = {
        "cannot read": replace(config, data=str(tmp_path / "missing.txt")),
        "one window needs": replace(config, context=10**6),
        "at least that of the tokenizer": replace(config, vocab_size=290),
        "cannot read the tokenizer": replace(config, tokenizer=str(tmp_path / "missing.json")),
    }
    for message, bad in cases.items():
        with pytest.raises(UserError, match=message):
            train(MODEL, bad, out, overwrite=True)
        after = contents(out)
        assert {name: after[name] for name in before} == before
        with pytest.raises(UserError, match=message):
            train(MODEL, bad, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_its_checkpoint(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is .* at step \d+: try a smaller --learning-rate"):
        train(MODEL, replace(CONFIG, data=data, learning_rate=1e30, clip=1e30), tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()


def test_configs_check_their_fields() -> None:
    wrong = {"context": 1, "accumulate": 0, "precision": "float16", "device": "tpu", "clip": math.nan}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"TrainConfig: {name} must"):
            TrainConfig(**{name: value})
    short = replace(MODEL, attention="softmax", decay="none", max_seq_len=23)
    with pytest.raises(UserError, match="windows of 24 tokens are longer than max_seq_len = 23"):
        train(short, CONFIG, "never made")
    with pytest.raises(ValueError, match="vocab_size is for a tokenizer to train"):
        TrainConfig(tokenizer="a.json", vocab_size=300)


@pytest.mark.parametrize("gpu", [False, True])
def test_devices(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    usable = gpu and torch.ops.elattn._has_cuda()
    assert select_device("cpu") == torch.device("cpu")
    assert select_device(None).type == ("cuda" if usable else "cpu")
    if not usable:
        with pytest.raises(UserError, match="no CUDA operators" if gpu else "no GPU that this PyTorch can use"):
            select_device("cuda")
    with pytest.raises(UserError, match="must be cpu or cuda"):
        select_device("tpu")
