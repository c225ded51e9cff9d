"""Find the inputs of a study beside its file: packed corpus, own gates and pretrained weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagating.trial import Trial
from tune.errors import StudyError
from tune.study.own_gates import check_gates, digests, keep_gates, place_gate
from tune.study.own_study import OwnStudy
from tune.study.study import Study
from tune.study.weights import check_pretrained, find_pretrained, note, noted, place_weights

if TYPE_CHECKING:
    from pagating.data.prepare import Draft


@dataclass(frozen=True)
class Inputs:
    """The inputs of a study on this machine.

    Attributes:
        folder: The study's folder. It holds the copies of own gates.
        corpus: Folder of the packed corpus.
        meta: Content of the corpus's `corpus.json`.
        gates: SHA-256 of the file of each own gate, by `FILE.py:NAME`.
        weights: `path` and `sha256` of the pretrained weights; None if the study has none.
    """

    folder: Path
    corpus: Path
    meta: Mapping[str, Any]
    gates: Mapping[str, str]
    weights: Mapping[str, str] | None

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.meta["vocab_size"])

    def identity(self) -> dict[str, Any]:
        """Return the digests that the ledger's first event records."""
        found: dict[str, Any] = {"corpus": self.meta["digest"]}
        if self.gates:
            found["gates"] = dict(self.gates)
        if self.weights:
            found["pretrained"] = self.weights["sha256"]
        return found

    def check_begun(self, begun: Mapping[str, Any]) -> None:
        """Raise StudyError if the study was begun with other inputs. Own gates of added arms are allowed.

        `begun` is the ledger's first event, with the gates of arms that were added since.
        """
        if begun["corpus"] != self.meta["digest"]:
            raise StudyError(
                f"{self.folder}: the study was begun on corpus {begun['corpus']}; the text or the tokenizer has "
                f"changed (now {self.meta['digest']}): give the study another name, or bring the old text back"
            )
        if not _contents(begun.get("gates", {})) <= _contents(self.gates):
            raise StudyError(
                f"{self.folder}: the gates in {self.folder / 'gates'} are not those that the study was begun with"
            )
        before, now = begun.get("pretrained"), self.weights["sha256"] if self.weights else None
        if before != now:
            raise StudyError(
                f"{self.folder}: the study was begun with {_weights(before)}, and model.pretrained now names "
                f"{_weights(now)}: give the study another name, or bring the old weights back"
            )

    def place(self, trial: Trial) -> Trial:
        """Return a trial with the paths of this machine's gate copies and weights."""
        return place_weights(place_gate(trial, self.folder), self.folder)


def _contents(gates: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return name and digest of each own gate. The path of its file may change."""
    return {(reference.rpartition(":")[2], digest) for reference, digest in gates.items()}


def _weights(digest: str | None) -> str:
    return f"weights {digest[:16]}" if digest else "no weights"


@dataclass(frozen=True)
class DraftInputs:
    """Inputs that were found and checked. Only `write` writes anything."""

    study: Study
    base: Path
    folder: Path
    corpus: Draft
    weights: dict[str, str] | None

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.corpus.meta["vocab_size"])

    def write(self) -> Inputs:
        """Write the corpus into the cache, and the gates and the weights' note into the study's existing folder."""
        corpus = self.corpus.write()
        keep_gates(self.study, self.base, self.folder)
        note(self.weights, self.folder)
        return Inputs(self.folder, corpus, self.corpus.meta, digests(self.study, self.folder), self.weights)


@contextmanager
def drafted(study: Study, base: Path, folder: Path, output: Path, digest: str | None = None) -> Iterator[DraftInputs]:
    """Find and check the inputs of a study; write nothing.

    Args:
        study: The study.
        base: Folder of the study file, at which its relative paths start.
        folder: The study's folder, which may not exist yet.
        output: Folder of studies. The corpus cache is `PAGATING_CACHE`, or else `.cache` in it.
        digest: Digest of a corpus that is taken from the cache if it is there and intact. Its text need not exist.

    Raises:
        StudyError: A gate or the weights are refused, or differ from those that the study was begun with.
        CorpusError: The text or the tokenizer cannot be used, or the cache cannot be written.
    """
    from pagating.data.prepare import drafted as drafted_corpus

    check_gates(study, base, folder)
    find_pretrained(study, base)  # before the corpus is packed, which may take minutes
    cached = _cached(output, digest) if digest else None
    with nullcontext(cached) if cached else drafted_corpus(*_corpus_of(study), _cache(output), base) as corpus:
        weights = check_pretrained(study, base, folder, corpus.meta["vocab_size"])
        yield DraftInputs(study, base, folder, corpus, weights)


def _cached(output: Path, digest: str) -> Draft | None:
    """Return the intact corpus with this digest in the cache, or None."""
    from pagating.data.corpus import CorpusError, read_meta
    from pagating.data.prepare import Draft, fault

    for path in sorted(_cache(output).glob("corpus-*")):
        try:
            meta = read_meta(path)
        except (CorpusError, OSError):
            continue  # another study's corpus is damaged
        if meta["digest"] == digest and fault(path) is None:
            return Draft(path, meta, {})
    return None


def relocated(study: Study, base: Path, folder: Path) -> Study:
    """Return the study with the relative paths of its text, tokenizer and weights written anew.

    They start at `folder` instead of `base`, so that a study file in `folder` finds the same files. Own gates keep
    their names, because the study has copies of them.
    """
    start, end = os.path.realpath(base), os.path.realpath(folder)

    def anew(path: str) -> str:
        local = not os.path.isabs(os.path.expanduser(path))
        return os.path.relpath(os.path.join(start, path), end) if local else path

    def if_there(name: str | None) -> str | None:
        return anew(name) if name and os.path.exists(os.path.join(start, os.path.expanduser(name))) else name

    corpus, tokenizer, model = study.corpus, study.tokenizer, study.model
    if isinstance(study, OwnStudy):
        run = study.trial
        place = anew(run) if isinstance(run, str) else run.model_copy(update={"folder": anew(run.folder)})
        return study.model_copy(update={"trial": place})
    if corpus.files:
        given = corpus.files.model_dump(include={"train", "validation", "test"}, exclude_none=True)
        moved = {split: anew(one) if isinstance(one, str) else [anew(p) for p in one] for split, one in given.items()}
        corpus = corpus.model_copy(update={"files": corpus.files.model_copy(update=moved)})
    if corpus.hub:
        hub = corpus.hub.model_copy(update={"name": if_there(corpus.hub.name)})
        corpus = corpus.model_copy(update={"hub": hub})
    if tokenizer.path:
        tokenizer = tokenizer.model_copy(update={"path": anew(tokenizer.path)})
    tokenizer = tokenizer.model_copy(update={"pretrained": if_there(tokenizer.pretrained)})
    model = model.model_copy(update={"pretrained": if_there(model.pretrained)})
    return study.model_copy(update={"corpus": corpus, "tokenizer": tokenizer, "model": model})


def packed_corpus(study: Study, output: Path, base: Path, digest: str | None = None) -> Path:
    """Return the study's packed corpus from the cache; pack it if needed. Raises CorpusError.

    Args:
        study: The study.
        output: Folder of studies, which has the cache.
        base: Folder of the study file.
        digest: Digest of a corpus that is taken if the cache has it. Its text need not exist.
    """
    from pagating.data.prepare import prepare

    cached = _cached(output, digest) if digest else None
    return cached.folder if cached else prepare(*_corpus_of(study), _cache(output), base)


def check_tokenizer(study: Study, base: Path) -> None:
    """Load a pretrained tokenizer, to see if it can be used. Raises CorpusError."""
    from pagating.data.tokenizer import make_tokenizer

    if study.tokenizer.path or study.tokenizer.pretrained:
        make_tokenizer(study.tokenizer.model_dump(), "", base)


def opened(study: Study, folder: Path, corpus: Path) -> Inputs:
    """Return the inputs of a study whose folder and packed corpus exist. Raises CorpusError."""
    from pagating.data.corpus import read_meta

    return Inputs(folder, corpus, read_meta(corpus), digests(study, folder), noted(folder))


def begun(study: Study, folder: Path, digest: str) -> Inputs:
    """Return the inputs of a study that was begun on the corpus with this digest. Its text need not exist any more.

    The corpus is packed again if the cache lacks it. Relative paths then start at the study's folder.
    """
    return opened(study, folder, packed_corpus(study, folder.parent, folder, digest))


def _corpus_of(study: Study) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the arguments of `pagating.data.prepare.drafted` that the study defines."""
    tokenizer = study.tokenizer.model_dump()
    if study.tokenizer.path or study.tokenizer.pretrained:  # the default size is no wish
        tokenizer = study.tokenizer.model_dump(exclude_defaults=True)
    return study.corpus.model_dump(exclude_none=True), tokenizer, study.model.n_ctx


def _cache(output: Path) -> Path:
    return Path(os.environ.get("PAGATING_CACHE") or output / ".cache").resolve()
