"""Tests of pretrained tokenizers: used unchanged, or refused in one line with the file; their code never runs."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers

from pagating.data import prepare
from pagating.data.corpus import open_split
from pagating.data.errors import CorpusError, NotDownloaded
from pagating.data.lines import encode_lines
from pagating.data.saved_tokenizer import tokenizer_key
from pagating.data.tokenizer import (
    check_alphabet,
    check_unknown,
    encode,
    make_tokenizer,
    vocabulary_size,
)

WORDS = "the quick brown fox jumps over the lazy dog\n"
EVIL = "open({mark!r}, 'w').close()\nclass Evil:\n    pass\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Write a tokenizer's folder with transformers."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    trained = make_tokenizer({"vocab_size": 280}, WORDS * 50)
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """Copy the folder, to damage the copy."""
    return shutil.copytree(whole, tmp_path / "own")


def refused(folder):
    """Return the message, one line, for an unusable folder."""
    with pytest.raises(CorpusError) as caught:
        make_tokenizer({"path": str(folder)}, "")
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_what_the_library_itself_gives(whole):
    own, ours = Tokenizer.from_file(str(whole / "tokenizer.json")), make_tokenizer({"path": str(whole)}, "")
    assert encode(ours, WORDS).tolist() == own.encode(WORDS).ids
    assert ours.get_vocab() == own.get_vocab()


@pytest.mark.parametrize("declared", ["list", "mapping"])
def test_python_that_a_tokenizer_brings_does_not_run_whoever_says_yes(folder, tmp_path, monkeypatch, declared):
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    named = ["evil.Evil", None] if declared == "list" else {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": named}))
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    assert "needs Python code of its own (auto_map), and that is never run; download tokenizer.json" in refused(folder)
    assert not mark.exists()


def test_python_that_a_model_beside_it_brings_does_not_run(folder, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    (folder / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}')
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    assert encode(make_tokenizer({"path": str(folder)}, ""), WORDS).size > 0
    assert not mark.exists()


FILES = ["tokenizer.json", "tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json"]
NO_OBJECT = {"[]": "a list", '"x"': "text", "3": "a number", "null": "null", "true": "true or false"}
NO_JSON = [b"", b"{", b"\xff", b"[" * 100_000, b"\0"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_object_is_named(folder, name):
    for text, kind in NO_OBJECT.items():
        (folder / name).write_text(text)
        assert refused(folder) == f"tokenizer file {folder / name}: is damaged: holds {kind}, not an object"
    for raw in NO_JSON:
        (folder / name).write_bytes(raw)
        assert f"tokenizer file {folder / name}: is damaged: no JSON (" in refused(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "is damaged: has no 'model'"),
        ("tokenizer.json", '{"model": {}}', "is damaged: has no 'added_tokens'"),
        ("tokenizer.json", '{"model": 3, "added_tokens": []}', "is damaged: its 'model' is a number"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "is damaged: its 'tokenizer_class' is a number"),
        ("tokenizer_config.json", '{"auto_map": 3}', "is damaged: its 'auto_map' is a number"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "is damaged: its 'added_tokens_decoder' is a list"),
        ("config.json", '{"auto_map": 3}', "is damaged: its 'auto_map' is a number"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file(folder, name, text, message):
    (folder / name).write_text(text)
    assert refused(folder) == f"tokenizer file {folder / name}: {message}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"model": {}, "added_tokens": []}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": [3]}, "added_tokens": [3]}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": []}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 3}}'),
        ("tokenizer_config.json", '{"extra_special_tokens": 3}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
    ],
)
def test_damage_within_says_what_the_library_says(folder, name, text):
    (folder / name).write_text(text)
    assert "cannot be loaded: a file is missing or damaged: " in refused(folder)


def test_what_is_not_there_is_not_called_damaged(tmp_path):
    assert "/nothing does not exist; download tokenizer.json" in refused(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    assert "cannot be loaded: a file is missing or damaged: " in refused(tmp_path / "bare")
    searched = (
        rf"'no-such/name' cannot be loaded: {tmp_path}/no-such/name does not exist, and there is no copy on the hub"
    )
    with pytest.raises(NotDownloaded, match=searched):
        make_tokenizer({"pretrained": "no-such/name"}, "", tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.txt"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CorpusError, match=rf"{name}: is a folder, pipe or device"):
        tokenizer_key({"path": str(folder)}, None)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt"])
def test_each_file_that_makes_a_tokenizer_tells_it_from_others(folder, name):
    before = tokenizer_key({"path": str(folder)}, None)
    (folder / "README.md").write_text("no part of it")
    assert tokenizer_key({"path": str(folder)}, None) == before
    (folder / name).write_bytes(b"another")
    assert tokenizer_key({"path": str(folder)}, None) != before


def test_a_tokenizers_file_is_in_the_key_of_the_corpus(tmp_path):
    """Two studies in one cache, each with a file of its own."""
    words = ["[UNK]", *dict.fromkeys(WORDS.split())]
    for name, ordered in {"one": words, "two": [words[0], *words[:0:-1]]}.items():
        vocabulary = {word: number for number, word in enumerate(ordered)}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        (tmp_path / name).mkdir()
        made.save(str(tmp_path / name / "tokenizer.json"))
    (tmp_path / "t").write_text(WORDS * 9)
    files = {"files": {"train": "t", "validation": "t", "test": "t"}}
    packed = [
        prepare.prepare(files, {"path": f"{name}/tokenizer.json"}, 8, tmp_path / "cache", tmp_path)
        for name in ("one", "two")
    ]
    first, second = (open_split(folder, "train")[:3].tolist() for folder in packed)
    assert (first, second) == ([1, 2, 3], [8, 7, 6])
    (tmp_path / "one" / "tokenizer.json").write_bytes((tmp_path / "two" / "tokenizer.json").read_bytes())
    assert prepare.prepare(files, {"path": "one/tokenizer.json"}, 8, tmp_path / "cache", tmp_path) == packed[1]


def test_the_bytes_of_a_hub_tokenizer_and_the_libraries_are_in_the_key(whole, tmp_path, monkeypatch):
    """A snapshot in the hub's cache; its name stays the same."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    keys = []
    for commit in ("1" * 40, "2" * 40):
        place = tmp_path / "models--me--mine"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        shutil.copytree(whole, place / "snapshots" / commit)
        (place / "snapshots" / commit / "special_tokens_map.json").write_text(f'{{"eos_token": "{commit[0]}"}}')
        keys.append(tokenizer_key({"pretrained": "me/mine"}, tmp_path / "elsewhere"))
    assert keys[0] != keys[1]
    assert encode(make_tokenizer({"pretrained": "me/mine"}, ""), WORDS).size > 0
    for library in ("tokenizers.__version__", "pagating.data.saved_tokenizer.version"):
        with monkeypatch.context() as patch:
            patch.setattr(library, "0" if library.startswith("tokenizers") else lambda name: "0")
            assert tokenizer_key({"pretrained": "me/mine"}, None) != keys[1]


@pytest.mark.parametrize("ids", [[0, 1, 9], [0, 1, 70_000]])
def test_ids_with_gaps_get_an_embedding_for_each_id(ids):
    gaps = Tokenizer(models.WordLevel(dict(zip(("a", "b", "c"), ids, strict=True)), unk_token="a"))
    gaps.pre_tokenizer = pre_tokenizers.Whitespace()
    assert vocabulary_size(gaps) == ids[2] + 1
    assert encode(gaps, "a b c").tolist() == ids == encode_lines(gaps, "a b c")[0].tolist()
    assert encode(gaps, "c").dtype == (np.uint32 if ids[2] > 65_535 else np.uint16)
    gaps.add_tokens(["<more>"])  # beyond the model's vocabulary
    assert vocabulary_size(gaps) == max(ids[2] + 1, max(encode(gaps, "<more>")) + 1)


def test_an_id_beyond_every_model_is_refused():
    wide = Tokenizer(models.WordLevel({"a": 0, "b": 1 << 20}, unk_token="a"))
    with pytest.raises(CorpusError, match=r"has the id 1048576; a model has at most 1,048,576 embeddings"):
        encode(wide, "a")


@pytest.mark.parametrize(
    "model", [models.WordLevel({"a": 0}), models.WordPiece({"a": 0}), models.Unigram([("a", -1.0)])], ids=repr
)
def test_no_unknown_token_works_until_one_is_needed(model):
    tokenizer = Tokenizer(model)
    assert encode(tokenizer, "a").tolist() == [0] == encode_lines(tokenizer, "a")[0].tolist()
    for way in (encode, encode_lines):
        with pytest.raises(CorpusError, match=r"cannot encode the text: .*it needs an unknown token, or a token for"):
            way(tokenizer, "b")


def test_a_bpe_without_unknown_token_must_know_every_character(whole):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    check_alphabet(tokenizer, ["abba"])
    assert encode(tokenizer, "aéb").tolist() == [0, 1] or encode(tokenizer, "aéb").tolist() == [2]  # lost in silence
    with pytest.raises(CorpusError, match=r"no token for '\\xe9', which the text has, and no unknown token"):
        check_alphabet(tokenizer, ["ab", "aéb"])
    tokenizer.model.unk_token = "a"
    check_alphabet(tokenizer, ["aéb"])
    check_alphabet(make_tokenizer({"path": str(whole)}, ""), ["aéb\u4e00\n"])  # byte-level
    ends = Tokenizer(models.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"))
    check_alphabet(ends, ["ba"])
    bytewise = Tokenizer(models.BPE({"a": 0, "<0xC3>": 1, "<0xA9>": 2}, [], byte_fallback=True))
    check_alphabet(bytewise, ["aé"])
    with pytest.raises(CorpusError, match=r"no token for '\\xe8'"):  # has the bytes C3 A8
        check_alphabet(bytewise, ["aéè"])


def test_what_a_tokenizer_removes_or_does_not_know_is_said(capsys):
    words = Tokenizer(models.WordLevel({"the": 0, "fox": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    check_alphabet(words, [WORDS])
    check_unknown(words, np.array([0, 1] * 40 + [2]))
    assert not capsys.readouterr().err
    check_unknown(words, np.array([0, 1, 2, 2]))
    assert "no token for parts of the training text: 50% of its tokens are '?'\n" in capsys.readouterr().err
    with pytest.raises(CorpusError, match=r"makes every token of the training text '\?': nothing could be learned"):
        check_unknown(words, np.array([2, 2, 2]))
    unigram = Tokenizer(models.Unigram([("<u>", 0.0), ("a", -1.0)], 0, False))
    check_unknown(unigram, np.array([0, 1]))
    assert "50% of its tokens are '<u>'\n" in capsys.readouterr().err
    words.normalizer = normalizers.Replace("q", "")
    check_alphabet(words, [WORDS])
    assert "the tokenizer removes characters of the text: 'q'\n" in capsys.readouterr().err


def test_a_size_that_a_given_tokenizer_does_not_have_is_refused(whole, tmp_path, capsys):
    (tmp_path / "t").write_text(WORDS * 9)
    source = {"files": {"train": "t", "validation": "t", "test": "t"}}
    for size in (None, 281):
        spec = {"path": str(whole), **({"vocab_size": size} if size else {})}
        folder = prepare.prepare(source, spec, 8, tmp_path / "cache", tmp_path)
        assert json.loads((folder / "corpus.json").read_text())["vocab_size"] == 281
    for cache in ("cache", "fresh"):
        with pytest.raises(CorpusError, match=r"tokenizer.vocab_size=5000: '.*' has 281 \(its largest id \+ 1\)"):
            prepare.prepare(source, {"path": str(whole), "vocab_size": 5000}, 8, tmp_path / cache, tmp_path)
    assert not (tmp_path / "fresh").exists()
    capsys.readouterr()
    with pytest.raises(CorpusError, match="one window needs n_ctx"):
        prepare.prepare(source, {"vocab_size": 4000}, 10_000, tmp_path / "fresh", tmp_path)
    assert "gives only" not in capsys.readouterr().err  # a refusal is one line
    prepare.prepare(source, {"vocab_size": 4000}, 8, tmp_path / "cache", tmp_path)
    assert "tokenizer.vocab_size=4000: the training text gives only " in capsys.readouterr().err
    prepare.prepare(source, {"vocab_size": 4000}, 8, tmp_path / "cache", tmp_path)
    assert "gives only" not in capsys.readouterr().err  # said once


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert "no file has a vocabulary; the folder has tokenizer_config.json; download" in refused(tmp_path)


def test_vocabulary_and_merges_alone_are_a_byte_level_tokenizer(tmp_path):
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([WORDS * 50], vocab_size=280, show_progress=False)
    trained.save_model(str(tmp_path))
    loaded = make_tokenizer({"path": str(tmp_path)}, "")
    assert encode(loaded, WORDS).tolist() == trained.encode(WORDS).ids
    assert loaded.get_vocab_size() == 281  # with GPT-2's end of text


def test_other_files_say_how_they_are_named(whole, tmp_path):
    own = tmp_path / "own.json"
    own.write_bytes((whole / "tokenizer.json").read_bytes())
    assert refused(tmp_path).endswith("has no tokenizer.json; name its file as tokenizer: {path: .../own.json}")
    assert encode(make_tokenizer({"path": str(own)}, ""), WORDS).size > 0
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nquick\n")
    assert "has a vocab.txt, and no file says of which kind: add a tokenizer_config.json such as " in refused(bert)
    assert "it is no tokenizer.json" in refused(bert / "vocab.txt")
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    assert encode(make_tokenizer({"path": str(bert)}, ""), "The quick fox").tolist() == [5, 6, 1]


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 33) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(value, at=()):
    """Yield every place in nested mappings and lists; of a list only the first."""
    inside = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    return [at, *(found for key, child in inside for found in places(child, (*at, key)))]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_anywhere_is_a_tokenizer_or_is_refused(whole, tmp_path, data):
    folder = tmp_path / "own"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    content = json.loads((folder / name).read_text())
    if name == "tokenizer.json":  # without the words of the vocabulary
        content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:2])
    *parents, last = data.draw(st.sampled_from(places(content)[1:]))
    section = content
    for key in parents:
        section = section[key]
    section[last] = data.draw(VALUE)
    (folder / name).write_text(json.dumps(content))
    files = {"files": {"train": "t", "validation": "t", "test": "t"}}
    (tmp_path / "t").write_text(WORDS * 9)
    try:
        made = prepare.prepare(files, {"path": "own"}, 8, tmp_path / "cache", tmp_path)
    except CorpusError as error:
        (line,) = str(error).splitlines()
        assert "own" in line or "split" in line or "the tokenizer" in line
    else:
        assert prepare.fault(made) is None
