"""YOLO folders: data.yaml, images/<split>, and labels/<split> with a text file for each image."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from elattn.detect.samples import Annotations, fit_box
from elattn.errors import UserError

__all__ = ["find_yolo", "read_yolo"]

_KINDS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_yolo(path: Path) -> Path | None:
    """The data.yaml of a folder, `path` itself if it is such a file, or None."""
    file = path if path.suffix in (".yaml", ".yml") else path / "data.yaml"
    return file if file.is_file() else None


def read_yolo(file: Path, split: str) -> tuple[list[Annotations], list[str], list[int], list[str]]:
    """Annotations, names of the classes, their numbers from 0 on, and a line about each object left out.

    An image without a text file has no objects.

    Raises:
        UserError: something is missing or wrong; the message names the file and the line.
    """
    content = _load(file)
    names = _names(file, content)
    images = _images(file, content, split)
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in _KINDS and path.is_file())
    if not paths:
        raise UserError(f"{images} has no images")
    labels = _labels(images)
    left_out: list[str] = []
    annotations, found = [], 0
    for i, path in enumerate(paths):
        text = (labels / path.relative_to(images)).with_suffix(".txt")
        found += text.is_file()
        boxes, classes = _read(text, len(names), left_out) if text.is_file() else ([], [])
        annotations.append(
            Annotations(
                path,
                i,
                None,
                np.array(boxes, np.float32).reshape(-1, 4),
                np.array(classes, np.int64),
                np.zeros(len(classes), bool),
            )
        )
    if not found:
        raise UserError(f"{labels} has no text file for any of the {len(paths)} images in {images}")
    return annotations, names, list(range(len(names))), left_out


def _load(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} has no 'names'")
    return content


def _names(file: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: 'names' must be a list, or have the numbers from 0 on")
    names = list(map(str, names))
    if len(set(names)) < len(names):
        raise UserError(f"{file}: two of the 'names' are equal")
    if content.get("nc", len(names)) != len(names):
        raise UserError(f"{file}: 'nc' is {content['nc']}, but there are {len(names)} 'names'")
    return names


def _images(file: Path, content: dict[str, Any], split: str) -> Path:
    """The folder of images: what the file says, or images/<split>."""
    root = file.parent / str(content.get("path") or "")
    entry = str(content.get(split) or f"images/{split}")
    # Some exporters write ../train/images for train/images.
    folders = [base / name for name in (entry, entry.removeprefix("../")) for base in (root, file.parent)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise UserError(f"{file}: the split {split!r} is not a folder ({folders[0]})")
    return folder


def _labels(images: Path) -> Path:
    """The folder beside the images: the last "images" of the path reads "labels"."""
    parts = list(images.parts)
    if "images" not in parts:
        raise UserError(f"{images}: a folder named images must be in the path, for labels to be beside it")
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _read(text: Path, classes: int, left_out: list[str]) -> tuple[list[tuple[float, ...]], list[int]]:
    """Boxes in shares of the image's sides, and classes."""
    try:
        lines = text.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {text} ({error})") from None
    boxes, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{text}: line {number}"
        try:
            label, x, y, width, height = map(float, line.split())
        except ValueError:
            raise UserError(f"{place} is not a class and the four numbers x, y, width, height") from None
        if label not in range(classes):
            raise UserError(f"{place} has the class {label:g}, but there are {classes}")
        try:
            box = fit_box((x - width / 2, y - height / 2, x + width / 2, y + height / 2), (1, 1))
        except ValueError as error:
            raise UserError(f"{place}: the box {error}") from None
        if box is None:
            left_out.append(f"{place}: the box holds nothing")
        else:
            boxes.append(box)
            labels.append(int(label))
    return boxes, labels
