"""Which kernels the tests run: those for the CPU, those for a GPU, or the latter in emulation."""

import os

import pytest
import torch

# "emulation": ELATTN_LIBRARY is a build whose operators on CPU tensors are the CUDA kernels (tests/cuda_operators).
BACKEND = os.environ.get("ELATTN_TEST_BACKEND", "cpu")
assert BACKEND in ("cpu", "cuda", "emulation"), f"ELATTN_TEST_BACKEND must be cpu, cuda or emulation (got {BACKEND})"

DEVICE = torch.device("cuda" if BACKEND == "cuda" else "cpu")

CPU_CONTRACT = pytest.mark.skipif(BACKEND != "cpu", reason="promised for the CPU kernels only")
