# SPDX-License-Identifier: Apache-2.0
"""Text cleaning, and leaving out what occurs twice: `data.clean`.

Strings are cleaned when their item is read, in the order of `STEPS`, whatever order they
are named in. To leave out repeated items all of them are read once, held-out ones first:
what is held out is kept, and is not trained on. The order of what is kept does not change.
"""

import functools
import hashlib
import html
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

import numpy as np

from jaxspeed.config import ConfigError, config_error
from jaxspeed.data.documents import Selected, Source, T


_logger = logging.getLogger(__name__)

_NOT_SHOWN = re.compile(
    r"<!--.*?-->|<(script|style|template)\b[^>]*>.*?</\1\s*>", re.DOTALL | re.I
)
_BLOCK = re.compile(
    r"</?(?:address|article|aside|blockquote|br|dd|div|dl|dt|figure|footer|form|h[1-6]"
    r"|header|hr|li|main|nav|ol|p|pre|section|table|tr|ul)\b[^<>]*>",
    re.I,
)
_CELL = re.compile(r"</?(?:td|th)\b[^<>]*>", re.I)
_TAG = re.compile(r"</?[a-z][^<>]*>|<[!?][^<>]*>", re.I)
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Joiners (U+200C, U+200D) are letters' affair and stay.
_CONTROL = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff]"
)
_BLANKS = re.compile(r"[^\S\n]+")
_AROUND_LINE_ENDS = re.compile(r" ?\n ?")
_EMPTY_LINES = re.compile(r"\n{3,}")

SHINGLE = 5
"""Words that are compared together (arXiv 2107.06499)."""
SIMILARITY = 0.8
"""Estimated share of common shingles (Jaccard) from which two texts are nearly the same."""
_PERMUTATIONS = 128
_SAMPLED = 64


def _strip_html(text: str) -> str:
    """Returns the text of HTML: blocks and breaks end lines, entities are characters.

    Not a parser: what is not well-formed enough for a tag's < and > to be found stays.
    """
    if "<" in text:
        text = _NOT_SHOWN.sub("", text)
        text = _TAG.sub("", _CELL.sub(" ", _BLOCK.sub("\n", text)))
    return html.unescape(text) if "&" in text else text


def _drop_control(text: str) -> str:
    return _CONTROL.sub("", _LINE_ENDS.sub("\n", text))


def _tidy_spaces(text: str) -> str:
    text = _AROUND_LINE_ENDS.sub("\n", _BLANKS.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", text).strip()


def _drop_stop_words(text: str) -> str:
    return _stop_words().sub("", text)


STEPS: Mapping[str, Callable[[str], str]] = {
    "html": _strip_html,
    "nfc": functools.partial(unicodedata.normalize, "NFC"),
    "nfkc": functools.partial(unicodedata.normalize, "NFKC"),
    "control": _drop_control,
    "stop_words": _drop_stop_words,
    "whitespace": _tidy_spaces,
}
"""What changes a text, in the order in which it is done."""


def make_cleaner(names: Sequence[str]) -> Callable[[str], str]:
    """Returns what cleans a text.

    Args:
        names: of `STEPS`, in any order; names that are no step of it do nothing.

    Raises:
        ConfigError: a step needs a package that is not installed.
    """
    steps = [step for name, step in STEPS.items() if name in names]
    if "stop_words" in names:
        _stop_words()

    def clean(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return clean


@functools.cache
def _stop_words() -> re.Pattern[str]:
    """Returns what matches scikit-learn's English stop words, and the blanks after one."""
    try:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    except ImportError as err:
        raise _missing("stop_words", "scikit-learn") from err
    words = "|".join(sorted(map(re.escape, ENGLISH_STOP_WORDS), key=len, reverse=True))
    return re.compile(rf"(?<![\w'])(?:{words})(?![\w'])[^\S\n]*", re.I)


def _missing(step: str, package: str) -> ConfigError:
    return config_error(
        "data.clean", step, f"it needs {package}", "pip install 'jaxspeed[tasks]'"
    )


def clean_strings(value: Any, clean: Callable[[str], str]) -> Any:
    """Returns a value with each string in it cleaned, in lists and dicts too."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean_strings(item, clean) for item in value]
    if isinstance(value, dict):
        return {name: clean_strings(item, clean) for name, item in value.items()}
    return value


class Cleaned(Generic[T]):
    """A source whose items are cleaned when they are read."""

    def __init__(self, source: Source[T], clean: Callable[[T], T]):
        self.name = source.name
        self.fingerprint = source.fingerprint
        self._source = source
        self._clean = clean
        spread = np.linspace(0, len(source) - 1, min(len(source), _SAMPLED), dtype=int)
        before = after = 0
        for index in spread.tolist():
            before += len(repr(source[index]))
            after += len(repr(self[index]))
        self.num_bytes = round(source.num_bytes * after / max(before, 1))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> T:
        return self._clean(self._source[index])


class Seen:
    """The items that were looked at, to find those that come again.

    Texts are compared without case and white space, other values exactly. Nearly the same
    are texts of `SIMILARITY` by MinHash signature, in items whose other values are equal.
    """

    def __init__(self, *, near: bool):
        self._exact: set[bytes] = set()
        self._signatures: list[tuple[Any, bytes]] = []
        self._index = _lsh() if near else None

    def unseen(self, source: Source[T]) -> Source[T]:
        """Returns a source without the items that were seen before."""
        count = len(source)
        kept = [index for index in range(count) if self._is_new(source[index])]
        if len(kept) == count:
            return source
        _logger.info("%s: %d of %d repeated", source.name, count - len(kept), count)
        return Selected(source, np.array(kept, np.int64))

    def _is_new(self, item: Any) -> bool:
        texts, others = _parts(item)
        words = " ".join(texts).lower().split()
        rest = hashlib.blake2b(others, digest_size=16).digest()
        digest = hashlib.blake2b(" ".join(words).encode(), key=rest).digest()
        if digest in self._exact:
            return False
        self._exact.add(digest)
        return self._index is None or len(words) < SHINGLE or self._is_far(words, rest)

    def _is_far(self, words: list[str], rest: bytes) -> bool:
        """Whether no text that was seen is nearly the same."""
        from datasketch import MinHash

        assert self._index is not None
        starts = range(len(words) - SHINGLE + 1)
        shingles = {
            " ".join(words[start : start + SHINGLE]).encode() for start in starts
        }
        signature = MinHash(num_perm=_PERMUTATIONS)
        signature.update_batch(list(shingles))
        for found in self._index.query(signature):
            known, other = self._signatures[found]
            if other == rest and known.jaccard(signature) >= SIMILARITY:
                return False
        self._index.insert(len(self._signatures), signature)
        self._signatures.append((signature, rest))
        return True


def _lsh() -> Any:
    """Returns an index that finds signatures that are alike."""
    try:
        from datasketch import MinHashLSH
    except ImportError as err:
        raise _missing("near_duplicates", "datasketch") from err
    return MinHashLSH(threshold=SIMILARITY, num_perm=_PERMUTATIONS)


def _parts(value: Any) -> tuple[list[str], bytes]:
    """Returns the texts in an item, and bytes that stand for all else."""
    if isinstance(value, str):
        return [value], b"s"
    if isinstance(value, np.ndarray):
        return [], f"{value.dtype}{value.shape}".encode() + value.tobytes()
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if not isinstance(value, list):
        return [], repr(value).encode()
    parts = [_parts(item) for item in value]
    texts = [text for found, _ in parts for text in found]
    return texts, b"\0".join(rest for _, rest in parts)
