"""Builds libelattn.so with CMake and packs it, its headers and its CMake package into the wheel.

Environment: DEBUG=1 makes a debug build, MAX_JOBS limits the compilations that run at once, ELATTN_WITH_CUDA and
ELATTN_BUILD_DIR are passed on to CMake (docs/build.md).
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEPENDENCIES = ["numpy", "rich", "typer", "matplotlib", "safetensors"]


def project_version() -> str:
    """The version in `project(elattn VERSION ...)`, the only place that states it."""
    match = re.search(r"project\(elattn VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert match, "CMakeLists.txt has no project(elattn VERSION ...)"
    return match[1]


def torch_requirement() -> str:
    """The release of PyTorch that the library is built with: its C++ interface is stable only within one."""
    try:
        release = importlib.metadata.version("torch").split(".")
    except importlib.metadata.PackageNotFoundError:
        return "torch>=2.11"
    return f"torch=={release[0]}.{release[1]}.*"


def debug() -> bool:
    return os.environ.get("DEBUG", "0").upper() not in ("", "0", "OFF", "FALSE")


class CMakeBuild(build_ext):
    def run(self) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            raise RuntimeError("building elattn needs PyTorch; without build isolation, install it first")
        package = ROOT / "python" / "elattn" if self.inplace or self.editable_mode else Path(self.build_lib) / "elattn"
        build = Path(os.environ.get("ELATTN_BUILD_DIR") or Path(self.build_temp) / "cmake").resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if debug() else "Release",
            "CMAKE_INSTALL_RPATH_USE_LINK_PATH": "OFF",  # the wheel finds PyTorch beside itself
            "ELATTN_TORCH_DIR": torch.submodule_search_locations[0],
            "ELATTN_WITH_CUDA": os.environ.get("ELATTN_WITH_CUDA", "AUTO"),
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defines = [f"-D{name}={value}" for name, value in options.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *defines])
        subprocess.check_call(["cmake", "--build", str(build), "--target", "elattn", "--parallel", jobs])
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(package.resolve())])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # The library has no Python symbol, so one wheel serves every Python.
        return "py3", "none", super().get_tag()[2]


# Setuptools leaves its own files in build/ and python/ of the checkout, unless told of another place.
options = {}
if "ELATTN_BUILD_DIR" in os.environ:
    scratch = Path(os.environ["ELATTN_BUILD_DIR"]).resolve() / "setuptools"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    options = {"build": {"build_base": str(scratch)}, "egg_info": {"egg_base": str(scratch)}}

setup(
    version=project_version(),
    install_requires=[torch_requirement(), *DEPENDENCIES],
    ext_modules=[Extension("elattn.libelattn", sources=[])],
    options=options,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
