"""Generation: greedy, sampling, penalty, stop tokens, padded prompts, streaming, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from elattn.models import ELATransformer
from elattn.models.generation import Sampling, sample
from tiny_models import OPTIONS, VOCAB, model, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@EVERY_OPTION
def test_greedy_generation_is_repeated_argmax(options: dict[str, Any]) -> None:
    net, ids = model(**options), some_ids(3, 4)
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, net(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    found = net.generate(ids, 6, temperature=0)
    assert torch.equal(found, expected)
    assert torch.equal(net.generate(ids, 6, temperature=0), found)
    assert not found.requires_grad


# Prompts of different length


def padded(prompts: list[Tensor], left: list[bool]) -> tuple[Tensor, Tensor]:
    """Prompts (L,) as rows with padding on a side, filled with random ids, and the mask."""
    length = max(len(p) for p in prompts)
    ids, mask = some_ids(len(prompts), length), torch.ones(len(prompts), length, dtype=torch.bool)
    for row, (prompt, on_left) in enumerate(zip(prompts, left, strict=True)):
        place = slice(length - len(prompt), length) if on_left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, False
    return ids, mask


@EVERY_OPTION
def test_padded_prompts_continue_as_they_do_alone(options: dict[str, Any]) -> None:
    net = model(**options)
    prompts = [some_ids(1, length)[0] for length in (5, 1, 3)]
    alone = [net.generate(p[None], 6, temperature=0, repetition_penalty=1.3)[0, len(p) :] for p in prompts]
    for left in ([True] * 3, [False] * 3, [True, False, True]):
        ids, mask = padded(prompts, left)
        found = net.generate(ids, 6, temperature=0, repetition_penalty=1.3, key_padding_mask=mask)
        assert torch.equal(found[:, :5], ids)
        for row in range(3):
            assert torch.equal(found[row, 5:], alone[row]), (left, row)


def test_a_mask_without_padding_changes_nothing() -> None:
    net, ids = model(), some_ids(2, 5)
    found = net.generate(ids, 4, temperature=0, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(found, net.generate(ids, 4, temperature=0))


def test_long_prompts_have_no_logits_but_the_last() -> None:
    """The largest matrix product of the output layer has as many rows as there are sequences."""
    net, rows = model(tie_embeddings=False), []
    net.output.register_forward_hook(lambda module, arguments, output: rows.append(output.shape))
    net.generate(some_ids(2, 50), 3, temperature=0)
    assert rows == [(2, VOCAB)] * 3


# Sampling


def test_sampling_depends_on_the_generator_only() -> None:
    net, ids = model(), some_ids(4, 3)
    draws = [net.generate(ids, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0][:, :3], ids)


def test_sampling_filters() -> None:
    net, ids = model(), some_ids(64, 3)
    probabilities = net(ids)[:, -1].softmax(-1).detach()

    def drawn(**options: Any) -> Tensor:
        return net.generate(ids, 1, generator=torch.Generator().manual_seed(0), **options)[:, -1]

    greedy = probabilities.argmax(-1)
    assert torch.equal(drawn(top_k=1), greedy)
    assert torch.equal(drawn(top_p=1e-6), greedy)
    rank = (probabilities > probabilities.gather(1, drawn(top_k=3)[:, None])).sum(1)
    assert rank.max() == 2
    before = (probabilities * (probabilities > probabilities.gather(1, drawn(top_p=0.5)[:, None]))).sum(1)
    assert (before < 0.5).all() and before.max() > 0.1
    assert torch.equal(drawn(top_k=23, top_p=1.0), drawn())
    assert (drawn(temperature=1e-3) == greedy).float().mean() > 0.9


def test_sampled_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = sample(logits.expand(20_000, 4), Sampling(temperature=0.7, generator=torch.Generator().manual_seed(0)))
    frequencies = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(frequencies, (logits / 0.7).softmax(0), rtol=0, atol=0.015)


def test_any_temperature_and_any_logits_give_a_token() -> None:
    for temperature in (1e-30, 1e-3, 1.0, 1e30):
        for size in (1e-30, 1.0, 1e30):
            logits = size * torch.tensor([[1.0, 3.0, 2.0]])
            token = sample(logits, Sampling(temperature=temperature, generator=torch.Generator().manual_seed(0)))
            assert 0 <= int(token) < 3
    assert int(sample(torch.tensor([[1.0, 3.0, 2.0]]), Sampling(temperature=1e-30))) == 1


def test_repetition_penalty() -> None:
    """Positive logits of seen tokens are divided, negative ones multiplied, others left alone."""
    logits = torch.tensor([[2.0, -1.0, 1.5, 0.5]])
    seen = torch.tensor([[True, True, False, False]])
    greedy = [int(sample(logits, Sampling(temperature=0, repetition_penalty=p), seen)) for p in (1.0, 1.3, 1.4)]
    assert greedy == [0, 0, 2]
    draws = sample(
        logits.expand(20_000, 4),
        Sampling(repetition_penalty=2.0, generator=torch.Generator().manual_seed(0)),
        seen.expand(20_000, 4),
    )
    expected = torch.tensor([1.0, -2.0, 1.5, 0.5]).softmax(0)
    torch.testing.assert_close(torch.bincount(draws, minlength=4) / 20_000, expected, rtol=0, atol=0.015)


def test_repetition_penalty_covers_prompt_and_continuation_but_not_padding() -> None:
    net, ids = model(), some_ids(2, 6)
    free = net.generate(ids, 10, temperature=0)
    strict = net.generate(ids, 10, temperature=0, repetition_penalty=1e9)
    assert any(len(set(row.tolist())) < 16 for row in free)
    for prompt, row in zip(ids, strict, strict=True):
        new = row[6:].tolist()
        assert len(set(new)) == 10 and not set(new) & set(prompt.tolist())
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, :5] = True  # the prompt is the last token alone
    one = net.generate(ids, 1, temperature=0, repetition_penalty=1e9, key_padding_mask=mask)[:, -1]
    assert torch.equal(one, net.generate(ids[:, 5:], 1, temperature=0, repetition_penalty=1e9)[:, -1])


# Stop tokens


def test_eos_fills_the_rest_of_a_row() -> None:
    net, ids = model(), some_ids(8, 2)
    free = net.generate(ids, 12, temperature=0)
    eos = int(free[0, 4])  # a token that row 0 meets after two more
    found = net.generate(ids, 12, temperature=0, eos_id=eos)
    for row in range(8):
        new = free[row, 2:].tolist()
        stop = new.index(eos) if eos in new else len(new)
        expected = new[: stop + 1] + [eos] * (len(new) - stop - 1)
        assert found[row, 2:].tolist() == expected[: found.size(1) - 2]
    alone = net.generate(ids[:1], 12, temperature=0, eos_id=eos)
    assert alone.size(1) <= 2 + 3 and alone[0, -1] == eos  # generation stops when all rows have ended


def test_several_stop_tokens() -> None:
    net, ids = model(), some_ids(8, 2)
    free = net.generate(ids, 12, temperature=0)
    stops = [int(free[0, 5]), int(free[1, 4])]
    found = net.generate(ids, 12, temperature=0, eos_id=stops)
    for row in range(8):
        new = free[row, 2:].tolist()
        stop = min((new.index(s) for s in stops if s in new), default=len(new))
        expected = new[: stop + 1] + [stops[0]] * (len(new) - stop - 1)
        assert found[row, 2:].tolist() == expected[: found.size(1) - 2]


# Streaming


def test_stream_yields_what_generate_returns() -> None:
    net, ids = model(**OPTIONS["hybrid"]), some_ids(3, 4)
    eos = int(net.generate(ids, 8, temperature=0)[0, 6])
    for options in ({"temperature": 0}, {"temperature": 0, "eos_id": eos}, {"top_k": 5, "repetition_penalty": 1.2}):
        tokens = [t.clone() for t in net.stream(ids, 8, generator=torch.Generator().manual_seed(0), **options)]
        assert all(t.shape == (3,) and not t.requires_grad for t in tokens)
        expected = net.generate(ids, 8, generator=torch.Generator().manual_seed(0), **options)
        assert torch.equal(torch.stack(tokens, 1), expected[:, 4:])


def test_stream_computes_no_more_than_it_is_asked_for() -> None:
    net, steps = model(), []
    step = ELATransformer.step
    net.step = lambda *arguments: steps.append(1) or step(net, *arguments)
    tokens = net.stream(some_ids(1, 3), 10, temperature=0)
    assert len(steps) == 0
    next(tokens)
    next(tokens)
    assert len(steps) == 1 and torch.is_grad_enabled()


# What is refused


def test_generate_refuses() -> None:
    net = model()
    for arguments, message in [
        ((some_ids(2, 0), 3), "at least one token"),
        ((some_ids(2, 3)[0], 3), "at least one token"),
        ((some_ids(), -1), "max_new_tokens must not be negative"),
        ((some_ids(), 3, -0.5), "temperature must not be negative"),
        ((some_ids(), 3, float("nan")), "temperature must not be negative"),
        ((some_ids(), 3, 1.0, 0), "top_k must be at least 1"),
        ((some_ids(), 3, 1.0, None, 0.0), "top_p must be in"),
        ((some_ids(), 3, 1.0, None, 1.5), "top_p must be in"),
        ((some_ids(), 3, 1.0, None, None, []), "eos_id must be a token, a list of at least one, or None"),
    ]:
        for call in (net.generate, net.stream):  # a stream refuses before its first token is asked for
            with pytest.raises(ValueError, match=message):
                call(*arguments)
    with pytest.raises(ValueError, match="repetition_penalty must be positive"):
        net.generate(some_ids(), 3, repetition_penalty=0.0)
    with pytest.raises(ValueError, match=r"ids must be in 0..vocab_size - 1 = 22 \(got 1 to 23\)"):
        net.generate(torch.tensor([[1, 23]]), 2)
    ids = some_ids()
    assert torch.equal(net.generate(ids, 0), ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 0, 1]], "row 0 of key_padding_mask has it on both sides or inside"),
        ([[0, 0, 0, 1], [0, 1, 0, 0]], "row 1 of key_padding_mask has it on both sides or inside"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "row 1 of key_padding_mask is all padding"),
        ([[0, 0, 1]], r"must be bool of the shape of ids, \(1, 4\) \(got torch.bool \(1, 3\)\)"),
    ],
)
def test_masks_that_are_refused(mask: list[list[int]], message: str) -> None:
    padding = torch.tensor(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        model().generate(some_ids(len(mask), 4), 2, key_padding_mask=padding)


def test_more_tokens_than_a_softmax_layer_takes() -> None:
    net = model(attention="softmax", max_seq_len=8)
    assert net.generate(some_ids(1, 5), 4, temperature=0).size(1) == 9  # the last token is not fed back
    for length, new in ((5, 5), (9, 1)):
        with pytest.raises(ValueError, match=f"a prompt of {length} tokens and {new} new ones do not fit max_seq_len"):
            net.generate(some_ids(1, length), new)
    # A padded prompt counts as long as it is.
    mask = torch.tensor([[True, True, True, False, False, False]])
    assert net.generate(some_ids(1, 6), 6, temperature=0, key_padding_mask=mask).size(1) == 12
