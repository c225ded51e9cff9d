"""Parameterised gates for transformers: units, gate strengths, and a patch for any Hugging Face model.

Each name below is imported on first use. `import pagating` alone loads neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AlphaParameter": "gating.alpha",
    "COMPETITORS": "gating.catalog",
    "GATES": "gating.gates",
    "PaGLU": "gating.units",
    "PaGPT2Config": "gating.hf_gpt2",
    "PaGPT2LMHeadModel": "gating.hf_gpt2",
    "PatchReport": "gating.patch",
    "alpha_parameters": "gating.alpha",
    "alpha_values": "gating.alpha",
    "glu": "gating.units",
    "load_model": "saved_model",
    "patch": "gating.patch",
    "pointwise": "gating.units",
    "register_gate": "gating.own_gate",
    "register_unit": "gating.own_gate",
    "set_progress": "gating.alpha",
    "unpatch": "gating.patch",
}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pagating' has no attribute {name!r}")
    return getattr(import_module(f"pagating.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
