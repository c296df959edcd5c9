"""Training a detector: who answers for what, losses, average precision, resumption, and the commands."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from elattn.cli.app import app
from elattn.detect import (
    DetectConfig,
    DetectionData,
    Detector,
    Prediction,
    demo_data,
    evaluate,
    find_images,
    load_data,
    load_detector,
    predict,
    save_detector,
    train_detector,
)
from elattn.detect import loop as loop_module
from elattn.detect.average import Average
from elattn.detect.evaluate import average_precision
from elattn.detect.loss import assign, detection_loss
from elattn.detect.plot import attention_weights
from elattn.errors import UserError
from elattn.models import YoloLat
from elattn.models.boxes import cell_centres, encode_boxes
from elattn.train import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")

CENTRES = cell_centres(6, 6, 16, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(demo_data(tmp_path_factory.mktemp("data") / "digits", pictures=(10, 4, 2)))


def owners(*boxes: tuple[float, ...], labels: list[int] | None = None) -> Tensor:
    """The object of every cell of 6 x 6, each 16 pixels wide."""
    labels = [0] * len(boxes) if labels is None else labels
    return assign(torch.tensor([boxes]), torch.tensor([labels]), CENTRES, 16)[0].view(6, 6)


def test_cells_inside_and_near_the_centre_answer() -> None:
    owner = owners((0.0, 0.0, 80.0, 80.0))
    assert (owner[1:4, 1:4] == 0).all() and (owner == 0).sum() == 9
    owner = owners((20.0, 0.0, 60.0, 80.0))
    assert (owner[1:4, 1:4] == 0).all() and (owner == 0).sum() == 9
    owner = owners((30.0, 0.0, 50.0, 80.0))
    assert (owner[1:4, 2] == 0).all() and (owner == 0).sum() == 3


def test_the_nearest_cell_answers_even_from_outside() -> None:
    owner = owners((30.0, 30.0, 31.0, 31.0))
    assert owner[1, 1] == 0 and (owner >= 0).sum() == 1


def test_the_smaller_object_has_a_shared_cell() -> None:
    owner = owners((0.0, 0.0, 96.0, 96.0), (20.0, 20.0, 50.0, 50.0))
    assert owner[1, 1] == 1 and owner[2, 2] == 1 and owner[3, 3] == 0
    assert torch.equal(
        owner, owners((0.0, 0.0, 96.0, 96.0), (20.0, 20.0, 50.0, 50.0), (1.0, 1.0, 9.0, 9.0), labels=[0, 0, -1])
    )


def perfect(boxes: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Raw predictions (B, 5 + C, 6, 6) of a detector that knows."""
    owner = assign(boxes, labels, CENTRES, 16)
    raw = torch.full((len(boxes), 36, 5 + classes), -20.0)
    for image, cell in (owner >= 0).nonzero().tolist():
        mine = owner[image, cell]
        raw[image, cell, :4] = encode_boxes(boxes[image, mine], CENTRES[cell], 16)
        raw[image, cell, 4] = raw[image, cell, 5 + labels[image, mine]] = 20.0
    return raw.transpose(1, 2).unflatten(2, (6, 6))


BOXES = torch.tensor([[[5.0, 5, 60, 50], [50, 40, 90, 90]], [[10.0, 20, 90, 80], [0, 0, 0, 0]]])
LABELS = torch.tensor([[0, 2], [1, -1]])


def test_the_loss_of_a_perfect_detector_vanishes() -> None:
    losses = detection_loss(perfect(BOXES, LABELS, 3), BOXES, LABELS, 16)
    assert max(losses).item() < 1e-5
    worse = detection_loss(perfect(BOXES, LABELS, 3), BOXES + 2, LABELS, 16)
    assert worse.total > 0.05


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 1e4, 1e30, 3e38])
def test_losses_and_gradients_stay_finite(magnitude: float) -> None:
    torch.manual_seed(0)
    raw = (torch.randn(2, 8, 6, 6) * 2).clamp(-1, 1).mul(magnitude).requires_grad_()
    for boxes, labels in ((BOXES, LABELS), (BOXES[:, :0], LABELS[:, :0]), (BOXES, LABELS.clamp(max=-1))):
        # Where magnitudes exceed what a sum of cross entropies holds, only the gradient is asked for.
        losses = detection_loss(raw, boxes, labels, 16)
        (gradient,) = torch.autograd.grad(losses.total, raw)
        assert gradient.isfinite().all() and (magnitude > 1e30 or losses.total.isfinite())


def test_the_gradient_is_that_of_the_loss() -> None:
    torch.manual_seed(0)
    raw = torch.randn(2, 8, 6, 6)
    with torch.enable_grad():
        raw.requires_grad_()
        losses = detection_loss(raw, BOXES, LABELS, 16)
        (gradient,) = torch.autograd.grad(losses.box + losses.objectness, raw)
        direction = gradient / gradient.norm()
    ahead, behind = (detection_loss(raw.detach() + s * 1e-2 * direction, BOXES, LABELS, 16) for s in (1, -1))
    slope = (ahead.box + ahead.objectness - behind.box - behind.objectness) / 2e-2
    # Alpha of CIoU is a constant for the gradient, so the two differ by its slope.
    torch.testing.assert_close(slope, gradient.norm(), rtol=0.05, atol=0)


def test_averaged_weights_forget_the_first_ones() -> None:
    model, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    tracked = Average(model, average, 0.9)
    assert torch.equal(average.weight, model.weight)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(7.0)
    for _ in range(200):
        tracked.update()
    torch.testing.assert_close(average.weight, torch.full((3,), 5.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(average.running_mean, torch.full((3,), 7.0), rtol=1e-5, atol=0)


def test_the_objects_themselves_have_average_precision_one(data: str) -> None:
    split = load_data(data, "train")
    samples = [split[i] for i in range(len(split))]
    exact = [Prediction(s.image_id, s.boxes, torch.ones(len(s.boxes)), s.labels) for s in samples]
    figures = average_precision(samples, exact, split.classes)
    assert figures["ap"] == pytest.approx(1) and figures["ap50"] == pytest.approx(1)
    shifted = [replace(p, boxes=p.boxes + torch.tensor([9.0, 9, 9, 9])) for p in exact]
    assert average_precision(samples, shifted, split.classes)["ap"] < 0.8
    nothing = [replace(p, boxes=p.boxes[:0], scores=p.scores[:0], labels=p.labels[:0]) for p in exact]
    assert average_precision(samples, nothing, split.classes)["ap"] == 0


def test_evaluation_sees_through_the_letterbox(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says the truth in pixels of the input."""
    split = load_data(data, "train")
    model = YoloLat(len(split.classes)).eval()
    truths = iter([split[i] for i in range(len(split))])

    def know(self: YoloLat, raw: Tensor, *_: float) -> list[tuple[Tensor, Tensor, Tensor]]:
        from elattn.detect.letterbox import letterbox

        samples = [next(truths) for _ in range(len(raw))]
        boxes = [letterbox(s.image, 160)[1].to_input(s.boxes) for s in samples]
        return [(b, torch.ones(len(b)), s.labels) for b, s in zip(boxes, samples, strict=True)]

    monkeypatch.setattr(YoloLat, "select", know)
    result = evaluate(model, split, 160, batch_size=3)
    assert result.ap == pytest.approx(1) and set(result.milliseconds) == {"read", "model", "boxes"}


CONFIG = DetectConfig(size=96, epochs=3, batch_size=4, warmup=2, eval_every=2)


def curve(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in log]


def test_a_run_stopped_twice_equals_a_run_never_stopped(data: str, tmp_path: Path) -> None:
    config = replace(CONFIG, data=data)
    whole = train_detector(config, tmp_path / "whole", plot=False)
    for resume, updates in ((False, 2), (True, 4)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            interrupt_after(updates, patch)
            train_detector(config, tmp_path / "parts", resume=resume, plot=False)
        load_detector(tmp_path / "parts")
    parts = train_detector(config, tmp_path / "parts", resume=True, plot=False)
    assert curve(parts.log) == curve(whole.log) and parts.best == whole.best
    for name in ("last", "best"):
        a, b = (load_detector(tmp_path / run / name).model.state_dict() for run in ("whole", "parts"))
        assert all(torch.equal(value, b[key]) for key, value in a.items())
    with pytest.raises(UserError, match="the run to resume has epochs = 3, not 4"):
        train_detector(replace(config, epochs=4), tmp_path / "parts", resume=True)
    with pytest.raises(UserError, match="exists already"):
        train_detector(config, tmp_path / "parts")


def interrupt_after(updates: int, patch: pytest.MonkeyPatch) -> None:
    """Presses Ctrl-C after an update."""
    caught = loop_module.catch_interrupt
    event: list[Any] = []

    class Catch:
        def __init__(self) -> None:
            self.inner = caught()

        def __enter__(self) -> Any:
            event.append(self.inner.__enter__())
            return event[0]

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

    update = Average.update

    def count(self: Average) -> None:
        update(self)
        if self.updates == updates:
            event[0].set()

    patch.setattr(loop_module, "catch_interrupt", Catch)
    patch.setattr(Average, "update", count)


def test_a_few_images_are_learned_by_heart(data: str) -> None:
    """Boxes and classes of eight images, among them a digit that fills its image."""
    torch.manual_seed(0)
    split = load_data(data, "train")
    few = DetectionData(split.annotations[:8], split.classes, split.category_ids)
    batch = next(iter(loop_module.DetectionBatches(few, 8).epoch(0, 160)))
    model = YoloLat(len(few.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(160):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, (160 - step) / 60)
        detection_loss(model(batch.images), batch.boxes, batch.labels, 16).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate(model, few, 160).ap > 0.9


def test_one_bad_image_does_not_stop_a_run(tmp_path: Path) -> None:
    folder = demo_data(tmp_path / "digits", pictures=(5, 3, 0))
    (folder / "images/train/000002.png").write_bytes(b"no image")
    (folder / "images/val/000001.png").write_bytes(b"no image")
    config = replace(CONFIG, data=str(folder), epochs=1)
    with pytest.warns(UserWarning, match=r"000002\.png"):
        result = train_detector(config, tmp_path / "run", plot=False)
    assert [Path(error.path).name for error in result.skipped] == ["000002.png"]
    assert len(result.last.skipped) == 1 and "000001.png" in result.last.skipped[0]


def test_attention_weights_are_shares(data: str) -> None:
    split = load_data(data, "val")
    for neck, kernels in (("linear", ("hadamard_exp", "sum_sq", "elu")), ("softmax", ("softmax",))):
        detector = Detector(YoloLat(10, neck=neck).eval(), split.classes, 96)
        for kernel in kernels:
            weights = attention_weights(detector, torch.rand(3, 96, 96), (2, 3), kernel)
            assert weights.shape == (4, 6, 6) and (weights >= 0).all()
            torch.testing.assert_close(weights.sum((1, 2)), torch.ones(4))


def test_detectors_are_saved_and_loaded(tmp_path: Path) -> None:
    detector = Detector(YoloLat(2, variant="lat_dw", position=3).eval(), ["a", "b"], 64)
    save_detector(detector, tmp_path)
    loaded, images = load_detector(tmp_path), torch.rand(1, 3, 64, 64)
    assert (loaded.classes, loaded.size) == (["a", "b"], 64)
    assert torch.equal(loaded.model(images), detector.model(images))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"classes": ["a"]}))
    with pytest.raises(UserError, match=r"cannot be read .*YoloLat"):
        load_detector(tmp_path)
    with pytest.raises(UserError, match=r"no detector in .*config\.json is missing"):
        load_detector(tmp_path / "none")


def test_predictions_are_in_pixels_of_the_image(data: str, tmp_path: Path) -> None:
    files = find_images([Path(data) / "images/val"])
    (tmp_path / "bad.png").write_bytes(b"")
    detector = Detector(YoloLat(10).eval(), list("0123456789"), 96)
    results = dict(predict(detector, [*files, tmp_path / "bad.png"], confidence=0.0))
    assert isinstance(results[tmp_path / "bad.png"], UserError)
    assert all(len(results[file].boxes) == 100 for file in files)
    with pytest.raises(UserError, match="no image in"):
        find_images([data])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "size must be a multiple of 16 (got 100)"),
        ({"early_scale": 0.0}, "early_scale must be above 0 and at most 1 (got 0.0)"),
        ({"early_share": 1.5}, "early_share must be from 0 to 1 (got 1.5)"),
        ({"epochs": 0}, "epochs must be positive (got 0)"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1 (got 1.0)"),
        ({"precision": "int8"}, "precision must be float32 or bfloat16 (got 'int8')"),
    ],
)
def test_refuses_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"DetectConfig: {message}")):
        DetectConfig(**options)


def test_the_first_epochs_see_smaller_inputs() -> None:
    config = DetectConfig(size=320, epochs=5, early_scale=0.62, early_share=0.5)
    assert [config.size_in(epoch) for epoch in range(5)] == [192, 192, 320, 320, 320]
    assert DetectConfig(size=16).size_in(0) == 16
    assert DetectConfig(early_share=0.0).size_in(0) == 320


def test_the_commands_work_together(data: str, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["detect", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    out = tmp_path / "run"
    options = ("--data", data, "--size", 96, "--epochs", 1, "--warmup", 1)
    assert "AP50" in run("train", "--out", out, *options)
    assert {path.name for path in out.iterdir()} == {
        *("attention.png", "best", "last", "log.jsonl", "loss.png", "precision.png", "predictions.png")
    }
    printed = run("val", out, "--data", data)
    assert "milliseconds per image" in printed and printed.count("AP ") == 11
    assert "in 2 images" in run("predict", out, Path(data) / "images/test", "--out", tmp_path / "found")
    assert len(json.loads((tmp_path / "found/boxes.json").read_text())) == 2
