"""Where other build systems find elattn."""

from pathlib import Path

cmake_prefix_path: str = str(Path(__file__).resolve().parent / "share" / "cmake")
"""For `-DCMAKE_PREFIX_PATH=`, so that `find_package(elattn)` works; beside `torch.utils.cmake_prefix_path`."""
