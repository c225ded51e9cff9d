"""Tests of the models that a trial leaves: folders that transformers loads, with a tokenizer, to the same logits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import pagating
from pagating.data import prepare
from pagating.export_model import export_model
from pagating.hf.folder import add_tokens, write_tokenizer
from pagating.hf.serving import Served
from pagating.train import steps
from pagating.trial import Trial
from tests.studies import SNAKES

torch.set_num_threads(1)
MODEL = {"n_layer": 2, "d_model": 16, "n_head": 2, "n_ctx": 32}
WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them\n"
LAYERS = {"learnable": {"init": 0.5, "per": "layer", "range": "free"}}
UNITS = {
    "stock": None,
    "fixed": {"gate": "tanh", "alpha": 0.5},
    "per layer": {"gate": "sigmoid", "alpha": LAYERS},
    "per model": {"gate": "sigmoid", "alpha": "learnable", "base": "gelu"},
    "scheduled": {"alpha": {"schedule": {"kind": "cosine"}}},
    "by token": {"alpha": {"token": {}}},
    "stock base": {"alpha": LAYERS, "base": "stock"},
    "glu": {"unit": "swiglu"},
    "projected": {"form": "projected"},
    "xielu": {"unit": "xielu"},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("text")
    (base / "train.txt").write_text("".join(f"{i * 7919 % 1000} {WORDS}" for i in range(2000)))
    return str(prepare.prepare({"files": {"train": "train.txt"}}, {"vocab_size": 280}, 32, base / "cache", base))


def kept(packed, folder, **changed):
    """Train a short trial and return the folder of its model."""
    size = {"tokens": 64 * 3, "batch_tokens": 64, "eval_windows": 2, "lr": 3e-3, "seed": 5}
    list(steps(Trial(corpus=packed, model=MODEL, **size, **changed), None, folder))
    return folder


@torch.no_grad()
def logits(model, **more):
    ids = torch.randint(0, 280, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_a_causal_model_is_a_gpt2_of_transformers(packed, tmp_path, unit, activation):
    size = {"tokens": 64 * 3, "batch_tokens": 64, "eval_windows": 2, "lr": 3e-3, "seed": 5, "unit": unit}
    trial = Trial(corpus=packed, model={**MODEL, "activation": activation}, **size)
    list(steps(trial, None, tmp_path / "model"))
    plain = pagating.load_model(tmp_path / "model")
    model = pagating.from_pretrained(tmp_path / "model")
    assert isinstance(model, transformers.GPT2LMHeadModel)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    by_auto, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert type(by_auto).__name__ == ("GPT2LMHeadModel" if unit is None else "PaGPT2LMHeadModel")
    assert torch.equal(logits(by_auto), logits(model))
    assert pagating.alpha_values(model) == pagating.alpha_values(plain)
    if unit is not None:
        with pytest.raises(ValueError, match="this model is patched; load it with pagating"):
            transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("unit", [None, {"gate": "sigmoid", "alpha": LAYERS}], ids=["stock", "gated"])
@pytest.mark.parametrize(
    ("task", "auto"), [("masked", "AutoModelForMaskedLM"), ("span", "AutoModelForSeq2SeqLM")], ids=["BERT", "T5"]
)
def test_a_denoising_model_is_one_of_transformers(packed, tmp_path, task, auto, unit):
    folder = kept(packed, tmp_path / "model", task=task, unit=unit)
    plain = pagating.load_model(folder)
    model = pagating.from_pretrained(folder)
    more = {} if task == "masked" else {"decoder_input_ids": torch.arange(280, 284)[None].repeat(2, 1)}
    assert type(model) is type(plain)
    assert torch.equal(logits(model, **more), logits(plain, **more))
    load = getattr(transformers, auto).from_pretrained
    if unit is None:
        assert torch.equal(logits(load(folder), **more), logits(plain, **more))
    else:
        with pytest.raises(ValueError, match="this model is patched; load it with pagating"):
            load(folder)


def test_tokenizers_have_the_ids_that_the_model_was_trained_with(packed, tmp_path):
    text = "the quick brown fox"
    ids = Tokenizer.from_file(str(Path(packed) / "tokenizer.json")).encode(text).ids
    folders = {task: kept(packed, tmp_path / task, task=task) for task in ("causal", "masked", "span")}
    for folder in folders.values():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.model_max_length == 32
    bert, t5 = (transformers.AutoTokenizer.from_pretrained(folders[task]) for task in ("masked", "span"))
    assert (bert.mask_token_id, bert.mask_token) == (280, "[MASK]")
    assert (t5.pad_token_id, t5.convert_tokens_to_ids("<extra_id_0>")) == (280, 281)
    config = json.loads((folders["span"] / "config.json").read_text())
    assert t5.convert_tokens_to_ids(f"<extra_id_{config['vocab_size'] - 282}>") == config["vocab_size"] - 1


def test_special_tokens_that_cannot_have_their_ids_are_left_out(tmp_path):
    vocabulary = {"a": 0, "[MASK]": 1, "b": 5}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    before = (tmp_path / "tokenizer.json").read_bytes()
    add_tokens(tmp_path, 6, ["[MASK]"])
    add_tokens(tmp_path, 6, ["<pad>", "<extra_id_0>"])
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert write_tokenizer(tmp_path, 8, {"mask_token": "[MASK]", "pad_token": "<pad>"}) == {"[MASK]": 1}
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_model_with_code_of_ones_own_needs_its_file(packed, tmp_path):
    (tmp_path / "snake.py").write_text(SNAKES)
    folder = kept(packed, tmp_path / "model", unit={"unit": f"{tmp_path / 'snake.py'}:Snake"})
    assert str(tmp_path) not in (folder / "config.json").read_text()
    with pytest.raises(
        pagating.SavedModelError, match=r"a unit of your own, 'snake.py:Snake', which is not known here"
    ):
        pagating.from_pretrained(folder)
    model = pagating.from_pretrained(folder, unit=f"{tmp_path / 'snake.py'}:Snake")
    plain = pagating.load_model(folder, unit=f"{tmp_path / 'snake.py'}:Snake")
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_served_models_answer_texts_with_texts(packed, tmp_path):
    write = Served(str(kept(packed, tmp_path / "gpt2", unit=UNITS["per layer"])))
    short, long = write.predict(["the quick", WORDS * 20], {"max_new_tokens": 3})
    assert short.startswith("the quick")
    assert len(write.tokenizer(long)["input_ids"]) <= 32
    assert write.predict(pd.DataFrame({"text": ["the quick"]}), {"max_new_tokens": 3}) == [short]
    assert write.predict("the quick", {"max_new_tokens": 3}) == [short]
    assert write.predict([""]) == [""]
    (filled,) = Served(str(kept(packed, tmp_path / "bert", task="masked"))).predict(["the [MASK] brown"])
    assert filled.startswith("the ")
    assert "[MASK]" not in filled
    (said,) = Served(str(kept(packed, tmp_path / "t5", task="span"))).predict(["the <extra_id_0> fox"])
    assert isinstance(said, str)


@pytest.mark.parametrize("form", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
@pytest.mark.parametrize("task", ["masked", "span"])
def test_a_denoising_model_is_exported_for_any_batch_and_length(packed, tmp_path, task, form):
    folder = kept(packed, tmp_path / "model", task=task, unit={"gate": "tanh", "alpha": LAYERS})
    assert export_model(folder, form, tmp_path / "written") < 1e-5
    assert (tmp_path / "written").is_file()


@pytest.mark.slow
def test_pipelines_in_fresh_processes(packed, tmp_path):
    kept(packed, tmp_path / "gpt2", unit=UNITS["per layer"])
    kept(packed, tmp_path / "stock")
    kept(packed, tmp_path / "bert", task="masked", unit=UNITS["per layer"])
    kept(packed, tmp_path / "t5", task="span", unit=UNITS["per layer"])
    without_package = """
import sys; sys.modules["pagating"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
for folder, remote in (("gpt2", True), ("stock", False)):
    write = pipeline("text-generation", folder, trust_remote_code=remote)
    said = write("the quick", do_sample=False)[0]["generated_text"]
    assert said.startswith("the quick") and len(said) > 12, said
    said = [row[0]["generated_text"] for row in write(["the quick", "a"], max_new_tokens=4, do_sample=False)]
    assert len(said) == 2
model = AutoModelForCausalLM.from_pretrained("gpt2", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("gpt2")
ids = model.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=4, do_sample=False)
print(tokenizer.decode(ids[0]))
"""
    with_package = """
import pagating
from pagating import PaGPT2LMHeadModel
from transformers import AutoTokenizer, pipeline
print(pipeline("text-generation", "gpt2")("the quick", max_new_tokens=4, do_sample=False)[0]["generated_text"])
bert = pagating.from_pretrained("bert")
rows = pipeline("fill-mask", bert, tokenizer=AutoTokenizer.from_pretrained("bert"))("the quick [MASK] fox")
assert len(rows) == 5 and abs(rows[0]["score"]) <= 1, rows
t5, tokenizer = pagating.from_pretrained("t5"), AutoTokenizer.from_pretrained("t5")
ids = t5.generate(**tokenizer("the quick <extra_id_0> fox", return_tensors="pt"), max_new_tokens=5)
assert ids.shape[1] <= 6 and ids[0, 0] == 280, ids
"""
    said = [_run(script, tmp_path) for script in (without_package, with_package)]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]


def _run(script, folder):
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_folders_without_the_files_of_transformers_still_load(packed, tmp_path):
    folder = kept(packed, tmp_path / "model", task="masked", unit=UNITS["per layer"])
    old = tmp_path / "old"
    old.mkdir()
    for name in ("model.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(folder / name, old / name)
    assert torch.equal(logits(pagating.load_model(old)), logits(pagating.load_model(folder)))
    with pytest.raises(pagating.SavedModelError, match=r"has no config.json"):
        pagating.from_pretrained(old)
