"""A trained detector and its files."""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from elattn._files import make_folder, write_file
from elattn.errors import UserError
from elattn.models import YoloLat
from elattn.train.checkpoint import first_line

__all__ = ["Detector", "load_detector", "save_detector"]


@dataclass(frozen=True)
class Detector:
    """A model with the names of its classes, and the side of the square that pictures are fitted into."""

    model: YoloLat
    classes: list[str]
    size: int


def save_detector(detector: Detector, folder: str | Path) -> None:
    """Writes config.json and model.safetensors."""
    folder, model = Path(folder), detector.model
    make_folder(folder)
    options = {"variant": model.variant, "neck": model.neck_kind, "position": model.position}
    config = {"classes": detector.classes, "size": detector.size, **options}
    write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_file(folder / "model.safetensors", safetensors.torch.save(tensors))


def load_detector(path: str | Path) -> Detector:
    """The detector in a folder of `save_detector`, or the best one of a training run.

    Raises:
        UserError: there is none, or its files are damaged or of different models.
    """
    path = Path(path)
    folder = next((path / name for name in ("best", "last") if (path / name).is_dir()), path)
    try:
        config = json.loads((folder / "config.json").read_text())
        classes, size = config.pop("classes"), config.pop("size")
        model = YoloLat(len(classes), **config)
        model.load_state_dict(safetensors.torch.load((folder / "model.safetensors").read_bytes()))
    except FileNotFoundError as error:
        raise UserError(f"no detector in {path}: {error.filename} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the detector in {folder} cannot be read ({first_line(error)})") from None
    return Detector(model.eval(), classes, size)
