"""Tests of where a patch goes: feed-forward layers alone, the options that choose, all or nothing, and wrappers."""

import copy
import functools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import pagating
from pagating.gating.discovery import all_activations, features, is_linear
from pagating.gating.patch import inner, unpatched

sys.path.append(str(Path(__file__).parents[3] / "docs"))
import make_architectures

torch.set_num_threads(1)
IDS = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))
LLAMA = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
CHANNELS = {"learnable": {"per": "channel"}}


def build(name: str, **options: Any) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**{**LLAMA, **options})).eval()


def gpt2(n_layer: int = 3) -> Any:
    return build("GPT2LMHeadModel", num_hidden_layers=n_layer)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


# --- feed-forward layers alone ---------------------------------------------------------------------------------------


def test_the_activation_of_attention_is_left_and_that_of_experts_replaced() -> None:
    types = ["linear_attention", "full_attention"]
    report = pagating.patch(build("MiniMaxForCausalLM", head_dim=8, layer_types=types, **EXPERTS))
    assert report.names == [f"model.layers.{i}.mlp.experts.act_fn" for i in range(2)]
    assert report.left == ["model.layers.0.self_attn.act_fn"]
    assert report.why == {"model.layers.0.self_attn.act_fn": "belongs to attention"}


def test_the_mlp_of_a_position_bias_is_left() -> None:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 2}
    model = transformers.Swinv2Model(transformers.Swinv2Config(**sizes))
    report = pagating.patch(model)
    assert report.names == ["encoder.layers.0.blocks.0.intermediate.intermediate_act_fn"]
    (bias,) = (name for name in report.left if "continuous_position_bias_mlp" in name)
    assert report.why[bias] == "belongs to attention"


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ({"self_attn": ["up 4 8", "act", "down 8 4"]}, "belongs to attention"),
        ({"router": ["up 4 8", "act", "down 8 4"]}, "belongs to a router"),
        ({"input_layernorm": ["up 4 8", "act", "down 8 4"]}, "belongs to a norm"),
        ({"rel_pos_mlp": ["up 2 8", "act", "down 8 2"]}, "belongs to a position bias"),
        ({"adapter_a": ["up 4 8", "act", "down 8 4"]}, "belongs to an adapter"),
        ({"x": ["per_layer_input_gate 8 4", "act", "per_layer_projection 4 8"]}, "the gate of per-layer embeddings"),
        ({"x": ["up 4 8", "act", "down 8 2"]}, "do not lead to another width and back: up 4 to 8, down 8 to 2"),
        ({"x": ["act"]}, "no linear layer beside it"),
        ({"x": ["up 4 8", "act", "conv"]}, "a Conv1d beside it mixes tokens"),
        ({"x": ["LayerNorm", "up 4 8", "act"]}, "in a sequence or with a norm"),
        ({"mask_embed": ["head 4 4", "act"]}, "which leads to the same width, as in a prediction head"),
    ],
)
def test_what_is_no_feed_forward_layer_is_left_and_the_reason_is_named(block: dict[str, list[str]], why: str) -> None:
    ((name, parts),) = block.items()
    holder = nn.Module()
    for part in parts:
        child, *sizes = part.split()
        made: nn.Module = nn.Linear(*map(int, sizes)) if sizes else nn.GELU()
        made = {"conv": nn.Conv1d(1, 1, 1), "LayerNorm": nn.LayerNorm(4)}.get(child, made)
        holder.add_module(child, made)
    alone = nn.Module()
    alone.layers = nn.ModuleList([nn.ModuleDict({name: holder})])
    before = str(alone)
    with pytest.raises(ValueError, match=rf"no MLP activation found.*; seen: layers\.0\.{name}\.act \(.*{why}\)$"):
        pagating.patch(alone)
    assert str(alone) == before
    assert pagating.patch(alone, include="act").names == [f"layers.0.{name}.act"]


@pytest.mark.parametrize("name", ["intermediate", "x"])
def test_a_lone_layer_to_another_width_is_that_of_bert(name: str) -> None:
    model = nn.Module()
    width = 4 if name == "intermediate" else 8
    model.layers = nn.ModuleList([nn.ModuleDict({name: nn.ModuleDict({"dense": nn.Linear(4, width)})})])
    model.layers[0][name].add_module("act", nn.GELU())
    assert pagating.patch(model).names == [f"layers.0.{name}.act"]


ACTIVATIONS = [
    cls
    for cls in vars(nn.modules.activation).values()
    if isinstance(cls, type) and cls.__module__ == nn.modules.activation.__name__
    and not re.search("GLU|Softm|LogSoftmax|MultiheadAttention", cls.__name__)
]  # fmt: skip


@pytest.mark.parametrize("cls", ACTIVATIONS)
def test_every_activation_of_torch_is_replaced(cls: Any) -> None:
    assert len(ACTIVATIONS) > 20
    stock = cls(0.1, 0.2) if cls is nn.Threshold else cls()
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), stock, nn.Linear(8, 4)).eval()])
    x = torch.linspace(-3.0, 3.0, 12).reshape(3, 4)
    before = model.layers[0](x)
    report = pagating.patch(model, base="stock", alpha=0.0)
    assert (report.names, report.replaced) == (["layers.0.1"], [cls.__name__])
    assert torch.equal(model.layers[0](x), before)
    pagating.unpatch(model)
    pagating.patch(model, alpha=1.0, gate="tanh")
    hidden = model.layers[0][0](x)
    torch.testing.assert_close(model.layers[0](x), model.layers[0][2](hidden * hidden.tanh()))


def test_a_gate_of_torch_that_halves_the_width_is_named() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 16), nn.GLU(), nn.Linear(8, 4))])
    with pytest.raises(ValueError, match=r"seen: layers.0.1 \(GLU is no known type of activation\)"):
        pagating.patch(model)


def test_an_activation_that_a_given_forward_does_not_read_is_left() -> None:
    def fused(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def hooked(self: Any, x: torch.Tensor) -> torch.Tensor:
        return wrapped(x)

    model = build("LlamaForCausalLM")
    first, second = (layer.mlp for layer in model.model.layers)
    first.forward = types.MethodType(fused, first)  # as Liger replaces it
    wrapped = second.forward
    second.forward = functools.update_wrapper(functools.partial(hooked, second), wrapped)  # as accelerate wraps it
    report = pagating.patch(model)
    assert report.names == ["model.layers.1.mlp.act_fn"]
    assert report.why == {"model.layers.0.mlp.act_fn": "the forward that LlamaMLP was given does not read it"}


def test_a_program_of_torch_jit_inside_a_model_is_left() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))])
    model.traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 8), nn.GELU()), torch.ones(1, 4))
    assert pagating.patch(model).names == ["layers.0.1"]


def test_one_activation_under_two_names_is_replaced_under_both() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)
            self.act1 = self.act2 = nn.GELU()
            self.b = nn.Linear(8, 4)

    model = nn.Module()
    model.layers = nn.ModuleList([Both()])
    report = pagating.patch(model, alpha={"learnable": {"per": "layer"}})
    assert (report.names, report.left) == (["layers.0.act1", "layers.0.act2"], [])
    assert model.layers[0].act1 is not model.layers[0].act2
    pagating.unpatch(model)
    assert model.layers[0].act1 is model.layers[0].act2


def test_functions_and_experts_without_a_module_are_named() -> None:
    with pytest.raises(ValueError, match=r"seen: model.layers.0.mlp.experts \(GptOssExperts reads no activation mod"):
        pagating.patch(build("GptOssForCausalLM", head_dim=8, **EXPERTS))
    model = gpt2(1)
    model.transformer.h[0].mlp.act = None
    model.transformer.h[0].mlp._modules.pop("act")
    model.transformer.h[0].mlp.__dict__["act"] = torch.nn.functional.gelu
    with pytest.raises(ValueError, match=r"seen: transformer.h.0.mlp.act \(is the function gelu, no module\)"):
        pagating.patch(model)


def test_an_activation_of_an_unknown_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"seen: transformer.h.0.mlp.gelu_impl \(BloomGelu is no known type of activ"):
        pagating.patch(build("BloomForCausalLM"))


def test_a_layer_that_calls_a_function_is_named() -> None:
    with pytest.raises(ValueError, match=r"seen: model.layers.0.feed_forward \(Lfm2MLP calls the function silu"):
        pagating.patch(build("Lfm2ForCausalLM", layer_types=["full_attention"] * 2))


# --- experts and linear layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_take_the_new_activation(name: str, implementation: str) -> None:
    model = build(name, **EXPERTS, moe_intermediate_size=24)
    model.set_experts_implementation(implementation)
    stock = logits(model)
    report = pagating.patch(model, gate="tanh", alpha=CHANNELS)
    assert report.names == [f"model.layers.{i}.mlp.experts.act_fn" for i in range(2)]
    assert report.left == []
    assert (logits(model) - stock).abs().max() > 1e-4
    model(input_ids=IDS, labels=IDS).loss.backward()
    for alpha in pagating.alpha_parameters(model):
        assert alpha.parameter.shape == (24,)
        assert alpha.parameter.grad.abs().max() > 0
    pagating.unpatch(model)
    pagating.patch(model, alpha=0.0, base="stock")
    assert torch.equal(logits(model), stock)


def test_experts_that_ignore_their_activation_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self, reads: bool) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 16, 4)), nn.Parameter(torch.ones(2, 4, 8))
            self.act_fn = nn.SiLU()
            self.has_gate = not reads

        def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act_fn(x)

    model = nn.Module()
    model.layers = nn.ModuleList([Experts(reads=False)])
    with pytest.raises(ValueError, match=r"seen: layers.0.act_fn \(Experts does not read it\)"):
        pagating.patch(model)
    model.layers = nn.ModuleList([Experts(reads=True)])
    assert pagating.patch(model).names == ["layers.0.act_fn"]


def test_a_linear_layer_is_known_by_its_features() -> None:
    class Packed(nn.Module):  # quantised: the weight says nothing of the sizes
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.in_features, self.out_features = n_in, n_out
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)

    class Bare(nn.Module):
        def __init__(self, *shape: int, bias: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(bias))

    for module, sizes in [
        (nn.Linear(3, 5), (3, 5)),
        (transformers.pytorch_utils.Conv1D(5, 3), (3, 5)),
        (Packed(3, 5), (3, 5)),
        (Bare(5, 3, bias=5), (3, 5)),
        (Bare(3, 5, bias=5), (3, 5)),
    ]:
        assert is_linear(module)
        assert features(module) == sizes
    for module in (
        nn.Embedding(3, 5),
        nn.LayerNorm((3, 5)),
        nn.Conv1d(3, 5, 1),
        nn.GELU(),
        nn.Sequential(nn.Linear(3, 5)),
    ):
        assert not is_linear(module)
    model = build("LlamaForCausalLM")
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(*features(getattr(layer.mlp, name))))
    pagating.patch(model, alpha=CHANNELS)
    assert [a.parameter.shape for a in pagating.alpha_parameters(model)] == [(24,), (24,)]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_an_adapted_model_is_patched(name: str) -> None:
    peft = pytest.importorskip("peft")
    stock = build(name)
    plain = pagating.patch(copy.deepcopy(stock))
    model = peft.get_peft_model(stock, peft.LoraConfig(target_modules="all-linear"))
    before = logits(model)
    report = pagating.patch(model, alpha=CHANNELS)
    assert report.names == plain.names
    assert not torch.equal(logits(model), before)
    assert all(a.parameter.requires_grad for a in pagating.alpha_parameters(model))
    with pytest.raises(ValueError, match=r"patched already; call pagating\.unpatch first"):
        pagating.patch(stock)
    assert pagating.unpatch(stock) == plain.names
    assert torch.equal(logits(model), before)
    assert pagating.alpha_values(model) == []
    with pytest.raises(ValueError, match="form: glu needs"):
        pagating.patch(model, form="glu")


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"layers": [0, 2]}, [0, 2]),
        ({"layers": range(1, 3)}, [1, 2]),
        ({"layers": [-1]}, [2]),
        ({"include": "transformer.h.1.mlp.act"}, [1]),
        ({"include": "*.[12].mlp.*"}, [1, 2]),
        ({"include": ["h.0", re.compile(r"h\.2\.")]}, [0, 2]),
        ({"exclude": "h.0"}, [1, 2]),
        ({"include": "mlp", "exclude": ["h.0", "h.1"]}, [2]),
        ({"exclude": "h.0", "layers": [0, 1]}, [1]),
    ],
    ids=str,
)
def test_options_choose(options: dict[str, Any], blocks: list[int], tmp_path: Path) -> None:
    model = gpt2()
    stock = logits(model)
    report = pagating.patch(model, alpha=[0.5] * len(blocks), **options)
    assert report.names == [f"transformer.h.{i}.mlp.act" for i in blocks]
    assert len(report.left) == 3 - len(blocks)
    assert set(report.why.values()) <= {"not in layers", "not in include", "in exclude"}
    model.save_pretrained(tmp_path)
    for load in (pagating.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path).eval()), logits(model))
    assert torch.equal(
        logits(pagating.from_pretrained(tmp_path, model_class=transformers.GPT2LMHeadModel)), logits(model)
    )
    pagating.unpatch(model)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "mpl"}, r"^include: 'mpl' fits no activation; the model has transformer.h.0.mlp.act$"),
        ({"exclude": "h.7"}, r"^exclude: 'h.7' fits no activation"),
        ({"include": []}, r"^include: an empty list"),
        ({"include": 3}, r"^include: 3 is neither a name"),
        ({"layers": [3]}, r"^layers: 3 is not the index of a block; the model has 0 to 2$"),
        ({"layers": [-4]}, r"^layers: -4 is not"),
        ({"layers": "0"}, r"^layers: '0' is not"),
        ({"layers": [True]}, r"^layers: True is not"),
        ({"exclude": "mlp"}, r"^GPT2LMHeadModel: include, exclude and layers leave nothing to patch; seen: "),
        ({"layers": [0], "alpha": [0.5, 0.5, 0.5]}, r"^alpha: a list of 3 for 1 layers"),
    ],
    ids=str,
)
def test_options_that_fit_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    model = gpt2()
    before = str(model)
    with pytest.raises(ValueError, match=message) as caught:
        pagating.patch(model, **options)
    assert "\n" not in str(caught.value)
    assert str(model) == before


def test_an_activation_of_unknown_width_takes_a_unit_that_needs_none() -> None:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    model = transformers.ResNetModel(config)
    with pytest.raises(ValueError, match="its width is not known, which this unit needs"):
        pagating.patch(model, alpha=CHANNELS, include="encoder")
    assert pagating.patch(model, include="encoder").count > 0


# --- all or nothing, and one notion of patched -----------------------------------------------------------------------


def state(model: nn.Module) -> tuple[str, list[int], list[str], dict[str, Any]]:
    return str(model), [id(m) for m in model.modules()], list(model.state_dict()), model.config.to_dict()


@pytest.mark.parametrize("step", ["_modules", "_initialise", "record_patch"])
def test_a_failed_patch_leaves_the_model_unchanged(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["pagating.gating.patch"]
    model = gpt2()
    before, stock, calls = state(model), logits(model), []
    works = getattr(module, step)

    def fails(*arguments: Any) -> Any:
        calls.append(step)
        if len(calls) == (1 if step == "record_patch" else 3):
            raise RuntimeError("the third layer")
        return works(*arguments)

    monkeypatch.setattr(module, step, fails)
    with pytest.raises(RuntimeError, match="the third layer"):
        pagating.patch(model, form="glu", alpha="learnable")
    monkeypatch.undo()
    assert state(model) == before
    assert torch.equal(logits(model), stock)
    with pytest.raises(ValueError, match="is not patched; nothing to undo"):
        pagating.unpatch(model)
    pagating.patch(model, form="glu")


def test_compiled_and_stock_model_are_one() -> None:
    model = gpt2()
    compiled = torch.compile(model, backend="eager")
    stock = logits(compiled)
    assert inner(compiled) is model
    names = pagating.patch(compiled, alpha=0.7).names
    assert names == [f"transformer.h.{i}.mlp.act" for i in range(3)]
    assert pagating.alpha_values(model) == pagating.alpha_values(compiled) == [0.7] * 3
    assert torch.equal(logits(compiled), logits(model))
    assert not torch.equal(logits(compiled), stock)
    for each in (model, compiled, model.transformer):
        with pytest.raises(ValueError, match=r"patched already; call pagating\.unpatch first"):
            pagating.patch(each)
    with unpatched(compiled):
        assert torch.equal(logits(compiled), stock)
    assert pagating.unpatch(model) == names
    assert torch.equal(logits(compiled), stock)
    for each in (model, compiled):
        with pytest.raises(ValueError, match="GPT2LMHeadModel is not patched; nothing to undo"):
            pagating.unpatch(each)


def test_the_record_of_a_patch_is_in_its_layers() -> None:
    model = gpt2()
    pagating.patch(model.transformer)
    with pytest.raises(ValueError, match=r"patched already; call pagating\.unpatch first"):
        pagating.patch(model)
    copied = copy.deepcopy(model)
    assert pagating.unpatch(model) == [f"transformer.h.{i}.mlp.act" for i in range(3)]
    copied.transformer.h = copied.transformer.h[1:]
    assert pagating.unpatch(copied.transformer) == [f"h.{i}.mlp.act" for i in range(2)]
    own = nn.Sequential(nn.Linear(4, 4), pagating.PaGLU())
    with pytest.raises(ValueError, match="Sequential is patched already; it was made with PaGLU"):
        pagating.patch(own)


def test_a_wrapper_that_shares_gradients_is_patched_if_no_parameter_is_new(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = gpt2()
        wrapped = DistributedDataParallel(model)
        before = state(model)
        with pytest.raises(ValueError, match="DistributedDataParallel: the trained parameters would change"):
            pagating.patch(wrapped, alpha="learnable")
        assert state(model) == before
        assert pagating.patch(wrapped, alpha=0.5).count == 3
        assert pagating.alpha_values(wrapped) == [0.5] * 3
        with pytest.raises(ValueError, match="patched already"):
            pagating.patch(model)
        pagating.unpatch(model)
        assert state(model) == before
        pagating.patch(model, alpha="learnable")
        wrapped, patched = DistributedDataParallel(model), state(model)
        with pytest.raises(ValueError, match="the trained parameters would change; patch or unpatch before it wraps"):
            pagating.unpatch(wrapped)
        assert state(model) == patched
        with unpatched(wrapped):
            assert state(model) == before
        for _ in range(2):  # DDP waits in the second one for a parameter that is gone
            wrapped(input_ids=IDS, labels=IDS).loss.backward()
        for unit in ({"alpha": {"learnable": {"per": "layer"}}}, {"form": "glu"}):
            sharded = gpt2()
            pagating.patch(sharded, **unit)
            fully_shard(sharded)
            if "form" in unit:  # the stock layers have no shards
                with pytest.raises(ValueError, match=r"FSDPGPT2LMHeadModel: the trained parameters would change"):
                    pagating.unpatch(sharded)
            else:
                pagating.unpatch(sharded)
                sharded(input_ids=IDS, labels=IDS).loss.backward()
        wrapped = DistributedDataParallel(build("LlamaForCausalLM", hidden_act="xielu"))
        with pytest.raises(ValueError, match="the trained parameters would change"):
            pagating.patch(wrapped, alpha=0.5)
    finally:
        dist.destroy_process_group()


# --- the page of architectures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "outcome", "replaced"),
    [
        ("llama", "patched", "`layers.0.mlp.act_fn`"),
        ("mixtral", "patched", "`layers.0.mlp.experts.act_fn`"),
        ("falcon", "patched", "`h.0.mlp.act`"),
        ("gemma3n_text", "patched", "`layers.0.mlp.act_fn`"),
        ("mamba", "refused", ""),
        ("gpt_oss", "refused", ""),
    ],
)
def test_a_sample_of_the_page(name: str, outcome: str, replaced: str) -> None:
    row = make_architectures.row(name)
    assert (row.outcome, row.replaced) == (outcome, replaced)
    assert f"{row}\n" in make_architectures.PAGE.read_text(encoding="utf-8")
    assert row.ran == ("yes" if outcome == "patched" else "")


def test_every_activation_has_a_slot_or_a_reason() -> None:
    slots = all_activations(build("BertForMaskedLM"))
    assert [(slot.name, slot.why) for slot in slots if slot.why] == [
        ("cls.predictions.transform.transform_act_fn", "outside of the blocks")
    ]
