# SPDX-License-Identifier: Apache-2.0
"""The bundled text as a TFDS data set: nine plays and the sonnets of Shakespeare.

`shakespeare.txt.xz` holds 323 documents, one scene or sonnet each, with a form feed
between them. The text is in the public domain; it is the Project Gutenberg edition of
1997-98 as packaged in the Python package shakespeare 0.6, without headers (docs/data.md
says what was changed). Every 20th document is the validation split.
"""

import lzma
from pathlib import Path
from typing import Any

from jaxspeed.data.documents import Record
from jaxspeed.data.prepare import SetInfo, counts_of, write_set


_HELD_OUT_EVERY = 20


def documents() -> list[str]:
    """Returns the scenes and sonnets in order."""
    packed = Path(__file__).with_name("shakespeare.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("ascii").split("\f")


def prepare(data_dir: Path) -> Path:
    """Writes the set under `data_dir` unless a whole one is there; returns `data_dir`.

    Raises:
        OSError: `data_dir` cannot be written.
    """
    if not counts_of(INFO.folder(data_dir)):
        splits: dict[str, list[Record]] = {"train": [], "validation": []}
        for number, text in enumerate(documents()):
            held_out = number % _HELD_OUT_EVERY == _HELD_OUT_EVERY // 2
            record = {"title": text.split("\n", 1)[0], "text": text}
            splits["validation" if held_out else "train"].append(record)
        write_set(INFO, data_dir, splits)
    return data_dir


def _features() -> dict[str, Any]:
    from tensorflow_datasets import features

    return {"title": features.Text(), "text": features.Text()}


INFO = SetInfo(
    name="jaxspeed_shakespeare",
    version="1.0.0",
    features=_features,
    description="Nine plays by scenes, and the sonnets, of Shakespeare.",
    licence="public domain",
)
