"""Detection of objects: data, training, evaluation and export of YOLO-LAT, which `elattn detect` runs.

Its packages are an extra: pip install "elattn[detect]".
"""

import importlib.util

from elattn.errors import UserError

for _package in ("PIL", "torchvision"):
    if importlib.util.find_spec(_package) is None:
        raise UserError(f'detection needs the package {_package}: pip install "elattn[detect]"')

from elattn.detect.augment import Augment  # noqa: E402  (the packages must be there)
from elattn.detect.batches import Batch, DetectionBatches  # noqa: E402
from elattn.detect.data import DetectionData, load_data  # noqa: E402
from elattn.detect.demo_data import demo_data  # noqa: E402
from elattn.detect.images import BadImage, read_image  # noqa: E402
from elattn.detect.letterbox import Letterbox, letterbox  # noqa: E402
from elattn.detect.samples import Sample  # noqa: E402

__all__ = [
    "Augment",
    "BadImage",
    "Batch",
    "DetectionBatches",
    "DetectionData",
    "Letterbox",
    "Sample",
    "demo_data",
    "letterbox",
    "load_data",
    "read_image",
]
