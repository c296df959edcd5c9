"""`elattn generate`."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from elattn.data import ByteTokenizer, decode_stream, load_tokenizer
from elattn.errors import UserError
from elattn.models import ELATransformer
from elattn.models.generation import Sampling, sample
from elattn.train import load_model, select_device

__all__ = ["generate", "until"]


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a training run or of a saved model.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; by default what comes on stdin.")] = None,
    new_tokens: Annotated[int, typer.Option(min=0, help="Most tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest of this total probability.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: fewer repetitions.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    state_in: Annotated[Path | None, typer.Option(help="State file of a conversation to go on with.")] = None,
    state_out: Annotated[Path | None, typer.Option(help="File for the state after the last token.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default what is there.")] = None,
) -> None:
    """Continue a text: the continuation goes to stdout as it comes, the speed to stderr."""
    stops = stop or []
    if "" in stops:
        raise UserError("--stop must not be empty")
    if state_out is not None and not state_out.parent.is_dir():
        raise UserError(f"cannot write {state_out}: there is no folder {state_out.parent}")
    target = select_device(device)
    model, tokenizer = load_model(run).to(target), load_tokenizer(run)
    if isinstance(tokenizer, ByteTokenizer) and model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{run} has no tokenizer.json, and the model has {model.config.vocab_size} tokens, not 256 bytes"
        )
    text = _stdin() if prompt is None else prompt
    try:
        model.config.require_vocabulary(tokenizer.vocab_size)
        ids = torch.tensor([tokenizer.encode(text)], dtype=torch.long, device=target)
        if ids.size(1) == 0:
            raise UserError("the prompt must have at least one token")
        generator = torch.Generator(target).manual_seed(seed)
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            generator=generator,
        )
        state = _state(model, state_in, ids.size(1) + new_tokens)
        began = time.perf_counter()
        logits, state = _read(model, ids, state)
        read = time.perf_counter()
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text") from None
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None
    count = 0

    def new_ids() -> Iterator[int]:
        nonlocal count
        for token in _continue(model, ids, logits, state, new_tokens, sampling, tokenizer.eos_id):
            count += 1
            yield token

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8
    for piece in until(decode_stream(tokenizer, new_ids()), stops):
        sys.stdout.write(piece)
        sys.stdout.flush()
    seconds = time.perf_counter() - read
    print()
    print(f"prompt {ids.size(1) / (read - began):,.0f} tokens/s, {count / seconds:,.0f} tokens/s", file=sys.stderr)
    if state_out is not None:
        model.save_state(state_out, state)


def until(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    """`pieces` up to the first of `stops`. What may be the beginning of one is held back until that is known."""
    text = ""
    for piece in pieces:
        text += piece
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            yield text[: min(found)]
            return
        held = max((_overlap(text, stop) for stop in stops), default=0)
        if len(text) > held:
            yield text[: len(text) - held]
            text = text[len(text) - held :]
    if text:
        yield text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("give --prompt, or a text on stdin")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def _state(model: ELATransformer, path: Path | None, more: int) -> list[Tensor]:
    """The state before the prompt, with room for `more` tokens."""
    if path is None:
        return model.new_state(1, more)
    state = model.load_state(path)
    position = state[model.state_names().index("layers.0.attention.position")]
    if position.numel() != 1:
        raise UserError(f"the state in {path} is of {position.numel()} sequences, not of one")
    return model.load_state(path, int(position) + more)


@torch.no_grad()
def _read(model: ELATransformer, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits (1, V) after the last of ids (1, L), those of the others not being formed; and the state."""
    hidden, state = model._prefill_hidden(ids, state, None)
    return model._logits(hidden[:, -1]), state


@torch.no_grad()
def _continue(
    model: ELATransformer,
    ids: Tensor,
    logits: Tensor,
    state: list[Tensor],
    count: int,
    sampling: Sampling,
    eos_id: int | None,
) -> Iterator[int]:
    """New tokens, up to the end token. `state` always includes those that were handed out."""
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    for _ in range(count):
        token = sample(logits, sampling, seen)
        if int(token) == eos_id:
            return
        seen.scatter_(1, token[:, None], True)
        logits = model.step(token, state)
        yield int(token)
