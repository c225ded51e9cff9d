"""GPT-2 with a parameterised gate as a Hugging Face model class of its own.

Importing this module registers `PaGPT2Config` and `PaGPT2LMHeadModel` with `AutoConfig` and
`AutoModelForCausalLM` under the model type `pagating_gpt2`. A folder written by `save_pretrained` also holds the
code, so that it loads with `trust_remote_code=True` where this package is not installed.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from .alpha import alpha_modules
from .catalog import DEFAULTS
from .patch import patch


class PaGPT2Config(GPT2Config):
    """GPT-2's configuration and the arguments of `pagating.patch`; by default the stock model (gate off).

    `gate`, `alpha`, `base`, `form`, `unit` mean what they mean there; None takes the default there. A setting
    that `patch` refuses is refused when a model is built.
    """

    model_type = "pagating_gpt2"

    gate: str | None = None
    alpha: Any = None
    base: str | None = None
    form: str | None = None
    unit: str | None = None

    def patch_arguments(self) -> dict[str, Any]:
        """The arguments of `patch`: those that are set, or the stock activation when none is."""
        given = {key: getattr(self, key) for key in (*DEFAULTS, "unit")}
        given = {key: value for key, value in given.items() if value is not None}
        return given or {"alpha": 0.0, "base": "stock"}


class PaGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2 with a language-modelling head and the gate that its configuration names.

    Parameter names are GPT-2's own, so a stock checkpoint loads into the pointwise forms with nothing missing or
    unexpected; a learnable alpha that the checkpoint lacks starts at its stated value, in float32.
    """

    config_class = PaGPT2Config
    _keep_in_fp32_modules_strict = frozenset(
        {"alpha_logit", "alpha_free", "alpha_scheduled", "alpha_weight", "alpha_bias"}
    )

    def __init__(self, config: PaGPT2Config) -> None:
        super().__init__(config)
        patch(self, **config.patch_arguments())

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Start what no checkpoint has given: GPT-2's parameters by its rule, each alpha at its stated value."""
        super().initialize_weights()
        for module in alpha_modules(self):
            own = dict(module.named_own_alpha())
            for name, start in module.alpha_starts().items():
                # transformers marks what it loaded; the rest is uninitialised memory
                if not getattr(own[name], "_is_hf_initialized", False):
                    own[name].fill_(start)


AutoConfig.register(PaGPT2Config.model_type, PaGPT2Config, exist_ok=True)
AutoModelForCausalLM.register(PaGPT2Config, PaGPT2LMHeadModel, exist_ok=True)
PaGPT2Config.register_for_auto_class()
PaGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
