"""Tests that a study knows its inputs by their bytes: a moved file continues, a changed one is refused."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pagating.data.errors import CorpusError
from pagating.model.gpt2 import GPT2
from pagating.model.size import GPT2Size
from tests.studies import TINY, study_of
from tune.backend.inline import Inline
from tune.errors import StudyError
from tune.study.files import parse
from tune.sweep import sweep

TEXT = "the quick brown fox jumps over the lazy dog\n" * 400
GATE = "import torch\n\ndef mine(x):\n    return torch.tanh(x)\n"


def study(**changes):
    """Return a study of one short trial, on a text file."""
    small = {"stages": ["search"], "search": {"trials_per_arm": 1}, "tokenizer": {"vocab_size": 260}}
    files = {"corpus": {"files": {"train": "text.txt"}}, "arms": {"linear-floor": None}}
    return study_of(TINY, "moved", **{**files, **small, **changes})


def run(given, base):
    """Run a study from a folder with its text. Return the number of cells that were trained now."""
    ended = []
    output = base.parent if base.name == given.name else base.parent / "studies"
    sweep(given, base, output, Inline(), listen=ended.append)
    return len(ended)


@pytest.fixture
def here(tmp_path):
    """Return a folder with the study's text."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "text.txt").write_text(TEXT)
    return tmp_path / "here"


def test_a_text_that_has_moved_is_the_same_and_a_changed_one_is_refused(here):
    assert run(study(), here) == 1
    (here / "data").mkdir()
    moved = Path(shutil.move(here / "text.txt", here / "data" / "other name.txt"))
    again = study(corpus={"files": {"train": "data/*.txt"}}, search={"trials_per_arm": 2})
    assert run(again, here) == 1  # only the second trial
    elsewhere = here.parent / "elsewhere"
    elsewhere.mkdir()
    assert (
        run(study(corpus={"files": {"train": "../here/data/other name.txt"}}, search={"trials_per_arm": 2}), elsewhere)
        == 0
    )
    moved.write_text(TEXT + "more\n")
    with pytest.raises(StudyError, match=r"was begun on corpus .*; the text or the tokenizer has changed"):
        run(again, here)


def test_a_study_continues_from_its_own_folder_without_its_text_and_gate(here):
    (here / "gate.py").write_text(GATE)
    arms = {"linear-floor": None, "mine": {"gate": "gate.py:mine", "alpha": 0.5}}
    folder = here.parent / "studies" / "moved"
    assert run(study(arms=arms), here) == 2
    (here / "gate.py").unlink()
    resolved = (folder / "study.yaml").read_text()
    assert "train: ../../here/text.txt" in resolved
    more = parse(resolved.replace("trials_per_arm: 1", "trials_per_arm: 2"), folder / "study.yaml")
    shutil.rmtree(folder.parent / ".cache")
    assert run(more, folder) == 2  # the text is packed again
    (here / "text.txt").unlink()
    more = parse(resolved.replace("trials_per_arm: 1", "trials_per_arm: 3"), folder / "study.yaml")
    assert run(more, folder) == 2
    shutil.rmtree(folder.parent / ".cache")
    with pytest.raises(CorpusError, match=r"no file matches '../../here/text.txt' in .*/studies/moved"):
        run(more, folder)


def test_a_tokenizer_may_move_and_not_change(here):
    run(study(), here)
    (packed,) = (here.parent / "studies" / ".cache").glob("corpus-*")
    shutil.copy(packed / "tokenizer.json", here / "tokenizer.json")
    same = {"vocab_size": 260, "path": "tokenizer.json"}
    assert run(study(tokenizer=same), here) == 0  # the same tokens, from a file
    with pytest.raises(StudyError, match="the text or the tokenizer has changed"):
        run(study(tokenizer={"vocab_size": 261}), here)


def test_a_question_and_other_words_may_change(here):
    run(study(), here)
    reworded = study(
        question="Is it any better?", tracking="none", corpus={"source": "files", "files": {"train": "text.txt"}}
    )
    assert run(reworded, here) == 0
    held = (here.parent / "studies" / "moved" / "study.yaml").read_text()
    assert parse(held, Path("moved.yaml")).question == "Is it any better?"
    with pytest.raises(StudyError, match=r"model\.n_layer was 1 and is now 2; .*undo the change, or give the"):
        run(study(question="Another?", model={"n_layer": 2}), here)


def test_a_gate_may_move_and_not_change(here):
    (here / "gate.py").write_text(GATE)
    (here / "far").mkdir()
    (here / "far" / "my.py").write_text(GATE)
    arms = {"linear-floor": None, "mine": {"gate": "gate.py:mine", "alpha": 0.5}}
    moved = {"linear-floor": None, "mine": {"gate": "far/my.py:mine", "alpha": 0.5}}
    assert run(study(arms=arms), here) == 2
    assert run(study(arms=moved), here) == 0
    assert run(study(arms=moved, search={"trials_per_arm": 2}), here) == 2
    (here / "gate.py").write_text(GATE.replace("tanh", "sigmoid"))
    with pytest.raises(StudyError, match=r"arms\.mine\.gate was far/my\.py:mine and is now gate\.py:mine; "):
        run(study(arms=arms, search={"trials_per_arm": 2}), here)


def test_weights_may_move_and_neither_change_nor_go_nor_come(here):
    run(study(), here)
    (packed,) = (here.parent / "studies" / ".cache").glob("corpus-*")
    shutil.copy(packed / "tokenizer.json", here / "tokenizer.json")
    model = GPT2(GPT2Size(vocab_size=260, **study().model.sizes()))
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    for name in ("one", "two"):
        (here / name).mkdir()
        save_file(weights, here / name / "model.safetensors")

    def started(folder, **changes):
        own = {"pretrained": folder} if folder else {}
        return study(model=own, tokenizer={"vocab_size": 260, "path": "tokenizer.json"}, **changes)

    with pytest.raises(StudyError, match=r"begun with no weights, and model.pretrained now names weights [0-9a-f]{16}"):
        run(started("one"), here)
    shutil.rmtree(here.parent / "studies")
    assert run(started("one"), here) == 1
    assert run(started("two"), here) == 0
    with pytest.raises(StudyError, match=r"begun with weights [0-9a-f]{16}, and model.pretrained now names no weights"):
        run(started(None), here)
    changed = load_file(here / "two" / "model.safetensors")
    changed["transformer.wpe.weight"] += 1
    save_file(changed, here / "two" / "model.safetensors")
    with pytest.raises(StudyError, match=r"two/model.safetensors is not the file that the study was begun with"):
        run(started("two"), here)


def test_two_studies_of_one_name_do_not_share_a_part_of_a_storage(here):
    shared = here.parent / "shared"
    shared.mkdir()
    given = study(storage=str(shared))
    assert run(given, here) == 1
    other = here.parent / "other" / "here"
    shutil.copytree(here, other)
    with pytest.raises(StudyError, match=rf"storage '{shared}': {shared}/moved holds .* another study called 'moved'"):
        run(given, other)
    assert not (other.parent / "studies").exists()
    (here.parent / "studies").rename(other.parent / "studies")  # the first one, moved
    assert run(study(storage=str(shared), search={"trials_per_arm": 2}), other) == 1
    with pytest.raises(StudyError, match="or remove that folder if the other one is gone"):
        run(given, here)
    shutil.rmtree(shared / "moved")
    assert run(given, here) == 1
