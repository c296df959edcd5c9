"""Models on a GPU, and the command that trains them there."""

import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from backend import DEVICE
from elattn.cli import main
from elattn.models import ELATransformer, YoloLat
from tiny_models import OPTIONS, close, model, some_ids

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", OPTIONS)
def test_models_agree_with_the_cpu(name: str) -> None:
    """In float64; loss, all gradients, and tokens generated."""
    net, ids = model(**OPTIONS[name]), some_ids(2, 33)
    results = []
    for device in (DEVICE, torch.device("cpu")):
        net.to(device).zero_grad()
        inputs, targets = ids[:, :-1].to(device), ids[:, 1:].to(device)
        loss = net.loss(inputs, targets)
        loss.backward()
        tokens = net.generate(inputs[:, :8], 8, temperature=0.0)
        # Copies, as a module takes its gradients along to another device.
        results.append([x.detach().to(DEVICE, copy=True) for x in (loss, tokens, *(p.grad for p in net.parameters()))])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_a_detector_agrees_with_the_cpu() -> None:
    """In float64, fused; raw predictions, boxes and scores."""
    net, images = YoloLat(3).double().eval(), torch.rand(2, 3, 96, 64, dtype=torch.float64)
    results = []
    for device in (DEVICE, torch.device("cpu")):
        fused = net.to(device).fuse()
        with torch.inference_mode():
            raw = fused(images.to(device))
            found = fused.select(raw, 0.0, 0.5, 100)
        results.append([x.to(DEVICE) for x in (raw, *(x for boxes, scores, _ in found for x in (boxes, scores)))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = random.Random(0).choices(["the ", "cat ", "sat ", "on ", "a ", "mat. ", "dog ", "ran. "], k=3000)
    path = tmp_path / "tiny.txt"
    path.write_text("".join(words))
    return path


def test_train_and_generate_on_the_gpu(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_device(None)  # as for a user
    try:
        sizes = "--batch-size 8 --context 64 --d-model 32 --layers 2 --heads 2 --d-hidden 32 --eval-every 20".split()
        for words in (
            ["train", "--data", text, "--out", tmp_path / "run", "--steps", 40, "--device", "cuda", *sizes],
            ["generate", tmp_path / "run" / "best", "--prompt", "the cat", "--new-tokens", 20, "--device", "cuda"],
        ):
            monkeypatch.setattr(sys, "argv", ["elattn", *map(str, words)])
            with pytest.raises(SystemExit, match=r"^0$"):
                main()
                raise SystemExit(0)  # where success does not end the process
        net = ELATransformer.from_pretrained(tmp_path / "run" / "best")
        ids = torch.tensor([list(text.read_bytes()[:64])])
        assert F.cross_entropy(net(ids[:, :-1])[0], ids[0, 1:]) < 5.0  # a model that has learned nothing has 5.5
    finally:
        torch.set_default_device(DEVICE)
