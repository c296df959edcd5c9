"""Options of a model on the command line: a preset or a file, and what differs from it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import elattn
from elattn.data import load_tokenizer
from elattn.errors import UserError
from elattn.models import ELAConfig

__all__ = ["PRESETS", "ModelOptions", "model_config"]

PRESETS = {
    "demo": lambda **fields: ELAConfig.recommended(**({"d_model": 128, "d_hidden": 256} | fields)),
    "small": lambda **fields: ELAConfig.recommended(**({"num_layers": 6, "d_hidden": 768} | fields)),
    "paper": ELAConfig.paper,
    "recommended": ELAConfig.recommended,
}
_BYTES = 256


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Model")


class ModelOptions:
    """Types of the options, each None if it is not given."""

    preset = Annotated[str | None, _option(f"One of {', '.join(PRESETS)}; demo if there is no --config.")]
    config = Annotated[Path | None, _option("ELAConfig as a JSON file, instead of a preset.")]
    d_model = Annotated[int | None, _option("Width.")]
    layers = Annotated[int | None, _option("Layers.")]
    heads = Annotated[int | None, _option("Query heads.")]
    kv_heads = Annotated[int | None, _option("Key and value heads; by default as many.")]
    d_hidden = Annotated[int | None, _option("Width of the feed-forward networks, or of each expert.")]
    experts = Annotated[int | None, _option("Feed-forward networks to route between; 1 for no routing.")]
    top_k = Annotated[int | None, _option("Experts per token.")]
    moe_bias = Annotated[str | None, _option("Experts' label as a bias: none, inner, outer.")]
    tie_labels = Annotated[bool | None, _option("The bias is the router's label.", "--tie-labels/--free-labels")]
    aux_coef = Annotated[float | None, _option("Weight of the experts' balance loss.")]
    attention = Annotated[str | None, _option("linear, or softmax for comparison.")]
    full_attention_every = Annotated[int | None, _option("Softmax in every n-th layer, 0 for none.")]
    kernel = Annotated[str | None, _option(f"One of {', '.join(elattn.kernels())}.")]
    decay = Annotated[str | None, _option("Forgetting: none, head, channel, token.")]
    short_conv = Annotated[int | None, _option("Width of the short convolution, 0 for none.")]
    gate = Annotated[bool | None, _option("Gate the attention's output.", "--gate/--no-gate")]
    rotary = Annotated[bool | None, _option("Rotary position embedding.", "--rotary/--no-rotary")]
    hyper_link = Annotated[str | None, _option("Links of layers: residual, sum, dense, gated.")]
    memory_lobe = Annotated[str | None, _option("Memory lobes: none, depth, causal.")]
    final_norm = Annotated[bool | None, _option("A norm before the output.", "--final-norm/--no-final-norm")]
    tie_embeddings = Annotated[bool | None, _option("Output layer = embedding.", "--tie-embeddings/--free-embeddings")]
    max_seq_len = Annotated[int | None, _option("Most tokens of softmax layers.")]


# Options whose names are not those of the fields.
_FIELDS = {"layers": "num_layers", "heads": "num_heads", "kv_heads": "num_kv_heads", "experts": "num_experts"}


def model_config(
    options: dict[str, Any],
    preset: str | None,
    config: Path | None,
    *,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
) -> ELAConfig:
    """The configuration that the options describe. The vocabulary follows the tokenizer: by default bytes.

    Args:
        options: values of `ModelOptions` by option, None where it was not given.
        vocab_size: of a tokenizer that is to be trained.
        tokenizer: path of a tokenizer.json.

    Raises:
        UserError: they contradict each other or a rule of `ELAConfig`, or a file is not what it should be.
    """
    fields = {_FIELDS.get(name, name): value for name, value in options.items() if value is not None}
    if fields.get("memory_lobe") == "none":
        fields["memory_lobe"] = None
    size = vocab_size or (_BYTES if tokenizer is None else load_tokenizer(tokenizer).vocab_size)
    if preset is not None and config is not None:
        raise UserError("--preset and --config exclude each other")
    try:
        if config is None:
            name = preset or "demo"
            if name not in PRESETS:
                raise UserError(f"--preset must be one of {', '.join(PRESETS)} (got {name})")
            return PRESETS[name](**(fields | {"vocab_size": size}))
        given = ELAConfig.from_json(config.read_text())
        if vocab_size is None and tokenizer is None and given.vocab_size > _BYTES:
            raise UserError(
                f"{config} has vocab_size {given.vocab_size}, but tokens are bytes: give --tokenizer, or "
                f"--vocab-size {given.vocab_size} to train one"
            )
        if vocab_size is not None:
            fields["vocab_size"] = vocab_size
        made = dataclasses.replace(given, **fields)
        made.require_vocabulary(size)
        return made
    except OSError as error:
        raise UserError(f"cannot read {config}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{config}: {error}" if config is not None else str(error)) from None
