"""Parameterised gates for transformers: the units, every kind of gate strength, any Hugging Face model.

The names below are imported on first use, so that `import pagating` needs neither torch nor transformers
(`patch` lives in `patching`: a submodule of the same name would hide the function).
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AlphaParameter": "alpha",
    "COMPETITORS": "competitors",
    "GATES": "gates",
    "PaGLU": "units",
    "PaGPT2Config": "gpt2",
    "PaGPT2LMHeadModel": "gpt2",
    "PatchReport": "patching",
    "alpha_parameters": "alpha",
    "alpha_values": "alpha",
    "glu": "units",
    "load_model": "saved_model",
    "patch": "patching",
    "pointwise": "units",
    "register_gate": "own_gate",
    "set_progress": "alpha",
    "unpatch": "patching",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pagating' has no attribute {name!r}")
    return getattr(import_module(f"pagating.{_HOME[name]}"), name)
