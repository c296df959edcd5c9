"""Training by two processes of torchrun equals training by one with twice the rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elattn.models import ELAConfig
from elattn.train import TrainConfig, load_model, train

MODEL = ["--d-model", "16", "--layers", "2", "--heads", "2", "--d-hidden", "16", "--hyper-link", "dense"]
TRAINING = ["--steps", "12", "--context", "24", "--eval-every", "6", "--warmup", "2", "--accumulate", "2"]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "elattn", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    texts = ("".join(random.choice(list("ab cd"), random.integers(2, 60))) for _ in range(100))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_two_processes_equal_one_with_the_doubled_batch(one_thread: None, data: Path, tmp_path: Path) -> None:
    run = torchrun("--data", data, "--out", tmp_path / "two", "--batch-size", 2, *TRAINING, *MODEL)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step    12") == 1, "one process prints"
    config = TrainConfig(data=str(data), steps=12, batch_size=4, accumulate=2, context=24, eval_every=6, warmup=2)
    model = ELAConfig.from_json((tmp_path / "two" / "best" / "config.json").read_text())
    one = train(model, config, tmp_path / "one", plot=False)
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert len(log) == len(one.log) == 3
    for a, b in zip(log, one.log, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a, b)
    weights = (load_model(tmp_path / name).state_dict().values() for name in ("two", "one"))
    assert all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*weights, strict=True))


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe4" * 1000)
    run = torchrun("--data", tmp_path / "latin.txt", "--out", tmp_path / "out")
    assert run.returncode != 0
    assert run.stderr.count("latin.txt is not UTF-8 text (line 1)") == 1, run.stderr
    assert not (tmp_path / "out").exists()
