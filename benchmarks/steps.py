"""The recurrent step: how long one token takes, from Python and from C++, early and late in a sequence."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import elattn
from benchmarks import oracle, peers, registry
from benchmarks.machine import seconds
from benchmarks.registry import Run

if TYPE_CHECKING:
    from benchmarks.measure import Row

TOKENS = 64  # a call steps through as many different ones
Tokens = list[tuple[Tensor, ...]]  # those of q, of k and of v, each (B, H, D)

POSITIONS = (1_000, 10_000, 100_000, 1_000_000)


def prepare(run: Run, row: "Row") -> tuple[Callable[[], Any], int]:
    """Checks TOKENS steps from the empty state, then gives the call that times as many."""
    inputs = oracle.make_inputs(replace(run, length=TOKENS))
    tokens = [x.unbind(2) for x in (inputs.q, inputs.k, inputs.v)]
    if run.peer == registry.NO_OP:
        return _loop(torch.ops.elattn_bench.no_op, tokens, _empty_state(run)), TOKENS

    call = _elattn(run, inputs, tokens) if run.peer.startswith(registry.ELATTN) else _plain(run, tokens)
    checked = replace(run, peer=registry.ELATTN, mode=registry.FORWARD, length=TOKENS)
    row.error, row.limit = oracle.error(checked, inputs, [torch.stack(call(), 2)]), oracle.limit(run)
    if run.peer == registry.ELATTN_CPP:
        state = _empty_state(run)
        return lambda: torch.ops.elattn_bench.step_loop(*tokens, state, 1), TOKENS
    return in_graph(call) if run.peer == registry.ELATTN_GRAPH else call, TOKENS


def in_graph(call: Callable[[], Any]) -> Callable[[], None]:
    """Replays what the call starts on the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda kept=call: graph.replay()  # a graph does not keep the tensors that it reads


def _empty_state(run: Run) -> Tensor:
    return elattn.new_state(run.batch, run.heads, run.head_dim, run.head_dim, device=run.device)


def _elattn(run: Run, inputs: oracle.Inputs, tokens: Tokens) -> Callable[[], list[Tensor]]:
    state = _empty_state(run)
    if run.peer == registry.ELATTN_CPP:
        loop = torch.ops.elattn_bench.step_loop
        return lambda: [loop([q], [k], [v], state, 1) for q, k, v in zip(*tokens, strict=True)]
    if run.decay:
        return _loop(functools.partial(elattn.attention_step, decay=inputs.decay), tokens, state)
    return _loop(elattn.attention_step, tokens, state)


def _loop(step: Callable[..., Any], tokens: Tokens, state: Tensor) -> Callable[[], list[Tensor]]:
    """Steps through the tokens, going on from where the state was left."""
    return lambda: [step(q, k, v, state) for q, k, v in zip(*tokens, strict=True)]


def _plain(run: Run, tokens: Tokens) -> Callable[[], list[Tensor]]:
    step = peers.plain_step if run.peer == registry.PLAIN_STEP else peers.compiled_step(run.head_dim)
    shape = (1, run.heads, run.head_dim)
    empty = torch.zeros(*shape, run.head_dim), torch.zeros(shape), torch.full(shape, float("-inf"))

    def call() -> list[Tensor]:
        outs, state = [], empty
        for q, k, v in zip(*tokens, strict=True):
            out, *state = step(q, k, v, *state)
            outs.append(out)
        return outs

    return call


def by_position(rounds: int, device: str = "cpu") -> dict[int, float]:
    """Seconds of a step (B = 1, H = 8, D = 64) after so many tokens, the best of `rounds`; on a GPU in a graph."""
    run = Run(registry.ELATTN, registry.STEP, 64, 1, device=device)
    inputs = oracle.make_inputs(replace(run, length=10_000))
    state, states = None, {}
    for position in range(10_000, POSITIONS[-1] + 1, 10_000):
        args = (inputs.q, inputs.k, inputs.v)
        if not states:
            _, states[1_000] = elattn.attention(*(x[:, :, :1_000] for x in args), is_causal=True, return_state=True)
        _, state = elattn.attention(*args, is_causal=True, state=state, return_state=True)
        if position in POSITIONS:
            states[position] = state
    tokens = [x[:, :, :TOKENS].unbind(2) for x in args]
    calls = {n: _loop(elattn.attention_step, tokens, states[n]) for n in POSITIONS}
    if device == "cuda":
        return _best({n: in_graph(call) for n, call in calls.items()}, rounds, "cuda")
    return _best(calls, rounds)


def call_overhead(rounds: int) -> float:
    """Seconds by which a step with next to no arithmetic (H = D = Dv = 1) exceeds an operator that does nothing."""
    inputs = oracle.make_inputs(Run(registry.ELATTN, registry.STEP, 1, TOKENS, heads=1))
    tokens = [x.unbind(2) for x in (inputs.q, inputs.k, inputs.v)]
    state = elattn.new_state(1, 1, 1, 1)
    step, no_op = elattn.attention_step, torch.ops.elattn_bench.no_op
    best = _best({"step": _loop(step, tokens, state), "no_op": _loop(no_op, tokens, state)}, rounds)
    return best["step"] - best["no_op"]


def _best(calls: dict[Any, Callable[[], Any]], rounds: int, clock: str = "cpu") -> dict[Any, float]:
    """Seconds per step, the calls taking turns."""
    best = dict.fromkeys(calls, float("inf"))
    torch.set_num_threads(1)
    for _ in range(rounds):
        for name, call in calls.items():
            taken = seconds(lambda call=call: [call() for _ in range(8)], clock)
            best[name] = min(best[name], taken / (8 * TOKENS))
    return best
