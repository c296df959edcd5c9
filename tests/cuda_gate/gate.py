"""Compiles the CUDA kernels and compares registers and instructions with budget.json.

No GPU is needed, only nvcc; without it the gate says so and passes. The rules for the text of device code are checked
in any case.

    python tests/cuda_gate/gate.py [FILE...] [--arch sm_80,sm_90] [--jobs N] [--print]

FILEs are keys of the budget; by default all of them. ``--print`` shows what was measured.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cubin
import sources

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
# As the library is compiled (CMakeLists.txt, csrc/cmake/elattnCuda.cmake).
_FLAGS = ["-std=c++20", "-O3", f"-I{_ROOT}", f"-I{_ROOT / 'csrc'}"]
_PTX = "compute_80"
_PROBE = "tests/cuda_gate/probe.cu"


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def _readable(mangled: list[str]) -> dict[str, str]:
    """``forward_kernel<Features<float>>`` for the kernels' mangled names."""
    output = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for name, text in zip(mangled, output.splitlines(), strict=True):
        text = re.sub(r"\b(elattn|cuda|_GLOBAL__N__\w+)::|\(anonymous namespace\)::", "", text)
        text = text.replace(" >", ">").removeprefix("void ")
        depth, end = 0, len(text)
        for i, c in enumerate(text):  # up to the parameters, which follow the template's arguments
            depth += {"<": 1, ">": -1}.get(c, 0)
            if c == "(" and depth == 0:
                end = i
                break
        names[name] = text[:end]
    return names


def _compile(nvcc: str, source: str, archs: list[str]) -> dict[str, dict[str, Counter[str]]]:
    """What is known of each kernel of a file, by architecture and its readable name."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"--generate-code=arch={_PTX},code=[{','.join(archs)}]"
        out = ["-c", "--keep", f"--keep-dir={folder}", "-o", f"{folder}/kernels.o"]
        run = subprocess.run(
            [nvcc, *_FLAGS, code, "-Xptxas", "-v", *out, str(_ROOT / source)], capture_output=True, text=True
        )
        if run.returncode != 0:
            raise SystemExit(f"{source} does not compile:\n{run.stdout}{run.stderr}")
        files = {arch: next(Path(folder).glob(f"*.{arch}.cubin")) for arch in archs}
        found = {arch: cubin.instructions(file) for arch, file in files.items()}
    counts: dict[str, Counter[str]] = {}
    kernel = ""
    for line in run.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel, counts = match[1], found[match[2]]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            counts[kernel]["stack"] = int(match[1])
        elif match := re.search(r"Used (\d+) registers", line):
            counts[kernel]["registers"] = int(match[1])
            if static := re.search(r"(\d+) bytes smem", line):
                counts[kernel]["static_shared"] = int(static[1])
    names = _readable(list(found[archs[0]]))
    return {arch: {names[kernel]: facts for kernel, facts in kernels.items()} for arch, kernels in found.items()}


def _compare(where: str, facts: Counter[str], budget: dict[str, Any]) -> list[str]:
    problems = []
    for key, limit in budget.get("at_most", {}).items():
        if facts[key] > limit:
            problems.append(f"{where}: {key} is {facts[key]}, at most {limit} allowed")
    for key, value in budget.get("exactly", {}).items():
        if facts[key] != value:
            problems.append(f"{where}: {key} is {facts[key]}, must be {value}")
    return problems


def _check(source: str, arch: str, kernels: dict[str, Counter[str]], budget: dict[str, Any]) -> list[str]:
    """The first pattern that a kernel's name matches is its budget, over the defaults of the file's kernels."""
    problems = []
    patterns = budget["files"][source]
    used = set()
    for name, facts in sorted(kernels.items()):
        where = f"{source}, {arch}, {name}"
        pattern = next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
        if pattern is None:
            problems.append(f"{where}: has no budget")
            continue
        used.add(pattern)
        defaults = budget["defaults"] | (budget["defaults_without_double"] if "double" not in name else {})
        own = patterns[pattern]
        problems += _compare(where, facts, {"at_most": defaults | own.get("at_most", {})})
        problems += _compare(where, facts, {"exactly": own.get("exactly", {})})
    problems += [f"{source}, {arch}: no kernel is called {p}" for p in patterns if p not in used]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the compiled kernels with their budget.")
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--arch", default="sm_80,sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--print", action="store_true", dest="show")
    options = parser.parse_args()

    problems = sources.problems(_ROOT)
    budget = json.loads((_HERE / "budget.json").read_text())
    compiled = {path.relative_to(_ROOT).as_posix() for path in _ROOT.glob("cuda/**/*.cu")}
    problems += [f"{source}: has no budget" for source in sorted(compiled - set(budget["files"]))]
    nvcc = _nvcc()
    if nvcc is None:
        print("the instruction gate is skipped: nvcc is neither on PATH nor in CUDA_HOME/bin or /usr/local/cuda/bin")
    else:
        files, archs = options.files or list(budget["files"]), options.arch.split(",")
        unknown = [f for f in files if f not in budget["files"]]
        if unknown:
            parser.error(f"not in budget.json: {', '.join(unknown)}")
        for arch, kernels in _compile(nvcc, _PROBE, archs).items():
            if wrong := _compare(f"{_PROBE}, {arch}", kernels["probe"], budget["probe"]):
                sys.exit("cubin.py does not know the instructions of this nvcc:\n" + "\n".join(wrong))
        with ThreadPoolExecutor(options.jobs) as pool:
            for source, measured in zip(files, pool.map(lambda file: _compile(nvcc, file, archs), files), strict=True):
                for arch, kernels in measured.items():
                    problems += _check(source, arch, kernels, budget)
                    for name, facts in sorted(kernels.items()) if options.show else ():
                        print(f"{source}, {arch}, {name}: " + ", ".join(f"{k} {n}" for k, n in sorted(facts.items())))
    kept = "sources" if nvcc is None else "kernels and sources"
    print("\n".join(problems) if problems else f"{kept} keep their rules")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
