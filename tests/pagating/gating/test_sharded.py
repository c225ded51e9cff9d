"""Tests of alpha under FSDP1, FSDP2, DDP, PEFT and accelerate."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pagating

torch.set_num_threads(1)
IDS = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, Any] = {
    "model": "learnable",
    "layer": {"learnable": {"per": "layer"}},
    "channel": {"learnable": {"per": "channel"}},
    "token": {"token": {}},
    "schedule": {"schedule": {"from": 0.3}},
}

SHARDED = """
    import functools, json, sys, warnings
    import torch, torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.nn.parallel import DistributedDataParallel
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block
    import pagating

    warnings.simplefilter("ignore")
    rank, world, store, kinds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    ids = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))
    mine = ids[rank:rank + 1] if world == 2 else ids

    def patched(alpha):
        torch.manual_seed(0)
        size = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**size))
        pagating.patch(model.eval(), alpha=alpha)
        return model

    def layers_first(model):
        for block in model.transformer.h:
            fully_shard(block)
        return fully_shard(model)

    cpu, blocks = torch.device("cpu"), ModuleWrapPolicy({GPT2Block})
    ways = {
        "FSDP2": fully_shard,
        "FSDP2 by layers": layers_first,
        "FSDP1": lambda model: FSDP(model, device_id=cpu, use_orig_params=True),
        "FSDP1, flat": lambda model: FSDP(model, device_id=cpu),
        "FSDP1 by layers": lambda model: FSDP(model, device_id=cpu, use_orig_params=True, auto_wrap_policy=blocks),
        "DDP": DistributedDataParallel,
    }

    def trained(model, batch):
        rate = torch.optim.SGD(model.parameters(), lr=2.0)
        for _ in range(2):
            rate.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            rate.step()
        return pagating.alpha_values(model)

    for kind, alpha in kinds.items():
        wanted = torch.tensor(trained(patched(alpha), ids), dtype=torch.float64)
        start = torch.tensor(pagating.alpha_values(patched(alpha)), dtype=torch.float64)
        assert (wanted != start).all() == (kind != "schedule"), kind
        for name, wrap in ways.items():
            try:
                got = torch.tensor(trained(wrap(patched(alpha)), mine), dtype=torch.float64)
            except ValueError as error:
                assert kind == "model" and name in ("FSDP1 by layers", "FSDP2 by layers"), (kind, name, error)
                assert "layer by layer" in str(error) or "shared" in str(error)
                continue
            assert kind != "model" or "layers" not in name
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * (world - 1), msg=f"{kind} {name}")
    names = [a.name for a in pagating.alpha_parameters(fully_shard(patched(kinds["layer"])))]
    assert names == [f"transformer.h.{i}.mlp.act.alpha_logit" for i in range(2)]
    if world == 1:
        try:
            pagating.alpha_parameters(FSDP(patched("learnable"), device_id=cpu))
        except ValueError as error:
            assert "use_orig_params=True" in str(error)
    dist.destroy_process_group()
    print("done")
"""


@pytest.mark.parametrize(
    ("world", "kinds"), [(1, ["model", "layer"]), pytest.param(2, list(KINDS), marks=pytest.mark.slow)], ids=str
)
def test_every_kind_trains_as_without_shards(world: int, kinds: list[str], tmp_path: Path) -> None:
    code, store = textwrap.dedent(SHARDED), str(tmp_path / "store")
    alphas = json.dumps({kind: KINDS[kind] for kind in kinds})
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world), store, alphas],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    for rank in ranks:
        out, errors = rank.communicate(timeout=300)
        assert out.strip() == "done", errors[-2000:]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=37, num_key_value_heads=1, **sizes)).eval()


@torch.no_grad()
def moved(model: nn.Module, alpha: Any) -> nn.Module:
    pagating.patch(model, alpha=alpha)
    for i, found in enumerate(pagating.alpha_parameters(model)):
        found.parameter.add_(0.3 + 0.1 * i)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [gpt2, llama])
def test_offloaded_to_memory_and_disk(build: Any, kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    stock = moved(build(), KINDS[kind])
    wanted, values = stock(input_ids=IDS).logits, pagating.alpha_values(stock)
    for offload in (
        lambda model: accelerate.cpu_offload(model, cpu),
        lambda model: accelerate.disk_offload(model, str(tmp_path), cpu),
        lambda model: accelerate.dispatch_model(model, {"": "cpu"}),
    ):
        model = moved(build(), KINDS[kind])
        offload(model)
        for _ in range(2):
            assert torch.equal(model(input_ids=IDS).logits, wanted)
        assert pagating.alpha_values(model) == values


@pytest.mark.parametrize("kind", ["layer", "channel", "token"])
@pytest.mark.parametrize(("build", "act"), [(gpt2, "act"), (llama, "act_fn")])
def test_peft_trains_saves_and_loads_alpha_as_a_module_to_save(build: Any, act: str, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        model = moved(build(), KINDS[kind])
        return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", modules_to_save=[act]))

    model = adapted()
    before = pagating.alpha_values(model)
    assert len(before) == 2
    assert all(a.parameter.requires_grad for a in pagating.alpha_parameters(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    after = pagating.alpha_values(model)
    assert all(a != b for a, b in zip(after, before, strict=True))
    with model.disable_adapter():
        assert pagating.alpha_values(model) == before
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(moved(build(), KINDS[kind]), tmp_path)
    assert pagating.alpha_values(loaded) == after
    assert torch.equal(loaded.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_an_adapted_model_has_one_shared_alpha_that_can_be_trained(build: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(moved(build(), "learnable"), peft.LoraConfig(target_modules="all-linear"))
    (alpha,) = pagating.alpha_parameters(model)
    assert not alpha.parameter.requires_grad  # PEFT freezes what it does not adapt
    alpha.parameter.requires_grad_(True)
    before = pagating.alpha_values(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([alpha.parameter], lr=0.5).step()
    after = pagating.alpha_values(model)
    assert len(set(after)) == 1
    assert after != before
    assert pagating.alpha_values(model.merge_and_unload()) == after
