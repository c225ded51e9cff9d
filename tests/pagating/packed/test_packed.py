"""Tests of a pack of trials against the same trials one by one."""

import json
import math

import pytest
import torch

from pagating import train as alone
from pagating.data import prepare
from pagating.data.corpus import open_split, train_batch
from pagating.device import resolve_device
from pagating.hardware import utilisation
from pagating.model.fused_loss import linear_nll, linear_nll_each
from pagating.model.gpt2 import GPT2, GPT2Size
from pagating.model.initialise import initialise_gpt2
from pagating.packed import loop
from pagating.packed.adamw import Rows, adamw_step, clip_each, factors, flatten
from pagating.packed.loop import main, train_packed
from pagating.packed.model import PackedGPT2, unit_kind
from pagating.train import train
from pagating.trial import Diverged, Trial

torch.set_num_threads(1)
MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 16}
PER_LAYER = {"learnable": {"init": 0.3, "per": "layer", "range": "free", "lr_multiplier": 10.0}}
UNITS = [
    None,
    {"alpha": 0.0},
    {"alpha": 0.5},
    {"alpha": 1.4},
    {"alpha": 0.7, "base": "stock"},
    {"alpha": PER_LAYER},
    {"alpha": {"learnable": {**PER_LAYER["learnable"], "init": 0.8, "lr_multiplier": 3.0}}},
    {"alpha": {"learnable": {"init": 0.6}}},
    {"alpha": {"learnable": {"per": "channel"}}, "gate": "tanh", "base": "gelu"},
    {"alpha": {"schedule": {"from": 0.2}}, "gate": "relu"},
    {"alpha": [0.0, 1.5]},
    {"unit": "swish"},
    {"unit": "xielu"},
    {"alpha": 0.5},
    {"unit": "xielu"},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} brown foxes jump\n" for i in range(2000)))
    return str(prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 16, base / "cache", base))


def make(text, **changed):
    settings = {"corpus": text, "model": MODEL, "lr": 3e-3, "tokens": 64 * 12, "batch_tokens": 64, "seed": 5}
    return Trial(**{**settings, "clip": 0.5, "weight_decay": 0.3, "eval_every": 5, "eval_windows": 8, **changed})


def mixed(text, **changed):
    """Return one trial per arm, each with its own rate, seed, schedule, decay and limit."""
    ways = [{"schedule": "linear", "warmup": 0.3}, {"weight_decay": 0.0}, {"clip": 0.05}, {"final_lr": 0.2}]
    return [
        make(text, unit=unit, seed=i, lr=1e-3 * (1 + i), **{**ways[i % len(ways)], **changed})
        for i, unit in enumerate(UNITS)
    ]


TIMES = ("tokens_per_second", "seconds", "peak_rss_mb", "packed")


def assert_same(entries, trials, tolerance):
    """Check that each row of each trial, `final` included, is that of the trial alone."""
    for i, trial in enumerate(trials):
        assert len(entries) == math.ceil(trial.steps / 5)
        for got, wanted in zip([entry[i] for entry in entries], train(trial), strict=True):
            assert set(got) == set(wanted)
            final, expected = (
                {k: v for k, v in row.pop("final", {}).items() if k not in TIMES} for row in (got, wanted)
            )
            assert got["alpha"] == pytest.approx(wanted.pop("alpha"), rel=tolerance, abs=tolerance)
            kept = {key: value for key, value in got.items() if key not in (*TIMES, "alpha")}
            assert kept == pytest.approx({key: wanted[key] for key in kept}, rel=tolerance), (i, trial.unit)
            assert final == pytest.approx(expected, rel=tolerance), (i, trial.unit)


def test_a_pack_of_all_arms_is_its_trials_one_by_one_in_float64(text, monkeypatch):
    build = alone.build_model
    for module in (alone, loop):
        monkeypatch.setattr(module, "build_model", lambda trial: build(trial).double())
    trials = mixed(text)
    entries = list(train_packed(trials))
    assert [entry[0]["step"] for entry in entries] == [5, 10, 12]
    assert_same(entries, trials, 1e-10)


def test_a_pack_in_float32_and_in_bfloat16(text):
    trials = mixed(text)
    assert_same(list(train_packed(trials)), trials, 1e-4)
    rounded = mixed(text, precision="bfloat16")[:3]
    assert_same(list(train_packed(rounded)), rounded, 1e-2)


@pytest.mark.slow
def test_a_compiled_pack_is_the_uncompiled_one(text, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for choice in ("never", "always"):
        trials = [make(text, unit=unit, seed=i, compile=choice) for i, unit in enumerate(UNITS[:6])]
        found.append(list(train_packed(trials)))
    for one, other in zip(*found, strict=True):
        for eager, compiled in zip(one, other, strict=True):
            finals = eager.pop("final", {"compiled": 0.0}), compiled.pop("final", {"compiled": 1.0})
            assert [final["compiled"] for final in finals] == [0.0, 1.0]
            keys = ("val_nll", "train_nll", "grad_norm")
            assert [compiled[key] for key in keys] == pytest.approx([eager[key] for key in keys], rel=1e-4)


def test_micro_batches_in_a_pack(text):
    trials = [make(text, unit=unit, seed=seed, micro_batch_tokens=16) for seed, unit in enumerate(UNITS[:3])]
    whole = [make(text, unit=unit, seed=seed) for seed, unit in enumerate(UNITS[:3])]
    entries = list(train_packed(trials))
    assert [row["train_nll"] for row in entries[-1]] != [row["train_nll"] for row in list(train_packed(whole))[-1]]
    assert_same(entries, whole, 1e-4)


@pytest.mark.parametrize("unit", [{"unit": "swiglu"}, {"form": "glu", "alpha": PER_LAYER}], ids=str)
def test_gated_linear_units_pack_with_their_like(text, unit):
    trials = [make(text, unit=unit, seed=seed, lr=lr, test=True) for seed, lr in ((1, 1e-3), (2, 5e-3))]
    assert_same(list(train_packed(trials)), trials, 1e-4)


def test_a_trial_that_diverges_ends_alone(text):
    good, bad = make(text, unit={"alpha": 0.5}), make(text, lr=1e30, warmup=0.0, clip=1e30)
    with pytest.raises(Diverged) as reason:
        list(train(bad))
    entries = list(train_packed([bad, good, bad]))
    assert isinstance(entries[0][0], Diverged)
    step = str(reason.value).split(":")[0]
    assert str(entries[0][0]).startswith(f"{step}: ")
    assert [entry[0] for entry in entries[1:]] == [None, None]
    assert_same([[entry[1]] for entry in entries], [good], 1e-4)
    assert len(list(train_packed([bad, bad]))) == 1  # nothing is left to train


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 64 * 13}, "pack: tokens is 832 in one trial and 768 in another"),
        ({"model": {**MODEL, "n_layer": 3}}, "pack: model is .* in one trial and .* in another"),
        ({"unit": {"unit": "swiglu"}}, r"pack: transformer.h.0.mlp.c_fc.weight is \(16, 64\) .* and \(16, 86\)"),
        ({"unit": {"alpha": {"token": {}}}}, "pack: PaGLU, alpha token, has no packed form; train it alone"),
        ({"unit": {"form": "projected"}}, "pack: ProjectedGLU, alpha fixed, has no packed form; train it alone"),
    ],
)
def test_what_is_no_pack_is_refused(text, changed, message):
    with pytest.raises(ValueError, match=message):
        next(train_packed([make(text), make(text, **changed)]))


def test_an_empty_pack_and_dropout_are_refused(text):
    with pytest.raises(ValueError, match="pack: no trials"):
        next(train_packed([]))
    with pytest.raises(ValueError, match=r"pack: dropout=0\.1; a pack has no dropout"):
        next(train_packed([make(text, model={**MODEL, "dropout": 0.1})]))


def test_runs_from_a_json_file(text, tmp_path, capsys):
    spec = {"corpus": text, "model": MODEL, "lr": 3e-3, "tokens": 64 * 4, "batch_tokens": 64, "seed": 5}
    path = tmp_path / "trials.json"
    path.write_text(json.dumps([spec, {**spec, "seed": 6}, {**spec, "lr": 1e30, "warmup": 0.0, "clip": 1e30}]))
    assert main([str(path)]) == 1
    first, second, third = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    *_, row = train(Trial(**spec))
    assert first["outcome"] == second["outcome"] == "completed"
    assert first["val_nll"] == pytest.approx(row["val_nll"], rel=1e-5)
    assert second["val_nll"] != first["val_nll"]
    assert first["packed"] == 3
    assert third["outcome"] == "infeasible"
    assert third["reason"].startswith("step ")
    path.write_text(json.dumps([spec, {**spec, "eval_windows": 3}]))
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: pack: eval_windows is 3 in one trial and 64 in another\n"


def test_the_windows_of_a_pack_are_those_of_each_trial(text, monkeypatch):
    monkeypatch.setattr(loop, "AHEAD", 3)
    trials = [make(text, seed=seed) for seed in (7, 2, 7)]
    tokens = open_split(text, "train")
    for on_gpu in (False, True):  # the tokens as a tensor, as a GPU has them, or mapped
        windows = loop.Windows(trials, 4, torch.device("cpu"))
        windows.on_device_N = torch.from_numpy(tokens.astype("int32")) if on_gpu else None
        for step in (0, 1, 4, 11, 2):
            each = [train_batch(tokens, trial.seed, step, 4, 16) for trial in trials]
            assert torch.equal(windows.at(step), torch.cat(each))
            assert windows.at(step).dtype == torch.int64


# --- the parts -------------------------------------------------------------------------------------------------------


def test_the_packed_model_is_its_models():
    size = GPT2Size(vocab_size=61, n_ctx=16, d_model=24, n_layer=2, n_head=2)
    models = [GPT2(size, unit) for unit in (None, {"alpha": 0.3}, {"alpha": 0.9}, {"alpha": PER_LAYER})]
    for seed, model in enumerate(models):
        initialise_gpt2(model, seed)
        model.double()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.sin(torch.arange(parameter.numel()).double() + seed).view(parameter.shape)
    models.sort(key=unit_kind)
    ids = torch.randint(0, 61, (4 * 3, 13), generator=torch.Generator().manual_seed(0))
    expected = torch.cat([model(part).logits for model, part in zip(models, ids.split(3), strict=True)])
    alphas = [model.transformer.h[0].mlp.act for model in models]
    wanted = [[] if not hasattr(act, "alpha") else [float(torch.as_tensor(act.alpha()).detach())] * 2 for act in alphas]
    pack = PackedGPT2(models)
    torch.testing.assert_close(pack(ids).logits, expected.detach(), rtol=1e-12, atol=1e-13)
    assert pack.alphas() == [pytest.approx(values) for values in wanted]


def test_linear_nll_of_several_models():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 7, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 31, 7, generator=generator, dtype=torch.float64).requires_grad_()
    targets, scale = torch.randint(0, 31, (3, 50), generator=generator), torch.tensor([1.0, 2.0, -0.5]).double()
    alone = torch.stack([linear_nll(x[k], weight[k], targets[k]) for k in range(3)])
    wanted = torch.autograd.grad(alone @ scale, (x, weight))
    together = linear_nll(x, weight, targets)
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=0)
    for own, reference in zip(torch.autograd.grad(together @ scale, (x, weight)), wanted, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-12, atol=1e-15)
    each = torch.stack([linear_nll_each(x[k], weight[k], targets[k]) for k in range(3)])
    torch.testing.assert_close(linear_nll_each(x, weight, targets), each, rtol=1e-13, atol=1e-15)
    with pytest.raises(ValueError, match=r"shapes \(3, 50, 7\), \(2, 31, 7\), \(3, 50\) are not"):
        linear_nll(x, weight[:2], targets)


def test_steps_of_a_pack_are_torchs_adamw_and_clipping_trial_by_trial():
    """Compare two trials. Only the second has a parameter of its own, with a rate multiplier."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    vector, own = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5), (1, 1, 1)))
    lrs, decays, limits = [1e-2, 3e-3], [0.1, 0.5], [0.5, 1e9]
    singles, optimizers = [], []
    for k in range(2):
        mine = [torch.nn.Parameter(matrix[k].clone()), torch.nn.Parameter(vector[k].clone())]
        groups = [{"params": mine[:1], "weight_decay": decays[k]}, {"params": mine[1:], "weight_decay": 0.0}]
        if k == 1:
            mine.append(torch.nn.Parameter(own[0].clone()))
            groups.append({"params": mine[2:], "weight_decay": 0.0, "lr": 7.0 * lrs[k]})
        singles.append(mine)
        optimizers.append(torch.optim.AdamW(groups, lr=lrs[k], betas=(0.9, 0.95)))
    rows = [torch.nn.Parameter(tensor.clone()) for tensor in (matrix, vector, own)]
    flats = [flatten([Rows(rows[0], 0)], 2, True), flatten([Rows(rows[1], 0), Rows(rows[2], 1, [7.0])], 2, False)]
    assert rows[2].data_ptr() == flats[1].value[1, 5:].data_ptr()
    for step in range(1, 4):
        grads = [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in mine] for mine in singles]
        for row, part in zip(rows, range(3), strict=True):
            mine = [grads[k][part] for k in range(2) if part < len(grads[k])]
            row.grad.add_(torch.stack(mine))
        norms = clip_each(flats, torch.tensor(limits, dtype=torch.float64))
        adamw_step(flats, step, flats[0].value.new_tensor(factors(step, lrs, decays, 0.9)), 0.9, 0.95)
        for k, mine in enumerate(singles):
            for parameter, grad in zip(mine, grads[k], strict=True):
                parameter.grad = grad
            wanted = torch.nn.utils.clip_grad_norm_(mine, limits[k])
            assert norms[k].item() == pytest.approx(wanted.item(), rel=1e-12)
            optimizers[k].step()
            for parameter, row in zip(mine, rows, strict=False):
                torch.testing.assert_close(row[k - 2 + row.shape[0]], parameter, rtol=1e-12, atol=1e-14)
    assert all(not flat.grad.any() for flat in flats)


def test_devices_and_utilisation():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device='tpu' is not one of cpu, cuda, auto"):
        resolve_device("tpu")
    assert utilisation(10**9, 1e5, "NVIDIA H100 80GB HBM3") == pytest.approx(1e14 / 989e12)
    assert utilisation(10**9, 1e5, "NVIDIA H100 PCIe") == pytest.approx(1e14 / 756e12)
    assert utilisation(10**9, 1e5, "a device that nobody knows") is None
    assert math.isclose(utilisation(10**9, 312e3, "NVIDIA A100-SXM4-80GB"), 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(text):
    with pytest.raises(ValueError, match="device='cuda': torch sees no CUDA device; choose cpu or auto"):
        next(train_packed([make(text, device="cuda")]))
