"""Find pretrained weights of GPT-2, compare them with a model's sizes, and load them.

The weights are one safetensors file, as transformers writes it for a `GPT2LMHeadModel` or `GPT2Model`. A pointwise arm
loads all of them; its gate replaces the activation. An arm with another form of MLP (`glu`, `projected`) loads
embeddings, attention and norms and keeps its own initialised MLPs, which is GPT-2 with its MLPs replaced.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pagating.gating.units import ProjectedGLU, SplitGLU
from pagating.model.gpt2 import GPT2

FILE = "model.safetensors"
MASK = re.compile(r".*\.attn\.(masked_)?bias")  # a constant that older checkpoints stored beside the weights
PREFIX = "transformer."


class PretrainedError(ValueError):
    """Unusable weights. The message is one line with the file, what was found and what is needed."""


class WeightsNotDownloaded(PretrainedError):
    """Weights of the hub without a copy on this machine. They may still exist."""


def find_weights(given: str, base: Path | None = None) -> Path:
    """Return the file of weights of a folder (relative to `base`) or of a model on the hub, downloaded if needed.

    Raise PretrainedError, which says what to download and where to put it, if there is none.
    """
    folder = Path(os.path.join(base or "", os.path.expanduser(given)))
    if (folder / FILE).is_file():
        return (folder / FILE).resolve()
    wanted = f"download {FILE} and config.json of the model into a folder and name it as model: {{pretrained: FOLDER}}"
    if folder.is_dir():
        raise PretrainedError(f"pretrained '{given}': {folder} has no {FILE}; {wanted}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(given, FILE)).resolve()
    except HFValidationError as error:
        raise PretrainedError(f"pretrained '{given}' cannot be loaded: {folder} does not exist; {wanted}") from error
    except (OSError, ValueError) as error:
        raise WeightsNotDownloaded(
            f"pretrained '{given}' cannot be loaded: no such folder ({folder}) and no copy on the hub; {wanted}"
        ) from error


def load_pretrained(model: GPT2, path: str | Path) -> None:
    """Copy the weights of a file into an initialised model. Other parameters keep their values.

    Only the first `n_ctx` rows of the position embeddings are copied. Raise PretrainedError as `check_weights` does, or
    if the file's output projection is not tied to its token embedding.
    """
    names = check_weights(model, path)
    with torch.no_grad(), safe_open(str(path), "pt") as file:
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(file.get_tensor(names[name])[: parameter.shape[0]])
        tied = file.get_tensor("lm_head.weight") if "lm_head.weight" in file.keys() else None  # noqa: SIM118
        if tied is not None and not torch.equal(tied.float(), model.transformer.wte.weight):
            raise PretrainedError(f"{path}: its output projection is not tied to its token embedding")


def check_weights(model: GPT2, path: str | Path) -> dict[str, str]:
    """Return, by parameter name, the name of the tensor in the file that fills it. The model may be on `meta`.

    Raise PretrainedError if sizes differ, or if the file has fewer or more tensors than a GPT-2 of that size.
    """
    found = _shapes(path)
    _check_heads(model, Path(path))
    new_mlp = any(isinstance(module, SplitGLU | ProjectedGLU) for module in model.modules())
    wanted = {}
    for name, parameter in model.named_parameters():
        if ".mlp.act." in name or (new_mlp and ".mlp." in name):
            continue
        stored, shape = found.get(name, (None, ()))
        fits = shape == tuple(parameter.shape)
        if name.endswith("wpe.weight"):
            fits = len(shape) == 2 and shape[0] >= parameter.shape[0] and shape[1] == parameter.shape[1]
        if stored is None:
            raise PretrainedError(f"{path}: has no '{name}', which a GPT-2 of {_sizes(model)} needs")
        if not fits:
            own = "; the tokenizer must be the weights' own" if name.endswith("wte.weight") else ""
            raise PretrainedError(
                f"{path}: '{name}' is {shape} and the study's model of {_sizes(model)} needs "
                f"{tuple(parameter.shape)}{own}"
            )
        wanted[name] = stored
    more = sorted(name for name in found if name not in wanted and not (new_mlp and ".mlp." in name))
    if more:
        raise PretrainedError(f"{path}: has '{more[0]}', which a GPT-2 of {_sizes(model)} does not have")
    return wanted


def _shapes(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return each weight's name in the file and its shape, by its name in a `GPT2LMHeadModel`."""
    try:
        with safe_open(str(path), "pt") as file:
            names = [name for name in file.keys() if not MASK.fullmatch(name) and name != "lm_head.weight"]  # noqa: SIM118
            return {
                name if name.startswith(PREFIX) else PREFIX + name: (name, tuple(file.get_slice(name).get_shape()))
                for name in names
            }
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"{path}: is not a complete safetensors file: {error}") from error


def _check_heads(model: GPT2, path: Path) -> None:
    """Raise PretrainedError if the number of heads, which weights do not show, is not that of the `config.json`."""
    config = path.with_name("config.json")
    if not config.is_file():
        return
    try:
        stated: Any = json.loads(config.read_bytes())
    except ValueError as error:
        raise PretrainedError(f"{config}: is not JSON: {error}") from error
    heads = stated.get("n_head") if isinstance(stated, dict) else None
    if heads is not None and heads != model.config.n_head:
        raise PretrainedError(f"{config}: n_head is {heads} and the study's model.n_head is {model.config.n_head}")


def _sizes(model: GPT2) -> str:
    size = model.config
    return f"n_layer={size.n_layer}, d_model={size.d_model}, n_ctx={size.n_ctx}, vocabulary {size.vocab_size}"
