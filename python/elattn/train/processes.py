"""The processes that train together: one alone, or those that torchrun started, and the device of each."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from elattn.errors import UserError

__all__ = ["Processes", "is_first", "join_processes", "select_device"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Processes:
    """Rank and number of the processes, and this one's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def one_after_first(self, function: Callable[[], _Result]) -> _Result:
        """Calls `function` in the first process, then in the others, which find the files that it left.

        Raises:
            UserError: in every process, if one of them raised it.
        """
        if self.size == 1:
            return function()
        results = [self.all(lambda turn=turn: function() if self.first == turn else None) for turn in (True, False)]
        return results[0] if self.first else results[1]  # type: ignore[return-value]

    def all(self, function: Callable[[], _Result]) -> _Result:
        """Calls `function` in every process at once.

        Raises:
            UserError: in every process, if one of them raised it.
        """
        if self.size == 1:
            return function()
        result, error = None, None
        try:
            result = function()
        except UserError as mistake:
            error = str(mistake)
        errors: list[str | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        for message in errors:
            if message is not None:
                raise UserError(message)
        return result  # type: ignore[return-value]


@contextmanager
def join_processes(device: str | None) -> Iterator[Processes]:
    """Joins the processes of torchrun for the duration of the block, unless the program did; alone without torchrun.

    Raises:
        UserError: the device is not available.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(0, 1, select_device(device))
        return
    # Gradients go by nccl on GPUs; flags, losses and messages always by gloo, without waiting for a GPU.
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        processes = Processes(dist.get_rank(), size, torch.device("cpu"))
        selected = processes.all(lambda: _own_device(select_device(device)))
        yield replace(processes, device=selected)
    finally:
        if joined:
            # DistributedDataParallel is part of a cycle of references and keeps the group: a group that outlives the
            # interpreter aborts the process.
            gc.collect()
            dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise UserError(f"process {index} of this machine has no GPU of its own: there are {torch.cuda.device_count()}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def is_first() -> bool:
    """Whether this process is the one that prints: alone, or the first of torchrun."""
    return os.environ.get("RANK", "0") == "0"


def select_device(name: str | None) -> torch.device:
    """The device of a name; for None CUDA if there is a GPU and the library has operators for it, else the CPU.

    Raises:
        UserError: "cuda" is asked for and cannot be had.
    """
    if name == "cpu":
        return torch.device("cpu")
    gpu = torch.cuda.is_available()
    operators: bool = torch.ops.elattn._has_cuda()
    if name is None:
        return torch.device("cuda" if gpu and operators else "cpu")
    if name != "cuda":
        raise UserError(f"the device must be cpu or cuda (got {name!r})")
    if not gpu:
        raise UserError("no GPU that this PyTorch can use: leave out --device cuda")
    if not operators:
        raise UserError("this build of elattn has no CUDA operators: leave out --device cuda")
    return torch.device("cuda")
