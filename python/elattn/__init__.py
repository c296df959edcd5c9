"""Exact linear attention for PyTorch: operators with their own gradients and a recurrent decode of constant size.

The functions here are thin wrappers of `torch.ops.elattn.*`. The rest is imported when first used: `elattn.nn` (the
attention module), `elattn.models` (a language model and a detector), `elattn.testing` (checks for your own models), and
what the command `elattn` runs: `elattn.data`, `elattn.train`, `elattn.detect`.
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch

from elattn import _library

_library.load()

from elattn.ops import (  # noqa: E402  (the operators must be registered first)
    FeatureKernel,
    attention,
    attention_step,
    feature_attention,
    feature_attention_step,
    grouped_linear,
    kernels,
    merge_states,
    new_state,
    state_fields,
    state_size,
    unpack_state,
)

if TYPE_CHECKING:
    from elattn import data, detect, models, nn, testing, train, utils

__version__: str = torch.ops.elattn._version()

__all__ = [
    "FeatureKernel",
    "__version__",
    "attention",
    "attention_step",
    "data",
    "detect",
    "feature_attention",
    "feature_attention_step",
    "grouped_linear",
    "kernels",
    "merge_states",
    "models",
    "new_state",
    "nn",
    "state_fields",
    "state_size",
    "testing",
    "train",
    "unpack_state",
    "utils",
]

_SUBMODULES = ("data", "detect", "models", "nn", "testing", "train", "utils")


def __getattr__(name: str) -> Any:
    # PEP 562: keeps `import elattn` as light as loading the library.
    if name in _SUBMODULES:
        return importlib.import_module(f"elattn.{name}")
    raise AttributeError(f"module 'elattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
