"""Tests of saving and loading a patched model of transformers: the same model comes back, or one clear error."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import pagating
from pagating.gating.gates import GATES
from pagating.gating.own_gate import load_own
from pagating.gating.patch import unpatched
from pagating.gating.saving import ADVICE

torch.set_num_threads(1)
IDS = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
UNITS: list[dict[str, Any]] = [
    {"alpha": 0.5},
    {"alpha": [0.2, 1.5], "gate": "mish"},
    {"alpha": "learnable", "base": "stock"},
    {"alpha": {"learnable": {"per": "channel", "range": "free", "init": 0.5}}, "base": "gelu"},
    {"alpha": {"schedule": {"kind": "cosine", "from": 0.2}}},
    {"alpha": {"token": {"init": 0.3}}},
    {"unit": "xielu"},
    {"unit": "swish"},
    {"form": "projected"},
]


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def shifted(model: Any, **unit: Any) -> Any:
    """Patch a model and move every parameter, so that none has its start value."""
    pagating.patch(model, **unit)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def out(model: Any) -> torch.Tensor:
    return model(IDS)[0]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_every_kind_of_patch_comes_back_with_its_bits(make: Any, unit: dict[str, Any], tmp_path: Path) -> None:
    model = shifted(make(), **unit)
    pagating.set_progress(model, 0.5)
    loaded = pagating.from_pretrained(saved(model, tmp_path / "one", max_shard_size="3KB"))
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    assert type(loaded) is type(model)
    assert torch.equal(out(loaded), out(model))
    assert pagating.alpha_values(loaded) == pagating.alpha_values(model)
    assert torch.equal(out(pagating.from_pretrained(saved(loaded, tmp_path / "two"))), out(model))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_in_bfloat16_alphas_keep_their_precision(make: Any, tmp_path: Path) -> None:
    stock = saved(make().to(torch.bfloat16), tmp_path / "stock")
    model = type(make()).from_pretrained(stock)
    pagating.patch(model, alpha={"learnable": {"init": 0.3, "per": "layer"}})
    loaded = pagating.from_pretrained(saved(model, tmp_path / "model"))
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(out(loaded), out(model))
    assert {p.dtype for name, p in loaded.named_parameters() if ".alpha_" in name} == {torch.float32}
    assert pagating.from_pretrained(tmp_path / "model", dtype=torch.float32).dtype == torch.float32


def test_the_record_says_all_that_patch_settled(tmp_path: Path) -> None:
    model = llama()
    pagating.patch(model, alpha="learnable")
    config = config_of(saved(model, tmp_path))
    assert config["pagating"] == {
        "format": 1,
        "arguments": {
            "gate": "sigmoid",
            "alpha": {"learnable": {"init": 0.5, "per": "model", "range": "unit", "lr_multiplier": 10.0}},
            "base": "identity",
            "form": "pointwise",
        },
        "functions": {},
        "names": ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"],
        "stock": {"hidden_act": "silu"},
    }
    assert (config["model_type"], config["hidden_act"]) == ("llama", ADVICE)
    live = model.config
    assert (live.model_type, live.hidden_act, live.to_dict()["hidden_act"]) == ("llama", "silu", "silu")


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_twin_of_the_same_configuration_and_an_unpatched_model_stay_stock(make: Any, tmp_path: Path) -> None:
    config = make().config
    one, twin = (type(make())(config).eval() for _ in range(2))
    pagating.patch(one, alpha=0.3)
    assert torch.equal(out(AutoModelForCausalLM.from_pretrained(saved(twin, tmp_path / "twin"))), out(twin))
    with unpatched(one):
        assert "pagating" not in config_of(saved(one, tmp_path / "inside"))
    assert config_of(saved(one, tmp_path / "after"))["pagating"]["arguments"]["alpha"] == 0.3
    pagating.unpatch(one)
    assert type(one.config) is type(config)
    assert config_of(saved(one, tmp_path / "stock")) == config_of(tmp_path / "twin")
    pagating.patch(one, alpha=0.7)
    assert torch.equal(out(pagating.from_pretrained(saved(one, tmp_path / "again"))), out(one))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_copies_pickles_and_parts_are_saved_as_what_they_are(make: Any, tmp_path: Path) -> None:
    model = shifted(make(), alpha="learnable")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for i, other in enumerate([copy.deepcopy(model), torch.load(buffer, weights_only=False)]):
        assert torch.equal(out(pagating.from_pretrained(saved(other, tmp_path / f"{i}"))), out(model))
        pagating.unpatch(other)
        assert "pagating" not in config_of(saved(other, tmp_path / f"stock {i}"))
    part = model.base_model
    assert torch.equal(out(pagating.from_pretrained(saved(part, tmp_path / "part"))), out(part))
    saved(model, tmp_path / "whole")
    assert torch.equal(out(pagating.from_pretrained(tmp_path / "whole", model_class=type(part))), out(part))


def test_a_loaded_model_is_unpatched_to_stock(tmp_path: Path) -> None:
    loaded = pagating.from_pretrained(saved(shifted(gpt2(), alpha=0.3), tmp_path / "patched"))
    pagating.unpatch(loaded)
    assert torch.equal(out(AutoModelForCausalLM.from_pretrained(saved(loaded, tmp_path / "stock"))), out(loaded))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert type(loaded) is pagating.PaGPT2LMHeadModel
    patched = out(loaded)
    pagating.unpatch(loaded)
    assert not torch.equal(out(loaded), patched)
    assert torch.equal(out(AutoModelForCausalLM.from_pretrained(saved(loaded, tmp_path / "class"))), out(loaded))


def test_changes_of_the_configuration_after_the_patch_are_kept(tmp_path: Path) -> None:
    model = shifted(llama(), alpha=0.4)
    model.config.use_cache = False
    model.resize_token_embeddings(41, mean_resizing=False)
    loaded = pagating.from_pretrained(saved(model, tmp_path))
    assert (loaded.config.vocab_size, loaded.config.use_cache) == (41, False)
    assert torch.equal(out(loaded), out(model))


def test_stock_folders_load_too(tmp_path: Path) -> None:
    model = llama()
    assert torch.equal(out(pagating.from_pretrained(saved(model, tmp_path))), out(model))


HARD = "import torch\n\n\ndef hard(x):\n    return torch.clamp(x / 6 + 0.5, 0.0, 1.0)\n"


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_gate_of_ones_own_must_be_given_and_be_the_same(make: Any, tmp_path: Path) -> None:
    code = tmp_path / "hard.py"
    code.write_text(HARD)
    load_own("gate", f"{code}:hard")
    model = shifted(make(), gate=f"{code}:hard", alpha="learnable")
    folder = saved(model, tmp_path / "model")
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert torch.equal(out(pagating.from_pretrained(folder, gate=f"{code}:hard")), out(model))
    with pytest.raises(pagating.SavedModelError, match=r"a gate of your own, 'hard.py:hard', which is not known here"):
        pagating.from_pretrained(folder)
    with pytest.raises(pagating.SavedModelError, match=r"unit='hard' was given, but it was patched with unit: None"):
        pagating.from_pretrained(folder, unit="hard")
    (tmp_path / "other.py").write_text(HARD.replace("/ 6", "/ 5"))
    with pytest.raises(pagating.SavedModelError, match=r"another gate than '.*other.py:hard' is here: its values"):
        pagating.from_pretrained(folder, gate=f"{tmp_path / 'other.py'}:hard")


class Snake(torch.nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(self.rate * x) ** 2 / self.rate


class Slower(Snake):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(self.rate * x) ** 2 / (2 * self.rate)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_module_of_ones_own_must_be_the_same(make: Any, tmp_path: Path) -> None:
    pagating.register_unit("a test's snake", Snake)
    model = shifted(make(), unit="a test's snake")
    folder = saved(model, tmp_path)
    loads = [pagating.from_pretrained, *([AutoModelForCausalLM.from_pretrained] if make is gpt2 else [])]
    for load in loads:
        assert torch.equal(out(load(folder)), out(model))
    pagating.register_unit("a test's snake", Slower)
    for load in loads:
        with pytest.raises(ValueError, match='another unit than "a test\'s snake" is here: its values differ'):
            load(folder)
    config = config_of(folder)
    config["pagating"]["functions"] = {"unit": None}  # as older versions wrote it
    (folder / "config.json").write_text(json.dumps(config))
    assert pagating.from_pretrained(folder)


def test_registered_functions_come_back(tmp_path: Path) -> None:
    pagating.register_gate("a test's gate", lambda x: torch.sigmoid(2 * x))
    try:
        model = shifted(llama(), gate="a test's gate", alpha=0.5)
        assert torch.equal(out(pagating.from_pretrained(saved(model, tmp_path / "gate"))), out(model))
        pagating.register_gate("a test's gate", lambda x: torch.sigmoid(3 * x))
        with pytest.raises(pagating.SavedModelError, match='another gate than "a test\'s gate" is here'):
            pagating.from_pretrained(tmp_path / "gate")
    finally:
        del GATES["a test's gate"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": 9}, "its record of the patch is not of format 1"),
        ({"names": None}, "has lost a key; it has arguments, format, functions, stock"),
        ({"names": ["model.layers.7.mlp.act_fn"]}, "its patch replaced model.layers.7.mlp.act_fn and 0 more, not"),
        ({"names": []}, "its patch replaced nothing, not model.layers.0.mlp.act_fn, model.layers.1.mlp.act_fn"),
        ({"arguments": {"alpha": 0.5}}, r"unexpected keys \['model.layers.0.mlp.act_fn.alpha_logit'"),
        ({"arguments": {"alpha": {"token": {}}}}, r"missing keys \['model.layers.0.mlp.act_fn.alpha_bias'"),
        ({"arguments": {"gate": "nope"}}, "gate: 'nope' is not one of sigmoid"),
        ({"stock": {}}, ADVICE),
    ],
)
def test_a_record_that_does_not_fit_the_weights_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = llama()
    pagating.patch(model, alpha={"learnable": {"per": "layer"}})
    config = config_of(saved(model, tmp_path))
    config["pagating"] = {key: value for key, value in {**config["pagating"], **changed}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(pagating.SavedModelError, match=said) as caught:
        pagating.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_of_a_model_is_refused_in_a_line(tmp_path: Path) -> None:
    folder = saved(shifted(llama(), alpha=0.3), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Mine"]}))
    with pytest.raises(pagating.SavedModelError, match="its class Mine is not one of transformers; give model_class"):
        pagating.from_pretrained(folder)
    assert pagating.from_pretrained(folder, model_class=transformers.LlamaForCausalLM)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(pagating.SavedModelError, match="cannot be loaded: "):
        pagating.from_pretrained(folder, model_class=transformers.LlamaForCausalLM)
    with pytest.raises(pagating.SavedModelError, match="nothing: there is no such folder"):
        pagating.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(pagating.SavedModelError, match=r"empty: has no config.json$"):
        pagating.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(pagating.SavedModelError, match="it is an adapter; load its base model with this function"):
        pagating.from_pretrained(tmp_path / "empty")


def test_in_a_fresh_process_the_same_model_or_a_loud_error(tmp_path: Path) -> None:
    for name, make in (("llama", llama), ("gpt2", gpt2)):
        model = shifted(make(), alpha="learnable", gate="tanh")
        saved(model, tmp_path / name)
        torch.save(out(model), tmp_path / f"{name}.pt")
    model = llama()
    pagating.patch(model, alpha=[0.1, 0.9])
    set_blocks(model, blocks(model)[::-1])
    torch.save(out(model), tmp_path / "moved.pt")
    saved(model, tmp_path / "moved")
    saved(type(model)(model.config), tmp_path / "twin")
    pagating.register_unit("a test's snake", Snake)
    model = shifted(gpt2(), unit="a test's snake")
    torch.save(out(model), tmp_path / "snake.pt")
    saved(model, tmp_path / "snake")
    script = f"""
import sys, torch, transformers
torch.set_num_threads(1)
ids = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))
for name, cls in (("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")):
    for load in (transformers.AutoModelForCausalLM, transformers.AutoModel, getattr(transformers, cls)):
        try:
            load.from_pretrained(name)
        except Exception as error:
            said = " ".join(str(error).split())
            assert {ADVICE!r} in said or (name == "gpt2" and "trust_remote_code=True" in said), said
        else:
            raise AssertionError((name, load))
assert "pagating" not in sys.modules
import pagating
assert pagating.alpha_values(transformers.AutoModelForCausalLM.from_pretrained("twin")) == []
for name in ("llama", "gpt2", "moved"):
    assert torch.equal(pagating.from_pretrained(name)(ids)[0], torch.load(f"{{name}}.pt")), name
class Snake(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.ones(features))
    def forward(self, x):
        return x + self.of(self.rate * x) ** 2 / self.rate
    of = staticmethod(torch.cos)

pagating.register_unit("a test's snake", Snake)
for load in (pagating.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
    Snake.of = torch.cos
    try:
        load("snake")
    except ValueError as error:
        assert "another unit" in str(error), error
    else:
        raise AssertionError(load)
    Snake.of = torch.sin
    assert torch.equal(load("snake").eval()(ids)[0], torch.load("snake.pt"))
loaded = transformers.AutoModelForCausalLM.from_pretrained("gpt2")
assert torch.equal(loaded(ids)[0], torch.load("gpt2.pt"))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr


# --- what is saved is what the model is ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_of_a_patched_models_configuration_are_stock(make: Any, tmp_path: Path) -> None:
    patched = make()
    config, values = patched.config, patched.config.to_dict()
    pagating.patch(patched, alpha=0.5)
    assert patched.config is config
    assert config.to_dict() == values
    for i, derived in enumerate([config, type(config).from_dict(config.to_dict()), copy.deepcopy(config)]):
        other = type(make())(derived).eval()
        folder = saved(other, tmp_path / f"{i}")
        for loaded in (pagating.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)):
            assert torch.equal(out(loaded), out(other))
            assert pagating.alpha_values(loaded) == []
    assert "pagating" not in config.to_json_string()
    folder = saved(patched, tmp_path / "patched")
    for loaded in (pagating.from_pretrained(folder), copy.deepcopy(pagating.from_pretrained(folder))):
        assert "pagating" not in loaded.config.to_json_string()
        assert torch.equal(out(pagating.from_pretrained(saved(loaded, tmp_path / "again"))), out(patched))


def blocks(model: Any) -> Any:
    """Return the blocks of a model as a list that a case may change."""
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def set_blocks(model: Any, new: list[Any]) -> None:
    holder, name = (model.model, "layers") if hasattr(model, "model") else (model.transformer, "h")
    setattr(holder, name, torch.nn.ModuleList(new))
    model.config.num_hidden_layers = len(new)
    for i, block in enumerate(new):
        (block.self_attn if hasattr(block, "self_attn") else block.attn).layer_idx = i


MOVED = {
    "reversed": lambda held: held[::-1],
    "the last alone": lambda held: held[1:],
    "one more": lambda held: [*held, copy.deepcopy(held[0])],
}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("moved", MOVED.values(), ids=MOVED)
@pytest.mark.parametrize(
    ("unit", "where"),
    [
        ({"alpha": [0.2, -1.5]}, {}),
        ({"alpha": "learnable"}, {}),
        ({"alpha": {"learnable": {"per": "layer"}}}, {}),
        ({"alpha": 0.5, "gate": "tanh"}, {"layers": [1]}),
        ({"alpha": {"token": {}}, "base": "stock"}, {"exclude": "*.0.*"}),
    ],
    ids=str,
)
def test_layers_that_were_moved_removed_or_copied_come_back(
    make: Any, moved: Any, unit: dict[str, Any], where: dict[str, Any], tmp_path: Path
) -> None:
    model = shifted(make(), **unit, **where)
    set_blocks(model, moved(list(blocks(model))))
    with torch.no_grad():
        for i, parameter in enumerate(alpha.parameter for alpha in pagating.alpha_parameters(model)):
            parameter.fill_(0.3 + i)  # a copy of a layer has an alpha of its own
    loaded = pagating.from_pretrained(saved(model, tmp_path))
    assert torch.equal(out(loaded), out(model))
    assert pagating.alpha_values(loaded) == pagating.alpha_values(model)


def test_layers_of_different_patches_are_refused(tmp_path: Path) -> None:
    one, other = llama(), llama()
    pagating.patch(one, alpha=0.5)
    pagating.patch(other, alpha=0.5, gate="tanh")
    one.model.layers[0] = other.model.layers[0]
    with pytest.raises(ValueError, match="LlamaForCausalLM: its layers were patched in different ways"):
        one.save_pretrained(tmp_path)
    other = llama()
    pagating.patch(other, alpha="learnable")
    one.model.layers[0] = other.model.layers[0]
    with pytest.raises(ValueError, match="alpha: its layers have different kinds of it"):
        one.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_patched_part_of_a_saved_whole_has_no_record(tmp_path: Path) -> None:
    model = llama()
    pagating.patch(model.model, alpha="learnable")
    with pytest.raises(pagating.SavedModelError, match=r"its weights have alphas, model.*no patch is recorded"):
        pagating.from_pretrained(saved(model, tmp_path / "whole"))
    part = pagating.from_pretrained(saved(model.model, tmp_path / "part"))
    assert torch.equal(out(part), out(model.model))


# --- other classes and options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("where", [{}, {"layers": [1]}], ids=str)
def test_a_patched_body_loads_into_classes_with_a_head(make: Any, where: dict[str, Any], tmp_path: Path) -> None:
    whole = shifted(make(), alpha={"learnable": {"per": "layer"}}, **where)
    body = pagating.from_pretrained(saved(whole, tmp_path / "whole"), model_class=transformers.AutoModel)
    folder = saved(body, tmp_path / "body")
    for cls in (transformers.AutoModelForSequenceClassification, AutoModelForCausalLM, type(whole)):
        loaded = pagating.from_pretrained(folder, model_class=cls, num_labels=3, pad_token_id=0)
        assert torch.equal(out(loaded.base_model), out(body))
        assert pagating.alpha_values(loaded) == pagating.alpha_values(whole)
        if cls is transformers.AutoModelForSequenceClassification:
            assert loaded(IDS).logits.shape == (2, 3)
        assert torch.equal(out(pagating.from_pretrained(saved(loaded, tmp_path / cls.__name__))), out(loaded))


def test_options_of_the_configuration_and_of_the_loader(tmp_path: Path) -> None:
    model = shifted(llama(), alpha=0.3)
    saved(model, tmp_path)
    loaded, info = pagating.from_pretrained(
        tmp_path, use_cache=False, output_loading_info=True, attn_implementation="eager", dtype=torch.float64
    )
    assert (loaded.config.use_cache, loaded.config._attn_implementation) == (False, "eager")
    assert loaded.dtype == torch.float64
    assert not any(info.values())
    config = copy.deepcopy(model.config)
    config.rms_norm_eps = 0.5
    changed = pagating.from_pretrained(tmp_path, config=config)
    assert (changed.config.rms_norm_eps, pagating.alpha_values(changed)) == (0.5, [0.3, 0.3])
    assert not torch.allclose(out(changed), out(model))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folder": 3}, "folder: int is not a path"),
        ({"folder": None}, "folder: NoneType is not a path"),
        ({"folder": torch.nn.Linear(1, 1)}, "folder: Linear is not a path"),
        ({"model_class": "LlamaModel"}, "model_class: 'LlamaModel' is not a class of models of transformers"),
        ({"model_class": torch.nn.Linear}, "Linear'> is not a class of models"),
        ({"model_class": transformers.AutoModelForCTC}, "AutoModelForCTC has no class for LlamaConfig"),
        ({"config": "folder"}, "config: str is not a configuration of transformers"),
        ({"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_in_a_line(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved(shifted(llama(), alpha=0.3), tmp_path)
    with pytest.raises(pagating.SavedModelError, match=said) as caught:
        pagating.from_pretrained(**{"folder": tmp_path, **given})
    assert "\n" not in str(caught.value)
