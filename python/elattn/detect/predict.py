"""Detection on image files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import draw_bounding_boxes

from elattn.detect.detector import Detector
from elattn.detect.evaluate import Prediction
from elattn.detect.images import BadImage, read_image
from elattn.detect.letterbox import letterbox
from elattn.errors import UserError

__all__ = ["draw", "find_images", "predict"]

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files among `paths`, and the images in the folders among them, by name.

    Raises:
        UserError: a path does not exist, or there is no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path} does not exist")
    if not files:
        raise UserError(f"no image in {', '.join(map(str, paths))}")
    return files


def predict(
    detector: Detector, files: Sequence[Path], *, confidence: float = 0.25, iou: float = 0.5
) -> Iterator[tuple[Path, Prediction | BadImage]]:
    """What is found in each image, in its pixels; or why it cannot be read.

    Args:
        confidence: smallest score.
        iou: largest overlap of two boxes of a class.
    """
    model = detector.model.fuse()
    device = next(model.parameters()).device
    for i, file in enumerate(files):
        try:
            image, fit = letterbox(torch.from_numpy(read_image(file)).permute(2, 0, 1), detector.size)
        except BadImage as error:
            yield file, error
            continue
        with torch.inference_mode():
            boxes, scores, labels = (x.cpu() for x in model.detect(image[None].to(device), confidence, iou)[0])
        yield file, Prediction(i, fit.to_image(boxes), scores, labels)


def draw(file: Path, prediction: Prediction, classes: Sequence[str]) -> Image.Image:
    """The image with its boxes."""
    image = torch.from_numpy(read_image(file)).permute(2, 0, 1)
    if len(prediction.boxes):
        texts = [f"{classes[i]} {s:.2f}" for i, s in zip(prediction.labels, prediction.scores, strict=True)]
        image = draw_bounding_boxes(image, prediction.boxes, texts, width=2)
    return Image.fromarray(image.permute(1, 2, 0).numpy())
