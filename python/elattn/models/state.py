"""States of a model as values and files: fork, save, load (docs/generation.md)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from elattn._files import write_file
from elattn.models.config import ELAConfig
from elattn.ops import state_fields

if TYPE_CHECKING:
    from elattn.models.transformer import ELATransformer

__all__ = ["fork_state", "kv_cache_bytes", "load_state", "save_state", "state_bytes"]

_FORMAT = "elattn-state-1"


def fork_state(state: list[Tensor], copies: int = 1) -> list[Tensor]:
    """A state of its own for each of several continuations: row b of `state` becomes rows b * copies and following.

    Every tensor is copied, so that steps with the one do not touch the other.

    Raises:
        ValueError: copies is not positive.
    """
    if copies < 1:
        raise ValueError(f"fork_state: copies must be positive (got {copies})")
    return [tensor.repeat_interleave(copies, 0) for tensor in state]


def save_state(model: ELATransformer, path: str | Path, state: list[Tensor]) -> None:
    """See `ELATransformer.save_state`.

    A safetensors file with the tensors under `model.state_names()`, keys and values only as far as there are tokens,
    and as metadata: `format`, `config` (JSON), `config_hash`, `kernel`, `layout` (the fields of a linear state, in
    memory order), `tokens` (how many each sequence has seen), `capacity` and `crc32` of the tensors' bytes.
    """
    model._check_state(state, state[0].size(0) if state else 0)
    named = dict(zip(model.state_names(), state, strict=True))
    tokens = named["layers.0.attention.position"].tolist()
    capacity = max((x.size(2) for name, x in named.items() if _is_cache(name)), default=0)
    used = max(tokens, default=0)
    tensors = {
        name: (x[:, :, :used] if _is_cache(name) else x).detach().cpu().contiguous() for name, x in named.items()
    }
    metadata = {
        "format": _FORMAT,
        "config": model.config.to_json(),
        "config_hash": model.config.hash(),
        "kernel": model.config.kernel,
        "layout": " ".join(state_fields(model.config.kernel)),
        "tokens": json.dumps(tokens),
        "capacity": str(capacity),
    }
    metadata["crc32"] = _checksum(metadata, tensors)
    write_file(path, safetensors.torch.save(tensors, metadata))


def load_state(model: ELATransformer, path: str | Path, capacity: int | None = None) -> list[Tensor]:
    """See `ELATransformer.load_state`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no state file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no state file, or is damaged ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is no state file that this version reads: its format is {metadata.get('format')!r}")
    if metadata.get("crc32") != _checksum(metadata, tensors):
        raise ValueError(f"{path} is damaged: its checksum is not the one it was written with")
    if metadata["config_hash"] != model.config.hash():
        raise ValueError(f"the state in {path} is of another model: {_difference(metadata['config'], model.config)}")

    tokens: list[int] = json.loads(metadata["tokens"])
    most = max(tokens, default=0)
    capacity = int(metadata["capacity"]) if capacity is None else capacity
    state = model.new_state(len(tokens), capacity)
    names = model.state_names()
    if set(names) != set(tensors):
        other = sorted(set(names) ^ set(tensors))
        raise ValueError(f"the state in {path} is of another model: only one of the two has {other[0]}")
    for name, room in zip(names, state, strict=True):
        if _is_cache(name):
            if most > capacity:
                raise ValueError(f"the state in {path} holds {most} tokens, more than the capacity {capacity}")
            room = room[:, :, :most]
        saved = tensors[name]
        if saved.shape != room.shape or saved.dtype != room.dtype:
            raise ValueError(
                f"the state in {path} is of another model: {name} is {saved.dtype} {list(saved.shape)}, "
                f"this model's is {room.dtype} {list(room.shape)}"
            )
        room.copy_(saved)
    return state


def state_bytes(state: list[Tensor], tokens: int) -> int:
    """Bytes of a state after `tokens` tokens, without the room that softmax layers have for more."""
    # Keys and values (B, Hkv, capacity, D) are the only tensors of four dimensions.
    parts = (tensor[:, :, :tokens] if tensor.dim() == 4 else tensor for tensor in state)
    return sum(part.numel() * part.element_size() for part in parts)


def kv_cache_bytes(config: ELAConfig, tokens: int) -> int:
    """Bytes of keys and values in float32 if every layer were softmax."""
    kv_heads = config.num_kv_heads or config.num_heads
    return 2 * 4 * config.num_layers * kv_heads * (config.d_model // config.num_heads) * tokens


def _is_cache(name: str) -> bool:
    """Whether a tensor (B, Hkv, capacity, D) has a place for each token."""
    return name.endswith((".keys", ".values"))


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """CRC-32 of all metadata but itself, and of all tensors."""
    facts = {key: value for key, value in metadata.items() if key != "crc32"}
    crc = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _difference(config: str, own: ELAConfig) -> str:
    """The first field in which two configurations differ, in words."""
    theirs, ours = json.loads(config), json.loads(own.to_json())
    for name in ours:
        if theirs.get(name) != ours[name]:
            return f"{name} is {theirs.get(name)!r} there, and {ours[name]!r} in this model"
    return f"its configuration has {', '.join(sorted(set(theirs) - set(ours)))}"
