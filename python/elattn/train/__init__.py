"""Training of a language model: what `elattn train` runs, and functions to build on."""

from elattn.train.checkpoint import load_model
from elattn.train.config import TrainConfig
from elattn.train.evaluate import Evaluation, evaluate
from elattn.train.interrupt import Interrupted
from elattn.train.loop import TrainResult, train
from elattn.train.plot import plot_losses
from elattn.train.processes import select_device

__all__ = [
    "Evaluation",
    "Interrupted",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_model",
    "plot_losses",
    "select_device",
    "train",
]
