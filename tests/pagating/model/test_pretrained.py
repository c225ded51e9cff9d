import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from pagating.evaluate import token_nll
from pagating.model.gpt2 import GPT2, GPT2Size
from pagating.model.initialise import initialise_gpt2
from pagating.model.pretrained import FILE, PretrainedError, check_weights, find_weights, load_pretrained
from pagating.train import build_model, trial_identity
from pagating.trial import Trial

torch.set_num_threads(1)
SIZE = GPT2Size(vocab_size=97, n_layer=3, d_model=24, n_head=3, n_ctx=20)
TOKENS = torch.randint(0, 97, (4, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hf():
    config = GPT2Config(vocab_size=97, n_layer=3, n_embd=24, n_head=3, n_positions=32, activation_function="gelu_new")
    torch.manual_seed(3)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # biases and norms too, so that the test notices a missing one
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(hf, tmp_path_factory):
    place = tmp_path_factory.mktemp("weights")
    hf.save_pretrained(place)
    return place


def model_of(unit=None, size=SIZE, seed=1):
    model = GPT2(size, unit).eval()
    initialise_gpt2(model, seed)
    return model


def test_the_loss_is_that_of_hugging_faces_model(hf, folder):
    model = model_of()
    load_pretrained(model, find_weights(str(folder)))
    with torch.no_grad():
        logits = hf(TOKENS[:, :-1]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none").view(4, 20)
        assert expected.mean() > 4
        torch.testing.assert_close(token_nll(model, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_a_gate_that_is_off_over_the_stock_base_leaves_the_loss(folder):
    stock, gated = model_of(), model_of({"gate": "tanh", "alpha": 0.0, "base": "stock"})
    for model in (stock, gated):
        load_pretrained(model, folder / FILE)
    with torch.no_grad():
        assert torch.equal(token_nll(stock, TOKENS), token_nll(gated, TOKENS))


@pytest.mark.parametrize("form", ["projected", "glu"])
def test_another_form_keeps_its_mlps_new_and_takes_the_rest(hf, folder, form):
    unit = {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.3}}, "form": form}
    model, fresh = model_of(unit), dict(model_of(unit).named_parameters())
    load_pretrained(model, folder / FILE)
    stored = hf.state_dict()
    kinds = set()
    for name, parameter in model.named_parameters():
        expected = fresh[name] if ".mlp." in name else stored[name][:20] if "wpe" in name else stored[name]
        assert torch.equal(parameter, expected), name
        kinds.add(".mlp." in name)
    assert kinds == {True, False}


def test_a_learned_alpha_of_a_pointwise_arm_starts_where_its_spec_says(hf, folder):
    model = model_of({"gate": "sigmoid", "alpha": {"learnable": {"init": 0.3, "per": "layer"}}})
    load_pretrained(model, folder / FILE)
    block = model.transformer.h[2].mlp
    assert block.act.alpha().item() == pytest.approx(0.3)
    assert torch.equal(block.c_fc.weight, hf.state_dict()["transformer.h.2.mlp.c_fc.weight"])


def test_names_without_their_prefix_and_stored_masks_are_taken_too(folder, tmp_path):
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / FILE).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(old, tmp_path / FILE)
    one, two = model_of(), model_of()
    load_pretrained(one, folder / FILE)
    load_pretrained(two, tmp_path / FILE)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_half_precision_is_read_as_float32(folder, tmp_path):
    half = {name: tensor.half() for name, tensor in load_file(folder / FILE).items()}
    save_file(half, tmp_path / FILE)
    model = model_of()
    load_pretrained(model, tmp_path / FILE)
    assert model.transformer.wte.weight.dtype == torch.float32
    assert torch.equal(model.transformer.wte.weight, half["transformer.wte.weight"].float())


REFUSED = {
    "vocabulary": ({"vocab_size": 96}, r"'transformer.wte.weight' is \(97, 24\).*tokenizer must be the weights' own"),
    "too long": ({"n_ctx": 33}, r"'transformer.wpe.weight' is \(32, 24\) .* needs \(33, 24\)"),
    "too few layers": ({"n_layer": 2}, "has 'transformer.h.2.attn.c_attn.bias', which a GPT-2 of n_layer=2"),
    "too many layers": ({"n_layer": 4}, "has no 'transformer.h.3.ln_1.weight', which a GPT-2 of n_layer=4"),
    "width": ({"d_model": 48}, r"'transformer.wte.weight' is \(97, 24\)"),
    "heads": ({"n_head": 4}, r"config.json: n_head is 3 and the study's model.n_head is 4"),
}


@pytest.mark.parametrize(("other", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_another_size_is_refused_before_anything_is_loaded(folder, other, message):
    with torch.device("meta"):
        model = GPT2(replace(SIZE, **other))
    with pytest.raises(PretrainedError, match=message):
        check_weights(model, folder / FILE)


def test_an_untied_output_projection_is_refused(folder, tmp_path):
    stored = load_file(folder / FILE)
    save_file({**stored, "lm_head.weight": stored["transformer.wte.weight"] + 1}, tmp_path / FILE)
    with pytest.raises(PretrainedError, match="its output projection is not tied"):
        load_pretrained(model_of(), tmp_path / FILE)
    save_file({**stored, "lm_head.weight": stored["transformer.wte.weight"].clone()}, tmp_path / FILE)
    load_pretrained(model_of(), tmp_path / FILE)


def test_damaged_files_are_one_line(folder, tmp_path):
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(PretrainedError, match="is not a complete safetensors file"):
        check_weights(model_of(), tmp_path / FILE)
    (tmp_path / FILE).write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(PretrainedError, match=r"has no 'transformer.wte.weight'"):
        check_weights(model_of(), tmp_path / FILE)
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PretrainedError, match=r"config.json: is not JSON"):
        check_weights(model_of(), tmp_path / FILE)


def test_what_is_not_here_says_what_to_download(folder, tmp_path):
    assert find_weights(folder.name, folder.parent) == (folder / FILE).resolve()
    with pytest.raises(PretrainedError, match=r"no copy on the hub; download model.safetensors and config.json"):
        find_weights("gpt2", tmp_path)
    with pytest.raises(PretrainedError, match=r"has no model.safetensors; download .* model: \{pretrained: FOLDER\}"):
        find_weights(".", tmp_path)


def test_a_trial_starts_from_them_and_its_checkpoints_know_them(hf, folder, tmp_path):
    meta = {"dtype": "uint16", "vocab_size": 97, "splits": {}}
    from pagating.data.corpus import meta_digest

    (tmp_path / "corpus.json").write_text(json.dumps({**meta, "digest": meta_digest(meta)}))
    sizes = {"n_layer": 3, "d_model": 24, "n_head": 3, "n_ctx": 20}
    plain = Trial(corpus=str(tmp_path), model=sizes, lr=1e-3, tokens=40, batch_tokens=20, seed=5)
    loaded = replace(plain, pretrained=str(folder / FILE))
    assert torch.equal(build_model(loaded).lm_head.weight, hf.state_dict()["lm_head.weight"])
    assert not torch.equal(build_model(plain).lm_head.weight, hf.state_dict()["lm_head.weight"])
    assert trial_identity(plain) != trial_identity(loaded)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((folder / FILE).read_bytes())
    assert trial_identity(replace(plain, pretrained=str(copy))) == trial_identity(loaded)
