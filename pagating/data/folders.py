"""Load datasets with the `datasets` library: local folders in every layout that it reads, and those of the hub."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import lzma
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pagating.data.errors import CorpusError, NotDownloaded, first_line, note

KINDS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")  # of files with rows of text
TEXTS = KINDS[:6]
PACKED = (".gz", ".xz", ".bz2", ".zst", ".lz4")
ARCHIVE = ".zip"  # of files with rows
PACKAGES = {"zstd": "zstandard", "lz4": "lz4"}  # that the library needs for a compression
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "README.md")


def load_hub(name: str, config: str | None, revision: str | None, shown: str, place: Path) -> Mapping[str, Any]:
    """Load a dataset of the hub, or its copy in the library's cache.

    Args:
        name: Name on the hub.
        config: Configuration of the dataset.
        revision: Version of the dataset.
        shown: Name of the dataset in messages.
        place: The local folder that was looked for, for messages.

    Raises:
        NotDownloaded: There is no copy on this machine, and the hub cannot be reached.
        CorpusError: There is no such dataset, or it cannot be loaded.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    missing = f"{shown} cannot be loaded: {place} does not exist"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CorpusError(f"{missing}, and no dataset of the hub can have that name") from error
    with _quiet():
        try:
            if "/" not in name:  # the library's cache has local folders of that name too, so only the hub knows
                name = HfApi().dataset_info(name, revision=revision, timeout=10).id
            return datasets.load_dataset(name, config, revision=revision)
        except MemoryError:
            raise
        except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
            kind = NotDownloaded if "/" in name else CorpusError  # the hub calls its datasets OWNER/NAME
            raise kind(f"{missing}, and the hub's cannot be reached: {first_line(error)}") from error
        except Exception as error:  # parsers of YAML, zip, Arrow raise errors of many types for bad content
            raise CorpusError(f"{missing}, and the hub's cannot be loaded: {_reason(error)}") from error


def load_folder(folder: Path, config: str | None, use: Callable[[Mapping[str, Any]], dict[str, str]]) -> dict[str, str]:
    """Load a local folder of data files, or one that `save_to_disk` wrote, and return what `use` makes of it.

    The library's own cache knows a file by its time of change, so a scratch folder takes its place. One line on
    standard error names data files that are not part of the dataset.

    Args:
        folder: The folder.
        config: Configuration in the folder's README.md; None for the only one.
        use: Called with the splits, by name, while the scratch folder exists.

    Raises:
        CorpusError: The folder has no data files, or one of them cannot be read.
    """
    import datasets

    with _quiet():
        try:
            if (folder / "dataset_dict.json").exists():
                return use(datasets.load_from_disk(str(folder)))
            if (folder / "state.json").exists():
                return use({"train": datasets.load_from_disk(str(folder))})
            with tempfile.TemporaryDirectory(prefix="pagating-") as scratch:
                return use(_load_files(folder, config, Path(scratch)))
        except (CorpusError, MemoryError):
            raise
        except Exception as error:  # parsers of YAML, zip, Arrow raise errors of many types for bad content
            raise CorpusError(f"corpus folder {folder}: {_why(folder, error)}") from error


def _load_files(folder: Path, config: str | None, scratch: Path) -> Mapping[str, Any]:
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    plain, cache = str(_without_wildcards(folder, scratch)), str(scratch / "cache")
    builder = datasets.load_dataset_builder(plain, config, cache_dir=cache)
    if isinstance(builder.config, CsvConfig):  # "NA" is a text like any other
        builder = datasets.load_dataset_builder(plain, config, cache_dir=cache, keep_default_na=False)
    used = {os.path.realpath(path) for split in (builder.config.data_files or {}).values() for path in split}
    if getattr(builder.config, "encoding", None) in (None, "utf-8"):
        for path in sorted(used):
            _check_utf8(Path(path))
    left = [str(path.relative_to(folder)) for path in data_files(folder) if os.path.realpath(path) not in used]
    if used and left and config is None:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        note(f"corpus folder {folder}: `datasets` leaves out {', '.join(left[:3])}{more}")
    builder.download_and_prepare()
    return builder.as_dataset()


def data_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold rows of text, sorted. Hidden ones are left out."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            suffixes = Path(name).suffixes[-2:]
            kind = suffixes[0] if len(suffixes) == 2 and suffixes[1] in PACKED else "".join(suffixes[-1:])
            if kind in (*KINDS, ARCHIVE) and name not in NO_ROWS and not name.startswith("."):
                found.append(Path(place) / name)
    return sorted(found)


def _check_utf8(path: Path) -> None:
    """Raise CorpusError if a file of text is not UTF-8; the library would replace or drop what it cannot decode."""
    if path.suffix == ARCHIVE:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if Path(name).suffix in TEXTS:
                    with archive.open(name) as file:
                        _check_bytes(file, f"{path}/{name}")
    elif path.suffix in TEXTS or (path.suffix in OPENERS and Path(path.stem).suffix in TEXTS):
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            _check_bytes(file, str(path))


def _check_bytes(file: IO[bytes], shown: str) -> None:
    """Raise CorpusError if a file has a byte that is not UTF-8, or a NUL byte."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        while piece := file.read(1 << 20):
            decoder.decode(piece)
            if b"\0" in piece:
                raise CorpusError(f"{shown}: is binary, not text (a NUL byte at offset {offset + piece.index(0)})")
            offset += len(piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = f"{error.object[error.start]:#04x} after offset {offset}"
        raise CorpusError(f"{shown}: is not UTF-8 text (byte {at}); convert it, for example with iconv") from error


def _without_wildcards(folder: Path, scratch: Path) -> Path:
    """Return the folder, or a copy of its tree made of links if the library would read its path as a pattern."""
    if not glob.has_magic(str(folder)) and "::" not in str(folder):
        return folder
    copy = scratch / "data"
    for place, _, names in os.walk(folder):
        below = copy / os.path.relpath(place, folder)
        below.mkdir(parents=True)
        for name in names:
            (below / name).symlink_to(Path(place).resolve() / name)
    return copy


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library, and that of the hub, inside the block. Its progress bars stay on a terminal."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    bars = datasets.utils.are_progress_bars_disabled()
    both = [(logging, logging.get_verbosity()) for logging in (datasets.utils.logging, hub_logging)]
    for logging, _ in both:
        logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        for logging, verbosity in both:
            logging.set_verbosity(verbosity)
        if not bars:
            datasets.utils.enable_progress_bars()


def _why(folder: Path, error: Exception) -> str:
    """Return the reason why a folder cannot be loaded."""
    files = data_files(folder)
    if not files:
        names = sorted(path.name for path in folder.iterdir())
        held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
        kinds, packed = ", ".join(KINDS), ", ".join((*PACKED, ARCHIVE))
        return (
            f"holds no file of rows ({kinds}, also packed with {packed}); it holds {held}. Plain text of any name is "
            "given as corpus: {files: {train: FOLDER/*}}"
        )
    if odd := [path for path in files if not path.is_file()]:
        return f"{odd[0].relative_to(folder)} is a pipe or device, or a link to nothing; remove it"
    empty = [path for path in files if not path.stat().st_size]
    if empty:
        return f"{empty[0].relative_to(folder)} is empty; remove it"
    said = _reason(error)
    for kind, package in PACKAGES.items():
        if f"type {kind} not supported" in said:
            return f"has files packed with {kind}; install the package {package}, or unpack them"
    name = f"{files[0].relative_to(folder)} " if len(files) == 1 else ""
    return f"{said}; set corpus.hub.config" if "Config name is missing" in said else f"{name}cannot be loaded: {said}"


def _reason(error: BaseException) -> str:
    """Return the first error of a chain in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return " ".join([first_line(error), *lines[1:2]])
