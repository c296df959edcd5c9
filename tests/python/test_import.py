"""`import elattn` is cheap and leaves the models alone; a library that does not load is an ImportError."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import elattn
from elattn import _library

CODE = """
import json, sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import elattn
seconds = time.perf_counter() - start
loaded = sorted(name for name in set(sys.modules) - before if name.startswith("elattn"))
print(json.dumps([seconds, loaded]))
"""


@pytest.fixture(scope="module")
def imports() -> list[tuple[float, list[str]]]:
    """Three processes: seconds that the import takes after `import torch`, and the modules that it loads."""
    runs = [subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(3)]
    return [tuple(json.loads(run.stdout)) for run in runs]


def test_import_adds_less_than_50_ms_to_torch(imports: list[tuple[float, list[str]]]) -> None:
    times = [seconds for seconds, _ in imports]
    assert statistics.median(times) < 0.05, times


def test_import_loads_only_the_operators(imports: list[tuple[float, list[str]]]) -> None:
    assert imports[0][1] == ["elattn", "elattn._library", "elattn.ops"]


def test_submodules_load_when_used() -> None:
    assert elattn.nn.ExactLinearAttention.__module__ == "elattn.nn.attention"
    assert set(elattn.__all__) <= set(dir(elattn))
    assert all(getattr(elattn, name) is not None for name in elattn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        elattn.nothing  # noqa: B018


def test_libraries_that_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    for path, message in [
        (tmp_path / "none.so", "does not exist.*pip install"),
        (damaged, "does not load with PyTorch"),
    ]:
        monkeypatch.setenv("ELATTN_LIBRARY", str(path))
        with pytest.raises(ImportError, match=message):
            _library.load()
