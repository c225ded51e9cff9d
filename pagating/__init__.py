"""Parameterised gates for transformers: units, gate strengths, and a patch for any Hugging Face model.

Each name and each sub-module is imported on first use. `import pagating` alone loads neither torch nor transformers.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from pagating.lazy import lazy

if TYPE_CHECKING:  # the same names as below, for type checkers and editors
    from pagating.gating.alpha import AlphaParameter as AlphaParameter
    from pagating.gating.alpha import alpha_parameters as alpha_parameters
    from pagating.gating.alpha import alpha_values as alpha_values
    from pagating.gating.alpha import set_progress as set_progress
    from pagating.gating.catalog import COMPETITORS as COMPETITORS
    from pagating.gating.gates import GATES as GATES
    from pagating.gating.hf_gpt2 import PaGPT2Config as PaGPT2Config
    from pagating.gating.hf_gpt2 import PaGPT2LMHeadModel as PaGPT2LMHeadModel
    from pagating.gating.own_gate import register_gate as register_gate
    from pagating.gating.own_gate import register_unit as register_unit
    from pagating.gating.patch import PatchReport as PatchReport
    from pagating.gating.patch import patch as patch
    from pagating.gating.patch import unpatch as unpatch
    from pagating.gating.units import PaGLU as PaGLU
    from pagating.gating.units import glu as glu
    from pagating.gating.units import pointwise as pointwise
    from pagating.hf.errors import SavedModelError as SavedModelError
    from pagating.hf.loading import from_pretrained as from_pretrained
    from pagating.optimizer import AlphaTrainerMixin as AlphaTrainerMixin
    from pagating.optimizer import param_groups as param_groups
    from pagating.saved_model import load_model as load_model

_HOME = {
    "AlphaParameter": "gating.alpha",
    "AlphaTrainerMixin": "optimizer",
    "COMPETITORS": "gating.catalog",
    "GATES": "gating.gates",
    "PaGLU": "gating.units",
    "PaGPT2Config": "gating.hf_gpt2",
    "PaGPT2LMHeadModel": "gating.hf_gpt2",
    "PatchReport": "gating.patch",
    "SavedModelError": "hf.errors",
    "alpha_parameters": "gating.alpha",
    "alpha_values": "gating.alpha",
    "from_pretrained": "hf.loading",
    "glu": "gating.units",
    "load_model": "saved_model",
    "param_groups": "optimizer",
    "patch": "gating.patch",
    "pointwise": "gating.units",
    "register_gate": "gating.own_gate",
    "register_unit": "gating.own_gate",
    "set_progress": "gating.alpha",
    "unpatch": "gating.patch",
}
_OF_TRANSFORMERS = ("gating.hf_gpt2", "hf.loading")  # these import transformers, which the library alone does not need
__all__ = [name for name, home in _HOME.items() if home not in _OF_TRANSFORMERS or find_spec("transformers")]
__version__ = "0.1.0"
__getattr__, __dir__ = lazy(__name__, _HOME)
