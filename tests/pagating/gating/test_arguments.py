"""Wrong arguments of the public functions: ValueError, one line, with the argument and its value."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import pagating
from pagating.export_model import export_model
from pagating.gating.cost import cost
from pagating.gating.export import export_program
from pagating.gating.probe import Probe
from pagating.layers import layer_rows
from pagating.optimizer import separate_alphas
from pagating.packed.loop import train_packed
from pagating.train import train

X = torch.randn(2, 3)
CHANNEL = {"learnable": {"per": "channel"}}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, vocab_size=11))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "name": (lambda: pagating.patch("gpt2"), "model: str is not a torch.nn.Module"),  # type: ignore[arg-type]
    "config": (lambda: pagating.patch(GPT2Config()), "model: GPT2Config is not a torch.nn.Module"),
    "gate is a function": (
        lambda: pagating.patch(gpt2(), gate=torch.tanh),  # type: ignore[arg-type]
        "is not a name, such as 'sigmoid'; register it with pagating.register_gate",
    ),
    "unit is a class": (
        lambda: pagating.patch(gpt2(), unit=nn.SiLU),  # type: ignore[arg-type]
        "is not a name, such as 'relu2'; register it with pagating.register_unit",
    ),
    "base is a number": (
        lambda: pagating.patch(gpt2(), base=3),  # type: ignore[arg-type]
        "base: 3 is not a name, such as 'identity'",
    ),
    "alpha is text": (lambda: pagating.patch(gpt2(), alpha="0.5"), "alpha: '0.5' is neither a number"),
    "alpha is NaN": (lambda: pagating.patch(gpt2(), alpha=float("nan")), "alpha: nan is not a finite number in [0, 2]"),
    "alpha is a parameter": (
        lambda: pagating.patch(gpt2(), alpha=nn.Parameter(torch.tensor(0.5))),  # type: ignore[arg-type]
        "alpha: Parameter containing: tensor(0.5000, requires_grad=True) is not a finite number",
    ),
    "alphas are too few": (lambda: pagating.patch(gpt2(), alpha=[0.1]), "alpha: a list of 1 for 2 layers"),
    "x is a list": (lambda: pagating.pointwise([1.0]), "x: list is not a tensor"),  # type: ignore[arg-type]
    "x is an array": (lambda: pagating.pointwise(np.ones(3)), "x: ndarray is not a tensor"),  # type: ignore[arg-type]
    "x is whole": (lambda: pagating.pointwise(torch.tensor([1])), "x: its dtype torch.int64 is no floating-point type"),
    "x is complex": (lambda: pagating.pointwise(torch.tensor([1j])), "x: its dtype torch.complex64 is no floating"),
    "strength is text": (
        lambda: pagating.pointwise(X, "learnable"),  # type: ignore[arg-type]
        "alpha: 'learnable' is neither a finite number nor a tensor",
    ),
    "strength is NaN": (lambda: pagating.pointwise(X, float("nan")), "alpha: nan is neither a finite number"),
    "strength is true": (lambda: pagating.pointwise(X, True), "alpha: True is neither a finite number"),
    "strength does not fit": (
        lambda: pagating.pointwise(X, torch.ones(2)),
        "alpha: shape (2,) does not broadcast against (2, 3), the shape of x",
    ),
    "gate is unknown": (lambda: pagating.pointwise(X, 0.5, "sigmoidd"), "gate: 'sigmoidd' is not one of sigmoid, tanh"),
    "gate is a list": (lambda: pagating.pointwise(X, 0.5, []), "gate: [] is not one of sigmoid"),  # type: ignore[arg-type]
    "base is unknown": (
        lambda: pagating.pointwise(X, 0.5, "tanh", "stock"),
        "base: 'stock' is not one of identity, gelu, nor a function",
    ),
    "base is none": (
        lambda: pagating.pointwise(X, 0.5, "tanh", None),  # type: ignore[arg-type]
        "base: None is not one of identity, gelu, nor a function",
    ),
    "halves differ": (
        lambda: pagating.glu(X, X[:1]),
        "b: (1, 3) torch.float32 is not (2, 3) torch.float32, the shape and dtype of a",
    ),
    "dtypes differ": (lambda: pagating.glu(X, X.double()), "b: (2, 3) torch.float64 is not (2, 3) torch.float32"),
    "strength of a glu": (
        lambda: pagating.glu(X, X, None),  # type: ignore[arg-type]
        "alpha: None is neither a finite number nor a tensor",
    ),
    "form is no elementwise one": (lambda: pagating.PaGLU(form="glu"), "form: 'glu' is not one of pointwise, scaled"),
    "width is missing": (lambda: pagating.PaGLU(CHANNEL), "give width, not None"),
    "width is negative": (lambda: pagating.PaGLU(CHANNEL, width=-1), "give width, not -1"),
    "layer is negative": (lambda: pagating.PaGLU([0.1, 0.2], layer=-1), "layer: -1 is not the index of a layer"),
    "unit is given a list": (lambda: pagating.PaGLU()([1.0]), "x: list is not a tensor"),
    "progress is text": (
        lambda: pagating.set_progress(gpt2(), "0.5"),  # type: ignore[arg-type]
        "fraction: '0.5' is not a finite number in [0, 1]",
    ),
    "progress is NaN": (lambda: pagating.set_progress(gpt2(), float("nan")), "fraction: nan is not a finite number"),
    "arguments are swapped": (
        lambda: pagating.set_progress(0.5, gpt2()),  # type: ignore[arg-type]
        "is not a finite number in [0, 1]",
    ),
    "no model": (lambda: pagating.set_progress(None, 0.5), "model: NoneType is not a torch"),  # type: ignore[arg-type]
    "values of no model": (lambda: pagating.alpha_values("x"), "model: str is not a"),  # type: ignore[arg-type]
    "parameters of no model": (lambda: pagating.alpha_parameters({}), "model: dict is not a"),  # type: ignore[arg-type]
    "owner is a number": (
        lambda: pagating.PaGLU("learnable", owner=5),  # type: ignore[arg-type]
        "owner: int is not a module with the same specification of alpha",
    ),
    "owner is a model": (
        lambda: pagating.PaGLU("learnable", owner=gpt2()),  # type: ignore[arg-type]
        "owner: GPT2LMHeadModel is not a module with the same",
    ),
    "owner has another alpha": (
        lambda: pagating.PaGLU("learnable", owner=pagating.PaGLU()),
        "owner: PaGLU is not a module with the same specification of alpha",
    ),
    "pattern of bytes": (
        lambda: pagating.patch(gpt2(), include=re.compile(b"x")),  # type: ignore[arg-type]
        "include: re.compile(b'x') is neither a name, a glob nor a compiled regular expression",
    ),
    "scripted model": (
        lambda: pagating.patch(torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.GELU()))),
        "model: RecursiveScriptModule is a program of torch.jit; take the model that it was made of",
    ),
    "traced model": (
        lambda: pagating.patch(torch.jit.trace(nn.Sequential(nn.Linear(4, 8), nn.GELU()), torch.ones(2, 4))),
        "is a program of torch.jit",
    ),
    "probe of no model": (lambda: Probe("x"), "model: str is not a torch.nn.Module"),  # type: ignore[arg-type]
    "program of no model": (lambda: export_program("x"), "model: str is not a torch"),  # type: ignore[arg-type]
    "cost of text": (lambda: cost(gpt2(), "8"), "n_ctx='8' is not a whole number in [1, inf)"),  # type: ignore[arg-type]
    "cost of less than nothing": (lambda: cost(gpt2(), -1), "n_ctx=-1 is not a whole number in [1, inf)"),
    "alphas of no optimiser": (
        lambda: separate_alphas("x", gpt2()),  # type: ignore[arg-type]
        "optimizer: str is not a torch.optim.Optimizer",
    ),
    "trial is a dict": (lambda: list(train({})), "trial: dict is not a pagating.trial.Trial"),  # type: ignore[arg-type]
    "pack of text": (lambda: list(train_packed("x")), "trial: str is not a pagating.trial"),  # type: ignore[arg-type]
    "layers of no trial": (lambda: layer_rows(gpt2(), None), "trial: NoneType is not a"),  # type: ignore[arg-type]
    "export into a number": (
        lambda: export_model("/none", "hf", 3),  # type: ignore[arg-type]
        "--into: int is not a path",
    ),
    "export of a number": (lambda: export_model(3, "hf", "x"), "folder: int is not a path"),  # type: ignore[arg-type]
    "patch of no model": (lambda: pagating.unpatch([]), "model: list is not a torch.nn.Module"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_in_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_refused_patch_leaves_the_model_as_it_was() -> None:
    model = gpt2()
    before = dict(model.named_modules())
    for arguments in ({"gate": "none"}, {"alpha": [0.1]}, {"unit": "none"}, {"form": "none"}):
        with pytest.raises(ValueError, match=r"none|a list of 1"):
            pagating.patch(model, **arguments)
    assert dict(model.named_modules()) == before
    assert pagating.patch(model).count == 2


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    pagating.patch(model := gpt2(), alpha={"schedule": {}})
    pagating.set_progress(model, torch.tensor(0.25))  # type: ignore[arg-type]
    assert pagating.alpha_values(model) == [0.25, 0.25]
    assert torch.equal(pagating.pointwise(X, np.float32(0.5)), pagating.pointwise(X, 0.5))
