"""The peer, by the names that the other modules use. The only file that imports Ultralytics."""

import contextlib
import copy
import io
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Read at its import: it asks no server, installs nothing, and leaves its settings in a folder that goes at the end.
_settings = tempfile.TemporaryDirectory()
os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
os.environ["YOLO_CONFIG_DIR"] = _settings.name

import ultralytics  # noqa: E402
from ultralytics.models.yolo.detect import DetectionPredictor, DetectionTrainer  # noqa: E402
from ultralytics.nn.tasks import DetectionModel  # noqa: E402
from ultralytics.utils import ops  # noqa: E402
from ultralytics.utils.nms import non_max_suppression  # noqa: E402

VERSION = ultralytics.__version__
CONFIG = "yolo26n.yaml"
# The two heads that its training makes: of many boxes for an object, which need suppression, and of one.
HEADS = {"suppression": None, "one box an object": False}

Found = tuple[Tensor, Tensor, Tensor]


def build(classes: int) -> nn.Module:
    """The model with random weights."""
    model = DetectionModel(CONFIG, ch=3, nc=classes, verbose=False)
    model.names = {i: str(i) for i in range(classes)}
    return model.eval()


def load(path: Path, classes: int) -> nn.Module:
    """The model with the weights that `train` left."""
    model = build(classes)
    model.load_state_dict(torch.load(path))
    return model


class Raw(nn.Module):
    """The model up to its raw predictions: boxes (B, 4, N) in cells and logits (B, C, N) of the head that suppression
    follows. Its own forward decodes them in evaluation."""

    def __init__(self, model: nn.Module, fuse: bool) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.end2end = False
        if fuse:
            self.model.fuse(verbose=False)
        self.model.model[-1].training = True  # of the head alone, so that it stops there

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(images)
        found = found.get("one2many", found)
        return found["boxes"], found["scores"]


def forms(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """The model as it is, and the forms that are faster. Unfused, it computes both heads."""
    fused = Raw(model, fuse=True)
    # A frozen module must be in evaluation, in which a head that is traced alone has no say.
    traced = torch.jit.trace(fused, images).eval()
    return {
        "eager": Raw(model, fuse=False),
        "fused": fused,
        "channels last": copy.deepcopy(fused).to(memory_format=torch.channels_last),
        "TorchScript": torch.jit.freeze(traced),
    }


class Detector:
    """Image to boxes by its own steps: its letterbox, the model as it prepares it, its suppression.

    Args:
        model: from `build` or `load`.
        size: side of the input.
        head: of `HEADS`.
        every_label: a box may have several labels, as in its validation; otherwise the best one, as in its prediction.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        *,
        head: str = "suppression",
        confidence: float,
        iou: float,
        limit: int,
        every_label: bool = False,
    ) -> None:
        threads = torch.get_num_threads()
        options = {"conf": confidence, "iou": iou, "max_det": limit, "imgsz": size, "rect": False, "nms": HEADS[head]}
        options |= {"device": "cpu", "verbose": False, "save": False, "mode": "predict"}
        self.predictor = DetectionPredictor(overrides=options)
        self.predictor.setup_model(model, verbose=False)  # fuses, and sets the process's number of threads
        torch.set_num_threads(threads)
        self.predictor.imgsz = [size, size]
        self.model, self.every_label = self.predictor.model, every_label

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        """Boxes, scores and labels of images uint8 (H, W, 3), BGR as it takes them."""
        args = self.predictor.args
        inputs = self.predictor.preprocess(list(images))
        found = non_max_suppression(
            self.model(inputs),
            args.conf,
            args.iou,
            multi_label=self.every_label,
            max_det=args.max_det,
            end2end=self.model.end2end,
        )
        return [
            (ops.scale_boxes(inputs.shape[2:], one[:, :4], image.shape), one[:, 4], one[:, 5].long())
            for one, image in zip(found, images, strict=True)
        ]

    def predict(self, images: Sequence[np.ndarray]) -> list[Found]:
        """The same through its public call, with what that adds."""
        self.predictor.args.batch = len(images)
        return [(one.boxes.xyxy, one.boxes.conf, one.boxes.cls.long()) for one in self.predictor(source=list(images))]


def train(
    data: Path, settings: dict[str, Any], *, epochs: int, batch_size: int, size: int, seed: int, threads: int
) -> tuple[nn.Module, float]:
    """Trains on a YOLO folder; the averaged weights, and the CPU seconds of the epochs, without preparation.

    Validation is left to the caller. Digits are not mirrored, and every batch is an update.
    """
    # It prints what it does.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given = {"model": CONFIG, "data": str(data), "project": folder, "name": "run", "pretrained": False}
        given |= {"epochs": epochs, "batch": batch_size, "nbs": batch_size, "imgsz": size, "seed": seed}
        given |= {"device": "cpu", "workers": 0, "cache": "ram", "amp": False, "deterministic": False, "fliplr": 0.0}
        given |= {"plots": False, "val": False, "save": False, "verbose": False}
        trainer = DetectionTrainer(overrides=given | settings)
        # The last epoch would be validated and saved in any case.
        trainer.validate = lambda: ({}, 0.0)
        trainer.save_model = lambda: False
        trainer.final_eval = lambda: None
        spent, began = 0.0, 0.0

        def begin(_: Any) -> None:
            nonlocal began
            torch.set_num_threads(threads)  # it has set its own
            began = time.process_time()

        def end(_: Any) -> None:
            nonlocal spent
            spent += time.process_time() - began
            if torch.get_num_threads() != threads:
                raise RuntimeError(f"the peer trains with {torch.get_num_threads()} threads, not {threads}")

        trainer.add_callback("on_train_epoch_start", begin)
        trainer.add_callback("on_train_epoch_end", end)
        trainer.train()
        model = trainer.ema.ema.float().eval()
    torch.set_num_threads(threads)
    model.criterion = None
    return model, spent
