"""Which kernels the tests run: those for the CPU, those for a GPU, or the latter in emulation."""

import os

import pytest
import torch

# "emulation": ELATTN_LIBRARY is a build whose operators on CPU tensors are the CUDA kernels (tests/cuda_operators).
BACKEND = os.environ.get("ELATTN_TEST_BACKEND", "cpu")
assert BACKEND in ("cpu", "cuda", "emulation"), f"ELATTN_TEST_BACKEND must be cpu, cuda or emulation (got {BACKEND})"

DEVICE = torch.device("cuda" if BACKEND == "cuda" else "cpu")

# Makes a GPU test that is skipped fail, so that a machine with a GPU cannot pass by skipping.
REQUIRE_GPU = os.environ.get("ELATTN_REQUIRE_GPU", "0") == "1"

CPU_CONTRACT = pytest.mark.skipif(BACKEND != "cpu", reason="promised for the CPU kernels only")


def missing_gpu() -> str | None:
    """Why the tests for a GPU cannot run; None if they can."""
    import elattn  # noqa: F401  (loads the operators)

    if BACKEND != "cuda":
        return "ELATTN_TEST_BACKEND is not cuda"
    if not torch.cuda.is_available():
        return "no GPU that this PyTorch can use"
    if not torch.ops.elattn._has_cuda():
        return "this build of elattn has no CUDA operators"
    return None
