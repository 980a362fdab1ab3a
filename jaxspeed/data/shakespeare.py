# SPDX-License-Identifier: Apache-2.0
"""The bundled text as a TFDS data set: nine plays and the sonnets of Shakespeare.

`shakespeare.txt.xz` holds 323 documents, one scene or sonnet each, with a form feed
between them. The text is in the public domain; it is the Project Gutenberg edition of
1997-98 as packaged in the Python package shakespeare 0.6, without headers (docs/data.md
says what was changed). Every 20th document is the validation split. The one decision:
the set is written by TFDS itself, to array_record files, which need no TensorFlow.
"""

import contextlib
import functools
import io
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader


NAME = "jaxspeed_shakespeare"
VERSION = "1.0.0"
"""Part of the cache path: a changed text needs a new version."""

_HELD_OUT_EVERY = 20


def documents() -> list[str]:
    """Returns the scenes and sonnets in order."""
    packed = Path(__file__).with_name("shakespeare.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("ascii").split("\f")


def prepare(data_dir: Path) -> Path:
    """Writes the set under `data_dir` unless a whole one is there; returns `data_dir`.

    It is written in a folder of its own and then renamed, so that a killed preparation
    leaves nothing that looks whole, and processes may prepare at once.

    Raises:
        OSError: `data_dir` cannot be written.
    """
    final = data_dir / NAME / VERSION
    if _is_whole(final):
        return data_dir
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".prepare-") as parts:
        # A fraction of a second: progress bars would only litter the terminal.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            builder_class()(
                data_dir=parts, file_format="array_record"
            ).download_and_prepare()
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists() and not _is_whole(final):
            shutil.rmtree(final)
        try:
            os.rename(Path(parts, NAME, VERSION), final)
        except OSError:
            # Another process was first.
            if not _is_whole(final):
                raise
    return data_dir


@functools.cache
def builder_class() -> Any:
    """Returns the TFDS builder, which registers itself under `NAME`."""
    import tensorflow_datasets as tfds

    class JaxspeedShakespeare(tfds.core.GeneratorBasedBuilder):
        """Scenes and sonnets: `title` and `text`."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        # Nothing is downloaded; looking for checksums beside the code would need
        # importlib_resources, which TFDS 4.9.10 does not install.
        url_infos = None

        def _info(self) -> Any:
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                description="Nine plays by scenes, and the sonnets, of Shakespeare.",
                features=tfds.features.FeaturesDict({"title": text, "text": text}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {
                "train": self._generate_examples(held_out=False),
                "validation": self._generate_examples(held_out=True),
            }

        def _generate_examples(self, held_out: bool) -> Iterator[tuple[int, Any]]:
            for key, text in enumerate(documents()):
                if (key % _HELD_OUT_EVERY == _HELD_OUT_EVERY // 2) == held_out:
                    yield key, {"title": text.split("\n", 1)[0], "text": text}

    return JaxspeedShakespeare


def _is_whole(folder: Path) -> bool:
    files = list(folder.glob("*.array_record*"))
    try:
        for file in files:
            ArrayRecordReader(str(file)).close()
    except RuntimeError:
        return False
    return len(files) == 2 and (folder / "dataset_info.json").exists()
