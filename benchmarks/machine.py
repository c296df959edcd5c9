"""The machine: what it is, what its core or its GPU could do at most, clocks, and the memory that a call takes."""

import ctypes
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import elattn
from benchmarks import registry

if TYPE_CHECKING:
    from benchmarks.measure import Row

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


# What keep_pages does, as variables in the environment of a program that is about to start.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}


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


class PeakGpuMemory:
    """The same for the GPU's memory."""

    grown: int | None = None

    def __enter__(self) -> "PeakGpuMemory":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self.grown = torch.cuda.max_memory_allocated() - self._before


def seconds(work: Callable[[], Any], clock: str) -> float:
    """How long `work` takes by a clock of `registry.Case`."""
    if clock == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    work()
    return now() - start


def launches(call: Callable[[], Any]) -> int | None:
    """Kernels that a call starts on the GPU; None where PyTorch's profiler does not see them."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    if ProfilerActivity.CUDA not in supported_activities():
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events()) or None


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

    columns = ("of FMA peak", "of mm")

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

    def fractions(self, row: "Row") -> tuple[float | None, float | None]:
        """What a row reaches of them; they count the arithmetic of linear attention and one thread."""
        if row.run.peer in (registry.NO_OP, registry.SDPA) or row.run.threads != 1:
            return None, None
        return row.flops / self.fma if self.fma else None, row.flops / self.mm

    def __str__(self) -> str:
        peak = "not measured (no C++ compiler)" if self.fma is None else f"{self.fma / 1e9:.0f} GFLOP/s"
        return f"FMA peak of one core {peak}; `torch.mm` of 2048 x 2048 {self.mm / 1e9:.0f} GFLOP/s"

    def results(self) -> dict[str, Any]:
        return {
            "fma_peak": self.fma,
            "fma_samples": self.fma_samples,
            "mm": self.mm,
            "mm_samples": self.mm_samples,
        }


class GpuCeilings:
    """The rates of a copy in the GPU's memory, byte/s, and of torch.mm in bfloat16, flop/s: the best of the run."""

    columns = ("of bandwidth", "of mm")
    _COPY, _SIZE = 1 << 28, 8192

    def __init__(self) -> None:
        self.bandwidth_samples: list[float] = []
        self.mm_samples: list[float] = []

    def sample(self, mm: bool = True) -> None:
        # Allocated anew, so that nothing is taken from the cases between.
        a, b = (torch.empty(self._COPY, dtype=torch.uint8, device="cuda") for _ in range(2))
        self.bandwidth_samples.append(2 * self._COPY / min(seconds(lambda: b.copy_(a), "cuda") for _ in range(5)))
        if mm:
            x = torch.randn(self._SIZE, self._SIZE, dtype=torch.bfloat16, device="cuda")
            best = min(seconds(lambda: torch.mm(x, x), "cuda") for _ in range(3))
            self.mm_samples.append(2 * self._SIZE**3 / best)

    @property
    def bandwidth(self) -> float:
        return max(self.bandwidth_samples)

    @property
    def mm(self) -> float:
        return max(self.mm_samples)

    def fractions(self, row: "Row") -> tuple[float | None, float | None]:
        """What a row reaches of them, counting the traffic and the arithmetic that linear attention needs."""
        if row.run.peer == registry.SDPA:
            return None, None
        return row.run.traffic / row.ns * 1e9 / self.bandwidth, row.flops / self.mm

    def of_bound(self, row: "Row") -> float:
        """The time that the nearer of the two allows over the time taken."""
        return max(self.fractions(row))

    def __str__(self) -> str:
        return (
            f"Copy in the GPU's memory {self.bandwidth / 1e9:,.0f} GB/s; `torch.mm` of {self._SIZE} x {self._SIZE} in "
            f"bfloat16 {self.mm / 1e12:.0f} TFLOP/s"
        )

    def results(self) -> dict[str, Any]:
        return {
            "bandwidth": self.bandwidth,
            "bandwidth_samples": self.bandwidth_samples,
            "mm": self.mm,
            "mm_samples": self.mm_samples,
        }


def load_step_loop(out: Path) -> bool:
    """Registers torch.ops.elattn_bench; False without a compiler."""
    root = Path(torch.__file__).parent
    includes = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    path = compile_shared("step_loop.cpp", out, "-O2", *includes, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
    if path is None:
        return False
    torch.ops.load_library(str(path))
    return True


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, versions, and the load that others put on the machine."""
    gpu = {}
    if device == "cuda":
        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        }
    return gpu | {
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
