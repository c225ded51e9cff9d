"""Gates in models that PEFT, accelerate, bitsandbytes and torchao changed: `python neighbours.py [NAME ...]`.

Each case compares with a model whose activations are replaced by hand, without this library. A JSON object on the last
line has "" for each case that holds, and the error for any other.
"""

import json
import sys
import tempfile
import traceback

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import pagating

IDS = torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(0))
LINEARS = {"llama": ["gate_proj", "up_proj", "down_proj"], "gpt2": ["c_fc", "c_proj"]}
LEARNED = {"learnable": {"per": "layer", "init": 0.25}}


def made(kind="llama"):
    """Make a small model; the same weights each time."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=37, n_embd=64, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=37, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class ByHand(nn.Module):
    """The unit of paGLU, written down."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def forward(self, x):
        return self.alpha * x / (1 + torch.exp(-x)) + (1 - self.alpha) * x


def by_hand(model, alpha):
    """Replace the activations of a model without this library."""
    for name, module in list(model.named_modules()):
        for child in ("act", "act_fn"):
            if isinstance(getattr(module, child, None), nn.Module) and name.endswith("mlp"):
                setattr(module, child, ByHand(alpha))
    return model


def lora(model, kind="llama"):
    """Add LoRA to the linear layers of the MLPs; its matrices are not zero, so that it has an effect."""
    config = LoraConfig(r=4, target_modules=LINEARS[kind], fan_in_fan_out=kind == "gpt2")
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def quantised(kind="llama", **options):
    """Save a model and load it with bitsandbytes."""
    with tempfile.TemporaryDirectory() as folder:
        made(kind).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options)).eval()


def int8():
    """Make a model whose linear layers have weights of torchao's int8."""
    model = made()
    quantize_(model, Int8WeightOnlyConfig())
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def near(found, expected, tolerance=1e-5):
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance, f"logits differ by {difference:.2e} of their largest"


def check(make, tolerance=1e-5):
    """Patch a model and compare it with one patched by hand; its alphas get gradients; unpatch restores it."""
    stock, expected = logits(make()), logits(by_hand(make(), 0.25))
    assert (stock - expected).abs().max() > 1e-3 * expected.abs().max(), "the case has no power"
    model = make()
    report = pagating.patch(model, alpha=LEARNED)
    assert report.count == 2, report
    near(logits(model), expected, tolerance)
    found = pagating.alpha_parameters(model)
    assert len(found) == 2, found
    for one in found:
        one.parameter.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(one.parameter.grad is not None and one.parameter.grad.abs().sum() > 0 for one in found)
    pagating.unpatch(model)
    near(logits(model), stock, tolerance)


def lora_before_the_patch():
    for kind in LINEARS:
        check(lambda kind=kind: lora(made(kind), kind))


def lora_on_all_linear_layers_before_the_patch():
    check(lambda: get_peft_model(made(), LoraConfig(target_modules="all-linear")).eval())


def dora_and_ia3_before_the_patch():
    check(lambda: get_peft_model(made(), LoraConfig(target_modules=LINEARS["llama"], use_dora=True)).eval())
    scaled = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    check(lambda: get_peft_model(made(), scaled).eval())


def a_second_adapter_and_a_disabled_one():
    expected = logits(by_hand(made(), 0.25))
    model = lora(made())
    pagating.patch(model, alpha=LEARNED)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    model.set_adapter("other")
    near(logits(model), expected)  # a new adapter starts without an effect
    with model.disable_adapter():
        near(logits(model), expected)
    pagating.unpatch(model)


def lora_after_the_patch():
    for kind in LINEARS:
        expected = logits(lora(by_hand(made(kind), 0.25), kind))
        model = made(kind)
        pagating.patch(model, alpha=LEARNED)
        adapted = lora(model, kind)
        near(logits(adapted), expected)
        assert pagating.alpha_values(adapted) == [0.25, 0.25]
        merged = adapted.merge_and_unload()
        near(logits(merged), expected)
        pagating.unpatch(merged)
        assert (logits(merged) - expected).abs().max() > 1e-3


def a_saved_adapter_on_a_patched_model():
    model = made()
    pagating.patch(model, alpha=LEARNED)
    adapted = lora(model)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        again = made()
        pagating.patch(again, alpha=LEARNED)
        near(logits(PeftModel.from_pretrained(again, folder).eval()), logits(adapted), 0.0)


def alphas_that_peft_trains_are_saved_with_the_adapter():
    model = made()
    pagating.patch(model, alpha=LEARNED)
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], modules_to_save=["act_fn"]))
    trained = [one.parameter for one in pagating.alpha_parameters(adapted) if one.parameter.requires_grad]
    assert len(trained) == 2, "modules_to_save trains the alphas"
    with torch.no_grad():
        for parameter in trained:
            parameter.fill_(2.0)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        again = made()
        pagating.patch(again, alpha=LEARNED)
        near(logits(PeftModel.from_pretrained(again, folder).eval()), logits(adapted.eval()), 0.0)


def offload_to_the_cpu_and_to_disk():
    for alpha in (
        LEARNED,
        "learnable",
        {"learnable": {"per": "channel"}},
        {"token": {}},
        {"schedule": {"kind": "linear"}},
    ):
        model = made()
        pagating.patch(model, alpha=alpha)
        expected = logits(model)
        cpu_offload(model, torch.device("cpu"))
        near(logits(model), expected, 0.0)
        with tempfile.TemporaryDirectory() as folder:
            model = made()
            pagating.patch(model, alpha=alpha)
            disk_offload(model, folder, torch.device("cpu"))
            near(logits(model), expected, 0.0)


def a_scheduled_alpha_moves_while_it_is_offloaded():
    schedule = {"schedule": {"kind": "linear", "from": 0.0, "to": 1.0}}
    expected = logits(by_hand(made(), 0.75))
    for offload_buffers in (False, True):
        model = made()
        pagating.patch(model, alpha=schedule)
        cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
        pagating.set_progress(model, 0.75)
        near(logits(model), expected)
        assert pagating.alpha_values(model) == [0.75, 0.75]
    with tempfile.TemporaryDirectory() as folder:
        model = made()
        pagating.patch(model, alpha=schedule)
        disk_offload(model, folder, torch.device("cpu"), offload_buffers=True)
        with pytest.raises(ValueError, match="offload with offload_buffers=False"):
            pagating.set_progress(model, 0.75)


def a_device_map():
    for alpha in (LEARNED, "learnable"):
        model = made()
        pagating.patch(model, alpha=alpha)
        expected = logits(model)
        with tempfile.TemporaryDirectory() as folder:
            places = {
                "model.embed_tokens": "cpu",
                "model.layers.0": "disk",
                "model.layers.1": "cpu",
                "model.norm": "cpu",
            }
            places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
            near(logits(dispatch_model(model, places, main_device="cpu", offload_dir=folder)), expected, 0.0)


def accelerate_trains_the_alphas():
    accelerator, model = Accelerator(cpu=True), made()
    pagating.patch(model, alpha=LEARNED)
    before = pagating.alpha_values(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
    optimizer.step()
    assert pagating.alpha_values(accelerator.unwrap_model(model)) != before
    pagating.unpatch(accelerator.unwrap_model(model))


def saved_in_every_way_comes_back():
    """The Trainer, accelerate and PEFT save a patched model so that one call loads it with the same bits."""
    for kind, alpha in ((kind, alpha) for kind in LINEARS for alpha in ("learnable", LEARNED, 0.25)):
        with tempfile.TemporaryDirectory() as folder:
            for name, save in SAVES.items():
                model = made(kind)
                saved = save(model, alpha, f"{folder}/{name}", kind).eval()
                loaded = pagating.from_pretrained(f"{folder}/{name}")
                assert pagating.alpha_values(loaded) == pagating.alpha_values(saved), name
                near(logits(loaded), logits(saved), 0.0)
                assert (logits(saved) - logits(made(kind))).abs().max() > 1e-4, "the case has no power"


def alphas_of_modules_to_save_are_merged_and_come_back():
    model = made()
    pagating.patch(model, alpha=LEARNED)
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], modules_to_save=["act_fn"]))
    with torch.no_grad():
        for one in pagating.alpha_parameters(adapted):
            one.parameter.fill_(2.0)
    expected, merged = logits(adapted.eval()), adapted.merge_and_unload()
    near(logits(merged), expected)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        near(logits(pagating.from_pretrained(folder)), logits(merged), 0.0)


def by_the_trainer(model, alpha, folder, kind):
    pagating.patch(model, alpha=alpha)
    settings = TrainingArguments(folder, report_to=[], use_cpu=True, max_steps=2, disable_tqdm=True, save_strategy="no")
    trainer = AlphaTrainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.train()
    trainer.save_model(folder)
    return model


def by_accelerate(model, alpha, folder, kind):
    pagating.patch(model, alpha=alpha)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.unwrap_model(prepared).save_pretrained(
        folder, save_function=accelerator.save, state_dict=accelerator.get_state_dict(prepared)
    )
    return model


def merged_after_the_patch(model, alpha, folder, kind):
    pagating.patch(model, alpha=alpha)
    merged = lora(model, kind).merge_and_unload()
    merged.save_pretrained(folder)
    return merged


def merged_before_the_patch(model, alpha, folder, kind):
    adapted = lora(model, kind)
    pagating.patch(adapted, alpha=alpha)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder)
    return merged


class AlphaTrainer(pagating.AlphaTrainerMixin, Trainer):
    pass


SAVES = {
    "Trainer.save_model": by_the_trainer,
    "accelerate": by_accelerate,
    "patch, LoRA, merge": merged_after_the_patch,
    "LoRA, patch, merge": merged_before_the_patch,
}


def bitsandbytes_in_8_bits():
    check(lambda: quantised(load_in_8bit=True), 0.02)  # activations in float16 and int8


def bitsandbytes_in_4_bits():
    check(lambda: quantised(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def gpt2_in_4_bits():
    check(lambda: quantised("gpt2", load_in_4bit=True))


def lora_on_4_bits():
    def make():
        return lora(prepare_model_for_kbit_training(quantised(load_in_4bit=True), use_gradient_checkpointing=False))

    check(make)


def torchao_in_int8():
    check(int8)


def the_glu_form_is_refused_and_the_model_stays():
    """Linear layers that are wrapped or quantised cannot be made narrower."""
    for make in (int8, lambda: lora(made("gpt2"), "gpt2"), lambda: quantised(load_in_4bit=True)):
        model = make()
        before = logits(model)
        with pytest.raises(ValueError, match="glu"):
            pagating.patch(model, form="glu")
        near(logits(model), before, 0.0)
        pagating.patch(model)


CASES = [
    lora_before_the_patch,
    lora_on_all_linear_layers_before_the_patch,
    dora_and_ia3_before_the_patch,
    a_second_adapter_and_a_disabled_one,
    lora_after_the_patch,
    a_saved_adapter_on_a_patched_model,
    alphas_that_peft_trains_are_saved_with_the_adapter,
    offload_to_the_cpu_and_to_disk,
    a_scheduled_alpha_moves_while_it_is_offloaded,
    a_device_map,
    accelerate_trains_the_alphas,
    saved_in_every_way_comes_back,
    alphas_of_modules_to_save_are_merged_and_come_back,
    bitsandbytes_in_8_bits,
    bitsandbytes_in_4_bits,
    gpt2_in_4_bits,
    lora_on_4_bits,
    torchao_in_int8,
    the_glu_form_is_refused_and_the_model_stays,
]


def outcome(case):
    """Run a case. Return "" or its error, with the line that failed."""
    try:
        case()
    except Exception as error:  # noqa: BLE001 (a case reports whatever went wrong)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = [case for case in CASES if not sys.argv[1:] or case.__name__ in sys.argv[1:]]
    print(json.dumps({case.__name__: outcome(case) for case in chosen}))
