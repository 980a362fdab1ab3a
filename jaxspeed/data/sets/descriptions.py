# SPDX-License-Identifier: Apache-2.0
"""Long texts with a summary each: Debian's descriptions of its packages.

The packages of one source share paragraphs, so those that do are in the same split.
"""

import re
from pathlib import Path
from typing import Any

from jaxspeed.data.documents import Record
from jaxspeed.data.download import Downloads
from jaxspeed.data.prepare import DataSet, SetInfo, divide


_DESCRIPTION = re.compile(r"^Description-en: (.*)\n((?: .*\n?)+)", re.MULTILINE)
_BETWEEN_PARAGRAPHS = re.compile(r"\n \.\n")
_SHORTEST = 60
"""Characters of a paragraph that says something of its own: most shorter ones do not."""


def _read(downloads: Downloads) -> dict[str, list[Record]]:
    found = {pair for file in downloads.apt_descriptions() for pair in _pairs(file)}
    records = [{"document": long, "summary": short} for long, short in sorted(found)]
    return divide(records, _keys, {"validation": 0.02, "test": 0.02})


def _pairs(file: Path) -> set[tuple[str, str]]:
    """Returns pairs of a long description, its paragraphs on a line each, and a short."""
    pairs = set()
    for short, long in _DESCRIPTION.findall(file.read_text(encoding="utf-8")):
        paragraphs = (" ".join(p.split()) for p in _BETWEEN_PARAGRAPHS.split(long))
        pairs.add(("\n".join(p for p in paragraphs if p), short.strip()))
    return {(long, short) for long, short in pairs if long and short}


def _keys(record: Record) -> list[str]:
    paragraphs = record["document"].split("\n")
    long = [p for p in paragraphs if len(p) >= _SHORTEST]
    return [f"summary {record['summary']}", record["document"], *long]


def _features() -> dict[str, Any]:
    from tensorflow_datasets import features

    return {"document": features.Text(), "summary": features.Text()}


SET = DataSet(
    info=SetInfo(
        name="jaxspeed_package_summaries",
        version="1.0.0",
        features=_features,
        description="Descriptions of Debian's packages: the long one, and the short one as "
        "its summary. What there is depends on the release of the machine that made it.",
        licence="that of each package; mostly GPL",
    ),
    fetched="the package lists of apt, 16 MB",
    read=_read,
)
