"""Text -> tokens -> memory-mapped windows.

A corpus is three texts (train, validation, test) packed without padding into one flat token file a split. The folder
that holds them is named by what is in it (text, tokenizer, format), written once, and only ever mapped for reading, so
that any number of trials on a node share one copy.

Axes: B batch, T position in a window, N token in a split.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pagating.texts import SPLITS, CorpusError, load_texts

FORMAT = 2  # raise it when the packing of the same text changes
CHUNK = 1 << 20  # characters of a piece that is tokenized on its own
BATCH = 8  # pieces handed to the tokenizer at a time
ROW_DTYPE = np.dtype("<i8")  # of the index of a corpus of lines


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces of CHUNK to 2 CHUNK characters; joined they give the text back.

    A piece ends at a line end; in a longer line before a space, and without one at 2 CHUNK.
    """
    start = 0
    while start < len(text):
        least, most = start + CHUNK, start + 2 * CHUNK
        end = text.find("\n", least, most) + 1
        if not end and most < len(text):
            space = text.rfind(" ", least, most)
            end = space if space > 0 else most
        yield text[start : end or len(text)]
        start = end or len(text)


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
    parts: list[np.ndarray] = []
    pieces = _chunks(text)
    while batch := list(itertools.islice(pieces, BATCH)):  # what the tokenizer hands back takes many times the text
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        parts += [np.asarray(piece.ids, dtype=dtype) for piece in encoded]
    return np.concatenate(parts)


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
    """The folder with the packed corpus, made when it is not in the cache, or damaged there (one line says so).

    Atomic: another process sees all or nothing, and of several that need the same corpus one makes it. It holds
    `train.bin`, `validation.bin`, `test.bin` (flat token ids), `tokenizer.json` and `corpus.json` (digest, dtype,
    vocabulary, tokens and bytes of text a split); with `rows: lines` in `source` also what `pagating.lines` reads. A
    trial that reads a folder while it is made again keeps its files.
    Raises CorpusError for a split shorter than one window, and for a cache that cannot be written.
    """
    texts = load_texts(source, base)
    lines = source.get("rows") == "lines"
    kind = ["lines"] if lines else []
    key = _digest(str(FORMAT), *kind, _tokenizer_key(tokenizer, base), *[texts[split] for split in SPLITS])[:16]
    folder = cache / f"corpus-{key}"
    if fault(folder):
        try:
            with alone(cache):
                damage = fault(folder)  # while this process waited, another may have made it
                if damage:
                    if folder.exists():
                        print(f"pagating: {folder}: {damage}; it is packed again", file=sys.stderr)
                    fast = make_tokenizer(tokenizer, texts["train"], base)
                    _pack(folder, fast, texts, lines)
        except OSError as error:
            raise CorpusError(f"{cache}: the packed corpus cannot be written: {error.strerror or error}") from error
    check_length(folder, n_ctx)
    return folder


@contextlib.contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Hold the cache's lock, which ends with the process; clear away what a process left that was killed with it."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for scratch in cache.glob(".corpus-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield


def _pack(folder: Path, tokenizer: Any, texts: Mapping[str, str], lines: bool) -> None:
    """Tokenize and write; the index of the lines too where they are rows."""
    if not lines:
        _write(folder, tokenizer, {split: encode(tokenizer, texts[split]) for split in SPLITS}, texts, {})
        return
    from pagating.lines import encode_lines

    both = {split: encode_lines(tokenizer, texts[split]) for split in SPLITS}
    tokens, rows = ({split: pair[i] for split, pair in both.items()} for i in range(2))
    _write(folder, tokenizer, tokens, texts, rows)


def _write(
    folder: Path,
    tokenizer: Any,
    tokens: Mapping[str, np.ndarray],
    texts: Mapping[str, str],
    rows: Mapping[str, np.ndarray],
) -> None:
    """Make the folder in one step, every byte of it on disk before its name is."""
    words = tokenizer.to_str().encode("utf-8")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "dtype": str(tokens["train"].dtype),
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer": hashlib.sha256(words).hexdigest(),
        "splits": {
            split: {
                "tokens": len(tokens[split]),
                "bytes": len(texts[split].encode("utf-8")),
                "sha256": hashlib.sha256(tokens[split].tobytes()).hexdigest(),
            }
            for split in SPLITS
        },
    }
    files = {f"{split}.bin": tokens[split].tobytes() for split in SPLITS}
    for split, spans in rows.items():
        raw = files[rows_file(split)] = spans.tobytes()
        meta["splits"][split] |= {"rows": len(spans), "rows_sha256": hashlib.sha256(raw).hexdigest()}
    if rows:
        meta["pad"] = pad_id(tokenizer)
    meta["digest"] = meta_digest(meta)
    files |= {"tokenizer.json": words, "corpus.json": json.dumps(meta, indent=1).encode("utf-8")}
    place(folder, {name: [raw] for name, raw in files.items()})


def place(folder: Path, files: Mapping[str, Iterable[bytes]]) -> None:
    """Write the folder in one step. The cache's lock is held: no one else has the scratch folder."""
    scratch = folder.parent / f".{folder.name}"
    try:
        scratch.mkdir()
        for name, pieces in files.items():
            with open(scratch / name, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():  # damaged: set it aside in one step, then remove it
            os.replace(folder, scratch / "damaged")
        os.replace(scratch, folder)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def rows_file(split: str) -> str:
    """Name of the index of a split's lines."""
    return f"{split}.rows"


def pad_id(tokenizer: Any) -> int:
    """What a row is filled up with: `<|endoftext|>`, GPT-2's usual choice, or id 0 where the vocabulary has none."""
    return tokenizer.token_to_id("<|endoftext|>") or 0


def fault(folder: Path) -> str | None:
    """What is wrong with a cached corpus, every byte looked at; None where it is as it was written."""
    try:
        meta = read_meta(folder)
        if meta["format"] != FORMAT:
            return f"format {meta['format']} is not {FORMAT}"
        wanted = {f"{split}.bin": meta["splits"][split]["sha256"] for split in SPLITS}
        indexed = {split: counts for split, counts in meta["splits"].items() if "rows" in counts}
        wanted |= {rows_file(split): counts["rows_sha256"] for split, counts in indexed.items()}
        for name, digest in {**wanted, "tokenizer.json": meta["tokenizer"]}.items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is damaged (its checksum does not match)"
    except (CorpusError, KeyError) as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def check_length(folder: Path, n_ctx: int) -> None:
    """Raise CorpusError when a split is shorter than one window of n_ctx tokens and the token after it."""
    for split, counts in read_meta(folder)["splits"].items():
        if counts["tokens"] < n_ctx + 1:
            raise CorpusError(
                f"the {split} split has {counts['tokens']} tokens; one window needs n_ctx + 1 = {n_ctx + 1}: "
                "give more text or a smaller model.n_ctx"
            )


def meta_digest(meta: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of what `corpus.json` says, its own `digest` left out."""
    return _digest(json.dumps({name: value for name, value in meta.items() if name != "digest"}, sort_keys=True))[:16]


def read_meta(folder: str | Path) -> dict[str, Any]:
    """`corpus.json` of a packed corpus: digest, dtype, vocab_size, and tokens and bytes of text a split.

    Raises CorpusError where it is not what was written, OSError where it cannot be read.
    """
    path = Path(folder) / "corpus.json"
    try:
        meta = json.loads(path.read_bytes())
        whole = isinstance(meta, dict) and meta.get("digest") == meta_digest(meta)
    except ValueError:  # cut off, or no UTF-8
        whole = False
    if not whole:
        raise CorpusError(f"{path} is damaged (its digest does not match)")
    return meta


# --- windows ---------------------------------------------------------------------------------------------------------


def open_split(folder: str | Path, split: str) -> np.ndarray:
    """The token ids (N,) of a split, memory-mapped and read-only.

    Raises CorpusError where the file has not the size that was written; `prepare` looks at every byte.
    """
    meta, path = read_meta(folder), Path(folder) / f"{split}.bin"
    wanted, size = meta["splits"][split]["tokens"] * np.dtype(meta["dtype"]).itemsize, path.stat().st_size
    if size != wanted:
        raise CorpusError(f"{path}: has {size} bytes, not {wanted}: it is cut off or not the file that was packed")
    return np.memmap(path, dtype=meta["dtype"], mode="r")


def step_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of a step: those of one `stream` are independent of another's, and of other steps'."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, step]))


def train_batch(tokens_N: np.ndarray, seed: int, step: int, batch: int, n_ctx: int) -> torch.Tensor:
    """Batch of training windows (B, T + 1), int64: a pure function of (seed, step), the same for every arm.

    The starts are uniform over the split, drawn by a counter-based generator (Philox): key `seed`, counter `step`.
    Inputs are [:, :-1], targets [:, 1:].
    """
    starts_B = step_generator(seed, step).integers(0, len(tokens_N) - n_ctx, size=batch)
    rows = np.stack([tokens_N[start : start + n_ctx + 1] for start in starts_B])
    return torch.from_numpy(rows.astype(np.int64))


def eval_windows(tokens_N: np.ndarray, n_ctx: int, count: int) -> torch.Tensor:
    """At most `count` non-overlapping windows (W, T + 1) spread evenly over a split, int64; the same for every trial.

    Window w predicts tokens w*T + 1 .. (w + 1)*T: no target is counted twice.
    """
    available = (len(tokens_N) - 1) // n_ctx
    chosen = np.unique(np.linspace(0, available - 1, min(count, available)).round().astype(np.int64))
    return torch.from_numpy(np.stack([tokens_N[w * n_ctx : (w + 1) * n_ctx + 1] for w in chosen]).astype(np.int64))
