"""Training of a byte-level language model: what `elattn train` runs, and functions to build on."""

from elattn.train.checkpoint import load_model
from elattn.train.loop import Interrupted, TrainConfig, TrainResult, evaluate, train
from elattn.train.plot import plot_losses

__all__ = ["Interrupted", "TrainConfig", "TrainResult", "evaluate", "load_model", "plot_losses", "train"]
