"""Tests of gates that are defined in a user's file."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import pagating
from pagating.data.prepare import prepare
from pagating.gating.gates import GATES, Gate, gate_row
from pagating.gating.own_gate import grows, load_own, register_gate, register_unit
from pagating.gating.units import PaGLU, pointwise
from pagating.train import Trial, main, train

torch.set_num_threads(1)
SIZE = {"n_layer": 1, "d_model": 8, "n_head": 2, "n_ctx": 16}


@pytest.fixture(autouse=True)
def _only_the_built_in_gates_remain():
    before = dict(GATES)
    yield
    GATES.clear()
    GATES.update(before)


def own(folder, body, name="mine"):
    """Write a gate's file into a folder. Return the reference to the gate."""
    path = folder / "own.py"
    path.write_text("import torch\n" + body)
    return f"{path}:{name}"


def hard(x):
    return torch.clamp(x / 6 + 0.5, 0.0, 1.0)


def test_an_own_gate_makes_the_unit_that_its_formula_says():
    register_gate("hard", hard)
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(pointwise(x, 1.0, "hard"), F.hardswish(x))
    torch.testing.assert_close(pointwise(x, 0.25, "hard"), 0.25 * F.hardswish(x) + 0.75 * x)


def test_a_row_brings_its_own_product():
    row = Gate(torch.sigmoid, F.silu, "sigmoid", (0.0, 1.0), (0.0, float("inf")), "mine", "none")
    assert register_gate("again", row) is row
    x = torch.randn(50)
    assert torch.equal(pointwise(x, 1.0, "again"), F.silu(x))


def test_any_model_takes_it():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, vocab_size=11)).eval()
    tokens = torch.arange(11)[None]
    pagating.patch(model, gate="tanh", alpha=0.5)
    expected = model(tokens).logits
    pagating.unpatch(model)
    pagating.register_gate("mine", torch.tanh)
    pagating.patch(model, gate="mine", alpha=0.5)
    assert torch.equal(model(tokens).logits, expected)


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    corpus = prepare({"files": {"train": "text.txt"}}, {"vocab_size": 260}, 16, tmp_path / "cache", tmp_path)
    return {"corpus": str(corpus), "model": SIZE, "lr": 1e-2, "tokens": 1280, "batch_tokens": 64, "seed": 1}


def test_the_same_gate_from_a_file_trains_to_the_same_bits(spec, tmp_path):
    finals = {}
    for gate in ("tanh", own(tmp_path, "def mine(x):\n    return torch.tanh(x)\n"), "silu"):
        unit = {"gate": gate, "alpha": {"learnable": {"init": 0.5}}}
        *_, row = train(Trial(**spec, unit=unit, eval_windows=4))
        finals[gate] = row["val_nll"], row["train_nll"], row["alpha"]
    built_in, mine, other = finals.values()
    assert mine == built_in
    assert other != built_in


def test_a_trial_whose_gate_is_missing_is_refused_in_one_line(spec, tmp_path, capsys):
    path = tmp_path / "trial.json"
    path.write_text(json.dumps({**spec, "unit": {"gate": "none.py:mine", "alpha": 1.0}}))
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: gate: 'none.py:mine': none.py: No such file or directory\n"


def test_a_changed_file_is_read_again(tmp_path):
    reference = own(tmp_path, "def mine(x):\n    return torch.tanh(x)\n")
    load_own("gate", reference)
    first = gate_row(reference)
    load_own("gate", reference)
    assert gate_row(reference) is first
    load_own("gate", own(tmp_path, "def mine(x):\n    return torch.sigmoid(x)\n"))
    assert gate_row(reference).gate(torch.zeros(())) == 0.5


def test_a_checkpoint_that_names_a_file_does_not_run_it(tmp_path):
    reference = own(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')\ndef mine(x):\n    return torch.tanh(x)\n")
    config = pagating.PaGPT2Config(gate=reference, n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=11)
    with pytest.raises(ValueError, match="is not one of sigmoid, tanh"):
        pagating.PaGPT2LMHeadModel(config)
    assert not (tmp_path / "ran").exists()


REFUSED = {
    "syntax": ("def mine(x) return x\n", r"cannot be imported: SyntaxError: expected ':'"),
    "import": (
        "import no_such_package\n",
        "cannot be imported: ModuleNotFoundError: No module named",
    ),
    "name": ("def other(x):\n    return x\n", "defines no 'mine'; it defines other$"),
    "relative": ("from .helper import mine\n", "relative import .*; a study keeps own.py alone: put what it needs"),
    "dtype at import": (
        "torch.set_default_dtype(torch.float64)\nmine = torch.tanh\n",
        "torch's gradient mode, default",
    ),
    "exit": ("def mine(x):\n    raise SystemExit(0)\n", r"fails on a tensor of shape \(2, 3, 4\): SystemExit: 0"),
    "not a function": ("mine = 3\n", "is int, neither a function nor a Gate"),
    "shape": ("def mine(x):\n    return x.sum()\n", r"makes \(\) torch.float32 of \(2, 3, 4\) torch.float32"),
    "dtype": ("def mine(x):\n    return torch.tanh(x.double())\n", "torch.float64 of"),
    "not a tensor": ("def mine(x):\n    return 0.5\n", "makes float of"),
    "tokens": ("def mine(x):\n    return x.softmax(dim=-2)\n", "mixes tokens: a token alone"),
    "the batch": ("def mine(x):\n    return x - x.mean(0)\n", "mixes tokens: a token alone"),
    "noise": ("def mine(x):\n    return x + torch.rand_like(x)\n", "draws random numbers or sets torch's seed"),
    "infinite": ("def mine(x):\n    return torch.exp(100 * x)\n", "is not finite between -4 and 4"),
    "gradient": ("def mine(x):\n    return x.abs().sqrt().round() + (x * 0).sqrt()\n", "gradient is not finite"),
    "raises": ("def mine(x):\n    return x @ x\n", r"fails on a tensor of shape \(2, 3, 4\): RuntimeError"),
    "module": ("mine = torch.nn.PReLU()\n", "is a module or a class, whose parameters would not be trained"),
    "class": ("mine = torch.nn.PReLU\n", "is a module or a class, whose parameters would not be trained"),
    "ends the process": ("raise SystemExit(3)\n", "cannot be imported: SystemExit: 3"),
    "detached": ("def mine(x):\n    return torch.sigmoid(x).detach()\n", "has no gradient, although its values change"),
    "data": ("def mine(x):\n    return torch.sigmoid(x.data)\n", "has no gradient, although its values change"),
    "no grad": ("@torch.no_grad()\ndef mine(x):\n    return torch.sigmoid(x)\n", "has no gradient, although"),
    "numpy": (
        "import numpy\ndef mine(x):\n    return torch.from_numpy(numpy.tanh(x.detach().numpy()))\n",
        "has no gradient, although",
    ),
    "attached numpy": ("def mine(x):\n    return torch.from_numpy(x.numpy())\n", r"fails on .*Can't call numpy\(\)"),
    "round": ("mine = torch.round\n", "has no gradient, although"),
    "sign": ("mine = torch.sign\n", "has no gradient, although"),
    "comparison": ("def mine(x):\n    return (x > 0).to(x.dtype)\n", "has no gradient, although"),
    "heaviside": (
        "def mine(x):\n    return torch.heaviside(x, x * 0)\n",
        "its gradient cannot be computed: RuntimeError",
    ),
    "cut in half": (
        "def mine(x):\n    return x.detach() * torch.sigmoid(x)\n",
        "its gradient is not its slope at 100%",
    ),
    "cut above 0": (
        "def mine(x):\n    return torch.where(x > 0, torch.sigmoid(x).detach(), torch.sigmoid(x))\n",
        r"its gradient is not its slope at \d\d%",
    ),
    "item": ("def mine(x):\n    return torch.sigmoid(x / x.abs().max().item())\n", "mixes tokens: a token alone"),
    "in place": ("def mine(x):\n    return x.clamp_(0, 1)\n", "changes its argument in place"),
    "in place on data": (
        "def mine(x):\n    x.data.mul_(0.5)\n    return torch.tanh(x)\n",
        "changes its argument in place",
    ),
    "seed": (
        "def mine(x):\n    torch.manual_seed(0)\n    return torch.tanh(x)\n",
        "draws random numbers or sets torch's",
    ),
    "other noise": ("import random\ndef mine(x):\n    return x * random.random()\n", "when it is called again"),
    "counter": (
        "calls = []\ndef mine(x):\n    calls.append(1)\n    return torch.tanh(x * len(calls))\n",
        "gives other values for the same input when it is called again",
    ),
    "settings": (
        "def mine(x):\n    torch.set_grad_enabled(False)\n    return torch.tanh(x)\n",
        "torch's gradient mode",
    ),
    "parameter": (
        "a = torch.nn.Parameter(torch.ones(()))\ndef mine(x):\n    return torch.tanh(a * x)\n",
        "uses a parameter that would not be trained",
    ),
    "width": ("def mine(x):\n    return torch.tanh(x * torch.ones(4))\n", r"fails on a tensor of shape \(2, 3, 6\)"),
}
LEGAL = {
    "relu": "mine = torch.relu\n",
    "hard sigmoid": "mine = torch.nn.functional.hardsigmoid\n",
    "flat within the inputs": "def mine(x):\n    return torch.relu(x - 5)\n",
    "steep": "def mine(x):\n    return torch.sigmoid(1000 * x)\n",
    "oscillates": "def mine(x):\n    return torch.sin(20 * x)\n",
    "constant": "def mine(x):\n    return torch.full_like(x, 0.5)\n",
    "large and small": "def mine(x):\n    return 100 + 1e-3 * torch.tanh(x)\n",
    "over the features": "def mine(x):\n    return x.softmax(dim=-1)\n",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    a: 'int' = 1\nmine = torch.tanh\n",
    "step with a gradient of its own": (
        "class Step(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, x):\n        return x.round()\n"
        "    @staticmethod\n    def backward(ctx, grad):\n        return grad\n"
        "mine = Step.apply\n"
    ),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("body", LEGAL.values(), ids=LEGAL)
def test_what_is_a_gate_is_taken(tmp_path, body, precision):
    reference = own(tmp_path, body)
    load_own("gate", reference, precision)
    assert reference in GATES


def test_a_precision_that_a_gate_does_not_keep_is_refused_only_if_it_is_asked_for(tmp_path):
    reference = own(tmp_path, "def mine(x):\n    return torch.tanh(x.float())\n")
    load_own("gate", reference)
    with pytest.raises(ValueError, match=r"makes \(2, 3, 4\) torch.float32 of \(2, 3, 4\) torch.bfloat16"):
        load_own("gate", reference, "bfloat16")


def test_a_check_leaves_torch_as_it_was(tmp_path):
    state = torch.get_rng_state()
    body = "torch.manual_seed(3)\ndef mine(x):\n    torch.set_default_dtype(torch.float64)\n    return torch.tanh(x)\n"
    with torch.no_grad(), pytest.raises(ValueError, match="changes torch's gradient mode, default dtype or threads"):
        load_own("gate", own(tmp_path, body))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode(), torch.device("meta"):
        load_own("gate", own(tmp_path, "mine = torch.tanh\n"))


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_gate_is_refused_in_one_line(tmp_path, body, message):
    reference = own(tmp_path, body)
    with pytest.raises(ValueError, match=message) as caught:
        load_own("gate", reference)
    assert "\n" not in str(caught.value)
    assert reference not in GATES


def test_a_built_in_gate_is_not_replaced():
    with pytest.raises(ValueError, match="'tanh' is a built-in gate; register yours under another name"):
        register_gate("tanh", torch.sigmoid)


def test_a_row_whose_parts_disagree_is_refused():
    row = Gate(torch.sigmoid, torch.tanh, "", (0.0, 1.0), (0.0, 1.0), "", "")
    with pytest.raises(ValueError, match=r"gated\(x\) is not x \* gate\(x\)"):
        register_gate("torn", row)


def test_a_file_that_needs_the_file_beside_it_is_told_so(tmp_path):
    (tmp_path / "helper.py").write_text("")
    with pytest.raises(ValueError, match=r"No module named 'helper'; a study keeps own.py alone: put what it needs"):
        load_own("gate", own(tmp_path, "from helper import mine\n"))
    with pytest.raises(ValueError, match=r"No module named 'elsewhere'$"):
        load_own("gate", own(tmp_path, "from elsewhere import mine\n"))


def test_what_a_file_prints_and_sets_does_not_reach_the_caller(tmp_path, capsys):
    load_own("gate", own(tmp_path, "print('read')\ndef mine(x):\n    print('called')\n    return torch.tanh(x)\n"))
    assert capsys.readouterr().out == ""
    before = torch.get_default_dtype()
    with pytest.raises(ValueError, match="default dtype"):
        load_own("gate", own(tmp_path, "torch.set_default_dtype(torch.float64)\nmine = torch.tanh\n"))
    assert torch.get_default_dtype() == before


def test_a_gate_under_torch_compile_is_checked_without_compiling(tmp_path):
    never = "def never(graph, inputs):\n    raise RuntimeError('compiled')\n"
    reference = own(tmp_path, f"{never}@torch.compile(backend=never)\ndef mine(x):\n    return torch.tanh(x)\n")
    load_own("gate", reference)
    assert not grows(reference)


NOT_FINITE = {
    "overflows": (lambda x: torch.exp(x) / (1 + torch.exp(x)), "is not finite at x = 100 in torch.float32"),
    "at zero": (lambda x: torch.sin(x) / x, "is not finite at x = 0 in torch.float32"),
    "far": (lambda x: torch.where(x.abs() > 500, float("inf"), torch.tanh(x)), "is not finite at x = 1000 in"),
    "infinite": (lambda x: torch.where(x < -50, torch.exp(-x * 0.9), torch.sigmoid(x)), "is not finite at x = -100 in"),
    "its slope": (
        lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x))),
        "its gradient is not finite at x = 100 in torch.float32; a trial would diverge",
    ),
    "its slope at zero": (lambda x: x.abs().sqrt(), "its gradient is not finite at x = 0 in torch.float32"),
    "asserts": (
        lambda x: torch.tanh(x) if x.abs().max() < 10 else 1 / 0,
        r"fails on a tensor of shape \(1, 1, 4\): ZeroDivisionError: division by zero$",
    ),
    "in float32 alone": (
        lambda x: torch.tanh(x.float()),
        r"makes \(2, 3, 4\) torch.float32 of \(2, 3, 4\) torch.bfloat16; it must keep shape and dtype",
    ),
}


@pytest.mark.parametrize(("gate", "message"), NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("register", [register_gate, register_unit])
def test_a_function_is_tried_at_large_arguments_and_in_bfloat16(register, gate, message):
    with pytest.raises(ValueError, match=message) as caught:
        register("mine", gate)
    assert "\n" not in str(caught.value)
    assert "mine" not in GATES


def test_a_patched_model_keeps_the_gate_that_it_has():
    tokens = torch.arange(11)[None]
    for form in ("pointwise", "glu"):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=11)).eval()
        register_gate("mine", hard)
        pagating.patch(model, gate="mine", form=form)
        before = model(tokens).logits
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        register_gate("mine", torch.tanh)
        for same in (model, copied, pickled):
            assert torch.equal(same(tokens).logits, before)
        pagating.unpatch(model)
        pagating.patch(model, gate="mine", form=form)
        assert not torch.allclose(model(tokens).logits, before, atol=1e-4)


def test_an_own_gate_compiles_without_a_break():
    register_gate("mine", hard)
    unit, x = PaGLU(0.5, "mine"), torch.randn(3, 4)
    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), unit(x))


def test_a_module_without_parameters_is_a_gate():
    register_gate("mine", torch.nn.Sigmoid())
    x = torch.randn(50)
    assert torch.equal(pointwise(x, 1.0, "mine"), x * torch.sigmoid(x))
    with pytest.raises(ValueError, match="is a module or a class, whose parameters would not be trained"):
        register_gate("other", torch.nn.PReLU())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tanh, "mine"), "is not a name; give the name first, then the function"),
        (("", torch.tanh), "'' is not a name"),
        ((["a"], torch.tanh), r"\['a'\] is not a name"),
        (("mine", "tanh"), "'mine' is str, not a function"),
        (("mine", None), "'mine' is NoneType, not a function"),
        (("mine", torch.tanh, "float8"), "precision: 'float8' is not one of float32, bfloat16, float16, float64"),
        (("mine", torch.tanh, torch.bfloat16), "precision: torch.bfloat16 is not one of float32"),
    ],
)
@pytest.mark.parametrize("register", [register_gate, register_unit])
def test_arguments_that_register_nothing(register, arguments, message):
    with pytest.raises(ValueError, match=message):
        register(*arguments)


def test_a_reference_that_was_registered_as_another_function_is_loaded_again(tmp_path):
    reference = own(tmp_path, "import torch\n\n\ndef mine(x):\n    return torch.tanh(x)\n")
    load_own("gate", reference)
    register_gate(reference, torch.cos)
    load_own("gate", reference)
    assert GATES[reference].gate(torch.tensor(0.0)) == 0.0


def test_a_function_of_three_axes_is_checked_patched_and_recorded(tmp_path):
    for key, register in (("gate", register_gate), ("unit", register_unit)):
        register("three axes", lambda x: torch.einsum("btf->btf", torch.sigmoid(2 * x)))
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=11)).eval()
        pagating.patch(model, **{key: "three axes"})
        model.save_pretrained(tmp_path)
        ids = torch.arange(8)[None]
        assert torch.equal(pagating.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
