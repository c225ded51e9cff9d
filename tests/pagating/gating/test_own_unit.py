"""Tests of activations that are defined in a user's file."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import pagating
from pagating.data.prepare import prepare
from pagating.gating.catalog import OWN_UNITS
from pagating.gating.own_gate import grows, load_own, register_gate, register_unit
from pagating.model.gpt2 import GPT2Size, activations
from pagating.packed.loop import train_packed
from pagating.tasks.table import task_of
from pagating.train import Trial, build_model, build_optimizer, train

torch.set_num_threads(1)
SIZE = {"n_layer": 2, "d_model": 8, "n_head": 2, "n_ctx": 16}
FILE = """
import torch
from torch import nn


def snake(x):
    return x + torch.sin(x) ** 2


def silu(x):
    return x * torch.sigmoid(x)


class Snake(nn.Module):
    def __init__(self, features, start=1.0):
        super().__init__()
        self.rate = nn.Parameter(torch.full((features,), start))
        self.mix = nn.Parameter(torch.eye(2))

    def forward(self, x):
        return x + torch.sin(self.rate * x) ** 2 * self.mix.sum() / 2


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return torch.tanh(self.a * x)


prelu = nn.PReLU()
"""


@pytest.fixture(autouse=True)
def _no_own_unit_remains():
    yield
    OWN_UNITS.clear()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "act.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    corpus = prepare({"files": {"train": "text.txt"}}, {"vocab_size": 260}, 16, tmp_path / "cache", tmp_path)
    size = {"corpus": str(corpus), "model": SIZE, "lr": 1e-2, "tokens": 640, "batch_tokens": 64, "seed": 1}
    return {**size, "eval_windows": 4}


def last(spec, **changed):
    *_, row = train(Trial(**{**spec, **changed}))
    return row["val_nll"], row["train_nll"]


def test_the_activation_is_the_function_itself(file):
    unit = {"unit": f"{file}:snake"}
    acts = activations(GPT2Size(11, 16, 8, 2, 2), unit)
    x = torch.randn(3, 32)
    for act in acts:
        assert torch.equal(act(x), x + torch.sin(x) ** 2)
    register_gate("snake gate", lambda x: x + torch.sin(x) ** 2)
    (wrong, _) = activations(GPT2Size(11, 16, 8, 2, 2), {"gate": "snake gate", "alpha": 1.0})
    assert torch.equal(wrong(x), x * (x + torch.sin(x) ** 2))


def test_a_known_activation_from_a_file_trains_to_the_same_loss(spec, file):
    own, known = (last(spec, unit={"unit": unit}) for unit in (f"{file}:silu", "silu"))
    assert own == pytest.approx(known, rel=1e-5)
    assert own != pytest.approx(last(spec, unit={"unit": f"{file}:snake"}), rel=1e-5)


def test_the_parameters_of_a_module_are_the_layers_own_and_are_trained(spec, file):
    trial = Trial(**spec, unit={"unit": f"{file}:Snake"})
    model = build_model(trial)
    own = {name: p for name, p in model.named_parameters() if ".act." in name}
    assert {name: tuple(p.shape) for name, p in own.items()} == {
        f"transformer.h.{layer}.mlp.act.base.{name}": shape
        for layer in range(2)
        for name, shape in (("rate", (32,)), ("mix", (2, 2)))
    }
    matrices, rest = build_optimizer(model, trial).param_groups[:2]
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for name, p in own.items() if name.endswith("mix")} < {id(p) for p in matrices["params"]}
    assert {id(p) for name, p in own.items() if name.endswith("rate")} < {id(p) for p in rest["params"]}
    before = {name: p.detach().clone() for name, p in own.items()}
    assert all(torch.equal(p, torch.ones(32)) for name, p in before.items() if name.endswith("rate"))
    task_of(trial).loss(trial, model, task_of(trial).batches(trial)(0))(
        model, task_of(trial).batches(trial)(0)
    ).backward()
    build_optimizer(model, trial).step()
    assert not any(torch.equal(before[name], p) for name, p in own.items())


def test_random_start_values_follow_the_seed_alone(spec, file):
    unit = {"unit": f"{file}:Random"}

    def starts(seed):
        torch.manual_seed(seed + 5)
        model = build_model(Trial(**{**spec, "unit": unit, "seed": seed}))
        return [model.get_parameter(f"transformer.h.{layer}.mlp.act.base.a").item() for layer in range(2)]

    (one, two), again, other = starts(1), starts(1), starts(2)
    assert [one, two] == again
    assert len({one, two, *other}) == 4
    stock = build_model(Trial(**spec)).state_dict()
    own = build_model(Trial(**spec, unit=unit)).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in stock.items())


@pytest.mark.parametrize("task", ["masked", "span"])
def test_the_other_tasks_take_it_too(spec, file, task):
    own, known = (last(spec, unit={"unit": unit}, task=task) for unit in (f"{file}:silu", "silu"))
    assert own == pytest.approx(known, rel=1e-5)
    assert last(spec, unit={"unit": f"{file}:prelu"}, task=task) != own


def test_a_pack_takes_a_function_and_refuses_a_module(spec, file):
    units = [{"unit": f"{file}:snake"}, {"unit": f"{file}:silu"}, {"unit": f"{file}:snake"}]
    trials = [Trial(**{**spec, "unit": unit, "seed": seed}) for seed, unit in enumerate(units)]
    *_, rows = train_packed(trials)
    assert [row["val_nll"] for row in rows] == pytest.approx([last(spec, unit=t.unit, seed=t.seed)[0] for t in trials])
    with pytest.raises(ValueError, match="pack: base PReLU has no packed form; train it alone"):
        list(train_packed([Trial(**spec, unit={"unit": f"{file}:prelu"})]))


def test_any_model_takes_it():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, vocab_size=11)).eval()
    tokens = torch.arange(11)[None]
    pagating.patch(model, unit="silu")
    expected = model(tokens).logits
    pagating.unpatch(model)
    pagating.register_unit("mine", nn.SiLU())
    report = pagating.patch(model, unit="mine")
    assert report.parameters_added == 0
    assert torch.equal(model(tokens).logits, expected)
    pagating.unpatch(model)
    pagating.register_unit("learned", nn.PReLU)
    assert pagating.patch(model, unit="learned").parameters_added == 2


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ({"unit": "none"}, "unit: 'none' is not one of gelu, linear"),
        ({"unit": "evil.py:mine"}, "unit: 'evil.py:mine' is not one of gelu, linear"),
        ({"unit": "mine", "alpha": 0.5}, "unit: 'mine' settles alpha; give one or the other"),
        ({"unit": "mine", "base": "gelu"}, "unit: 'mine' settles base"),
        ({"base": "mine"}, "base: 'mine' is not one of identity, gelu"),
    ],
)
def test_what_a_patch_refuses(unit, message):
    register_unit("mine", torch.tanh)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=11))
    with pytest.raises(ValueError, match=message):
        pagating.patch(model, **unit)


REFUSED = {
    "cut": (
        "def mine(x):\n    return torch.tanh(x).detach()\n",
        "unit: .* has no gradient, although its values change",
    ),
    "dropout": ("mine = nn.Dropout(0.5)\n", "draws random numbers"),
    "batch norm": ("mine = nn.BatchNorm1d(3)\n", "mixes tokens|fails on|when it is called again"),
    "recurrent": ("mine = nn.GRU\n", "needs the arguments|cannot be made"),
    "idle parameter": (
        "class mine(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a = nn.Parameter(torch.ones(()))\n    def forward(self, x):\n"
        "        return torch.tanh(x) * self.a.item()\n",
        "its parameter 'a' gets no gradient",
    ),
    "arguments": (
        "class mine(nn.Module):\n    def __init__(self, one, two):\n        super().__init__()\n",
        "needs the arguments one, two; allowed: none, or the number of features",
    ),
    "constructor": (
        "class mine(nn.Module):\n    def __init__(self):\n        raise OSError('no disk')\n",
        "cannot be made for 4 features: OSError: no disk",
    ),
    "plain class": (
        "class mine:\n    def __init__(self, x):\n        self.x = x\n",
        "is a class that is no nn.Module; give an instance of it, or make it a module",
    ),
    "ends the process": ("def mine(x):\n    raise SystemExit(0)\n", "fails on a tensor .*: SystemExit: 0"),
    "gate row": (
        "from pagating.gating.gates import GATES\nmine = GATES['tanh']\n",
        "is a Gate; a unit is a function, a module or a class of modules",
    ),
    "parameter outside": (
        "a = nn.Parameter(torch.ones(()))\ndef mine(x):\n    return torch.tanh(a * x)\n",
        "uses a parameter that would not be trained",
    ),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_activation_is_refused_in_one_line(tmp_path, body, message):
    path = tmp_path / "own.py"
    path.write_text("import torch\nfrom torch import nn\n" + body)
    with pytest.raises(ValueError, match=message) as caught:
        load_own("unit", f"{path}:mine")
    assert "\n" not in str(caught.value)
    assert not OWN_UNITS


@pytest.mark.parametrize("name", ["gelu", "identity", "stock"])
def test_a_known_unit_is_not_replaced(name):
    with pytest.raises(ValueError, match=f"'{name}' is a known unit; register yours under another name"):
        register_unit(name, torch.tanh)


def test_a_gate_that_grows_like_an_activation_is_told_from_one_that_does_not():
    for name, gate, expected in (
        ("snake", lambda x: x + torch.sin(x) ** 2, True),
        ("own relu", torch.relu, True),
        ("cube", lambda x: x**3, True),
        ("own sigmoid", torch.sigmoid, False),
        ("far", lambda x: 100 + torch.tanh(x), False),
        ("wave", torch.sin, False),
        ("log", lambda x: torch.log1p(x.abs()), False),
    ):
        register_gate(name, gate)
        assert grows(name) is expected, name
