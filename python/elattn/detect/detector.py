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

    def to_json(self) -> str:
        """Classes, size and the options of the model."""
        model = self.model
        options = {"variant": model.variant, "neck": model.neck_kind, "position": model.position}
        return json.dumps({"classes": self.classes, "size": self.size, **options}, indent=2) + "\n"


def save_detector(detector: Detector, folder: str | Path) -> None:
    """Writes config.json and model.safetensors."""
    folder = Path(folder)
    make_folder(folder)
    write_file(folder / "config.json", detector.to_json())
    tensors = {name: value.contiguous() for name, value in detector.model.state_dict().items()}
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
