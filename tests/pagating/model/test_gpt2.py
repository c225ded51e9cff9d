"""Tests of GPT-2 against Hugging Face's model, for each arm."""

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from pagating import patch
from pagating.evaluate import mean_nll, token_nll
from pagating.gating.alpha import alpha_parameters, alpha_values
from pagating.gating.catalog import COMPETITORS
from pagating.gating.cost import cost
from pagating.model.gpt2 import GPT2, training_flops_per_token
from pagating.model.initialise import initialise_gpt2
from pagating.model.size import GPT2Size, stock_flops_per_token

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
    """Make our model and transformers' model with the same unit, from the same seed."""
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
            # not the start values, which would hide a wrong bias or gain
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
        ({"colour": 1}, "unit: unknown key 'colour'; did you mean 'form'. allowed: gate, alpha, base, form, unit"),
        ({"unit": "silu", "gate": "tanh"}, "unit: 'silu' settles gate; give one or the other"),
        ({"form": "wide"}, "form: 'wide' is not one of pointwise, scaled, expanded, squared, glu, projected"),
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


def test_evaluation_of_the_plain_model_in_chunks_is_that_of_transformers():
    plain, reference = both({"alpha": 0.5})
    windows = tokens(batch=5, length=17)
    assert mean_nll(plain, windows, 2) == pytest.approx(mean_nll(reference, windows, 3), rel=1e-6)
    torch.testing.assert_close(token_nll(plain, windows), token_nll(reference, windows), rtol=1e-5, atol=1e-6)


def test_flops_of_a_stock_model_follow_from_its_sizes():
    assert stock_flops_per_token(SIZE) == training_flops_per_token(both(None)[0])
