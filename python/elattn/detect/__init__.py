"""Detection of objects: data, training, evaluation and export of YOLO-LAT, which `elattn detect` runs.

Its packages are an extra: pip install "elattn[detect]".
"""

import importlib.util

from elattn.errors import UserError

for _package in ("PIL", "pycocotools", "sklearn", "torchvision", "yaml"):
    if importlib.util.find_spec(_package) is None:
        raise UserError(f'detection needs the package {_package}: pip install "elattn[detect]"')

from elattn.detect.augment import Augment  # noqa: E402  (the packages must be there)
from elattn.detect.batches import Batch, DetectionBatches  # noqa: E402
from elattn.detect.config import DetectConfig  # noqa: E402
from elattn.detect.data import DetectionData, load_data  # noqa: E402
from elattn.detect.demo_data import demo_data  # noqa: E402
from elattn.detect.detector import Detector, load_detector, save_detector  # noqa: E402
from elattn.detect.evaluate import Evaluation, Prediction, evaluate  # noqa: E402
from elattn.detect.export import export_detector_onnx, export_detector_torchscript  # noqa: E402
from elattn.detect.images import BadImage, read_image  # noqa: E402
from elattn.detect.letterbox import Letterbox, letterbox  # noqa: E402
from elattn.detect.loop import DetectResult, train_detector  # noqa: E402
from elattn.detect.plot import attention_weights, plot_run  # noqa: E402
from elattn.detect.predict import draw, find_images, predict  # noqa: E402
from elattn.detect.samples import Sample  # noqa: E402

__all__ = [
    "Augment",
    "BadImage",
    "Batch",
    "DetectConfig",
    "DetectResult",
    "DetectionBatches",
    "DetectionData",
    "Detector",
    "Evaluation",
    "Letterbox",
    "Prediction",
    "Sample",
    "attention_weights",
    "demo_data",
    "draw",
    "evaluate",
    "export_detector_onnx",
    "export_detector_torchscript",
    "find_images",
    "letterbox",
    "load_data",
    "load_detector",
    "plot_run",
    "predict",
    "read_image",
    "save_detector",
    "train_detector",
]
