# SPDX-License-Identifier: Apache-2.0
"""Pairs of sentences in English and German: the help pages of LibreOffice.

A page is the same HTML in each language, and its paragraphs, headings, list items and
cells have the same ids.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxspeed.data.documents import Record
from jaxspeed.data.download import Downloads, members
from jaxspeed.data.prepare import DataSet, SetInfo, divide


_PACKAGES = {
    "en": ("libreoffice-help-en-us", "en-US"),
    "de": ("libreoffice-help-de", "de"),
}
_SEGMENT = re.compile(r'<(p|h\d|li|td)\b[^>]*\bid="([^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)
_TAG = re.compile(r"<[^>]+>")


def _read(downloads: Downloads) -> dict[str, list[Record]]:
    files = downloads.apt(*(package for package, _ in _PACKAGES.values()))
    folders = (folder for _, folder in _PACKAGES.values())
    english, german = (
        dict(_segments(file, f"usr/share/libreoffice/help/{folder}/"))
        for file, folder in zip(files, folders, strict=True)
    )
    pairs = {(text, german[key]) for key, text in english.items() if key in german}
    # What is the same in both is a name or a formula, or was not translated.
    records = [{"en": en, "de": de} for en, de in sorted(pairs) if en != de]
    shares = {"validation": 0.05, "test": 0.05}
    return divide(
        records, lambda record: [f"en {record['en']}", f"de {record['de']}"], shares
    )


def _segments(file: Path, folder: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields page and id of each piece of text, and the text."""
    for name, content in members(file, f"{folder}*.html"):
        for match in _SEGMENT.finditer(content.decode()):
            text = " ".join(html.unescape(_TAG.sub("", match[3])).split())
            if text:
                yield (name.removeprefix(folder), match[2]), text


def _features() -> dict[str, Any]:
    from tensorflow_datasets import features

    return {"en": features.Text(), "de": features.Text()}


SET = DataSet(
    info=SetInfo(
        name="jaxspeed_help_en_de",
        version="1.0.0",
        features=_features,
        description="Sentences, headings and cells of LibreOffice's help pages in English "
        "and German.",
        licence="MPL-2.0",
    ),
    fetched="libreoffice-help-en-us and libreoffice-help-de from apt, 5 MB",
    read=_read,
)
