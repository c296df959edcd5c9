"""Demo data: handwritten digits on photographs, as a COCO folder.

The digits are the 1,797 scans of scikit-learn, the photographs its two. Train, validation and test share no scan and no
part of a photograph. Quartered digits, which are no objects, lie among the digits.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elattn._files import make_folder
from elattn.errors import UserError

__all__ = ["demo_data"]

_VERSION = 1  # of what is made; a new one has a new folder
# Of the scans in random order, a share; of each photograph (its columns in quarters), the quarters from one to another.
_SPLITS = {
    "train": ((0.0, 0.6), ((1, 3), (0, 2))),
    "val": ((0.6, 0.8), ((0, 1), (2, 3))),
    "test": ((0.8, 1.0), ((3, 4), (3, 4))),
}
_SIDES = 240, 320  # of pictures
_HEIGHTS = 26, 160  # of objects, before faint tips are cut off
_VISIBLE = 64  # ink, of 255, that the outermost pixels of a box must reach
_EMPTY = 0.04  # share of pictures without objects
_OVERLAP = 0.1  # largest share of the smaller of two boxes that the other covers
_INK = 110  # grey level of an enlarged scan from which on there is ink


def demo_data(
    folder: str | Path | None = None,
    *,
    seed: int = 0,
    pictures: tuple[int, int, int] = (1600, 400, 400),
    console: Console | None = None,
) -> Path:
    """The folder of the demo data, made if it is not there.

    Equal arguments give equal pixels and annotations on every machine. A picture does not depend on how many there are.

    Args:
        folder: to make; by default one in the user's cache.
        seed: of everything that is random.
        pictures: for training, validation and test.
        console: for the progress; standard error by default.

    Raises:
        UserError: the folder cannot be made.
    """
    if folder is None:
        name = "-".join(map(str, (_VERSION, seed, *pictures)))
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elattn" / f"demo-{name}"
    folder = Path(folder)
    if (folder / "annotations").is_dir():
        return folder
    make_folder(folder.parent)
    try:
        # Made beside it and renamed at the end, so that the folder is whole when it is there.
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as made:
            whole = Path(made) / "demo"
            _make(whole, seed, pictures, console or Console(stderr=True))
            whole.rename(folder)
    except OSError as error:
        if not (folder / "annotations").is_dir():  # else another process was faster
            raise UserError(f"cannot make the demo data in {folder}: {error.strerror}") from None
    return folder


def _make(folder: Path, seed: int, pictures: Sequence[int], console: Console) -> None:
    columns = TextColumn("making demo data"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(pictures))
        (folder / "annotations").mkdir(parents=True)
        for number, (split, count) in enumerate(zip(_SPLITS, pictures, strict=True)):
            painter = _Painter(split, seed)
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            (folder / "images" / split).mkdir(parents=True)
            for index in range(count):
                picture, objects = painter.paint(np.random.default_rng((seed, number, index)))
                name = f"{index:06}.png"
                path = folder / "images" / split / name
                Image.fromarray(picture).save(path, compress_level=1, compress_type=zlib.Z_RLE)
                height, width = picture.shape[:2]
                images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
                for digit, (left, top, right, bottom) in objects:
                    width, height = right - left, bottom - top
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": index + 1,
                            "category_id": digit + 1,
                            "bbox": [left, top, width, height],
                            "area": width * height,
                            "iscrowd": 0,
                        }
                    )
                progress.advance(task)
            categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


_Box = tuple[int, int, int, int]


class _Painter:
    """Pictures of one split. All is computed in integers, which are the same on every machine."""

    def __init__(self, split: str, seed: int) -> None:
        from sklearn.datasets import load_digits, load_sample_images  # slow, and seldom needed

        scans = load_digits()
        order = np.random.default_rng(seed).permutation(len(scans.images))
        (first, last), quarters = _SPLITS[split]
        own = order[int(first * len(order)) : int(last * len(order))]
        # A margin, so that ink at the edge of a scan is as round as elsewhere.
        self.scans = np.pad((scans.images[own] * (255 / 16)).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
        self.digits = scans.target[own]
        self.backgrounds = []
        for photograph, (low, high) in zip(load_sample_images().images, quarters, strict=True):
            quarter = photograph.shape[1] // 4
            self.backgrounds.append(photograph[:, low * quarter : high * quarter])

    def paint(self, random: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, _Box]]]:
        """A picture, uint8 (H, W, 3); digit and box of each object."""
        picture = self._background(random)
        objects: list[tuple[int, _Box]] = []
        taken: list[_Box] = []
        digits = 0 if random.random() < _EMPTY else int(random.integers(2, 8))
        decoys = int(random.integers(0, 3))
        for decoy in [False] * digits + [True] * decoys:
            scan = int(random.integers(len(self.scans)))
            ink = self._ink(scan, random)
            if decoy:  # each quarter goes to the opposite corner
                ink = np.roll(ink, (ink.shape[0] // 2, ink.shape[1] // 2), (0, 1))
            box = _place(ink, picture, taken, random)
            if box is None:
                continue
            taken.append(box)
            left, top, right, bottom = box
            _draw(picture[top:bottom, left:right], ink, random)
            if not decoy:
                objects.append((int(self.digits[scan]), box))
        return picture, objects

    def _background(self, random: np.random.Generator) -> np.ndarray:
        """A part of a photograph, enlarged two to three times, perhaps mirrored, in other shades."""
        photograph = self.backgrounds[int(random.integers(len(self.backgrounds)))]
        height, width = random.integers(_SIDES[0], _SIDES[1] + 1, 2).tolist()
        percent = int(random.integers(35, 51))
        part_height, part_width = height * percent // 100, width * percent // 100
        top = int(random.integers(photograph.shape[0] - part_height + 1))
        left = int(random.integers(photograph.shape[1] - part_width + 1))
        part = photograph[top : top + part_height, left : left + part_width]
        part = part[:: random.choice((-1, 1)), :: random.choice((-1, 1))]
        part = np.minimum(part * random.integers(60, 131, 3) // 100, 255)
        return _resize(part, height, width)

    def _ink(self, scan: int, random: np.random.Generator) -> np.ndarray:
        """A digit turned and enlarged: how much ink each pixel of its box has, uint8 (h, w)."""
        # Pillow is exact here: 16 times as large, the weights are binary fractions; and nothing is interpolated later.
        large = Image.fromarray(self.scans[scan]).resize((160, 160), Image.Resampling.BICUBIC)
        turned = np.asarray(large.rotate(int(random.integers(-25, 26)), Image.Resampling.NEAREST, expand=True))
        turned = turned[_extent(turned >= _INK)]
        low, high = _HEIGHTS
        height = round(low * (high / low) ** random.random())
        width = max(1, round(turned.shape[1] * height / turned.shape[0]))
        fine = _resize(turned, 3 * height, 3 * width) >= _INK  # 9 points in each pixel
        ink = fine.reshape(height, 3, width, 3).sum((1, 3)) * 255 // 9
        return ink[_extent(ink >= _VISIBLE)].astype(np.uint8)


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns from the first to the last that has anything."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Levels (h, w, ...) as uint8 (height, width, ...), bilinear."""
    for axis, size in enumerate((height, width)):
        pixels = np.moveaxis(pixels, axis, 0).astype(np.int32)
        # Centres of the new pixels in 256ths of the old ones.
        places = ((2 * np.arange(size) + 1) * len(pixels) * 128 // size - 128).clip(0, (len(pixels) - 1) * 256)
        before, weight = places >> 8, (places & 255).reshape(-1, *[1] * (pixels.ndim - 1)).astype(np.int32)
        after = np.minimum(before + 1, len(pixels) - 1)
        pixels = np.moveaxis((pixels[before] * (256 - weight) + pixels[after] * weight + 128) >> 8, 0, axis)
    return pixels.astype(np.uint8)


def _place(ink: np.ndarray, picture: np.ndarray, taken: list[_Box], random: np.random.Generator) -> _Box | None:
    """A box for the ink that hides nothing, or None if none is found."""
    height, width = ink.shape
    for _ in range(20):
        top = int(random.integers(picture.shape[0] - height + 1))
        left = int(random.integers(picture.shape[1] - width + 1))
        box = left, top, left + width, top + height
        if all(_overlap(box, other) <= _OVERLAP for other in taken):
            return box
    return None


def _overlap(a: _Box, b: _Box) -> float:
    """Share of the smaller box that the other covers."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller


def _draw(background: np.ndarray, ink: np.ndarray, random: np.random.Generator) -> None:
    """Draws in a colour clearly lighter or darker than the background (h, w, 3)."""
    around = _lightness(background.sum((0, 1), dtype=np.int64) // ink.size)
    colour = random.integers(0, 256, 3)
    while abs(_lightness(colour) - around) < 70:
        colour = random.integers(0, 256, 3)
    share = ink[..., None].astype(np.int64)
    background[:] = (background * (255 - share) + colour * share + 127) // 255


def _lightness(colour: np.ndarray) -> int:
    return int(colour @ (77, 150, 29)) >> 8
