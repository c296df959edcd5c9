"""COCO folders: annotations/instances_<split>.json beside the images."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from elattn.detect.samples import Annotations, fit_box
from elattn.errors import UserError

__all__ = ["find_coco", "read_coco"]

_PREFIX = "instances_"


def find_coco(folder: Path, split: str) -> Path | None:
    """The file of a split ("train" may be instances_train2017.json), or None if this is no COCO folder.

    Raises:
        UserError: it has other splits only.
    """
    exact = folder / "annotations" / f"{_PREFIX}{split}.json"
    if exact.is_file():
        return exact
    splits = sorted(path.stem.removeprefix(_PREFIX) for path in exact.parent.glob(f"{_PREFIX}*.json"))
    dated = [name for name in splits if name.startswith(split) and name[len(split) :].isdigit()]
    if len(dated) == 1:
        return exact.with_name(f"{_PREFIX}{dated[0]}.json")
    if splits:
        raise UserError(f"{exact.parent} has no split {split!r} (it has: {', '.join(splits)})")
    return None


def read_coco(file: Path, folder: Path) -> tuple[list[Annotations], list[str], list[int], list[str]]:
    """Annotations, names of the classes, their category ids (ascending), and a line about each object left out.

    Raises:
        UserError: something is missing or wrong; the message names the file and the entry.
    """
    content = _load(file)
    names = {_get(c, "id", int, f"{file}: a category"): c for c in content["categories"]}
    names = {i: _get(names[i], "name", str, f"{file}: category {i}") for i in sorted(names)}
    if len(set(names.values())) < len(content["categories"]):
        raise UserError(f"{file}: two categories have the same id or name")
    objects: dict[int, list[tuple[tuple[float, ...], int, bool]]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for image in content["images"]:
        i = _get(image, "id", int, f"{file}: an image")
        if i in objects:
            raise UserError(f"{file}: two images have the id {i}")
        objects[i] = []
        width, height = sizes[i] = tuple(_get(image, side, int, f"{file}: image {i}") for side in ("width", "height"))
        if min(width, height) < 1:
            raise UserError(f"{file}: image {i} has {width} x {height} pixels")
    left_out = []
    labels = {i: label for label, i in enumerate(names)}
    for annotation in content["annotations"]:
        place = f"{file}: annotation {annotation.get('id', '?')}"
        image, category = (_get(annotation, key, int, place) for key in ("image_id", "category_id"))
        if image not in objects:
            raise UserError(f"{place} is of the image {image}, which is not listed")
        if category not in labels:
            raise UserError(f"{place} has the category {category}, which is not listed")
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
            raise UserError(f"{place} has no 'bbox' of four numbers")
        edges = box[0], box[1], box[0] + box[2], box[1] + box[3]
        try:
            fitted = fit_box(edges, sizes[image])
        except ValueError as error:
            raise UserError(f"{place}: the box {box} {error}") from None
        if fitted is None:
            left_out.append(f"{place}: the box {box} holds nothing")
        else:
            objects[image].append((fitted, labels[category], bool(annotation.get("iscrowd", 0))))
    paths = _paths(file, folder, content["images"])
    annotations = [
        Annotations(
            path,
            i,
            sizes[i],
            np.array([box for box, _, _ in found], np.float32).reshape(-1, 4),
            np.array([label for _, label, _ in found], np.int64),
            np.array([crowd for _, _, crowd in found], bool),
        )
        for path, (i, found) in zip(paths, objects.items(), strict=True)
    ]
    return annotations, list(names.values()), list(names), left_out


def _load(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{file} has no list of {key!r}")
    if not content["images"]:
        raise UserError(f"{file} lists no images")
    return content


def _get(entry: dict[str, Any], key: str, kind: type, place: str) -> Any:
    if not isinstance(value := entry.get(key), kind):
        raise UserError(f"{place} has no {key!r}" if value is None else f"{place}: {key!r} is {value!r}")
    return value


def _paths(file: Path, folder: Path, images: list[dict[str, Any]]) -> list[Path]:
    """The files of all images; one folder has them all."""
    names = [_get(image, "file_name", str, f"{file}: image {image['id']}") for image in images]
    split = file.stem.removeprefix(_PREFIX)
    folders = [folder / "images" / split, folder / split, folder / "images", folder]
    root = next((root for root in folders for name in names[:1] if (root / name).is_file()), None)
    if root is None:
        searched = ", ".join(map(str, folders))
        raise UserError(f"{file} lists the image {names[0]}, which is in none of the folders {searched}")
    paths = [root / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{file} lists {len(paths)} images, but {len(missing)} are missing; the first is {missing[0]}")
    return paths
