"""Part (c): how fast a token is decoded and how large the state is, by the length of the context.

Computing a context of 131,072 tokens by softmax attention takes minutes, so the keys and values of softmax layers are
filled with random numbers and the position is set; a linear layer's state comes from a short prompt, as its size and
the work of a step do not depend on the position. What computing such a context costs is measured by itself.
"""

import functools
import statistics
import warnings
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.paper import checks
from benchmarks.paper.presets import Decode
from benchmarks.paper.turns import seconds, take_turns
from elattn.models import ELAConfig, ELATransformer
from elattn.models.state import state_bytes

State = list[Tensor]

FULL_ATTENTION, HYBRID, PURE, RECOMMENDED = "FA-GPT", "hybrid 3:1", "ELA-GPT", "recommended"
PROMPT = 64  # tokens that a linear state has taken in
# Operators that count as work; the rest of a step is overhead.
WORK = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::mv",
    "aten::addmv",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "elattn::grouped_linear",
    "elattn::attention_step",
)


def configs(paper_size: bool) -> dict[str, ELAConfig]:
    """The paper's model with each kind of attention, and with what we recommend."""
    sizes = {} if paper_size else {"vocab_size": 64, "d_model": 32, "num_heads": 2, "d_hidden": 16}
    paper = ELAConfig.paper(**sizes)
    mixture = {name: getattr(paper, name) for name in ("num_experts", "top_k", "moe_bias", "d_hidden")}
    return {
        FULL_ATTENTION: ELAConfig.paper(attention="softmax", **sizes),
        HYBRID: ELAConfig.paper(full_attention_every=4, **sizes),
        PURE: paper,
        RECOMMENDED: ELAConfig.recommended(**(sizes | mixture)),
    }


def build_models(paper_size: bool) -> dict[str, ELATransformer]:
    """The models of `configs`, checked."""
    made = {}
    for name, config in configs(paper_size).items():
        torch.manual_seed(0)
        made[name] = ELATransformer(config)
        checks.assert_decodes(made[name])
    return made


def measure(sizes: Decode, paper_size: bool, console: Console) -> dict[str, Any]:
    models = build_models(paper_size)
    threads = torch.get_num_threads()
    result: dict[str, Any] = {"threads": threads, "contexts": [], "profile": []}
    for context in sizes.contexts:
        rows = by_context(models, context, sizes)
        result["contexts"] += rows
        said = ", ".join(f"{r['model']} {r['tokens_per_second']:,.0f} tokens/s {r['state_bytes']:,} B" for r in rows)
        console.print(f"context {context:,}: {said}", highlight=False)
    result["prefill"] = prefill(models, sizes)
    for row in result["prefill"]:
        console.print(f"prefill of {row['tokens']:,}: {row['model']} {row['seconds']:.1f} s", highlight=False)
    for name in (PURE, RECOMMENDED):
        result["profile"] += profile(name, models[name], sizes.profile_steps)
    for row in result["profile"]:
        console.print(
            f"step of {row['model']}, {row['how']}: {row['microseconds']:.0f} µs, {row['share']:.0%} outside matrix "
            "products and attention",
            highlight=False,
        )
    return result


@torch.no_grad()
def state_at(model: ELATransformer, context: int, room: int) -> State:
    """A state with `context` tokens before it and space for `room` more; see the head of this file."""
    prompt = torch.randint(model.config.vocab_size, (1, min(PROMPT, context)))
    _, state = model.prefill(prompt, model.new_state(1, context + room))
    for tensor in state:
        if _is_cache(tensor):
            tensor.normal_()
    _set_position(state, context)
    return state


def _is_cache(tensor: Tensor) -> bool:
    """Whether these are keys or values of a softmax layer, (B, Hkv, capacity, D)."""
    return tensor.dim() == 4


def _set_position(state: State, position: int) -> None:
    for tensor in state:
        if tensor.dtype == torch.int64:
            tensor.fill_(position)


def _keeps_cache(model: ELATransformer) -> bool:
    return any(model.config.is_softmax(layer) for layer in range(model.config.num_layers))


def by_context(models: dict[str, ELATransformer], context: int, sizes: Decode) -> list[dict[str, Any]]:
    """Greedy decoding at batch 1 of `sizes.tokens` tokens, each round from the same position on."""
    models = {n: model for n, model in models.items() if context <= sizes.longest_cache or not _keeps_cache(model)}
    states = {name: state_at(model, context, sizes.tokens) for name, model in models.items()}
    calls = {name: functools.partial(_decode, models[name], states[name], context, sizes.tokens) for name in models}
    samples = take_turns(calls, sizes.rounds)
    return [
        {
            "model": name,
            "context": context,
            "tokens_per_second": sizes.tokens / min(samples[name]),
            "median_tokens_per_second": sizes.tokens / statistics.median(samples[name]),
            "state_bytes": state_bytes(states[name], context),
            "samples": samples[name],
        }
        for name in models
    ]


def _decode(model: ELATransformer, state: State, context: int, tokens: int) -> None:
    _set_position(state, context)
    token = torch.zeros(1, dtype=torch.long)
    for _ in range(tokens):
        token = model.step(token, state).argmax(-1)


def prefill(models: dict[str, ELATransformer], sizes: Decode) -> list[dict[str, Any]]:
    """Seconds to the first token after a prompt of `sizes.prefill` tokens: the best of the rounds, one with softmax."""
    rows = []
    for name, model in models.items():
        ids = torch.randint(model.config.vocab_size, (1, sizes.prefill))
        rounds = 1 if _keeps_cache(model) else sizes.prefill_rounds
        model.generate(ids[:, :256], 1, temperature=0)
        samples = [seconds(functools.partial(model.generate, ids, 1, temperature=0)) for _ in range(rounds)]
        rows.append({"model": name, "tokens": sizes.prefill, "seconds": min(samples), "samples": samples})
    return rows


def profile(name: str, model: ELATransformer, steps: int) -> list[dict[str, Any]]:
    """Where the time of a step at batch 1 goes, in Python and as TorchScript.

    The operators' own time comes from the profiler, which slows down what lies between them; so the share outside is
    taken from the time without it. What a matrix product takes is next to unaffected.
    """
    rows = []
    # Scripting warns that it is deprecated; it is what C++ loads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(model)
    for how, module in (("eager", model), ("TorchScript", scripted)):
        state = state_at(model, PROMPT, 2)
        run = functools.partial(_decode, module, state, PROMPT, steps)
        wall = min(take_turns({how: run}, 5)[how]) / steps
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
            run()
        microseconds = {e.key: e.self_cpu_time_total / steps for e in profiler.key_averages()}
        work = sum(microseconds.get(operator, 0.0) for operator in WORK)
        others = sorted(microseconds.items(), key=lambda item: -item[1])
        rows.append(
            {
                "model": name,
                "how": how,
                "microseconds": wall * 1e6,
                "work_microseconds": work,
                "share": max(0.0, 1 - work / (wall * 1e6)),
                "largest": [(op, value) for op, value in others if op not in WORK][:8],
            }
        )
    return rows
