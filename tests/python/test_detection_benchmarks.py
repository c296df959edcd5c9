"""benchmarks/detection: what is timed is right, budgets are shared fairly, and the report has what is there."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.detection import contestants, program, report, speed, train  # noqa: E402
from benchmarks.detection.__main__ import app  # noqa: E402
from benchmarks.detection.contestants import PEER  # noqa: E402

from elattn.detect import demo_data, load_data  # noqa: E402
from elattn.models import YoloLat  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(demo_data(tmp_path_factory.mktemp("data") / "digits", pictures=(6, 2, 2)))


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    monkeypatch.delitem(sys.modules, "benchmarks.detection.peer", raising=False)


@pytest.mark.usefixtures("no_peer")
def test_speed_runs_without_the_peer(data: str, tmp_path: Path) -> None:
    sizes = ["--size", "64", "--batch", "2", "--growth", "64", "--model", "lat_n", "--rounds", "1"]
    result = CliRunner().invoke(app, ["speed", "--out", str(tmp_path), "--data", data, *sizes], catch_exceptions=False)
    assert result.exit_code == 0 and f"{PEER}: not installed" in result.output
    times = json.loads((tmp_path / "speed.json").read_text())
    forms = [form for form in report.FORMS if form != "channels last"]  # the peer's; YoloLat is so once fused
    assert [(row["form"], len(row["samples"])) for row in times["raw"]] == [(form, 1) for form in forms]
    assert [row["how"] for row in times["boxes"]] == ["fused"]
    assert [row["how"] for row in times["program"]] == (list(program.HOWS) if program.PROGRAM.exists() else [])
    text = (tmp_path / "results.md").read_text()
    assert "| parameters of lat_n, one class | 316,438 | 316,438 | reached |" in text
    assert "not installed" in text and (tmp_path / report.PLOTS["growth"]).exists()


def test_a_wrong_form_is_not_timed() -> None:
    images = torch.rand(2, 3, 64, 64)
    model = YoloLat(2)
    contestants.settle(model, images)
    speed.check_forms("lat_n", {"eager": model, "fused": model.fuse()}, images)
    wrong = model.fuse()
    with torch.no_grad():
        wrong.neck.direct.bias += 1
    with pytest.raises(AssertionError, match="lat_n, fused: off by"):
        speed.check_forms("lat_n", {"eager": model, "fused": wrong}, images)
    with pytest.raises(AssertionError, match="off by nan"):
        speed.check_forms("lat_n", {"eager": model, "fused": _Constant(float("nan"))}, images)


def test_boxes_out_of_order_are_not_timed() -> None:
    right = torch.zeros(2, 4), torch.tensor([0.5, 0.4]), torch.zeros(2, dtype=torch.long)
    speed.check_boxes("model", [right], 1)
    for wrong in ((right[0] / 0, *right[1:]), (right[0], right[1].flip(0), right[2]), (right[0][:1], *right[1:])):
        with pytest.raises(AssertionError, match="not in order"):
            speed.check_boxes("model", [wrong], 1)


def test_changed_threads_are_noticed() -> None:
    threads = torch.get_num_threads()
    try:
        with pytest.raises(AssertionError, match="timed with 2 threads, not 1"):
            speed.in_turns({"call": lambda: torch.set_num_threads(2)}, speed.Sizes(rounds=1))
    finally:
        torch.set_num_threads(threads)


def test_operations_are_those_of_the_paper() -> None:
    images = torch.zeros(1, 3, 320, 320)
    counts = [contestants.count_flops(YoloLat(1, variant=name).eval(), images) for name in ("lat_n", "lat_dw")]
    assert [count / 1e9 for count in counts] == pytest.approx([0.464, 0.206], rel=0.01)
    assert contestants.attention_flops(YoloLat(1), images) == 4 * 20 * 20 * 4 * 16 * 16


@pytest.mark.parametrize(("peer", "epochs"), [(0.1, 3), (0.13, 2), (0.11, 3), (1.0, 1)])
def test_ours_never_get_more_cpu_seconds_than_the_peer(peer: float, epochs: int) -> None:
    images, seconds = 1600, 480.0
    own = train.share_epochs({"lat_n": 0.021, PEER: peer}, images, seconds)
    limit = min(seconds, epochs * images * peer)
    assert own[PEER] == epochs
    assert own["lat_n"] * images * 0.021 <= limit < (own["lat_n"] + 1) * images * 0.021


def test_the_best_setting_on_val_is_chosen() -> None:
    results = {name: {"val": {"ap": ap}, "test": {"ap": -ap}} for name, ap in (("a", 0.2), ("b", 0.3))}
    assert train.choose(results | {"failed": None}) == "b"


def test_the_peer_reads_the_same_boxes(data: str, tmp_path: Path) -> None:
    mine, written = load_data(data, "train"), load_data(str(train.write_yolo(data, tmp_path)), "train")
    assert written.classes == mine.classes and len(written) == len(mine)
    for i in range(len(mine)):
        assert torch.equal(written[i].image, mine[i].image) and torch.equal(written[i].labels, mine[i].labels)
        torch.testing.assert_close(written[i].boxes, mine[i].boxes, rtol=0, atol=1e-3)


def test_the_objects_themselves_are_judged_perfect(data: str) -> None:
    source = load_data(data, "train")
    samples = iter([source[i] for i in range(len(source))])

    def answer(images: list[np.ndarray]) -> contestants.Found:
        found = []
        for image in images:
            sample = next(samples)
            assert np.array_equal(image[..., ::-1].transpose(2, 0, 1), sample.image.numpy())  # BGR
            found.append((sample.boxes, torch.ones(len(sample.labels)), sample.labels))
        return found

    assert train.judge(answer, source, batch_size=4)["ap"] == pytest.approx(1)


@pytest.mark.usefixtures("no_peer")
def test_training_is_compared_and_reported(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_lat", _trained)
    monkeypatch.setattr(train, "calibrate", lambda *_: {"lat_n": 1.0, "lat_dw": 2.0})
    arguments = ["train", "--out", str(tmp_path), "--data", data, "--seeds", "2", "--jobs", "1", "--cpu-seconds", "12"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    plan = train.read_plan(tmp_path)
    assert plan["own_epochs"] == {"lat_n": 2, "lat_dw": 1} and plan["chosen"] == {"lat_n": "learning rate 0.008"}
    assert list(plan["groups"]) == list(train.GROUPS)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    text = (tmp_path / "results.md").read_text()
    assert "| lat_n position 3 | 1 | 2 | 5 | 0.400 (0.400 to 0.400) |" in text and "Runs are missing" not in text
    assert "| AP in 12 CPU seconds, median of the seeds | ≥ 0.42 | 0.400 | not reached |" in text
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}


class _Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 7, 4, 4), self.value)


def _trained(*, kept: Path | None, **config: Any) -> dict[str, Any]:
    ap = 200 * config.get("learning_rate", 1e-3)
    some = dict.fromkeys(("ap", "ap50", "ap75", "small", "medium", "large"), 0.4)
    return {"summary": "", "cpu_seconds": 5.0, "parameters": 1, "val": some | {"ap": ap}, "test": some}
