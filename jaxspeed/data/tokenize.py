# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: bytes, or a vocabulary of the `tokenizers` library.

One id ends a document and begins the next; what looks like it inside a text is encoded
as text. The one decision: `encode_with_bytes` counts UTF-8 bytes per token so that they
add up to the document, and bits per byte are exact for any tokenizer.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32
from numpy.typing import ArrayLike

from jaxspeed.config import ConfigError, DataConfig, config_error
from jaxspeed.data.corpus import Corpus
from jaxspeed.data.documents import Source, atomic


if TYPE_CHECKING:
    import tokenizers

_logger = logging.getLogger(__name__)

END_TOKEN = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

_TRAIN_BYTES = 1 << 26
_END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")


class Encoded(NamedTuple):
    """A document as token ids, without the end token."""

    ids: Int32[np.ndarray, " T"]
    num_bytes: Int32[np.ndarray, " T+1"] | None = None
    """Bytes that each token stands for; the last entry is the end token's."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int
    """One more than the largest id."""
    end_id: int
    """Ends a document, and is the first input of the next."""
    fingerprint: str
    """Changes when any text could be encoded differently."""

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Returns the ids of a document, without the end token."""
        ...

    def encode_with_bytes(self, text: str) -> Encoded:
        """Returns the ids, and how many bytes of UTF-8 each stands for."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of some ids."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes of UTF-8; 256 ends a document."""

    vocab_size = 257
    end_id = 256
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

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text; end tokens vanish, bytes that are no text become U+FFFD."""
        array = np.asarray(ids, np.int64).reshape(-1)
        return array[array < 256].astype(np.uint8).tobytes().decode(errors="replace")


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, with one of its tokens as the end."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", end_id: int):
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

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text; special tokens vanish."""
        flat = np.asarray(ids, np.int64).reshape(-1).tolist()
        return self._tokenizer.decode(flat, skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Writes the vocabulary as a tokenizer.json."""
        with atomic(path) as file:
            file.write(self._tokenizer.to_str(pretty=True).encode())


def build_tokenizer(
    cfg: DataConfig, corpus: Corpus, *, vocab_size: int, workdir: Path
) -> ByteTokenizer | SubwordTokenizer:
    """Returns the tokenizer that `data.tokenizer` names.

    A trained one is kept as `tokenizer.json` in the run directory and read from there
    the next time. Training is deterministic: every process may do it and gets the same.

    Args:
        cfg: the data configuration.
        corpus: its text; only the training part is looked at.
        vocab_size: of the model; also how large a vocabulary is trained.
        workdir: the run directory.

    Raises:
        ConfigError: no such tokenizer, or more ids than the model has.
    """
    if cfg.tokenizer == "byte":
        tokenizer = ByteTokenizer()
    elif cfg.tokenizer == "bpe":
        tokenizer = _trained(corpus, vocab_size, workdir / TOKENIZER_FILE)
    else:
        tokenizer = load_tokenizer(Path(cfg.tokenizer).expanduser())
    if tokenizer.vocab_size > vocab_size:
        why = f"it has {tokenizer.vocab_size} ids but the model only {vocab_size}"
        change = f"set model.vocab_size to {tokenizer.vocab_size} or more"
        if cfg.tokenizer == "bpe":
            change += f", or remove {workdir / TOKENIZER_FILE} to train another"
        raise config_error("data.tokenizer", cfg.tokenizer, why, change)
    return tokenizer


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
        raise error("no such file", "give byte, bpe or the path of a tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as err:  # the library raises no narrower class
        why = f"is not a tokenizer.json ({err})"
        raise error(why, "give one that the tokenizers library wrote") from err
    try:
        names = _end_tokens(path.with_name("tokenizer_config.json"))
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


def _byte_offsets(text: str) -> np.ndarray:
    """Returns the byte offset of every character and of the end."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def _trained(corpus: Corpus, vocab_size: int, path: Path) -> SubwordTokenizer:
    if path.exists():
        return load_tokenizer(path)
    if vocab_size < 257:
        raise config_error(
            "data.tokenizer",
            "bpe",
            f"it needs at least 257 ids (bytes and end) but the model has {vocab_size}",
            "set model.vocab_size to 257 or more",
        )
    _logger.info("training a BPE of %d ids, to be kept in %s", vocab_size, path)
    tokenizer = train_bpe(corpus.train, vocab_size)
    try:
        tokenizer.save(path)
    except OSError as err:
        why = f"the trained tokenizer cannot be written there ({err})"
        change = "give a folder that can be written"
        raise config_error("workdir", str(path.parent), why, change) from err
    return tokenizer


def train_bpe(sources: Sequence[Source], vocab_size: int) -> SubwordTokenizer:
    """Trains a byte-level BPE on up to 64 MiB, spread over the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(sources), trainer)
    end = tokenizer.token_to_id(END_TOKEN)
    assert end is not None
    return SubwordTokenizer(tokenizer, end)


def _sample(sources: Sequence[Source]) -> Iterator[str]:
    """Yields every k-th document, so that about _TRAIN_BYTES are read."""
    every = -(-sum(source.num_bytes for source in sources) // _TRAIN_BYTES)
    for source in sources:
        for index in range(0, len(source), max(every, 1)):
            yield source[index]
