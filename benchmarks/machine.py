"""The machine: what it is, what its core could do at most, and an allocator that keeps its pages."""

import ctypes
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import elattn

HERE = Path(__file__).resolve().parent

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_libc = ctypes.CDLL(None)


def keep_pages() -> bool:
    """Makes freed memory stay with the process, so that outputs are not written to pages fresh from the kernel.

    A fresh page costs more than the arithmetic of the rows that fit it, whichever library writes them. Returns whether
    the C library has the switches.
    """
    # glibc caps M_MMAP_THRESHOLD at 32 MiB, so mmap is forbidden instead.
    return _mallopt(_MMAP_MAX, 0) and _mallopt(_TRIM_THRESHOLD, -1)


def return_pages() -> bool:
    """The opposite: what is freed goes back at once, so the resident set is what is in use."""
    done = _mallopt(_MMAP_MAX, 1 << 20) and _mallopt(_MMAP_THRESHOLD, 64 << 10) and _mallopt(_TRIM_THRESHOLD, 128 << 10)
    if done:
        _libc.malloc_trim(0)
    return done


def _mallopt(parameter: int, value: int) -> bool:
    return hasattr(_libc, "mallopt") and _libc.mallopt(parameter, value) == 1


class PeakMemory:
    """Growth of the resident set, bytes, between entering and its largest value; None where Linux does not tell."""

    grown: int | None = None

    def __enter__(self) -> "PeakMemory":
        return_pages()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before = _status("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.grown = max(0, _status("VmHWM") - self._before)
        keep_pages()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def compile_shared(source: str, out: Path, *flags: str) -> Path | None:
    """Compiles benchmarks/`source` into `out`, unless that is done; None without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{Path(source).stem}-torch{torch.__version__}.so"
    if not path.exists() or path.stat().st_mtime < (HERE / source).stat().st_mtime:
        command = [compiler, "-std=c++20", "-shared", "-fPIC", str(HERE / source), "-o", str(path), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return path


class Ceilings:
    """The core's FMA peak and the rate of torch.mm (2048 x 2048, one thread), flop/s: the best seen in the run."""

    def __init__(self, out: Path) -> None:
        path = compile_shared("fma_peak.cpp", out, "-O3", "-march=native")
        self._loop = None
        if path is not None:
            self._loop = ctypes.CDLL(str(path)).fma_peak
            self._loop.restype, self._loop.argtypes = ctypes.c_double, [ctypes.c_double]
        self._matrices = [torch.randn(2048, 2048) for _ in range(3)]
        self.fma_samples: list[float] = []
        self.mm_samples: list[float] = []

    def sample(self, mm: bool = True) -> None:
        if self._loop is not None:
            self.fma_samples.append(self._loop(0.02))
        if mm:
            torch.set_num_threads(1)
            a, b, c = self._matrices
            begin = time.process_time()
            torch.mm(a, b, out=c)
            self.mm_samples.append(2 * 2048**3 / (time.process_time() - begin))

    @property
    def fma(self) -> float | None:
        return max(self.fma_samples, default=None)

    @property
    def mm(self) -> float:
        return max(self.mm_samples)


def load_step_loop(out: Path) -> bool:
    """Registers torch.ops.elattn_bench; False without a compiler."""
    root = Path(torch.__file__).parent
    includes = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    path = compile_shared("step_loop.cpp", out, "-O2", *includes, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
    if path is None:
        return False
    torch.ops.load_library(str(path))
    return True


def describe() -> dict[str, Any]:
    """Processor, versions, and the load that others put on the machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "elattn": elattn.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
