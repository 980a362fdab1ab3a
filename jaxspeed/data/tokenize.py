# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: bytes, or a vocabulary of the `tokenizers` library.

One id ends a document and begins the next; what looks like it inside a text is encoded
as text. A text for an encoder stands in a frame of special tokens, the tokenizer's own.
The one decision: `encode_with_bytes` counts UTF-8 bytes per token so that they add up to
the document, and bits per byte are exact for any tokenizer. Which one a run has, and how
one is trained: `vocabulary`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32
from numpy.typing import ArrayLike

from jaxspeed.config import ConfigError, config_error


if TYPE_CHECKING:
    import tokenizers

END_TOKEN = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

_END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")
_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")


class Encoded(NamedTuple):
    """A document as token ids, without the end token."""

    ids: Int32[np.ndarray, " T"]
    num_bytes: Int32[np.ndarray, " T+1"] | None = None
    """Bytes that each token stands for; the last entry is the end token's."""
    counts: Bool[np.ndarray, " T+1"] | None = None
    """Which tokens count in the loss, the last entry is the end token's; None: all."""


class Pieces(NamedTuple):
    """A text as token ids, without special tokens, and where each stands in it."""

    ids: Int32[np.ndarray, " T"]
    spans: Int32[np.ndarray, "T 2"]
    """The characters of each token: begin, and end (one behind the last)."""


class Frame(NamedTuple):
    """The special tokens around one text, or two."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    second_type: int
    """Token type of the second text and of what follows it; that of the first is 0."""

    @property
    def size(self) -> int:
        """The number of special tokens."""
        return sum(map(len, (self.before, self.between, self.after)))

    def around(
        self,
        first: Int32[np.ndarray, " T"],
        second: Int32[np.ndarray, " S"] | None = None,
    ) -> tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"]]:
        """Returns the ids of the framed text or texts, and their token types."""
        head = [self.before, first]
        tail = [self.after] if second is None else [second, self.after]
        head += [] if second is None else [self.between]
        lengths = [sum(map(len, part)) for part in (head, tail)]
        ids = np.concatenate([np.asarray(part, np.int32) for part in (*head, *tail)])
        types = [0, 0 if second is None else self.second_type]
        return ids, np.repeat(np.asarray(types, np.int32), lengths)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int
    """One more than the largest id."""
    end_id: int
    """Ends a document, and is the first input of the next."""
    pad_id: int
    """Fills rows; the end's where the vocabulary has no such token."""
    fingerprint: str
    """Changes when any text could be encoded differently."""

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Returns the ids of a document, without the end token."""
        ...

    def encode_with_bytes(self, text: str) -> Encoded:
        """Returns the ids, and how many bytes of UTF-8 each stands for."""
        ...

    def pieces(self, text: str) -> Pieces:
        """Returns the ids of a text, and which of its characters each stands for."""
        ...

    def frame(self, texts: int) -> Frame:
        """Returns the special tokens around one text, or around two."""
        ...

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name, or None."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of some ids."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes of UTF-8; 256 ends a document."""

    vocab_size = 257
    end_id = 256
    pad_id = 256
    fingerprint = "byte"

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Returns the bytes of the text."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_with_bytes(self, text: str) -> Encoded:
        """Returns the bytes, each of which counts one."""
        ids = self.encode(text)
        num_bytes = np.ones(len(ids) + 1, np.int32)
        num_bytes[-1] = 0
        return Encoded(ids, num_bytes)

    def pieces(self, text: str) -> Pieces:
        """Returns the bytes; each of a character's bytes stands for all of it."""
        sizes = np.diff(_byte_offsets(text))
        begins = np.repeat(np.arange(len(text), dtype=np.int32), sizes)
        return Pieces(self.encode(text), np.stack([begins, begins + 1], 1))

    def frame(self, texts: int) -> Frame:
        """Returns the end token behind each text."""
        return _plain_frame(self.end_id, texts)

    def token_id(self, token: str) -> int | None:
        """Returns None: bytes have no names."""
        return None

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text; end tokens vanish, bytes that are no text become U+FFFD."""
        array = np.asarray(ids, np.int64).reshape(-1)
        return array[array < 256].astype(np.uint8).tobytes().decode(errors="replace")


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, with one of its tokens as the end."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", end_id: int):
        named = map(tokenizer.token_to_id, _PAD_TOKENS)
        self.pad_id = next((i for i in named if i is not None), end_id)
        if tokenizer.padding:
            self.pad_id = int(tokenizer.padding["pad_id"])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A document that quotes "<|endoftext|>" must not end there.
        tokenizer.encode_special_tokens = True
        self.end_id = end_id
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        text = f"{end_id} {tokenizer.to_str()}"
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Returns the ids of the text alone, without special tokens around it."""
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(batch[0].ids, np.int32)

    def encode_named(self, text: str) -> Int32[np.ndarray, " T"]:
        """Returns the ids of a text in which special tokens are written by name, as chat templates do."""
        self._tokenizer.encode_special_tokens = False
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True
        return np.asarray(ids, np.int32)

    def encode_with_bytes(self, text: str) -> Encoded:
        """Returns the ids and their bytes, by where each token ends in the text."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ends = np.asarray([end for _, end in encoding.offsets], np.int64)
        byte_ends = _byte_offsets(text)[np.maximum.accumulate(ends)]
        # What no token covers (dropped white space, say) falls to the next, or the end.
        bounds = np.concatenate([[0], byte_ends, [len(text.encode())]])
        return Encoded(
            np.asarray(encoding.ids, np.int32), np.diff(bounds).astype(np.int32)
        )

    def pieces(self, text: str) -> Pieces:
        """Returns the ids of the text alone, and where each stands in it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
        return Pieces(np.asarray(encoding.ids, np.int32), spans)

    def frame(self, texts: int) -> Frame:
        """Returns what the tokenizer.json puts around; without such a rule, the end token behind each text."""
        probe = self._tokenizer.encode("a", "b" if texts == 2 else None)
        whose = probe.sequence_ids
        if None not in whose:
            return _plain_frame(self.end_id, texts)
        ids = np.asarray(probe.ids)
        begins = [whose.index(text) for text in range(texts)]
        ends = [len(whose) - whose[::-1].index(text) for text in range(texts)]
        between = ids[ends[0] : begins[-1]].tolist() if texts == 2 else []
        return Frame(
            tuple(ids[: begins[0]].tolist()),
            tuple(between),
            tuple(ids[ends[-1] :].tolist()),
            probe.type_ids[begins[-1]],
        )

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name, or None."""
        return self._tokenizer.token_to_id(token)

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the id of each token."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text; special tokens vanish."""
        flat = np.asarray(ids, np.int64).reshape(-1).tolist()
        return self._tokenizer.decode(flat, skip_special_tokens=True)

    def to_json(self) -> bytes:
        """Returns the contents of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True).encode()


def load_tokenizer(path: Path) -> SubwordTokenizer:
    """Reads a tokenizer.json.

    The end token is the eos_token of a tokenizer_config.json beside it or, without one,
    the first of the usual names that the vocabulary has.

    Raises:
        ConfigError: not a tokenizer.json, or no end token in it.
    """
    import tokenizers

    def error(why: str, change: str) -> ConfigError:
        return config_error("data.tokenizer", str(path), why, change)

    if not path.is_file():
        change = (
            "give auto, byte, bpe, wordpiece, unigram or the path of a tokenizer.json"
        )
        raise error("no such file", change)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as err:  # the library raises no narrower class
        why = f"is not a tokenizer.json ({err})"
        raise error(why, "give one that the tokenizers library wrote") from err
    try:
        names = _end_tokens(path.with_name(CONFIG_FILE))
    except ValueError as err:
        why = f"the tokenizer_config.json beside it is not JSON ({err})"
        raise error(why, "mend or remove that") from err
    for end in map(tokenizer.token_to_id, names):
        if end is not None:
            return SubwordTokenizer(tokenizer, end)
    why = f"no end-of-text token in it (looked for {', '.join(names)})"
    raise error(why, "name it as eos_token in a tokenizer_config.json beside it")


def _end_tokens(config: Path) -> Sequence[str]:
    """Returns the names to look for."""
    if not config.exists():
        return _END_TOKENS
    named = json.loads(config.read_text()).get("eos_token")
    # Older files hold {"content": "</s>", ...}.
    named = named["content"] if isinstance(named, dict) else named
    return [named] if named else _END_TOKENS


def _plain_frame(end_id: int, texts: int) -> Frame:
    return Frame((), (end_id,) * (texts - 1), (end_id,), texts - 1)


def _byte_offsets(text: str) -> np.ndarray:
    """Returns the byte offset of every character and of the end."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])
