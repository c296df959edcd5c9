"""COCO and YOLO folders, image files, letterboxing, augmentation and batches."""

import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from elattn import detect
from elattn.detect import (
    Augment,
    BadImage,
    DetectionBatches,
    DetectionData,
    Letterbox,
    letterbox,
    load_data,
    read_image,
)
from elattn.detect import data as data_module
from elattn.detect import images as images_module
from elattn.detect.letterbox import PADDING
from elattn.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

# Width, height and objects (label, left, top, right, bottom) of each image.
SCENES = [
    (64, 48, [(0, 4.0, 5.0, 20.0, 25.0), (2, 30.0, 10.5, 63.0, 40.0)]),
    (40, 80, [(1, 0.0, 0.0, 40.0, 80.0)]),
    (50, 50, []),
    (33, 31, [(2, 1.0, 2.0, 9.0, 12.0)]),
]
NAMES = ["cat", "dog", "bird"]
IDS = [3, 17, 90]


def draw(path: Path, width: int, height: int, objects: list[tuple[float, ...]]) -> None:
    """Noise, with objects in the colours of their labels."""
    pixels = np.random.default_rng(width).integers(0, 60, (height, width, 3), np.uint8)
    for label, *box in objects:
        left, top, right, bottom = (round(edge) for edge in box)
        pixels[top:bottom, left:right] = np.eye(3, dtype=np.uint8)[label] * 200
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def coco(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None, images: str = "images/train") -> Path:
    """A folder whose category ids are neither from 0 nor contiguous, nor in order."""
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for i, (width, height, objects) in enumerate(SCENES):
        draw(folder / images / f"{i}.png", width, height, objects)
        content["images"].append({"id": 100 - i, "file_name": f"{i}.png", "width": width, "height": height})
        for label, left, top, right, bottom in objects:
            box = [left, top, right - left, bottom - top]
            known = {"id": 1000 + len(content["annotations"]), "image_id": 100 - i, "category_id": IDS[label]}
            content["annotations"].append(known | {"bbox": box, "iscrowd": 0})
    content["categories"] = [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)][::-1]
    change(content)
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return folder


def yolo(folder: Path, yaml: str = "names: [cat, dog, bird]\n") -> Path:
    for i, (width, height, objects) in enumerate(SCENES):
        draw(folder / "images" / "train" / f"{i}.png", width, height, objects)
        lines = []
        for label, left, top, right, bottom in objects:
            x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
            lines.append(f"{label} {x:.6f} {y:.6f} {(right - left) / width:.6f} {(bottom - top) / height:.6f}\n")
        (folder / "labels" / "train").mkdir(parents=True, exist_ok=True)
        if objects:
            (folder / "labels" / "train" / f"{i}.txt").write_text("".join(lines))
    (folder / "data.yaml").write_text(yaml)
    return folder


def check_scenes(data: DetectionData) -> None:
    assert len(data) == len(SCENES)
    for sample, (width, height, objects) in zip(data, SCENES, strict=True):
        assert sample.image.shape == (3, height, width) and sample.image.dtype == torch.uint8
        expected = torch.tensor([box for _, *box in objects]).view(-1, 4)
        torch.testing.assert_close(sample.boxes, expected, rtol=0, atol=1e-4)
        assert sample.labels.tolist() == [label for label, *_ in objects] and sample.labels.dtype == torch.int64
        assert sample.crowd.shape == sample.labels.shape and sample.crowd.dtype == torch.bool
        for label, (left, top, *_) in zip(sample.labels, sample.boxes.long().tolist(), strict=True):
            assert sample.image[label, top + 2, left + 2] == 200, "image and boxes belong together"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    with pytest.raises(UserError, match=r'the package torchvision: pip install "elattn\[detect\]"'):
        importlib.reload(detect)


# COCO


@pytest.mark.parametrize("images", ["images/train", "train", "images", ""])
def test_a_coco_folder(images: str, tmp_path: Path) -> None:
    data = load_data(coco(tmp_path, images=images), "train")
    check_scenes(data)
    assert data.classes == NAMES and data.category_ids == IDS
    assert [sample.image_id for sample in data] == [100, 99, 98, 97]
    assert data[1].path == str(tmp_path / images / "1.png") and not data.left_out


def test_names_of_coco_itself(tmp_path: Path) -> None:
    coco(tmp_path, images="train2017")
    file = tmp_path / "annotations" / "instances_train.json"
    file.rename(file.with_name("instances_train2017.json"))
    (file.parent / "instances_val2017.json").write_text("{}")
    check_scenes(load_data(tmp_path, "train"))
    check_scenes(load_data(tmp_path, "train2017"))
    with pytest.raises(UserError, match=r"no split 'test' \(it has: train2017, val2017\)"):
        load_data(tmp_path, "test")


def test_crowds_are_kept_for_the_evaluation_and_not_trained_on(tmp_path: Path) -> None:
    def crowd(content: dict[str, Any]) -> None:
        content["annotations"][0]["iscrowd"] = 1

    data = load_data(coco(tmp_path, crowd), "train")
    assert data[0].crowd.tolist() == [True, False]
    (batch,) = DetectionBatches(data, 4).epoch(0, 64)
    assert sorted(batch.labels[batch.labels >= 0].tolist()) == [1, 2, 2]


def set_(key: str, index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key][index].update(values)


def delete(key: str, index: int, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key][index].pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_("annotations", 1, bbox=[30, 10, -2, 5]), r"annotation 1001: the box \[30, 10, -2, 5\] has a negative"),
        (set_("annotations", 1, bbox=[30, 10, 60, 5]), r"annotation 1001: the box .* outside the image of 64 x 48"),
        (set_("annotations", 1, bbox=[-5, 10, 20, 5]), r"annotation 1001: the box .* outside the image of 64 x 48"),
        (set_("annotations", 1, bbox=[1, 2, float("nan"), 5]), "annotation 1001: the box .* is not finite"),
        (set_("annotations", 1, bbox=[1, 2, 3]), "annotation 1001 has no 'bbox' of four numbers"),
        (delete("annotations", 1, "bbox"), "annotation 1001 has no 'bbox' of four numbers"),
        (set_("annotations", 1, category_id=4), "annotation 1001 has the category 4, which is not listed"),
        (set_("annotations", 1, image_id=4), "annotation 1001 is of the image 4, which is not listed"),
        (set_("annotations", 1, image_id="4"), "annotation 1001: 'image_id' is '4'"),
        (set_("images", 1, id=100), "two images have the id 100"),
        (set_("images", 1, width=0), "image 99 has 0 x 80 pixels"),
        (delete("images", 1, "height"), "image 99 has no 'height'"),
        (delete("images", 1, "file_name"), "image 99 has no 'file_name'"),
        (set_("images", 2, file_name="x.png"), "lists 4 images, but 1 are missing; the first is .*train/x.png"),
        (set_("images", 0, file_name="x.png"), "lists the image x.png, which is in none of the folders"),
        (set_("categories", 0, name="cat"), "two categories have the same id or name"),
        (set_("categories", 0, id=3), "two categories have the same id or name"),
        (lambda content: content.pop("images"), "has no list of 'images'"),
        (lambda content: content.update(annotations={}), "has no list of 'annotations'"),
        (lambda content: content.update(images=[], annotations=[]), "lists no images"),
    ],
)
def test_mistakes_in_coco_name_the_file_and_the_entry(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"instances_train.json:? {message}"):
        load_data(coco(tmp_path, change), "train")


def test_a_broken_coco_file(tmp_path: Path) -> None:
    (coco(tmp_path) / "annotations" / "instances_train.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"instances_train.json is not JSON \(.*line 1"):
        load_data(tmp_path, "train")


def test_rounding_is_clipped_and_boxes_of_nothing_are_left_out(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = [-0.3, 5, 20, 43.2]
        content["annotations"][1]["bbox"] = [30, 10.5, 33, 0]

    data = load_data(coco(tmp_path, change), "train")
    torch.testing.assert_close(data[0].boxes, torch.tensor([[0.0, 5.0, 19.7, 48.0]]))
    assert len(data.left_out) == 1 and "annotation 1001: the box [30, 10.5, 33, 0] holds nothing" in data.left_out[0]


# YOLO


@pytest.mark.parametrize(
    "yaml",
    [
        "names: [cat, dog, bird]\n",
        "nc: 3\nnames: {0: cat, 1: dog, 2: bird}\ntrain: images/train\n",
        "path: elsewhere\nnames: [cat, dog, bird]\ntrain: ../images/train  # as some exporters write\n",
    ],
)
def test_a_yolo_folder(yaml: str, tmp_path: Path) -> None:
    data = load_data(yolo(tmp_path, yaml), "train")
    check_scenes(data)
    assert data.classes == NAMES and data.category_ids == [0, 1, 2] and data[3].image_id == 3
    check_scenes(load_data(tmp_path / "data.yaml", "train"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "is not a class and the four numbers"),
        ("0 0.5 0.5 0.5 0.5 0.5", "is not a class and the four numbers"),
        ("cat 0.5 0.5 0.5 0.5", "is not a class and the four numbers"),
        ("3 0.5 0.5 0.5 0.5", "has the class 3, but there are 3"),
        ("0.5 0.5 0.5 0.5 0.5", "has the class 0.5, but there are 3"),
        ("0 0.5 0.5 -0.5 0.5", ": the box has a negative size"),
        ("0 0.9 0.5 0.5 0.5", ": the box reaches outside the image"),
        ("0 32 24 10 10", ": the box reaches outside the image"),
        ("0 nan 0.5 0.5 0.5", ": the box is not finite"),
    ],
)
def test_mistakes_in_yolo_labels_name_the_file_and_the_line(line: str, message: str, tmp_path: Path) -> None:
    (yolo(tmp_path) / "labels" / "train" / "1.txt").write_text(f"1 0.5 0.5 1 1\n\n{line}\n")
    with pytest.raises(UserError, match=f"labels/train/1.txt: line 3 ?{message}"):
        load_data(tmp_path, "train")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [cat, dog", "data.yaml is not YAML"),
        ("train: images/train", "data.yaml: 'names' must be a list"),
        ("names: {1: cat}", "data.yaml: 'names' must be a list, or have the numbers from 0 on"),
        ("names: [cat, cat]", "data.yaml: two of the 'names' are equal"),
        ("nc: 2\nnames: [cat, dog, bird]", "data.yaml: 'nc' is 2, but there are 3 'names'"),
        ("names: [cat, dog, bird]\ntrain: pictures", "data.yaml: the split 'train' is not a folder .*pictures"),
        ("names: [cat, dog, bird]\ntrain: labels/train", "must be in the path"),
        ("names: [cat, dog, bird]\ntrain: images/empty", "images/empty has no images"),
        ("names: [cat, dog, bird]\ntrain: images/bare", "labels/bare has no text file for any of the 1 images"),
        ("[]", "data.yaml has no 'names'"),
    ],
)
def test_mistakes_in_data_yaml(yaml: str, message: str, tmp_path: Path) -> None:
    (yolo(tmp_path, yaml) / "images" / "empty").mkdir()
    draw(tmp_path / "images" / "bare" / "a.png", 8, 8, [])
    draw(tmp_path / "labels" / "train" / "a.png", 8, 8, [])
    with pytest.raises(UserError, match=message):
        load_data(tmp_path, "train")


def test_yolo_rounding_is_clipped_and_boxes_of_nothing_are_left_out(tmp_path: Path) -> None:
    (yolo(tmp_path) / "labels" / "train" / "1.txt").write_text("1 0.5 0.5 1.000002 1\n0 0.5 0.5 0 0.1\n")
    data = load_data(tmp_path, "train")
    torch.testing.assert_close(data[1].boxes, torch.tensor([[0.0, 0.0, 40.0, 80.0]]))
    assert len(data.left_out) == 1 and "1.txt: line 2: the box holds nothing" in data.left_out[0]


# Both


def test_a_folder_of_neither_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither annotations/instances_val.json \(COCO\) nor data.yaml \(YOLO\)"):
        load_data(tmp_path, "val")
    with pytest.raises(UserError, match="nothing is not a folder"):
        load_data(tmp_path / "nothing", "val")


def test_labels_as_indices_into_the_classes_of_a_model(tmp_path: Path) -> None:
    data = load_data(coco(tmp_path), "train", classes=["bird", "horse", "cat", "dog"])
    assert data.classes == ["bird", "horse", "cat", "dog"] and data.category_ids == [90, 92, 3, 17]
    assert data[0].labels.tolist() == [2, 0] and data[1].labels.tolist() == [3]
    with pytest.raises(UserError, match=r"1.png has a 'dog', but the classes are cat, bird"):
        load_data(tmp_path, "train", classes=["cat", "bird"])


def test_what_is_stored_is_read_only_and_samples_are_copies(tmp_path: Path) -> None:
    for folder in (coco(tmp_path / "coco"), yolo(tmp_path / "yolo")):
        data = load_data(folder, "train")
        known = data.annotations[0]
        for array in (known.boxes, known.labels, known.crowd, data._image(0)):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
        sample = data[0]
        for x in (sample.image, sample.boxes, sample.labels, sample.crowd):
            x.zero_()
        check_scenes(data)
        with pytest.raises(IndexError):
            data[len(data)]
        assert data[-1].image_id == data[3].image_id


def test_images_are_kept_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_KEPT_BYTES", 64 * 48 * 3 + 50 * 50 * 3)
    data = load_data(coco(tmp_path), "train")
    check_scenes(data)
    assert sorted(data._kept) == [0, 2], "the second is too large, the fourth finds no room"
    check_scenes(data)


# Images


def test_images_of_many_kinds(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    grey = np.repeat(pixels[..., :1], 3, -1)
    alpha = np.concatenate([pixels, pixels[..., :1]], -1)
    kinds: dict[str, tuple[Image.Image, np.ndarray]] = {
        "rgb.png": (Image.fromarray(pixels), pixels),
        "rgb.bmp": (Image.fromarray(pixels), pixels),
        "grey.png": (Image.fromarray(pixels[..., 0]), grey),
        "alpha.png": (Image.fromarray(alpha), pixels),
        "alpha.webp": (Image.fromarray(alpha), pixels),
        "deep.png": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 255), grey),
        "deep.tiff": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 255), grey),
    }
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
        found = read_image(tmp_path / name)
        assert found.dtype == np.uint8 and np.array_equal(found, expected), name
    Image.fromarray(pixels).quantize(256).save(tmp_path / "palette.png")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("palette.png", "cmyk.jpg"):
        assert read_image(tmp_path / name).shape == (5, 7, 3)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned, so the picture has to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))


def test_bad_images_have_the_file_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "good.png", 64, 64, [])
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.png").write_bytes(content[:200] + bytes([content[200] ^ 255]) + content[201:])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    cases = {
        "cut.png": "cannot be read",
        "flipped.png": "cannot be read",
        "text.png": "not an image",
        "empty.png": "not an image",
        "folder.png": "cannot be read",
        "none.png": "no such file",
        "float.tiff": "grey levels of 32 bits",
    }
    for name, message in cases.items():
        with pytest.raises(BadImage, match=message) as error:
            read_image(tmp_path / name)
        assert error.value.path == str(tmp_path / name) and str(error.value).startswith(f"{tmp_path / name}: ")
    monkeypatch.setattr(images_module, "_MOST_PIXELS", 4000)
    with pytest.raises(BadImage, match="64 x 64 pixels are more than"):
        read_image(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses it before its size is known
    with pytest.raises(BadImage, match="million pixels"):
        read_image(tmp_path / "good.png")


def test_an_image_of_another_size_than_its_annotations_say(tmp_path: Path) -> None:
    data = load_data(coco(tmp_path, set_("images", 0, width=70)), "train")
    with pytest.raises(BadImage, match=r"0\.png: 64 x 48 pixels, but its annotations are for 70 x 48"):
        data[0]


# Letterbox


@pytest.mark.parametrize("width", [1, 13, 200, 320, 321, 1000])
@pytest.mark.parametrize("height", [1, 16, 320, 777])
def test_letterbox_there_and_back(width: int, height: int) -> None:
    box = Letterbox.fit(width, height, 320)
    assert max(box.inner) == 320 and box.left >= 0 and box.left + box.inner[0] <= 320
    assert box.top >= 0 and box.top + box.inner[1] <= 320 and min(box.left, box.top) == 0
    corners = torch.rand(50, 2, 2).sort(1).values * torch.tensor((width, height))
    boxes = corners.flatten(1)
    torch.testing.assert_close(
        box.to_image(box.to_input(boxes)), boxes, rtol=1e-5, atol=1e-4 * max(width, height) / 320
    )
    whole = torch.tensor((0.0, 0.0, width, height))
    edges = box.left, box.top, box.left + box.inner[0], box.top + box.inner[1]
    torch.testing.assert_close(box.to_input(whole), torch.tensor(edges, dtype=torch.float32))


def test_letterbox_puts_pixels_where_it_says() -> None:
    image = torch.zeros(3, 30, 60, dtype=torch.uint8)
    image[0, 10:20, 40:50] = 255
    out, box = letterbox(image, 120)
    assert out.dtype == torch.float32 and out.shape == (3, 120, 120)
    assert (box.left, box.top, box.inner) == (0, 30, (120, 60))
    left, top, right, bottom = box.to_input(torch.tensor((40.0, 10.0, 50.0, 20.0))).int().tolist()
    red = out[0, top + 1 : bottom - 1, left + 1 : right - 1]
    assert red.numel() > 300 and (red > 0.7).all() and out[0].sum() > red.sum()
    assert (out[:, :30] == PADDING).all() and (out[:, 90:] == PADDING).all() and (out[1:, 30:90] == 0).all()
    same, _ = letterbox(image[:, :, :30], 30)
    assert torch.equal(same, image[:, :, :30] / 255), "no resampling where none is needed"


# Augmentation


def spots(size: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bright squares on black, each in a channel of its own."""
    image = torch.zeros(3, size, size + 40, dtype=torch.uint8)
    boxes = torch.tensor([(10.0, 20.0, 30.0, 40.0), (60.0, 10.0, 90.0, 40.0), (100.0, 60.0, 130.0, 90.0)])
    for channel, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[channel, top:bottom, left:right] = 255
    return image, boxes, torch.arange(3)


@pytest.mark.parametrize("mirror", [False, True])
def test_boxes_move_with_the_image(mirror: bool) -> None:
    """Without changes of colour, each box left is around what is bright in its channel; the image stays as it was."""
    augment = Augment(brightness=0, contrast=0, saturation=0, hue=0, mirror=mirror, visible=0.3)
    image, boxes, labels = spots()
    before = image.clone(), boxes.clone(), labels.clone()
    dropped, mirrored, counts = 0, 0, []
    for i in range(100):
        out = torch.full((3, 96, 96), PADDING)
        found, kept = augment(out, image, boxes, labels, np.random.default_rng(i))
        assert all(torch.equal(a, b) for a, b in zip(before, (image, boxes, labels), strict=True))
        assert (found >= 0).all() and (found <= 96).all() and found.dtype == torch.float32
        counts.append(len(kept))
        for channel, (left, top, right, bottom) in zip(kept.tolist(), found.tolist(), strict=True):
            bright = out[channel] > 0.6
            rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
            edges = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            assert max(abs(a - b) for a, b in zip(edges, (left, top, right, bottom), strict=True)) <= 1
        for channel in set(range(3)) - set(kept.tolist()):
            dropped += 1
            assert (out[channel] > 0.6).sum() < 0.35 * (30 * 96 / 140 * augment.zoom[1]) ** 2
        if {0, 2} <= set(kept.tolist()):
            mirrored += bool(found[kept == 0, 0] > found[kept == 2, 0])
    assert dropped > 10 and min(counts) < 3 == max(counts)
    assert mirrored > 10 if mirror else mirrored == 0


def test_zoom_and_place_vary_and_the_smallest_are_dropped() -> None:
    augment = Augment(zoom=(0.1, 2.0))
    image, boxes, labels = spots()
    sizes, places, fewest = [], [], 3
    for i in range(200):
        found, kept = augment(torch.full((3, 96, 96), PADDING), image, boxes, labels, np.random.default_rng(i))
        assert not len(found) or (found[:, 2:] - found[:, :2]).min() >= augment.smallest
        fewest = min(fewest, len(kept))
        if 1 in kept:
            left, top, right, bottom = found[kept == 1][0].tolist()
            sizes.append(max(right - left, bottom - top))
            places.append((left, top))
    assert fewest == 0 and min(sizes) < 6 and max(sizes) > 38
    assert np.ptp(np.array(places), 0).min() > 60


def test_colours_vary_within_bounds() -> None:
    image = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8)
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    still = Augment(zoom=(1, 1), brightness=0, contrast=0, saturation=0, hue=0)
    out, expected = torch.full((3, 64, 64), PADDING), letterbox(image, 64)[0]
    still(out, image, *none, np.random.default_rng(0))
    torch.testing.assert_close(out.sum(), expected.sum(), rtol=1e-5, atol=0)
    strong = Augment(zoom=(1, 1), brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    means = []
    for i in range(20):
        out = torch.full((3, 64, 64), PADDING)
        boxes, labels = strong(out, image, *none, np.random.default_rng(i))
        assert boxes.shape == (0, 4) and labels.shape == (0,)
        assert (out >= 0).all() and (out <= 1).all()
        means.append(out.mean((1, 2)))
    assert torch.stack(means).std(0).min() > 0.05
    grey = image[:1].expand(3, -1, -1)
    out = torch.full((3, 64, 64), PADDING)
    Augment(brightness=0, contrast=0, saturation=0.9, hue=0.5)(out, grey, *none, np.random.default_rng(3))
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=2e-3, msg="saturation and hue leave grey alone")


# Batches


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "boxes", "labels"))


def test_batches_without_augmentation_are_letterboxes(tmp_path: Path) -> None:
    data = load_data(coco(tmp_path), "train")
    batches = DetectionBatches(data, 3)
    assert len(batches) == 2
    found = list(batches.epoch(0, 64))
    assert [len(batch.images) for batch in found] == [3, 1]
    order = np.random.default_rng((0, 0)).permutation(4).tolist()
    rows = [row for batch in found for row in zip(batch.images, batch.boxes, batch.labels, strict=True)]
    for index, (image, boxes, labels) in zip(order, rows, strict=True):
        expected, box = letterbox(data[index].image, 64)
        count = len(data[index].labels)
        assert torch.equal(image, expected) and torch.equal(boxes[:count], box.to_input(data[index].boxes))
        assert torch.equal(labels[:count], data[index].labels)
        assert (labels[count:] == -1).all() and (boxes[count:] == 0).all() and len(labels) >= 1
    assert found[0].to(torch.device("cpu")).labels.dtype == torch.int64


def test_batches_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    data = load_data(coco(tmp_path), "train")
    first = DetectionBatches(data, 3, seed=1, augment=Augment())
    expected = [list(first.epoch(number, 64)) for number in range(3)]
    torch.manual_seed(7)
    again = DetectionBatches(load_data(tmp_path, "train"), 3, seed=1, augment=Augment())
    for number in (2, 0, 1, 1):
        torch.rand(3), np.random.rand(3)
        assert all(map(equal, again.epoch(number, 64), expected[number]))
    assert not equal(expected[0][0], expected[1][0])
    assert not equal(expected[0][0], next(DetectionBatches(data, 3, seed=2, augment=Augment()).epoch(0, 64)))


def test_the_data_are_the_same_after_an_epoch(tmp_path: Path) -> None:
    data = load_data(coco(tmp_path), "train")
    for batch in DetectionBatches(data, 2, augment=Augment(mirror=True)).epoch(0, 64):
        for x in (batch.images, batch.boxes, batch.labels):
            x.zero_()
    check_scenes(data)


def test_bad_images_are_reported_once_and_change_no_other(tmp_path: Path) -> None:
    data = load_data(coco(tmp_path), "train")
    batches = DetectionBatches(data, 4, augment=Augment())
    (whole,) = batches.epoch(0, 64)
    place = np.random.default_rng((0, 0)).permutation(4).tolist().index(1)
    (tmp_path / "images" / "train" / "1.png").write_bytes(b"broken")
    batches = DetectionBatches(load_data(tmp_path, "train"), 4, augment=Augment())
    with pytest.warns(UserWarning, match="skipped .*1.png: not an image") as seen:
        (batch,) = batches.epoch(0, 64)
    assert len(seen) == 1 and [error.path for error in batches.skipped] == [str(tmp_path / "images/train/1.png")]
    others = [i for i in range(4) if i != place]
    assert torch.equal(batch.images, whole.images[others]) and len(batches) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (again,) = batches.epoch(0, 64)
    assert equal(again, batch) and len(batches.skipped) == 1
    for path in (tmp_path / "images" / "train").iterdir():
        path.write_bytes(b"broken")
    batches = DetectionBatches(load_data(tmp_path, "train"), 4)
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(UserError, match="none of the 4 images can be read; one is"):
            warnings.simplefilter("ignore")
            list(batches.epoch(0, 64))
