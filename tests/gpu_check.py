"""Builds elattn for the GPU of this machine, tests it and times it there: `make gpu-check OUT=folder`.

Uses the Python that runs it with that Python's PyTorch, and downloads nothing. Stages:

    build       the library for this GPU alone, and the tests of the primitives where Catch2 is installed
    primitives  what the kernels are made of, bit for bit as in the emulation (tests/cuda_emulation)
    operators   the tests of the operators on CUDA tensors
    gpu         what only a GPU can show, and models on it (test_cuda.py, test_cuda_models.py)
    bench       benchmarks.run --device cuda
    memcheck    compute-sanitizer on some tests, where it is installed

A stage that fails or runs out of time does not stop the next. OUT/logs has what each printed, OUT/reports the results
of the tests, OUT/bench the measurements. The exit status is 0 if everything passed.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import summary

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "python"
# Those of the Makefile's `cuda_tests`, which also pass in the emulation.
OPERATOR_TESTS = (
    "cuda_kernels", "forward_oracle", "backward_oracle", "decay", "padding_packing", "state", "adversarial",
    "properties", "gradcheck", "grouped_linear",
)  # fmt: skip
GPU_TESTS = ("cuda", "cuda_models")
NEEDS = {"adversarial": ("hypothesis",), "cuda_models": ("numpy", "rich", "safetensors", "typer")}
CUDA_HOMES = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")


@dataclass
class Stage:
    name: str
    seconds: float  # at most
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    has_report: bool = False  # OUT/reports/NAME.xml
    missing: str = ""  # why it cannot run
    optional: bool = False  # whether that is no failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="folder of the build")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations and tests at once")
    parser.add_argument("--minutes", type=float, default=10, help="for all stages together")
    parser.add_argument("--only", help="names of stages, with commas between")
    options = parser.parse_args()
    if problems := missing_tools():
        print("The GPU check cannot run here:", *problems, sep="\n  ", file=sys.stderr)
        return 1

    out = options.out.resolve()
    for folder in ("logs", "reports"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    facts = machine()
    (out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, modules in NEEDS.items():
        if absent := lacking(modules):
            print(f"test_{name}.py is left out: {absent}")

    stages = plan(out, options.build.resolve(), facts["capability"], options.jobs)
    if options.only:
        chosen = options.only.split(",")
        if unknown := set(chosen) - {stage.name for stage in stages}:
            parser.error(f"no stage is called {', '.join(sorted(unknown))}")
        stages = [stage for stage in stages if stage.name in chosen]
    return run(stages, out, time.monotonic() + 60 * options.minutes)


def run(stages: list[Stage], out: Path, deadline: float) -> int:
    results, failed = [], False
    for stage in stages:
        begin = time.monotonic()
        if stage.missing:
            result = f"not run: {stage.missing}"
            failed |= not stage.optional
        else:
            print(f"{stage.name} ...", flush=True)
            result = execute(stage, out / "logs" / f"{stage.name}.log", min(begin + stage.seconds, deadline))
            failed |= result != "passed"
        results.append((stage.name, time.monotonic() - begin, result))
    print(f"\n{'stage':<12}{'seconds':>8}  result")
    for name, seconds, result in results:
        print(f"{name:<12}{seconds:>8.0f}  {result}")
    suites = [stage.name for stage in stages if stage.has_report and not stage.missing]
    if suites:
        failed |= bool(summary.main(out / "reports", suites))
    print(f"{'FAILED' if failed else 'The GPU check passed'}; everything is in {out}")
    return int(failed)


def execute(stage: Stage, log: Path, deadline: float) -> str:
    """Runs the commands of a stage one after the other, to the first that fails."""
    with log.open("w") as stream:
        for command in stage.commands:
            print("$", *command, file=stream, flush=True)
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | stage.environment,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return f"{command[0]}: {error.strerror}"
            try:
                code = process.wait(max(deadline - time.monotonic(), 0))
            except BaseException as stop:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
                if isinstance(stop, subprocess.TimeoutExpired):
                    return f"out of time, see {log}"
                raise
            if code != 0:
                return f"failed with exit code {code}, see {log}"
    return "passed"


def plan(out: Path, build: Path, capability: str, jobs: int) -> list[Stage]:
    import torch

    primitives = build / "tests" / "cuda_emulation" / "gpu" / "cuda_primitives_tests"
    catch2 = has_catch2()
    report = {name: out / "reports" / f"{name}.xml" for name in ("primitives", "operators", "gpu", "memcheck")}
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), *(["-G", "Ninja"] if shutil.which("ninja") else []),
        "-DCMAKE_BUILD_TYPE=Release", "-DELATTN_WITH_CUDA=ON", f"-DELATTN_EMULATE_CUDA={'ON' if catch2 else 'OFF'}",
        f"-DELATTN_TORCH_DIR={Path(torch.__file__).parent}",
    ]  # fmt: skip
    targets = ["elattn", *(["cuda_primitives_tests"] if catch2 else [])]
    python = {
        "ELATTN_LIBRARY": str(build / "libelattn.so"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH")))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    tests = python | {
        "ELATTN_TEST_BACKEND": "cuda",
        "ELATTN_REQUIRE_GPU": "1",
        "OMP_NUM_THREADS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what PyTorch wants for reproducible products
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    several = ["-n", str(max(1, min(jobs, 8)))] if has("xdist") else []
    no_pytest = lacking(["pytest"])

    def files(names: Iterable[str]) -> list[str]:
        return [str(TESTS / f"test_{name}.py") for name in names if not lacking(NEEDS.get(name, ()))]

    sanitizer = tool("compute-sanitizer")
    return [
        Stage(
            "build", 300, [configure, ["cmake", "--build", str(build), "--parallel", str(jobs), "--target", *targets]],
            {"TORCH_CUDA_ARCH_LIST": capability},
        ),
        Stage(
            "primitives", 30, [[str(primitives), "--reporter", "junit", "--out", str(report["primitives"])]],
            has_report=True, missing="" if catch2 else "Catch2 is not installed", optional=True,
        ),
        Stage(
            "operators", 200, [[*pytest, *several, f"--junitxml={report['operators']}", *files(OPERATOR_TESTS)]], tests,
            has_report=True, missing=no_pytest,
        ),
        Stage(
            "gpu", 150, [[*pytest, f"--junitxml={report['gpu']}", *files(GPU_TESTS)]], tests,
            has_report=True, missing=no_pytest,
        ),
        Stage(
            "bench", 180,
            [[sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--out", str(out / "bench")]], python,
            missing=lacking(["numpy", "rich", "typer", "matplotlib"]),
        ),
        Stage(
            "memcheck", 90,
            [[
                sanitizer or "", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "1",
                *pytest, f"--junitxml={report['memcheck']}", str(TESTS / "test_cuda_kernels.py"),
                "-k", "(padding_and_packing and causal) or (dimensions_around_a_tile and 130)",
            ]],
            # Every tensor is an allocation of its own, so that the sanitizer sees where it ends.
            tests | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            has_report=True, missing=no_pytest if sanitizer else "compute-sanitizer is not installed",
            optional=not sanitizer,
        ),
    ]  # fmt: skip


def missing_tools() -> list[str]:
    """A sentence for everything without which nothing can be checked."""
    problems = []
    if not has("torch"):
        problems.append(f"{sys.executable} has no torch; name another Python with PYTHON=")
    else:
        import torch

        if torch.version.cuda is None:
            problems.append(f"the PyTorch of {sys.executable} is built without CUDA")
        elif not torch.cuda.is_available():
            problems.append("there is no GPU that PyTorch can use")
        elif torch.cuda.get_device_capability() < (8, 0):
            problems.append(f"the kernels need compute capability 8.0, {torch.cuda.get_device_name()} has less")
    if not tool("nvcc"):
        problems.append("nvcc is neither on PATH nor in CUDA_HOME/bin or /usr/local/cuda/bin")
    if not shutil.which("cmake"):
        problems.append("cmake is not on PATH")
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++") if name):
        problems.append("there is no C++ compiler on PATH")
    return problems


def machine() -> dict[str, str]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    nvcc = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", nvcc)
    return {
        "GPU": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "nvcc": release[1] if release else "unknown",
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def lacking(modules: Iterable[str]) -> str:
    """A sentence about the modules that this Python has not; empty if it has them all."""
    absent = [module for module in modules if not has(module)]
    return f"{sys.executable} has no {', '.join(absent)}" if absent else ""


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    places = [shutil.which(name), *(shutil.which(name, path=f"{home}/bin") for home in CUDA_HOMES if home)]
    return next(filter(None, places), None)


def has_catch2() -> bool:
    prefixes = ["/usr", "/usr/local", sys.prefix, *os.environ.get("CMAKE_PREFIX_PATH", "").split(os.pathsep)]
    return any((Path(prefix) / "include" / "catch2").exists() for prefix in prefixes if prefix)


if __name__ == "__main__":
    sys.exit(main())
