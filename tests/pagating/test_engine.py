"""The trial engine against Hugging Face's model and torch's own loss."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from pagating import corpus, engine_loss, patch
from pagating.accounting import cost
from pagating.alpha import alpha_parameters, alpha_values
from pagating.competitors import COMPETITORS
from pagating.engine_compile import CHOICES, LEAST_FLOPS, is_compiled
from pagating.engine_loss import chunk_rows, linear_nll, linear_nll_each
from pagating.evaluate import mean_nll, pad_rows, padded_nll, text_rows, token_nll
from pagating.gpt2_plain import GPT2, GPT2Size, stock_flops_per_token, training_flops_per_token
from pagating.initialise import initialise_gpt2
from pagating.train import Trial, train

SIZE = GPT2Size(vocab_size=61, n_ctx=16, d_model=24, n_layer=3, n_head=2, activation="gelu_pytorch_tanh")
PER_LAYER = {"learnable": {"init": 0.4, "per": "layer", "range": "free"}}
ARMS = [
    None,
    {"alpha": 0.0, "base": "stock"},
    {"alpha": 0.0, "base": "gelu"},
    {"alpha": 0.0},
    {"alpha": 0.7, "base": "gelu"},
    {"alpha": [0.0, 0.5, 1.5], "base": "stock"},
    {"alpha": {"learnable": {"init": 0.3}}},
    {"alpha": PER_LAYER, "gate": "tanh"},
    {"alpha": {"learnable": {"per": "channel"}}, "gate": "mish"},
    {"alpha": {"schedule": {"from": 0.2}}, "gate": "gelu"},
    {"alpha": {"token": {"init": 0.4}}, "gate": "relu"},
    {"form": "projected", "alpha": 0.5},
    *({"unit": name} for name in COMPETITORS),
]


def both(unit, size=SIZE, seed=3):
    """The plain model and transformers' model with the same unit, from the same seed."""
    plain = GPT2(size, unit)
    config = GPT2Config(
        vocab_size=size.vocab_size, n_positions=size.n_ctx, n_embd=size.d_model, n_layer=size.n_layer,
        n_head=size.n_head, activation_function=size.activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    reference = GPT2LMHeadModel(config)
    if unit is not None:
        patch(reference, **unit)
    for model in (plain, reference):
        initialise_gpt2(model, seed)
    return plain, reference


def tokens(batch=3, length=13, seed=0):
    return torch.randint(0, SIZE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("unit", ARMS, ids=str)
def test_the_plain_model_is_transformers_gpt2_with_the_same_patch(unit):
    plain, reference = both(unit)
    own, theirs = plain.state_dict(), reference.state_dict()
    assert list(dict(plain.named_parameters())) == list(dict(reference.named_parameters()))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    plain.load_state_dict(theirs)
    reference.load_state_dict(own)
    assert alpha_values(plain) == alpha_values(reference)
    assert [(a.name, a.lr_multiplier) for a in alpha_parameters(plain)] == [
        (a.name, a.lr_multiplier) for a in alpha_parameters(reference)
    ]
    counted = cost(reference, SIZE.n_ctx)
    assert training_flops_per_token(plain) == counted.training_flops_per_token
    ids = tokens()
    for model in (plain.double(), reference.double()):
        for parameter in model.parameters():
            # away from the start, where a wrong bias or a wrong gain would not be seen
            parameter.data += 0.1 * torch.sin(torch.arange(parameter.numel()).double()).view(parameter.shape)
        F.cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    loose = {"rtol": 1e-5, "atol": 1e-6} if unit == {"unit": "xielu"} else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(plain(ids).logits, reference(input_ids=ids).logits, **loose)
    others = dict(reference.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, others[name].grad, **loose)


def test_dropout_falls_on_the_same_elements_as_in_transformers():
    size = GPT2Size(**{**vars(SIZE), "dropout": 0.3})
    plain, reference = both(None, size)
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    outputs = []
    for model in (plain, reference):
        model.train()
        torch.manual_seed(1)
        outputs.append(model(input_ids=tokens()).logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    torch.manual_seed(2)
    assert not torch.allclose(plain(tokens()).logits, outputs[0])
    plain.eval()
    assert torch.equal(plain(tokens()).logits, plain(tokens()).logits)


def test_bfloat16_attention_on_a_cpu_is_causal_and_close_to_float32():
    plain, _ = both(None)
    ids = tokens(length=16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = plain(ids).logits.float()
        changed = plain(torch.cat([ids[:, :8], ids[:, 8:].flip(1)], 1)).logits.float()
    with torch.no_grad():
        exact = plain(ids).logits
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
    assert torch.equal(changed[:, :8], rounded[:, :8])
    assert not torch.equal(changed[:, 8:], rounded[:, 8:])


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ({"colour": 1}, "unit: unknown key 'colour'; allowed: gate, alpha, base, form, unit"),
        ({"unit": "silu", "gate": "tanh"}, "unit: 'silu' settles gate; give one or the other"),
        ({"form": "wide"}, "form: 'wide' is not one of pointwise, scaled, expanded, glu, projected"),
        ({"form": "glu", "base": "gelu"}, "base: 'gelu' has no meaning for form glu; allowed: identity"),
        ({"base": "relu"}, "base: 'relu' is not one of identity, gelu, stock"),
        ({"alpha": [0.1, 0.2]}, "alpha: a list of 2 for 3 layers"),
    ],
)
def test_a_unit_that_patch_refuses_is_refused(unit, message):
    with pytest.raises(ValueError, match=message):
        GPT2(SIZE, unit)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="d_model=10 is not a multiple of n_head=3"):
        GPT2Size(vocab_size=5, n_ctx=4, d_model=10, n_layer=1, n_head=3)
    with pytest.raises(ValueError, match="activation='relu' is not one of gelu_pytorch_tanh, gelu_new"):
        GPT2Size(vocab_size=5, n_ctx=4, d_model=10, n_layer=1, n_head=2, activation="relu")


# --- the loss --------------------------------------------------------------------------------------------------------


def case(n=50, c=7, v=31, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(v, c, generator=generator, dtype=dtype).requires_grad_()
    return x, weight, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("rows", [1, 16, 17, 50, 64])
def test_linear_nll_is_cross_entropy_in_values_and_gradients(monkeypatch, rows):
    monkeypatch.setattr(engine_loss, "LEAST_ROWS", rows)
    monkeypatch.setattr(engine_loss, "CHUNK", 1)
    x, weight, targets = case()
    expected = F.cross_entropy(x @ weight.T, targets)
    wanted = torch.autograd.grad(3.0 * expected, (x, weight))
    got = linear_nll(x, weight, targets)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    for own, reference in zip(torch.autograd.grad(3.0 * got, (x, weight)), wanted, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-12, atol=1e-15)
    each = F.cross_entropy(x @ weight.T, targets, reduction="none")
    torch.testing.assert_close(linear_nll_each(x, weight, targets), each, rtol=1e-13, atol=1e-15)


def test_linear_nll_in_float32_and_bfloat16():
    x, weight, targets = case(dtype=torch.float32)
    expected = F.cross_entropy((x @ weight.T).double(), targets)
    wanted = torch.autograd.grad(expected, (x, weight))
    for precise, tolerance in ((True, 2e-6), (False, 2e-2)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
            got = linear_nll(x, weight, targets)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(expected.item(), rel=tolerance)
        for own, reference in zip(torch.autograd.grad(got, (x, weight)), wanted, strict=True):
            assert own.dtype == torch.float32
            torch.testing.assert_close(own, reference, rtol=tolerance, atol=tolerance / 10)


def test_linear_nll_at_the_limits():
    x, weight, _ = case(n=4, v=1)
    assert linear_nll(x, weight, torch.zeros(4, dtype=torch.long)).item() == 0.0  # one word: nothing to predict
    x, weight, targets = case(n=1)
    assert linear_nll(x, weight, targets).item() == pytest.approx(F.cross_entropy(x @ weight.T, targets).item())
    x, weight, targets = case(dtype=torch.float32)
    got = linear_nll(1e4 * x, weight, targets)  # an exponential of these logits overflows
    assert got.item() == pytest.approx(F.cross_entropy(1e4 * x @ weight.T, targets).item(), rel=1e-6)
    assert math.isnan(linear_nll(torch.full_like(x, math.nan), weight, targets).item())
    frozen = linear_nll(x, weight.detach(), targets)
    frozen.backward()
    assert weight.grad is None
    assert x.grad is not None


def test_linear_nll_refuses_what_it_cannot_do():
    x, weight, targets = case()
    with pytest.raises(ValueError, match=r"shapes \(50, 7\), \(31, 7\), \(49,\) are not \(N, C\), \(V, C\), \(N,\)"):
        linear_nll(x, weight, targets[1:])
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_nll(x, weight, targets + 31)
    loss = linear_nll(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called a second time"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_or_the_weight(monkeypatch):
    monkeypatch.setattr(engine_loss, "CHUNK", 4096)
    monkeypatch.setattr(engine_loss, "LEAST_ROWS", 2)
    x, weight, targets = case(n=512, c=4, v=256, dtype=torch.float32)
    assert chunk_rows(512, 256) == 16
    with Largest() as chunked:
        linear_nll(x, weight, targets).backward()
        linear_nll_each(x, weight, targets)
    assert chunked.elements == 16 * 256
    with Largest() as whole:
        F.cross_entropy(x @ weight.T, targets).backward()
    assert whole.elements == 512 * 256


def test_evaluation_of_the_plain_model_in_chunks_is_that_of_transformers():
    plain, reference = both({"alpha": 0.5})
    windows = tokens(batch=5, length=17)
    assert mean_nll(plain, windows, 2) == pytest.approx(mean_nll(reference, windows, 3), rel=1e-6)
    torch.testing.assert_close(token_nll(plain, windows), token_nll(reference, windows), rtol=1e-5, atol=1e-6)


# --- the published computation ---------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A model whose logits at each position are given."""

    def __init__(self, logits_TV):
        super().__init__()
        self.logits_TV = torch.tensor(logits_TV)

    def forward(self, input_ids):
        self.seen = input_ids
        return type("Output", (), {"logits": self.logits_TV[: input_ids.shape[1]].expand(len(input_ids), -1, -1)})


def test_padded_nll_counts_the_padding_as_the_published_figures_do():
    cases = json.loads((Path(__file__).parents[1] / "known_answers.json").read_text())["cases"]
    known = next(case for case in cases if case["id"] == "padding_mask")
    labels, pads = known["inputs"]["labels"], known["inputs"]["pad_positions"]
    model, pad = Fixed(known["inputs"]["logits"]), labels[pads[0]]
    row = [0, *labels[: pads[0]]]  # the first token is given, not predicted
    assert padded_nll(model, [row], len(labels) + 1, pad, 1) == pytest.approx(known["expected"]["unmasked"], abs=1e-6)
    assert model.seen.tolist() == [[0, *labels[:-1]]]
    assert mean_nll(model, torch.tensor([row]), 1) == pytest.approx(known["expected"]["masked"], abs=1e-6)


def test_rows_are_cut_and_padded_on_the_right():
    assert pad_rows([[1, 2, 3, 4], [5], []], 3, 9).tolist() == [[1, 2, 3], [5, 9, 9], [9, 9, 9]]
    with pytest.raises(ValueError, match="pad_rows: no rows"):
        pad_rows([], 3, 9)


MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16, "activation": "gelu_pytorch_tanh"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} apples\n" for i in range(4000)))
    (base / "validation.txt").write_text("".join(f"line {i}\n\n" for i in range(100)))
    files = {"train": "train.txt", "validation": "validation.txt"}
    return str(corpus.prepare({"files": files}, {"vocab_size": 280}, 16, base / "cache", base))


def make(packed, **changed):
    settings = {"corpus": packed, "model": MODEL, "lr": 3e-3, "tokens": 64 * 12, "batch_tokens": 64, "seed": 5}
    return Trial(**{**settings, **changed})


def test_rows_of_a_packed_corpus_are_its_lines(packed):
    from tokenizers import Tokenizer

    rows, pad = text_rows(packed, "validation", 1000)
    tokenizer = Tokenizer.from_file(str(Path(packed) / "tokenizer.json"))
    assert [tokenizer.decode(row) for row in rows] == [text for i in range(100) for text in (f"line {i}", "")]
    assert pad == 0
    few, _ = text_rows(packed, "validation", 3)
    assert few == [rows[0], rows[100], rows[199]]


def test_a_confirm_trial_reports_the_padded_loss_beside_its_own(packed):
    final = list(train(make(packed, test=True)))[-1]["final"]
    assert math.isfinite(final["padded_nll"])
    assert final["padded_nll"] != final["val_nll"]
    assert "padded_nll" not in list(train(make(packed)))[-1]["final"]


# --- compiled or not -------------------------------------------------------------------------------------------------


def losses(trial):
    return [(row["val_nll"], row["train_nll"], row["grad_norm"]) for row in train(trial)]


def test_whether_a_trial_is_compiled_follows_from_its_specification(packed):
    assert [is_compiled(choice, LEAST_FLOPS, 0.0) for choice in CHOICES] == [True, True, False]
    assert [is_compiled(choice, 0.99 * LEAST_FLOPS, 0.0) for choice in CHOICES] == [False, True, False]
    assert [is_compiled(choice, LEAST_FLOPS, 0.1) for choice in CHOICES] == [False, True, False]
    with pytest.raises(ValueError, match="compile='sometimes' is not one of auto, always, never"):
        make(packed, compile="sometimes")
    plain, _ = both(None)
    assert stock_flops_per_token(SIZE) == training_flops_per_token(plain)
    assert list(train(make(packed)))[-1]["final"]["compiled"] == 0.0


def test_a_trial_needs_no_transformers(packed, tmp_path):
    code = (
        "import sys\nfrom pagating.train import Trial, train\n"
        f"*_, row = train(Trial(corpus={packed!r}, model={MODEL!r}, lr=3e-3, tokens=128, batch_tokens=64, seed=5,"
        " unit={'alpha': 0.5}, test=True))\n"
        "assert row['final']['steps'] == 2\n"
        "print([name for name in ('transformers', 'pandas') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


RUN = """
import json, sys
import torch._dynamo
from pagating.train import Trial, train
spec, units, choices = json.loads(sys.argv[1])
def losses(unit, choice):
    rows = list(train(Trial(**spec, unit=unit, compile=choice)))
    assert rows[-1]["final"]["compiled"] == float(sys.argv[2] == "works" and choice == "always")
    return [[r["val_nll"], r["train_nll"], r["grad_norm"], r["alpha"]] for r in rows]
result, graphs = [], []
for unit in units:
    result.append([losses(unit, choice) for choice in choices])
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
print(json.dumps([result, graphs]))
"""


def run_apart(packed, cache, units, choices, expect="works", **environment):
    """Losses of each unit and choice, and the graphs made so far after each unit, in a process of its own."""
    spec = {"corpus": packed, "model": MODEL, "lr": 3e-3, "tokens": 64 * 12, "batch_tokens": 64, "seed": 5}
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", RUN, json.dumps([spec, units, choices]), expect]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_compiled_trials_agree_with_uncompiled_ones_and_share_graphs(packed, tmp_path):
    """Tolerance: 1e-5 relative on every loss over 12 steps in float32."""
    units = [None, {"alpha": 0.0, "base": "stock"}, {"alpha": 0.3}, {"alpha": 0.6}, {"alpha": 1.7}, {"alpha": 0.0}]
    found, graphs, _ = run_apart(packed, tmp_path / "c", units, ["never", "always"])
    for eager, compiled in found:
        for one, other in zip(eager, compiled, strict=True):
            assert other[:3] == pytest.approx(one[:3], rel=1e-5)
            assert other[3] == one[3]
    assert found[0] == found[1]  # the gate switched off is the stock model, bit for bit, compiled too
    assert found[2] != found[3]
    assert graphs[2] == graphs[3] == graphs[4]  # one graph for every value of alpha
    again, _, _ = run_apart(packed, tmp_path / "c", list(reversed(units)), ["always"])  # from the cache, another order
    assert [row[0] for row in reversed(again)] == [row[1] for row in found]
    fresh, _, _ = run_apart(packed, tmp_path / "d", units[2:3], ["always"])
    assert fresh[0][0] == found[2][1]


@pytest.mark.slow
def test_every_arm_compiles_and_agrees(packed, tmp_path):
    units = [unit for unit in ARMS if unit is None or not isinstance(unit.get("alpha"), list)]
    found, _, _ = run_apart(packed, tmp_path, units, ["never", "always"])
    for unit, (eager, compiled) in zip(units, found, strict=True):
        for one, other in zip(eager, compiled, strict=True):
            assert other[:3] == pytest.approx(one[:3], rel=1e-4), unit


@pytest.mark.slow
def test_without_a_compiler_a_trial_runs_uncompiled_and_says_so_in_one_line(packed, tmp_path):
    nothing = str(tmp_path / "nothing")
    found, _, err = run_apart(packed, tmp_path, [{"alpha": 0.3}], ["never", "always"], "fails", CXX=nothing)
    eager, fallen_back = found[0]
    assert fallen_back == eager
    assert err.count("\n") == 1
    assert err.startswith("pagating: torch.compile does not work here (")
    assert err.endswith("); the trial runs uncompiled\n")
