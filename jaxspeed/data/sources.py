# SPDX-License-Identifier: Apache-2.0
"""An entry of `data.path` to documents: what kind of thing it is, and what is in it."""

import os
from pathlib import Path

from jaxspeed.config import ConfigError, suggest
from jaxspeed.data.documents import Joined, Origin, Source
from jaxspeed.data.records import (
    BUNDLED,
    TFDS_PREFIX,
    open_array_records,
    open_bundled,
    open_tfds,
    open_tfds_folder,
)
from jaxspeed.data.textfiles import TEXT_KINDS, open_text_file


FILE_KINDS = (*TEXT_KINDS, ".array_record")


def open_source(
    path: str, *, field: str, text_field: str, cache_dir: Path
) -> tuple[Source, Source | None]:
    """Opens one entry of `data.path` or `data.eval_path`.

    Args:
        path: `shakespeare`, `tfds:NAME`, a file or a folder.
        field: the setting it came from, for errors.
        text_field: key or column that holds the text.
        cache_dir: where prepared sets and indices are kept.

    Returns:
        The documents, and the set's own validation split if it has one.

    Raises:
        ConfigError: missing, empty, damaged or not text.
    """
    origin = Origin(field, path)
    if path == BUNDLED:
        return open_bundled(origin, cache_dir)
    if path.startswith(TFDS_PREFIX):
        return open_tfds(origin, text_field, cache_dir)
    found = Path(os.path.expanduser(path))
    if not path or not found.exists():
        raise _missing(origin, found)
    if (found / "dataset_info.json").exists():
        return open_tfds_folder(origin, found, text_field)
    try:
        source = _open_files(origin, _files(origin, found), text_field, cache_dir)
    except OSError as err:
        why = f"cannot be read ({err})"
        raise origin.error(why, "check that the file is there and readable") from err
    if not len(source):
        raise origin.error("holds no text", "give a file that is not empty")
    return source, None


def files_of(path: str) -> frozenset[Path]:
    """Returns the files that an entry of `data.path` reads; none for named sets."""
    if path == BUNDLED or path.startswith(TFDS_PREFIX):
        return frozenset()
    found = Path(os.path.expanduser(path))
    files = _walk(found) if found.is_dir() else [found]
    return frozenset(file.resolve() for file in files)


def _open_files(
    origin: Origin, files: list[Path], text_field: str, cache_dir: Path
) -> Source:
    records = [file for file in files if _kind(file) == ".array_record"]
    parts: list[Source] = [
        open_text_file(
            origin._replace(file=file), str(_kind(file)), text_field, cache_dir
        )
        for file in files
        if _kind(file) != ".array_record"
    ]
    parts += [open_array_records(origin, records)] if records else []
    return parts[0] if len(parts) == 1 else Joined(origin.value, parts)


def _missing(origin: Origin, found: Path) -> ConfigError:
    beside = [p.name for p in found.parent.iterdir()] if found.parent.is_dir() else []
    return origin.error(
        "no such file or folder",
        f"give a file, a folder, {BUNDLED} or {TFDS_PREFIX}NAME."
        + suggest(found.name, [*beside, BUNDLED]),
    )


def _kind(file: Path) -> str | None:
    # TFDS and others name shards x.array_record-00000-of-00004.
    if ".array_record" in file.name:
        return ".array_record"
    return file.suffix.lower() if file.suffix.lower() in FILE_KINDS else None


def _walk(folder: Path) -> list[Path]:
    """Returns the readable files below a folder, sorted, without hidden ones."""
    files: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += (Path(root, name) for name in names if not name.startswith("."))
    return sorted(file for file in files if _kind(file))


def _files(origin: Origin, found: Path) -> list[Path]:
    """Returns the files of a path, at least one."""
    files = _walk(found) if found.is_dir() else [found]
    known = f"{', '.join(FILE_KINDS[:-1])} or {FILE_KINDS[-1]}"
    if not files:
        raise origin.error(f"the folder holds no {known} file", "give another folder")
    if _kind(files[0]) is None:
        raise origin.error(
            "what kind of file it is, its name does not say", f"name it {known}"
        )
    return files
