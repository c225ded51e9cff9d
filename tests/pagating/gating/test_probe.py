"""Tests of the probe: known ranks and shares, and hooks that change nothing and are removed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import pagating
from pagating.gating.probe import (
    Probe,
    dead_share,
    effective_rank,
    gate_statistics,
    linear_share,
    negative_slope_share,
    openness,
)

torch.set_num_threads(1)
IDS = torch.randint(1, 37, (2, 9), generator=torch.Generator().manual_seed(1))


def gpt2(n_embd: int = 16) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=37, n_positions=32, n_embd=n_embd, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def test_effective_rank_of_matrices_whose_rank_is_known() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7.0)
    assert effective_rank(torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 4.0))) == pytest.approx(1.0, abs=1e-9)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2.0)
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert effective_rank(torch.diag(p)) == pytest.approx(math.exp(-float((p * p.log()).sum())))
    assert effective_rank(torch.zeros(3, 4)) == 0.0


def test_linear_share() -> None:
    x = torch.linspace(-1, 1, 101)
    assert linear_share(x, -3 * x + 1) == pytest.approx(1.0)
    assert linear_share(x, x.square()) == pytest.approx(0.0, abs=1e-12)
    # relu = x/2 + |x|/2 with uncorrelated halves: var(x/2) / (var(x/2) + var(|x|/2)) = (1/3) / (1/3 + 1/12) for large n
    fine = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    assert linear_share(fine, fine.clamp(min=0)) == pytest.approx(0.8, abs=1e-4)


def test_gate_statistics_by_hand() -> None:
    x = torch.tensor([-100.0, 0.0, 0.0, 100.0])
    assert gate_statistics("sigmoid", x) == {
        "gate_mean": pytest.approx(0.5),
        "gate_std": pytest.approx(math.sqrt(0.125)),
        "gate_saturated": 0.5,
    }
    assert gate_statistics("relu", x)["gate_saturated"] == 0.75
    assert gate_statistics("linear", x)["gate_saturated"] == 0.0


@pytest.mark.parametrize(
    "unit",
    [
        {"alpha": 0.5},
        {"alpha": "learnable", "base": "gelu"},
        {"alpha": {"token": {"init": 0.25}}},
        {"unit": "swiglu"},
        {"unit": "swish"},
        {"form": "projected", "gate": "tanh"},
    ],
    ids=str,
)
def test_rows_hold_what_the_layers_did(unit: dict[str, Any]) -> None:
    model = gpt2()
    pagating.patch(model, **unit)
    kept: dict[str, torch.Tensor] = {}
    module = model.transformer.h[1].mlp.act

    def keep(m: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        kept.update(x=inputs[0].detach(), y=output.detach())
        output.register_hook(lambda grad: kept.__setitem__("grad", grad))

    handle = module.register_forward_hook(keep)
    with Probe(model) as probe:
        model(input_ids=IDS, labels=IDS).loss.backward()
    handle.remove()
    rows = probe.rows()
    assert [row["name"] for row in rows] == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    row = rows[1]
    assert row["activation_rms"] == pytest.approx(kept["y"].double().square().mean().sqrt().item())
    assert row["gradient_rms"] == pytest.approx(kept["grad"].double().square().mean().sqrt().item())
    assert row["alpha"] == pytest.approx(pagating.alpha_values(model)[1], rel=1e-6)
    assert 1.0 <= row["output_rank"] <= 16.0
    assert math.isfinite(row["gate_mean"])
    if "form" not in unit and unit.get("unit") != "swiglu":
        assert 0.9 < row["linear_share"] <= 1.0 + 1e-12  # near zero every unit is nearly linear


@pytest.mark.parametrize("patched", [False, True])
def test_the_rank_is_that_of_the_mlp_not_of_the_block_around_it(patched: bool) -> None:
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
            max_position_embeddings=32, word_embed_proj_dim=16,
        )
    ).eval()  # fmt: skip
    block = model.model.decoder.layers[1]
    with torch.no_grad():
        block.fc2.weight[3:] = 0.0  # an output of rank 3 at most; the residual stream has more
    if patched:
        pagating.patch(model)
    kept: list[torch.Tensor] = []
    handle = block.fc2.register_forward_hook(lambda m, i, output: kept.append(output.detach()))
    with Probe(model) as probe:
        model(input_ids=IDS)
    handle.remove()
    rank = probe.rows()[1]["output_rank"]
    assert rank == effective_rank(kept[0].flatten(0, -2))
    assert rank <= 3.0


def test_half_a_gate_over_the_identity_is_nearly_linear_at_the_start() -> None:
    model = gpt2(n_embd=96)
    shares = {}
    for alpha in (0.0, 0.5):
        pagating.patch(model, alpha=alpha)
        with Probe(model) as probe:
            model(input_ids=IDS)
        shares[alpha] = [row["linear_share"] for row in probe.rows()]
        pagating.unpatch(model)
    assert shares[0.0] == pytest.approx([1.0, 1.0])
    assert all(0.97 < share < 1.0 for share in shares[0.5])


def test_a_probe_changes_nothing_and_comes_off() -> None:
    plain, watched = gpt2(), gpt2()
    loss = plain(input_ids=IDS, labels=IDS).loss
    loss.backward()
    probe = Probe(watched)
    other = watched(input_ids=IDS, labels=IDS).loss
    other.backward()
    assert torch.equal(loss, other)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    rows = probe.rows()
    assert set(rows[0]) == {
        *("name", "activation_rms", "linear_share", "openness", "negative_slope", "width", "dead", "hidden_rank"),
        *("output_rank", "gradient_rms", "gradient_norm", "gradient_passed"),
    }
    probe.close()
    assert all(not m._forward_hooks for m in watched.modules())
    watched(input_ids=IDS.flip(1))
    assert probe.rows() == rows


def test_a_model_without_an_mlp_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear: no MLP activation to watch"):
        Probe(nn.Linear(2, 2))


def test_openness_dead_units_and_negative_slopes_by_hand() -> None:
    x = torch.tensor([[-2.0, 1.0], [3.0, 0.5]])
    assert openness(x, x) == 1.0
    assert openness(x, x.clamp(min=0)) == pytest.approx((1 + 9 + 0.25) / (4 + 1 + 9 + 0.25))
    assert math.isnan(openness(torch.zeros(3), torch.zeros(3)))
    off, constant, tiny = torch.zeros(4, 1), torch.full((4, 1), 2.0), torch.tensor([[0.0], [0.02], [0.0], [0.02]])
    live = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    assert dead_share(torch.cat([off, constant, tiny, live], 1)) == 0.75  # the RMS is near 1.1, tiny's deviation 0.01
    assert dead_share(torch.cat([off, constant, 2 * tiny, live], 1)) == 0.5
    assert dead_share(torch.zeros(4, 3)) == 1.0
    grid = torch.linspace(-4.0, 4.0, 801)
    # x sigmoid(x) falls left of -1.2785, so on (-4, -1.2785): 272 of 801 points of a grid of 0.01
    assert negative_slope_share(nn.functional.silu, grid) == pytest.approx(273 / 801, abs=2 / 801)
    assert negative_slope_share(lambda x: -x, grid) == 1.0
    assert negative_slope_share(torch.relu, grid) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_give_nan_and_no_error(value: float) -> None:
    y = torch.ones(4, 3)
    y[1, 2] = value
    assert math.isnan(effective_rank(y))
    assert math.isnan(dead_share(y))
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[0] = value
    with Probe(model) as probe:
        model(input_ids=IDS, labels=IDS).loss.backward()
    first, second = probe.rows()
    assert all(math.isfinite(first[name]) for name in ("openness", "hidden_rank", "dead", "negative_slope"))
    assert all(math.isnan(second[name]) for name in ("openness", "hidden_rank", "dead", "gradient_norm"))
    pagating.patch(model)
    with Probe(model) as probe, torch.no_grad():
        model(input_ids=IDS)
    first, second = probe.rows()
    assert math.isfinite(first["gate_saturated"])
    assert math.isnan(second["gate_saturated"]) == math.isnan(value)  # a sigmoid is 1 at infinity


@pytest.mark.parametrize(
    ("unit", "slope"),
    [
        ({}, lambda s, x: 0.5 * (s + x * s * (1 - s)) + 0.5),
        ({"alpha": 1.9}, lambda s, x: 1.9 * (s + x * s * (1 - s)) - 0.9),
        ({"unit": "swiglu"}, None),
    ],
    ids=["half", "most", "swiglu"],
)
def test_units_are_compared_as_in_numpy(unit: dict[str, Any], slope: Any) -> None:
    model = gpt2()
    pagating.patch(model, **unit)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.mul_(60)  # into the range where the slope may be negative
    kept: dict[str, Any] = {}
    act = model.transformer.h[0].mlp.act

    def keep(m: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        kept.update(x=inputs[0].detach().double().flatten(0, -2).numpy(), y=output.detach().flatten(0, -2).numpy())
        for name, tensor in (("by_x", inputs[0]), ("by_y", output)):
            tensor.register_hook(lambda grad, name=name: kept.__setitem__(name, grad.double().numpy()))

    handle = act.register_forward_hook(keep)
    with Probe(model) as probe:
        model(input_ids=IDS, labels=IDS).loss.backward()
    handle.remove()
    row, x, y = probe.rows()[0], kept["x"], kept["y"].astype(np.float64)
    values = np.linalg.svd(y, compute_uv=False)
    p = values[values > 0] / values.sum()
    assert row["hidden_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert row["width"] == y.shape[1] == (43 if unit.get("unit") else 64)
    assert row["dead"] == (y.std(0) <= 0.01 * np.sqrt((y**2).mean())).mean()
    assert row["gradient_norm"] == pytest.approx(np.linalg.norm(kept["by_x"]))
    assert row["gradient_passed"] == pytest.approx(np.linalg.norm(kept["by_x"]) / np.linalg.norm(kept["by_y"]))
    a = x[:, : y.shape[1]]
    assert row["openness"] == pytest.approx((a * y).sum() / (a**2).sum(), rel=1e-6)
    if slope is None:  # the factor of a is silu(b), negative if b is
        expected = (x[:, y.shape[1] :] < 0).mean()
    else:
        s = 1 / (1 + np.exp(-x))
        expected = (slope(s, x) < 0).mean()
    assert row["negative_slope"] == pytest.approx(expected, abs=1e-3)
    assert 0 <= expected <= 1
    if unit.get("alpha") == 1.9:
        assert expected > 0.2


def test_no_slope_for_a_unit_that_mixes_features() -> None:
    for unit in ({"form": "projected"}, {"alpha": {"token": {}}}, {"unit": "polynorm"}):
        model = gpt2()
        pagating.patch(model, **unit)
        with Probe(model) as probe:
            model(input_ids=IDS)
        assert not {"openness", "negative_slope"} & probe.rows()[0].keys()
        assert probe.rows()[0]["hidden_rank"] > 1


def test_the_gate_is_the_one_that_the_model_was_patched_with() -> None:
    pagating.register_gate("probed", lambda x: 0.25 * torch.tanh(x) + 0.5)
    model = gpt2()
    pagating.patch(model, gate="probed")
    pagating.register_gate("probed", lambda x: 0.25 * torch.tanh(x) + 5.0)
    with Probe(model) as probe:
        model(input_ids=IDS)
    assert probe.rows()[0]["gate_mean"] == pytest.approx(0.5, abs=0.1)
