"""A model as files that C++ runs without Python (docs/cpp.md)."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from elattn._files import replacing
from elattn.errors import UserError
from elattn.models.transformer import ELATransformer

__all__ = ["export_aoti", "export_torchscript"]


def export_torchscript(
    model: ELATransformer, path: str | Path, *, byte_level: bool | None = None, eos_id: int | None = None
) -> None:
    """Writes the scripted model, with `forward`, `new_state`, `prefill` and `step`; replaces `path` once complete.

    A program that loads it needs PyTorch's C++ library and libelattn.so, but no Python. The file also holds facts about
    the model, each as text in an extra file (`_extra_files` of `torch.jit.load`): `config.json`, `vocab_size`,
    `byte_level` ("1" or "0"), `eos_id` (empty for None), `elattn_version`, and `fingerprint`, a hash of configuration
    and weights.

    Args:
        model: left as it is.
        path: of the file.
        byte_level: token i < 256 is the byte i, so a program may take and print text; by default, whether vocab_size
            is 256.
        eos_id: the token that ends a text, at which a program stops by default.
    """
    if byte_level is None:
        byte_level = model.config.vocab_size == 256
    facts = _facts(model) | {
        "config.json": model.config.to_json(),
        "byte_level": str(int(byte_level)),
        "eos_id": "" if eos_id is None else str(eos_id),
    }
    with _evaluating(model):
        write_torchscript(model, path, facts)


def write_torchscript(model: nn.Module, path: str | Path, facts: dict[str, str]) -> None:
    """Writes the scripted model with `facts` as extra files; replaces `path` once complete."""
    with replacing(path) as partial, warnings.catch_warnings():
        # What loads in C++ without Python is still TorchScript.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        torch.jit.save(torch.jit.script(model), str(partial), _extra_files=facts)


def origin(model: nn.Module, config: str) -> dict[str, str]:
    """Facts for any file of a model: `elattn_version`, and `fingerprint`, a hash of configuration and weights."""
    import elattn

    digest = hashlib.sha256(config.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {"elattn_version": elattn.__version__, "fingerprint": digest.hexdigest()}


def export_aoti(model: ELATransformer, path: str | Path) -> None:
    """Writes the model's `step`, compiled by AOTInductor, as a package (.pt2); replaces `path` once complete.

    `torch._inductor.aoti_load_package(path)` is a function like `model.step`: it takes ids (B,) and a state, which it
    updates in place, and returns logits (B, vocab_size), for any B and capacity. The state comes from `new_state` and
    `prefill` of the model, or of its TorchScript file. In C++ `AOTIModelPackageLoader` takes [ids, *state]. The package
    has the weights in it, and machine code for the instruction set of the CPU on which it was made. It does not check
    its arguments: ids outside of the vocabulary, a state of another size or a full cache end the program or worse.

    Its metadata (`get_metadata()`) has `vocab_size`, `elattn_version` and `fingerprint`, as the TorchScript file.

    Raises:
        UserError: there is no working C++ compiler, or it fails.
    """
    from torch._inductor.exc import InductorError  # here, because it takes a second

    # Two sequences in the example, with room for two tokens: a size of one would be taken for a constant.
    ids = torch.zeros(2, dtype=torch.long, device=model.embedding.weight.device)
    state = model.new_state(2, 2)
    batch, capacity = torch.export.Dim("batch", min=1), torch.export.Dim("capacity", min=1)
    state_shapes = [
        {0: batch} | {i: capacity for i, size in enumerate(shape, 1) if size < 0} for shape in model.state_shapes
    ]
    configs = {
        "aot_inductor.metadata": _facts(model),
        # What is compiled is elementwise work on (B, d_model), too little to share among threads. Matrix products and
        # attention are calls into PyTorch and elattn, with as many threads as the program that loads the package has.
        "cpp.threads": 1,
    }
    with _evaluating(model), replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # PyTorch's, to itself
        program = torch.export.export(_Step(model), (ids, state), dynamic_shapes=({0: batch}, state_shapes))
        try:
            # A file object, because a path would have to end in .pt2.
            with partial.open("wb") as file:
                torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=configs)
        except InductorError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"the step cannot be compiled ({reason}): install g++, or name a compiler in CXX"
            ) from error


class _Step(nn.Module):
    """`model.step` as the `forward` that `torch.export` asks for."""

    def __init__(self, model: ELATransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, state: list[Tensor]) -> Tensor:
        return self.model.step(ids, state)


def _facts(model: ELATransformer) -> dict[str, str]:
    return {"vocab_size": str(model.config.vocab_size)} | origin(model, model.config.to_json())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
