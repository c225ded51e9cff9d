"""The files that make a folder with a trained model one of Hugging Face: configuration, tokenizer, generation, code.

For a causal model they are written without transformers, so that a trial need not import it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagating import gating
from pagating.gating.catalog import settings
from pagating.gating.saving import masked, record_of, recorded, settled
from pagating.model.size import GPT2Size

TOKENIZER, CONFIG, GENERATION, TOKENIZER_CONFIG = (
    "tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json"
)  # fmt: skip
CODE = "hf_gpt2"  # the module of `pagating.gating` that has the classes of a patched GPT-2
END = "<|endoftext|>"
_RELATIVE = re.compile(r"^from \.(\w+) import", re.MULTILINE)


def write_gpt2(folder: Path, size: GPT2Size, unit: Mapping[str, Any] | None) -> None:
    """Write the files of a causal model beside its tokenizer.json and its weights.

    Args:
        folder: The folder.
        size: Sizes of the GPT-2.
        unit: Arguments of `pagating.patch`; None is the stock model.
    """
    end = write_tokenizer(folder, size.n_ctx, {"eos_token": END, "bos_token": END, "pad_token": END}).get(END)
    _write(folder / CONFIG, gpt2_config(size, unit, end))
    _write(
        folder / GENERATION, {"eos_token_id": end, "bos_token_id": end, "pad_token_id": end, "max_length": size.n_ctx}
    )
    if unit is not None:
        for module in _code():
            shutil.copyfile(Path(gating.__file__).with_name(f"{module}.py"), folder / f"{module}.py")


def write_denoiser(folder: Path, model: Any, vocab_size: int, n_ctx: int) -> None:
    """Write the files of a BERT or T5 beside its tokenizer.json, which gets the model's special tokens.

    Args:
        folder: The folder.
        model: A model of `pagating.tasks.denoising`.
        vocab_size: Ids of the corpus's vocabulary. Those of the special tokens follow.
        n_ctx: Longest window.
    """
    config, added = model.config, model.config.vocab_size - vocab_size
    roles = {"pad_token": "<pad>"} if config.is_encoder_decoder else {"mask_token": "[MASK]"}
    tokens = [*roles.values(), *(f"<extra_id_{i}>" for i in range(added - 1))]
    add_tokens(folder, vocab_size, tokens)
    write_tokenizer(folder, n_ctx, roles)
    config.architectures, config.dtype = [type(model).__name__], "float32"
    with recorded(model):
        model.config.save_pretrained(folder)
    if config.is_encoder_decoder:
        model.generation_config.save_pretrained(folder)


def gpt2_config(size: GPT2Size, unit: Mapping[str, Any] | None, end: int | None) -> dict[str, Any]:
    """Return the JSON values of config.json. `end` is the id of the token that ends a text, if there is one."""
    stock = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": size.vocab_size,
        "n_positions": size.n_ctx,
        "n_embd": size.d_model,
        "n_layer": size.n_layer,
        "n_head": size.n_head,
        "activation_function": size.activation,
        "resid_pdrop": size.dropout,
        "embd_pdrop": size.dropout,
        "attn_pdrop": size.dropout,
        "initializer_range": size.initializer_range,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "dtype": "float32",
    }
    if unit is None:
        return stock
    record = record_of(settled(settings(unit)), [f"transformer.h.{layer}.mlp.act" for layer in range(size.n_layer)])
    own = {
        "model_type": "pagating_gpt2",
        "architectures": ["PaGPT2LMHeadModel"],
        "auto_map": {"AutoConfig": f"{CODE}.PaGPT2Config", "AutoModelForCausalLM": f"{CODE}.PaGPT2LMHeadModel"},
        "pagating": {**record, "class": "GPT2LMHeadModel"},
    }
    return masked({**stock, **record["arguments"], **own})


def write_tokenizer(folder: Path, n_ctx: int, named: Mapping[str, str]) -> dict[str, int]:
    """Write the configuration of the tokenizer in tokenizer.json.

    Args:
        folder: The folder.
        n_ctx: Longest window.
        named: Special tokens by their role, such as `eos_token`. One that the tokenizer lacks is left out.

    Returns:
        The ids of those that it has.
    """
    raw = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))  # the library need not be installed
    vocabulary = raw["model"].get("vocab")
    known = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    known |= {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
    roles = {role: token for role, token in named.items() if token in known}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": n_ctx, **roles}
    _write(folder / TOKENIZER_CONFIG, {**values, "clean_up_tokenization_spaces": False})
    return {token: known[token] for token in roles.values()}


def add_tokens(folder: Path, first: int, tokens: list[str]) -> None:
    """Add special tokens to tokenizer.json, with ids from `first` on.

    Nothing is written if they cannot have these ids: the tokenizer has one of them, or its ids have gaps.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if [tokenizer.token_to_id(token) for token in tokens] == list(range(first, first + len(tokens))):
        tokenizer.save(str(folder / TOKENIZER))


def _code() -> list[str]:
    """Return the names of the modules of `pagating.gating` that the class of a patched GPT-2 needs, and its own."""
    found = [CODE]
    for module in found:
        text = Path(gating.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        found += [name for name in _RELATIVE.findall(text) if name not in found]
    return found


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
