"""The demo data: the same everywhere, as described, and whole or not there."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from elattn.detect import demo_data, load_data
from elattn.detect.demo_data import _EMPTY, _OVERLAP, _SPLITS, _VISIBLE, _overlap, _Painter
from elattn.errors import UserError

PICTURES = 6, 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_data(tmp_path_factory.mktemp("demo") / "data", pictures=PICTURES)


@pytest.fixture(scope="module")
def painters() -> dict[str, _Painter]:
    return {split: _Painter(split, 0) for split in _SPLITS}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_seeds_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    expected = contents(folder)
    assert len(expected) == sum(PICTURES) + 3
    assert contents(demo_data(tmp_path / "again", pictures=PICTURES)) == expected
    other = contents(demo_data(tmp_path / "other", seed=1, pictures=PICTURES))
    assert all(other[name] != expected[name] for name in expected)


def test_a_picture_does_not_depend_on_how_many_there_are(folder: Path, tmp_path: Path) -> None:
    few = contents(demo_data(tmp_path / "few", pictures=(2, 1, 1)))
    assert {name for name, content in contents(folder).items() if few.get(name) == content} == {
        "images/train/000000.png",
        "images/train/000001.png",
        "images/val/000000.png",
        "images/test/000000.png",
    }


def test_pixels_and_annotations_are_those_of_every_machine(folder: Path) -> None:
    digest = hashlib.sha256()
    for split in _SPLITS:
        for sample in load_data(folder, split):
            for x in (sample.image.contiguous(), sample.boxes, sample.labels):
                digest.update(x.numpy().tobytes())
    assert digest.hexdigest() == "babecc7f2b11286b0b9d2c475ce3925b18a5495737ecd9db08e683050e84ae67"


def test_splits_share_no_scan_and_no_part_of_a_photograph(painters: dict[str, _Painter]) -> None:
    scans = [{scan.tobytes() for scan in painter.scans} for painter in painters.values()]
    assert sum(len(painter.scans) for painter in painters.values()) == 1797
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(scans, 2))
    for photograph in range(2):
        quarters = [quarters[photograph] for _, quarters in _SPLITS.values()]
        assert sorted(itertools.chain.from_iterable(range(*part) for part in quarters)) == [0, 1, 2, 3]
        assert sum(painter.backgrounds[photograph].shape[1] for painter in painters.values()) == 640


def test_pictures_are_as_described(painters: dict[str, _Painter]) -> None:
    """240 to 320 pixels, about 4 objects of 24 to 160 pixels, 4% empty, none hidden, all digits equally often."""
    counts, heights, digits = [], [], []
    for i in range(250):
        picture, objects = painters["train"].paint(np.random.default_rng((7, i)))
        height, width = picture.shape[:2]
        assert 240 <= height <= 320 and 240 <= width <= 320
        boxes = [box for _, box in objects]
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert all(_overlap(a, b) <= _OVERLAP for a, b in itertools.combinations(boxes, 2))
        counts.append(len(objects))
        heights += [bottom - top for _, top, _, bottom in boxes]
        digits += [digit for digit, _ in objects]
    assert np.mean(counts) == pytest.approx(4.2, abs=0.4)
    assert counts.count(0) / len(counts) == pytest.approx(_EMPTY, abs=0.03)
    assert 24 <= min(heights) < 30 and 140 < max(heights) <= 160
    assert min(np.bincount(digits, minlength=10)) > 0.07 * len(digits)


def test_boxes_are_tight_around_the_ink(painters: dict[str, _Painter]) -> None:
    for i in range(100):
        ink = painters["val"]._ink(i, np.random.default_rng(i))
        assert all(edge.max() >= _VISIBLE for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))


def test_it_is_a_coco_folder(folder: Path) -> None:
    for split, count in zip(_SPLITS, PICTURES, strict=True):
        data = load_data(folder, split)
        assert len(data) == count and data.classes == [str(digit) for digit in range(10)]
        assert data.category_ids == list(range(1, 11)) and not data.left_out
        assert sum(len(sample.boxes) for sample in data) > 0
    content = json.loads((folder / "annotations" / "instances_val.json").read_text())
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in content["annotations"])


def test_the_cache_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = demo_data(pictures=(1, 1, 1))
    assert made.parent == tmp_path / "elattn" and [path.name for path in made.parent.iterdir()] == [made.name]
    monkeypatch.setattr(_Painter, "paint", lambda *_: pytest.fail("made again"))
    assert demo_data(pictures=(1, 1, 1)) == made
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    made.parent.rename(tmp_path / "home" / ".cache" / "elattn")
    assert demo_data(pictures=(1, 1, 1)) == tmp_path / "home" / ".cache" / "elattn" / made.name


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_generation_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint, painted = _Painter.paint, []

    def paint_two(painter: _Painter, random: np.random.Generator) -> object:
        if len(painted) == 2:
            raise error
        painted.append(paint(painter, random))
        return painted[-1]

    with monkeypatch.context() as patch:
        patch.setattr(_Painter, "paint", paint_two)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError):
            demo_data(tmp_path / "made" / "data", pictures=PICTURES)
    assert len(painted) == 2 and not list((tmp_path / "made").iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=f"cannot make the demo data in {tmp_path}"):
        demo_data(tmp_path, pictures=(1, 0, 0))
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_another_process_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        (target / "annotations").mkdir(parents=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    assert demo_data(tmp_path / "data", pictures=(1, 0, 0)) == tmp_path / "data"
    assert list((tmp_path / "data").iterdir()) == [tmp_path / "data" / "annotations"], "the other's"
