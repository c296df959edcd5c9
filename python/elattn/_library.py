"""Finds libelattn.so and loads it, which registers the operators with PyTorch."""

import os
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent


def library_path() -> Path:
    """Path of the library: ELATTN_LIBRARY if it is set, else lib/ in the package, else build/ of the checkout.

    The last is for work on elattn itself: the package lies in `python/elattn` there, the library in `build`.
    """
    if chosen := os.environ.get("ELATTN_LIBRARY"):
        return Path(chosen)
    installed = _PACKAGE / "lib" / "libelattn.so"
    return installed if installed.exists() else _PACKAGE.parents[1] / "build" / "libelattn.so"


def load() -> Path:
    """Loads the library and returns its path.

    Raises ImportError, with the remedy, if it is missing or was built for another PyTorch.
    """
    path = library_path()
    if not path.exists():
        raise ImportError(
            f"elattn: {path} does not exist. Install elattn (`pip install .` in its checkout), or build it there "
            "(`make library`), or set ELATTN_LIBRARY to the path of a libelattn.so."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"elattn: {path} does not load with PyTorch {torch.__version__}; probably it was built for another one. "
            f"Rebuild it: `pip install --no-build-isolation --force-reinstall .`. The loader says: {error}"
        ) from error
    return path
