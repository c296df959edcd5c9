"""Models composed from `elattn.nn`."""

from elattn.models.config import ELAConfig
from elattn.models.export import export_torchscript
from elattn.models.transformer import ELATransformer

__all__ = ["ELAConfig", "ELATransformer", "export_torchscript"]
