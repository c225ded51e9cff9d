"""GPT-2 with a parameterised gate as a Hugging Face model class.

Importing this module registers `PaGPT2Config` and `PaGPT2LMHeadModel` with `AutoConfig` and `AutoModelForCausalLM`
under the model type `pagating_gpt2`. A folder written by `save_pretrained` also holds the code, so that it loads with
`trust_remote_code=True` if this package is not installed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .alpha import alpha_modules, share_alphas
from .catalog import DEFAULTS
from .patch import patch
from .saving import KEY, Patched, Recorded, check_functions, unmasked

ARGUMENTS = (*DEFAULTS, "unit", "include")
ALPHA_NAMES = frozenset({"alpha_logit", "alpha_free", "alpha_scheduled", "alpha_weight", "alpha_bias"})


@torch.no_grad()
def start_alphas(model: nn.Module) -> None:
    """Set the alphas that no file of weights filled to their start values."""
    for module in alpha_modules(model):
        own = dict(module.named_own_alpha())
        for name, start in module.alpha_starts().items():
            # transformers marks loaded tensors; the others are uninitialised memory
            if not getattr(own[name], "_is_hf_initialized", False):
                own[name].fill_(start)


class PaGPT2Config(Recorded, GPT2Config):
    """GPT-2's configuration with arguments of `pagating.patch`: `gate`, `alpha`, `base`, `form`, `unit`, `include`.

    None means the default of `patch`. If all are None, the model is the stock model. An invalid setting raises
    ValueError when a model is built.
    """

    model_type = "pagating_gpt2"

    gate: str | None = None
    alpha: Any = None
    base: str | None = None
    form: str | None = None
    unit: str | None = None
    include: list[str] | None = None

    def patch_arguments(self) -> dict[str, Any]:
        """Return the arguments of `patch` that are set, or those of the stock activation if none is set."""
        given = {key: getattr(self, key) for key in ARGUMENTS}
        given = {key: value for key, value in given.items() if value is not None}
        return given or {"alpha": 0.0, "base": "stock"}

    def set_record(self, record: dict[str, Any] | None) -> None:
        """Set the record of a patch and its arguments, or remove both."""
        super().set_record(record)
        for key in ARGUMENTS:
            setattr(self, key, record["arguments"].get(key) if record else None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return the configuration of these JSON values, those of a patched model too."""
        return super().from_dict(unmasked(config_dict), **options)

    @classmethod
    def of(cls, patched: GPT2Config) -> "PaGPT2Config":
        """Return the configuration of this class for a patched GPT-2's, which has a record."""
        config = cls(**{key: value for key, value in patched.to_dict().items() if key not in ("model_type", KEY)})
        config.set_record({**getattr(patched, KEY), "class": GPT2LMHeadModel.__name__})
        config.architectures = [PaGPT2LMHeadModel.__name__]
        config.auto_map = {"AutoModelForCausalLM": f"{__name__.rpartition('.')[2]}.{PaGPT2LMHeadModel.__name__}"}
        return config


class PaGPT2LMHeadModel(Patched, GPT2LMHeadModel):
    """GPT-2 with a language-modelling head and the gate of its configuration.

    Parameters have GPT-2's names, so that a stock checkpoint loads into the pointwise forms with nothing missing or
    unexpected. A learnable alpha that is not in the checkpoint starts at its stated value, in float32.
    """

    config_class = PaGPT2Config
    _keep_in_fp32_modules_strict = ALPHA_NAMES

    def __init__(self, config: PaGPT2Config) -> None:
        super().__init__(config)
        arguments = config.patch_arguments()
        check_functions(getattr(config, KEY, {}), arguments)
        patch(self, **arguments)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the embeddings, and the alpha that all layers share; transformers calls it after a load."""
        super().tie_weights(missing_keys, recompute_mapping)
        share_alphas(self, missing_keys)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise tensors that no checkpoint filled: GPT-2's parameters by its rule, alphas at their start value."""
        super().initialize_weights()
        start_alphas(self)


class _WithAxis(ConversionOps):
    """Give a number its axis: folders of older versions hold one alpha with shape (), not (1,)."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, list[Tensor]]:
        tensors = {key: each if isinstance(each, list) else [each] for key, each in input_dict.items()}
        return {key: [torch.atleast_1d(tensor) for tensor in each] for key, each in tensors.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


ONE_AXIS = ("alpha_logit", "alpha_free", "alpha_bias")
register_checkpoint_conversion_mapping(
    PaGPT2Config.model_type, [WeightConverter(name, name, [_WithAxis()]) for name in ONE_AXIS], overwrite=True
)
AutoConfig.register(PaGPT2Config.model_type, PaGPT2Config, exist_ok=True)
AutoModelForCausalLM.register(PaGPT2Config, PaGPT2LMHeadModel, exist_ok=True)
PaGPT2Config.register_for_auto_class()
PaGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
