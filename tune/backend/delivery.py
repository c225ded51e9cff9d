"""Delivery of corpus, user gates, weights and own training code to nodes that have neither repository nor corpus.

The driver splits the packed corpus into objects of Ray's store. The first trial on a node writes them to the node's
cache, once, under a file lock, and checks every byte against the digest. All trials on the node map that one copy.
If all nodes see the folder of the corpus (`storage`), nothing is sent.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock

from analysis.io.write import replacing, write_whole
from pagating.data.prepare import file_names, receive
from pagating.trial import Trial
from tune.study.inputs import Inputs
from tune.subject.function import Function, OwnJob
from tune.subject.subject import Job

PART_BYTES = 64 << 20


@dataclass(frozen=True)
class Parcel:
    """Input files of a study, as paths or as objects of Ray's store.

    Attributes:
        corpus: Folder of the packed corpus, on the driver's machine or in the storage.
        digest: Digest of the corpus.
        study: Folder of the study on the driver's machine.
        driver: Ray's id of the driver's node. It is empty for a driver outside the cluster.
        shared: All nodes see the folder of the corpus.
        parts: Objects that hold the parts of each file of the corpus, in order. It is empty if `shared`.
        gates: Source of each file of the user's gates.
        weights: Objects that hold the parts of the file of pretrained weights. It is empty if `shared`.
        weights_digest: SHA-256 of that file. None means that there are no pretrained weights.
    """

    corpus: str
    digest: str
    study: str
    driver: str = ""
    shared: bool = False
    parts: dict[str, list[Any]] = field(default_factory=dict)
    gates: dict[str, bytes] = field(default_factory=dict)
    weights: list[Any] = field(default_factory=list)
    weights_digest: str | None = None


@dataclass(frozen=True)
class OwnParcel:
    """Files of the user's own training.

    Attributes:
        files: Content of each file, by its path in the folder in which a trial runs.
        study: Folder of the study on the driver's machine.
        driver: Ray's id of the driver's node. It is empty for a driver outside the cluster.
        shared: All nodes see the folders of the trials.
    """

    files: dict[str, bytes]
    study: str
    driver: str = ""
    shared: bool = False

    def place(self, job: Job, cache: Path) -> Job:
        """Write the files into a folder of the cache, named by their content; return the job that runs there."""
        digests = "".join(f"{name}\0{_sha(content)}\0" for name, content in sorted(self.files.items()))
        folder = cache / f"code-{_sha(digests.encode())[:16]}"
        for name, content in self.files.items():
            _write_once(folder / name, content)
        trial: OwnJob = job.trial
        main = folder if trial.command else folder / Path(trial.file).name
        return replace(job, trial=replace(trial, file=str(main), folder=str(folder)))


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield a file in pieces of at most `PART_BYTES`."""
    with open(path, "rb") as file:
        while piece := file.read(PART_BYTES):
            yield piece


def pack(inputs: Inputs, storage: Path | None, driver: str) -> Parcel:
    """Copy a study's corpus and weights to `storage`, or put them into Ray's object store; return the parcel.

    Args:
        inputs: The inputs of the study.
        storage: Folder that all nodes see, or None.
        driver: Ray's id of the driver's node. It is empty for a driver outside the cluster.

    Raises:
        CorpusError: The storage holds another or a damaged corpus and cannot be written.
        OSError: A file cannot be read or written.
    """
    corpus, folder, digest = inputs.corpus, inputs.folder, inputs.meta["digest"]
    gates = {str(path): path.read_bytes() for path in (folder.resolve() / "gates").glob("*.py")}
    own: dict[str, Any] = {"gates": gates, "weights_digest": None}
    if weights := inputs.weights:
        source, own["weights_digest"] = Path(weights["path"]), weights["sha256"]
        if storage:
            _receive_weights(storage, weights["sha256"], lambda: _pieces(source))
        else:
            own["weights"] = [ray.put(piece) for piece in _pieces(source)]
    if storage:
        shared = storage / corpus.name
        receive(shared, digest, lambda: {name: _pieces(corpus / name) for name in file_names(corpus)})
        return Parcel(str(shared), digest, str(folder.resolve()), driver, shared=True, **own)
    parts = {name: [ray.put(piece) for piece in _pieces(corpus / name)] for name in file_names(corpus)}
    return Parcel(str(corpus.resolve()), digest, str(folder.resolve()), driver, parts=parts, **own)


def pack_own(subject: Function, storage: Path | None, driver: str) -> OwnParcel:
    """Return the files of the user's own training. Raises StudyError if one of a command cannot travel.

    Args:
        subject: The user's own training.
        storage: Folder that all nodes see, or None.
        driver: Ray's id of the driver's node. It is empty for a driver outside the cluster.
    """
    sources = subject.sources
    return OwnParcel(sources.contents(), str(sources.folder.resolve()), driver, shared=storage is not None)


def node_cache() -> Path:
    """Return this node's cache: `PAGATING_CACHE`, else the folder `pagating` in `XDG_CACHE_HOME` (~/.cache).

    The variables are those of the node. The driver's environment is not sent.
    """
    own = os.environ.get("PAGATING_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagating"


def unpack(parcel: Parcel | OwnParcel, job: Job) -> Job:
    """Fetch the files that this node lacks; return the job with the paths of this node.

    Raises:
        CorpusError, OSError: A file cannot be fetched. The node is at fault, not the trial.
    """
    if parcel.driver and ray.get_runtime_context().get_node_id() == parcel.driver:
        return job
    cache = node_cache()
    if isinstance(parcel, OwnParcel):
        return replace(parcel.place(job, cache), checkpoints=_checkpoints(parcel, job, cache))
    trial = job.trial
    corpus = Path(parcel.corpus) if parcel.shared else cache / Path(parcel.corpus).name
    if not parcel.shared:
        receive(corpus, parcel.digest, lambda: {name: map(_fetched, refs) for name, refs in parcel.parts.items()})
    placed = replace(_with_own_code(parcel, trial, cache), corpus=str(corpus))
    if digest := parcel.weights_digest:
        where = corpus.parent if parcel.shared else cache
        weights = _receive_weights(where, digest, lambda: map(_fetched, parcel.weights))
        placed = replace(placed, pretrained=str(weights))
    return replace(job, trial=placed, checkpoints=_checkpoints(parcel, job, cache))


def _checkpoints(parcel: Parcel | OwnParcel, job: Job, cache: Path) -> str | None:
    """Return the folder of a job's checkpoints. Without a storage it is in the node's cache: others cannot read it."""
    if parcel.shared or not job.checkpoints:
        return job.checkpoints
    return str(cache / f"checkpoints-{_sha(parcel.study.encode())[:16]}" / Path(job.checkpoints).name)


def _receive_weights(cache: Path, digest: str, pieces: Callable[[], Iterable[bytes]]) -> Path:
    """Write the file of pretrained weights to `cache` unless it is there; return its path.

    Raises:
        OSError: The SHA-256 of the pieces is not `digest`.
    """
    path = cache / f"weights-{digest[:16]}.safetensors"
    with FileLock(cache / ".weights.lock"):
        if str(path) in _verified and path.is_file():
            return path
        if not path.is_file() or _sha256(path) != digest:
            for left in cache.glob(f".{path.name}.*"):  # unfinished files of a process that was killed
                left.unlink()
            with replacing(path) as scratch:
                with open(scratch, "wb") as file:
                    file.writelines(pieces())
                if (found := _sha256(scratch)) != digest:
                    raise OSError(f"{path}: the weights that came are {found[:16]}, not {digest[:16]}")
    _verified.add(str(path))
    return path


_verified: set[str] = set()  # files whose SHA-256 this process has checked


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetched(ref: Any) -> bytes:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        raise OSError(f"the study's data cannot be fetched from the driver: {type(error).__name__}") from error


def _with_own_code(parcel: Parcel, trial: Trial, cache: Path) -> Trial:
    """Return the trial with its user's code named by this node's copy of the file, in a folder named by its content."""
    own = trial.own_code
    if own is None:
        return trial
    source = parcel.gates[own.file]
    copy = cache / f"gate-{_sha(source)[:16]}" / re.sub(r"[^\w.-]", "-", Path(own.file).name)
    _write_once(copy, source)
    return trial.with_own(copy)


def _write_once(path: Path, content: bytes) -> None:
    """Write a file unless it is there with the same content."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
