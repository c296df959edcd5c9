"""Models composed from `elattn.nn`."""

from elattn.models.config import ELAConfig
from elattn.models.export import export_aoti, export_torchscript
from elattn.models.state import fork_state
from elattn.models.transformer import ELATransformer
from elattn.models.yolo_lat import YoloLat

__all__ = ["ELAConfig", "ELATransformer", "YoloLat", "export_aoti", "export_torchscript", "fork_state"]
