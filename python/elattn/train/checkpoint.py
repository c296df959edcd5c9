"""Files of a training run. Each is replaced only when its successor is complete, so a crash leaves the older one.

config.json, model.safetensors   in best/ and last/: the model, for `ELATransformer.from_pretrained`
tokenizer.json                   there and in the run's own folder, unless tokens are bytes
training.safetensors             in last/: weights, optimizer and progress, for exact resumption
log.jsonl, loss.png              the history
cache/                           tokens of the text, for the next start
"""

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from elattn._files import write_file
from elattn.errors import UserError
from elattn.models import ELATransformer

__all__ = ["check_run", "clear_run", "load_model", "read_training", "restore", "save_training"]

_FILES = ("attention.png", "log.jsonl", "loss.png", "precision.png", "predictions.png", "tokenizer.json")
_FOLDERS = ("best", "last")


def load_model(path: str | Path) -> ELATransformer:
    """The model in a folder of `save_pretrained`, or the best one of a training run.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    path = Path(path)
    folder = next((path / name for name in ("best", "last") if (path / name).is_dir()), path)
    try:
        return ELATransformer.from_pretrained(folder)
    except FileNotFoundError as error:
        raise UserError(f"no model in {path}: {error.filename} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the model in {folder} cannot be read ({first_line(error)}); train or copy it again") from None


def save_training(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Writes training.safetensors: weights, the optimizer's tensors by parameter name, and `progress` as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.contiguous()
    content = safetensors.torch.save(tensors, metadata={"progress": json.dumps(progress)})
    write_file(folder / "training.safetensors", content)


def read_training(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The progress and the tensors that `save_training` wrote.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    path = folder / "training.safetensors"
    if not path.exists():
        raise UserError(f"nothing to resume: {path} is missing; start without --resume")
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["progress"]), {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint {path} cannot be read ({first_line(error)}); start again with --overwrite or another --out"
        ) from None


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer where `save_training` found them."""
    model.load_state_dict({n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")})
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"optimizer.{key}.{name}")) is not None:  # none for a weight without a gradient
                # With the strides of the parameter: the fused update takes elements as they lie in memory.
                state[key] = torch.empty_like(parameter).copy_(value)
                state["step"] = tensors[f"optimizer.step.{name}"].to(parameter.device)


def clear_run(out: Path) -> None:
    """Deletes the files of an earlier run in `out`, and nothing else there; the token cache stays.

    Raises:
        UserError: `out` holds no run.
    """
    check_run(out)
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


def check_run(out: Path) -> None:
    """Raises UserError if the folder `out` holds something other than a training run."""
    if not (out / "log.jsonl").exists():
        raise UserError(f"{out} holds something other than a training run: choose another --out")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
