"""How much is computed: sizes, steps and rounds of every part, as data."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Text:
    """Training of byte-level language models; d_hidden is that of dense softmax with rotary, whose size all have."""

    d_model: int
    num_layers: int
    num_heads: int = 4
    d_hidden: int
    steps: int
    batch_size: int
    context: int
    eval_every: int
    held_out: float = 0.1  # of the text
    learning_rate: float = 3e-3
    warmup: int = 50


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Multi-query associative recall: one model per form, trained on the fewest pairs, then on all numbers of them."""

    d_model: int
    num_layers: int = 2
    num_heads: int = 2
    d_hidden: int
    vocab_size: int
    pairs: tuple[int, ...]
    easy_steps: int  # with the fewest pairs, without which hardly any form learns the rest in so few steps
    steps: int  # in all
    tokens: int  # of a batch
    eval_every: int
    eval_sequences: int  # for each number of pairs
    learning_rates: tuple[float, ...]  # of each form the best one counts
    warmup: int = 100
    enough: float = 0.99  # training stops when every number of pairs is answered so often


@dataclass(frozen=True, kw_only=True)
class Decode:
    contexts: tuple[int, ...]
    longest_cache: int  # contexts beyond it are for models without a cache
    rounds: int
    tokens: int  # of a round
    prefill: int  # tokens
    prefill_rounds: int  # of models without softmax layers; the others get one
    profile_steps: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    shapes: tuple[tuple[int, int], ...]  # (batch, length) of a training step
    moe_tokens: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Preset:
    """All parts. `paper_size`: decode and speed measure the paper's model, and not a tiny one."""

    train: Text
    ablate: Text
    recall: Recall
    decode: Decode
    speed: Speed
    paper_size: bool = True


_CONTEXTS = (1024, 4096, 16384, 65536, 131072, 1048576)
_SMALL_MODEL = {"d_model": 96, "num_layers": 4, "d_hidden": 192}
_LARGE_MODEL = {"d_model": 256, "d_hidden": 768, "batch_size": 32, "context": 512, "learning_rate": 2e-3}
_TINY_MODEL = {"d_model": 32, "num_layers": 4, "num_heads": 2, "d_hidden": 64, "context": 16}

PRESETS = {
    "smoke": Preset(
        train=Text(**_TINY_MODEL, batch_size=16, steps=4, eval_every=2, held_out=0.005, warmup=2),
        ablate=Text(**_TINY_MODEL, batch_size=16, steps=2, eval_every=2, held_out=0.005, warmup=2),
        recall=Recall(
            d_model=32,
            d_hidden=32,
            vocab_size=64,
            pairs=(4, 8),
            easy_steps=1,
            steps=4,
            tokens=512,
            eval_every=2,
            eval_sequences=8,
            learning_rates=(3e-3,),
            warmup=2,
        ),
        decode=Decode(
            contexts=(128, 256, 1024),
            longest_cache=256,
            rounds=2,
            tokens=4,
            prefill=256,
            prefill_rounds=1,
            profile_steps=4,
        ),
        speed=Speed(shapes=((2, 128), (1, 256)), moe_tokens=64, rounds=2),
        paper_size=False,
    ),
    # Each part within 15 minutes on two cores.
    "small": Preset(
        train=Text(**_SMALL_MODEL, steps=900, batch_size=8, context=256, eval_every=100),
        ablate=Text(**_SMALL_MODEL, steps=240, batch_size=8, context=128, eval_every=120),
        recall=Recall(
            d_model=64,
            d_hidden=128,
            vocab_size=256,
            pairs=(8, 16, 32, 64),
            easy_steps=400,
            steps=1500,
            tokens=2048,
            eval_every=100,
            eval_sequences=32,
            learning_rates=(1e-2,),
        ),
        decode=Decode(
            contexts=_CONTEXTS,
            longest_cache=131072,
            rounds=5,
            tokens=16,
            prefill=65536,
            prefill_rounds=2,
            profile_steps=100,
        ),
        speed=Speed(shapes=((20, 128), (1, 4096)), moe_tokens=4096, rounds=7),
    ),
    # For a GPU, or a night.
    "full": Preset(
        train=Text(**_LARGE_MODEL, num_layers=8, steps=5000, eval_every=500, warmup=200),
        ablate=Text(**_LARGE_MODEL, num_layers=4, steps=2000, eval_every=250, warmup=100),
        recall=Recall(
            d_model=128,
            d_hidden=256,
            vocab_size=8192,
            pairs=(8, 16, 32, 64),
            easy_steps=2000,
            steps=20000,
            tokens=16384,
            eval_every=500,
            eval_sequences=128,
            learning_rates=(1e-3, 3e-3, 1e-2),
        ),
        decode=Decode(
            contexts=_CONTEXTS,
            longest_cache=1048576,
            rounds=9,
            tokens=32,
            prefill=65536,
            prefill_rounds=3,
            profile_steps=200,
        ),
        speed=Speed(shapes=((20, 128), (4, 1024), (1, 4096), (1, 16384)), moe_tokens=4096, rounds=25),
    ),
}
