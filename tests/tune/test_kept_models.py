"""Tests of the kept models of a real study: in transformers, MLflow and ONNX, each in a process of its own."""

import html
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

import pagating
from tests.studies import TINY, changed, yaml_of

torch.set_num_threads(1)
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts `uvicorn` by name
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": PATH}
STUDY = changed(
    TINY,
    question="Is a learned gate better than GELU?",
    corpus={"files": {"train": "train.txt"}},
    tokenizer={"vocab_size": 300},
    fixed={"tokens": 512},
    arms={"linear-floor": None, "learned": {"gate": "sigmoid", "alpha": {"learnable": {"per": "layer"}}}},
    stages=["search", "confirm"],
    search={"trials_per_arm": 1},
    calibrate=None,
    confirm={"seeds": 3},
)
IDS = torch.arange(8)[None]


def run(folder, *words, code=0, **more):
    """Run Python in a process; return its standard output."""
    environment = {**ENVIRONMENT, "HF_MODULES_CACHE": str(folder / "modules"), **more}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a finished study `studies/kept` and its MLflow store."""
    place = tmp_path_factory.mktemp("place")
    (place / "train.txt").write_text("".join(f"{i * 7919 % 1000} the quick brown fox jumps\n" for i in range(3000)))
    (place / "kept.yaml").write_text(yaml_of(STUDY))
    run(place, "-m", "tune.cli", "sweep", "kept.yaml", "--inline")
    return place


def uri_of(place):
    return f"sqlite:///{place / 'mlflow.db'}"


@pytest.mark.slow
def test_auto_classes_load_it_to_the_same_logits(place):
    script = """
import sys; sys.modules["pagating"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for arm in ("gelu", "learned"):
    folder = f"studies/kept/models/{arm}"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=arm != "gelu")
    torch.save(model(torch.arange(8)[None]).logits.detach(), f"{arm}.pt")
    ids = AutoTokenizer.from_pretrained(folder)("the quick", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] == ids["input_ids"].shape[1] + 3
"""
    run(place, "-c", script)
    for arm in ("gelu", "learned"):
        expected = pagating.load_model(place / "studies" / "kept" / "models" / arm)(IDS).logits
        torch.testing.assert_close(torch.load(place / f"{arm}.pt"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_loaded_models_write_the_samples_of_the_report(place):
    script = """
import json, torch, pagating
from transformers import AutoTokenizer
torch.set_num_threads(1)
for arm in ("gelu", "learned"):
    folder = f"studies/kept/models/{arm}"
    model, tokenizer = pagating.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = torch.tensor([row["prompt"] for row in json.load(open(f"{folder}/samples.json"))])
    print(json.dumps(tokenizer.batch_decode(model.generate(prompts, do_sample=False, max_length=16))))
"""
    said = [json.loads(line) for line in run(place, "-c", script).splitlines()]
    table = pd.read_parquet(place / "studies" / "kept" / "samples.parquet")
    whole = table["beginning"] + table["greedy"]
    assert [whole[table["arm"] == arm].tolist() for arm in ("gelu", "learned")] == said
    assert [len(texts) for texts in said] == [3, 3]
    page = (place / "studies" / "kept" / "report.html").read_text()
    assert all(html.escape(text[-8:].replace("  ", "␣␣")) in page for texts in said for text in texts)


@pytest.mark.slow
def test_the_card_says_what_it_is(place):
    verdict = json.loads((place / "studies" / "kept" / "verdict.json").read_text())
    row = next(row for row in verdict["comparisons"] if row["arm"] == "learned")
    card = (place / "studies" / "kept" / "models" / "learned" / "README.md").read_text()
    facts = json.loads((place / "studies" / "kept" / "models" / "learned" / "model.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "| question | Is a learned gate better than GELU? |" in card
    assert f"| verdict | {row['verdict']} against gelu: " in card
    assert f"| validation loss | {facts['final']['val_nll']:.4f} nats per target |" in card
    assert "| verdict | the baseline |" in (place / "studies" / "kept" / "models" / "gelu" / "README.md").read_text()


@pytest.mark.slow
def test_the_command_exports_every_form(place):
    model = place / "studies" / "kept" / "models" / "learned"
    expected = pagating.load_model(model)(IDS).logits
    for form, suffix in (("hf", ""), ("onnx", ".onnx"), ("torch", ".pt2")):
        said = run(place, "-m", "tune.cli", "export", "kept", "learned", "--to", form)
        assert said.startswith(f"kept-learned{suffix}: its logits differ from those of studies/kept/models/learned by")
        assert float(said.split()[-1]) <= 1e-5
    torch.testing.assert_close(pagating.load_model(place / "kept-learned")(IDS).logits, expected)
    script = """
import numpy, onnxruntime, torch
session = onnxruntime.InferenceSession("kept-learned.onnx")
found = session.run(None, {"input_ids": numpy.arange(8)[None]})[0]
torch.save(torch.from_numpy(found), "onnx.pt")
"""
    run(place, "-c", script)
    torch.testing.assert_close(torch.load(place / "onnx.pt"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_mlflow_registers_and_serves_it(place):
    client = MlflowClient(uri_of(place))
    experiment = client.get_experiment_by_name("kept").experiment_id
    logged = next(m for m in client.search_logged_models([experiment]) if m.name == "learned")
    script = f"""
import mlflow
mlflow.set_tracking_uri({uri_of(place)!r})
made = mlflow.register_model("models:/{logged.model_id}", "best")
print(mlflow.pyfunc.load_model(f"models:/best/{{made.version}}").predict(["the quick"], params={{"max_new_tokens": 3}}))
"""
    expected = run(place, "-c", script).splitlines()[-1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", f"models:/{logged.model_id}", "--env-manager", "local"]
    with open(place / "server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            cwd=place, env={**ENVIRONMENT, "MLFLOW_TRACKING_URI": uri_of(place)},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        said = _asked(port, {"inputs": ["the quick"], "params": {"max_new_tokens": 3}}, server, place / "server.log")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
    assert str(said["predictions"]) == expected
    assert said["predictions"][0].startswith("the quick")


def _asked(port, question, server, log):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
