"""Trains a small language model on real text, and serves it from Python and from C++ (`make demo`).

Its only mixing of tokens is `elattn.attention`. Every number printed is computed in this run.
"""

import argparse
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elattn.data import load_corpus
from elattn.errors import UserError
from elattn.models import ELAConfig, ELATransformer, export_torchscript
from elattn.models.state import kv_cache_bytes, state_bytes
from elattn.testing import assert_causal, assert_mixes_tokens
from elattn.train import Interrupted, TrainConfig, load_model, train

MODEL = ELAConfig.recommended(vocab_size=256, d_model=128, d_hidden=256)
NEW_TOKENS = 200
LONGER = 100  # the long context is so many times that of training

console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="text, folder or JSON-lines (default: Python's documentation topics)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo writes")
    parser.add_argument("--steps", type=int, default=800, help="updates of the weights")
    parser.add_argument("--generate-binary", type=Path, help="the C++ program examples/cpp/generate")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted demo")
    options = parser.parse_args()
    try:
        return run(options)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        arguments = [a for a in sys.argv if a != "--resume"]
        print(f"demo: {stop}. To go on: {shlex.join([sys.executable, *arguments, '--resume'])}", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    try:
        config = TrainConfig(data=options.data, steps=options.steps)
    except ValueError as error:
        raise UserError(str(error)) from None

    heading("1. Train")
    result = train(MODEL, config, options.out, resume=options.resume, overwrite=not options.resume, console=console)
    model = load_model(options.out)
    corpus = load_corpus(config.data, held_out=config.held_out, cache=options.out / "cache")
    held_out = torch.from_numpy(corpus.held_out.tokens.copy())  # bytes
    sample = held_out[None, :64].long()
    assert_causal(model, sample)
    assert_mixes_tokens(model, sample)
    console.print("Checked: no prediction sees a later byte, and every byte reaches later predictions.")

    heading("2. Generate by the recurrent decode")
    prompt = prompt_from(held_out)
    ids = torch.tensor([list(prompt)])
    sampled = model.generate(ids, 2 * NEW_TOKENS, 0.7, generator=torch.Generator().manual_seed(0))
    print_continued(prompt, sampled[0, ids.size(1) :].tolist())
    contexts = {n: decode(model, held_out, n) for n in (config.context, LONGER * config.context)}

    heading("3. Generate in C++, without Python")
    exported = options.out / "model.pt"
    export_torchscript(model, exported)
    console.print(f"TorchScript: {exported} ({exported.stat().st_size:,} bytes)")
    expected = model.generate(ids, NEW_TOKENS, temperature=0)[0, ids.size(1) :].tolist()
    same = None
    if options.generate_binary is None:
        console.print("No C++ program was named (--generate-binary), so this part is left out.")
    else:
        same = continue_in_cpp(options.generate_binary, exported, ids[0].tolist()) == expected
        print_continued(prompt, expected)
        console.print(
            f"C++ continues the prompt with the same {NEW_TOKENS} tokens as Python: {'yes' if same else 'NO'}"
        )

    heading("Summary")
    summary = Table.grid(padding=(0, 2))
    summary.add_row("held-out text", f"{result.bits_per_byte:.3f} bits per byte")
    summary.add_row("  bigram model", f"{result.bigram:.3f}")
    summary.add_row("  unigram model", f"{result.unigram:.3f}")
    summary.add_row("training", f"{result.tokens_per_second:,.0f} tokens/s")
    for length, (rate, size) in contexts.items():
        summary.add_row(
            f"decode after {length:,} tokens",
            f"{rate:,.0f} tokens/s, state {size:,} bytes (a KV cache: {kv_cache_bytes(MODEL, length):,})",
        )
    summary.add_row("C++ = Python", {True: "yes, token by token", False: "NO", None: "not tried"}[same])
    summary.add_row("written", f"{options.out / 'loss.png'}, {options.out / 'best'}, {exported}")
    console.print(summary)
    return 1 if same is False else 0


def heading(title: str) -> None:
    console.print(f"\n[bold cyan]{title}[/bold cyan]")


def print_continued(prompt: bytes, tokens: list[int]) -> None:
    console.print(Text(prompt.decode(), "bold") + Text(bytes(tokens).decode(errors="replace"), "none"), soft_wrap=True)


def prompt_from(held_out: torch.Tensor, length: int = 64) -> bytes:
    """The beginning of the first held-out paragraph of prose; does not end inside a character."""
    data = bytes(held_out.tolist())
    prose = re.search(rb"\n\n(?=[A-Z][a-z]+ [a-z]+ )", data)
    start = prose.end() if prose else 0
    return data[start : start + length].decode(errors="ignore").encode()


@torch.no_grad()
def decode(model: ELATransformer, held_out: torch.Tensor, context: int) -> tuple[float, int]:
    """Tokens/s of the greedy decode after `context` tokens of held-out text, repeated as needed, and bytes of state."""
    ids = held_out.repeat(math.ceil(context / held_out.numel()))[None, :context].long()
    logits, state = model.prefill(ids, model.new_state(1))
    token = logits[:, -1].argmax(-1)
    began = time.perf_counter()
    for _ in range(NEW_TOKENS):
        token = model.step(token, state).argmax(-1)
    rate = NEW_TOKENS / (time.perf_counter() - began)
    return rate, state_bytes(state, context)


def continue_in_cpp(binary: Path, exported: Path, ids: list[int]) -> list[int]:
    """The tokens with which the C++ program continues `ids`."""
    command = [str(binary), str(exported), ",".join(map(str, ids)), str(NEW_TOKENS), "--ids"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise UserError(f"cannot run {binary}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"{binary} failed: {error.stderr.strip()}") from None
    console.print(f"C++: {done.stderr.strip()}")
    return [int(token) for token in done.stdout.strip().split(",")]


if __name__ == "__main__":
    sys.exit(main())
