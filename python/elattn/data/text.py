"""Text as a tensor of bytes: the vocabulary is 0..255, and bits per byte is loss / ln 2."""

from pathlib import Path

import torch
from torch import Tensor

from elattn.errors import UserError

__all__ = ["ByteBatches", "load_text", "split_text"]


def load_text(path: str | Path | None = None) -> Tensor:
    """The bytes (N,) uint8 of a text file, or of Python's own documentation topics if no path is given.

    Raises:
        UserError: the file is missing, empty or not UTF-8 text.
    """
    if path is None:
        from pydoc_data.topics import topics

        data = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the text {path}: {error.strerror}") from None
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from None
        if "\0" in text:
            raise UserError(f"{path} holds zero bytes: give a plain text file")
        if not text.strip():
            raise UserError(f"{path} is empty: give a text file of at least a few hundred kilobytes")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def split_text(data: Tensor, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """Training text and the contiguous last part of `data`, a share of `held_out`, for validation."""
    end = data.numel() - int(data.numel() * held_out)
    return data[:end], data[end:]


class ByteBatches:
    """Random windows of a text. Batch i depends on the seed and i alone, so training can resume at any step.

    Args:
        data: (N,) uint8, N > length.
        batch_size, length: windows in a batch, and bytes in a window.
        seed: of the positions.
    """

    def __init__(self, data: Tensor, batch_size: int, length: int, seed: int = 0) -> None:
        if data.numel() <= length:
            raise UserError(
                f"the text has {data.numel()} bytes to train on, but one window needs {length + 1}: "
                "give a longer text or a shorter context"
            )
        self.data, self.batch_size, self.length, self.seed = data, batch_size, length, seed

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and the bytes that follow them, both (batch_size, length) int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(self.data.numel() - self.length, (self.batch_size, 1), generator=generator)
        windows = self.data[starts + torch.arange(self.length + 1)].long()
        return windows[:, :-1], windows[:, 1:]
