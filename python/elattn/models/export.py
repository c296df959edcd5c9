"""A model as TorchScript, for C++ (docs/cpp.md)."""

import os
import warnings
from pathlib import Path

import torch
from torch import nn

__all__ = ["export_torchscript"]


def export_torchscript(model: nn.Module, path: str | Path) -> None:
    """Writes the scripted model, with `forward`, `new_state`, `prefill` and `step`; replaces `path` once complete.

    A program that loads it needs PyTorch's C++ library and libelattn.so, but no Python.
    """
    with warnings.catch_warnings():
        # What loads in C++ without Python is still TorchScript.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        scripted = torch.jit.script(model.eval())
        partial = f"{path}.partial"
        torch.jit.save(scripted, partial)
    os.replace(partial, path)
