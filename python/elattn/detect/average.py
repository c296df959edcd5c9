"""Averaged weights."""

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average:
    """The exponential moving average of a model's weights and statistics, in a model of its own.

    After n updates the older average keeps min(keep, (1 + n) / (10 + n)), so that the initial weights are soon
    forgotten.
    """

    def __init__(self, model: nn.Module, average: nn.Module, keep: float) -> None:
        self.model, self.keep, self.updates = average.eval().requires_grad_(False), keep, 0
        self.pairs = [
            (mine, value)
            for mine, value in zip(self._tensors(average), self._tensors(model), strict=True)
            if mine.is_floating_point()
        ]
        average.load_state_dict(model.state_dict())

    def update(self) -> None:
        self.updates += 1
        keep = min(self.keep, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_([mine for mine, _ in self.pairs], [value for _, value in self.pairs], 1 - keep)

    @staticmethod
    def _tensors(model: nn.Module) -> list[Tensor]:
        return [*model.parameters(), *model.buffers()]
