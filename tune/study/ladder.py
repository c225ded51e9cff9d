"""The rungs of a ladder as parts of a study file: the content of a rung's study, its training tokens and compute."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from pagating.model.size import GPT2_VOCABULARY, PRESETS, GPT2Size, stock_flops_per_token
from tune.study.sections import (
    TOKENS_PER_PARAMETER,
    FixedSection,
    ModelSection,
    Rung,
    TokenizerSection,
)

SHARED = {  # keys of `model` and `fixed` that all rungs have in common, and why
    "n_ctx": "the text is cut into the same windows at every size",
    "pretrained": "initial weights have a size of their own",
    "precision": "one ladder has one precision",
    "padding": "all rungs train on the same rows",
}


def rung_content(ladder: dict[str, Any], rung: Rung, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the content of the study of a rung.

    Args:
        ladder: Content of the ladder's study.
        rung: The rung.
        without: Arms that were dropped below the rung.
    """
    row = rung.model_dump(exclude_none=True, exclude={"tokens_per_parameter"})
    given = PRESETS.get(row.get("preset", ""), {}) | row
    changed = {
        "scales": [],
        "model": ladder["model"] | {key: given[key] for key in given if key in ModelSection.model_fields},
        "fixed": ladder["fixed"] | {key: given[key] for key in given if key in FixedSection.model_fields},
        "confirm": ladder["confirm"] | {"level": ladder["confirm"]["level"] / len(ladder["scales"])},
        "arms": {arm: keys for arm, keys in ladder["arms"].items() if arm not in without},
        "contrasts": [pair for pair in ladder["contrasts"] if not set(pair) & set(without)],
    }
    return ladder | changed


def with_tokens(
    rung: Rung, model: ModelSection, fixed: FixedSection, tokenizer: TokenizerSection, causal: bool
) -> Rung:
    """Return a rung of a ladder with its training tokens, a whole number of steps.

    Args:
        rung: The rung, whose `tokens`, `steps` or `tokens_per_parameter` may be given.
        model, fixed, tokenizer: Sections of the ladder.
        causal: The task is causal, so that the model is a GPT-2.

    Raises:
        ValueError: A key is not for a rung, two keys contradict each other, or the parameters are not known from the
            study file.
    """
    keys: dict[str, Any] = rung.model_dump(exclude_none=True)
    for key, why in SHARED.items():
        if key in keys:
            raise ValueError(f"{key}={keys[key]}: {why}; leave it out")
    batch = keys.get("batch_tokens", fixed.batch_tokens)
    if "tokens_per_parameter" not in keys:
        if "steps" in keys:
            return rung.model_copy(update={"steps": None, "tokens": keys["steps"] * batch})
        if "tokens" in keys:
            return rung
    if "steps" in keys:
        raise ValueError(
            f"give one of steps and tokens_per_parameter, not both (steps={keys['steps']}, "
            f"tokens_per_parameter={keys['tokens_per_parameter']:g})"
        )
    if tokenizer.path or tokenizer.pretrained not in (None, "gpt2") or not causal:
        why = "the tokenizer has the vocabulary" if causal else "the model is no GPT-2"
        raise ValueError(
            f"the parameters are not known from the study file ({why}); give tokens or steps instead of "
            "tokens_per_parameter"
        )
    given = {**model.sizes(), **PRESETS.get(keys.get("preset", ""), {}), **keys}
    size = GPT2Size(vocabulary_of(tokenizer), **{name: given[name] for name in model.sizes()})
    each = rung.tokens_per_parameter or TOKENS_PER_PARAMETER
    tokens = math.ceil(each * parameters(size) / batch) * batch
    if keys.get("tokens", tokens) != tokens:
        raise ValueError(
            f"tokens={keys['tokens']} and tokens_per_parameter={each:g}, which is tokens={tokens}; give one of them"
        )
    return rung.model_copy(update={"tokens": tokens, "tokens_per_parameter": each})


def vocabulary_of(tokenizer: TokenizerSection) -> int:
    """Return the vocabulary's size from the study file alone. A tokenizer that is not trained counts as GPT-2's."""
    return GPT2_VOCABULARY if tokenizer.pretrained or tokenizer.path else tokenizer.vocab_size


def parameters(size: GPT2Size) -> int:
    """Return the parameters of a stock GPT-2 with tied embeddings: `V C + T C + L (12 C^2 + 13 C) + 2 C`."""
    c = size.d_model
    return (size.vocab_size + size.n_ctx + 2) * c + size.n_layer * (12 * c * c + 13 * c)


def training_flops(model: ModelSection, fixed: FixedSection, tokenizer: TokenizerSection) -> float:
    """Return the training FLOPs of one trial of a stock GPT-2 with these sections."""
    return float(stock_flops_per_token(GPT2Size(vocabulary_of(tokenizer), **model.sizes()))) * fixed.tokens
