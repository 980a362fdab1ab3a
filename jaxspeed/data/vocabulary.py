# SPDX-License-Identifier: Apache-2.0
"""Which tokenizer a run has: its model's own, bytes, one from a file, or one trained on its text.

It is kept in the run directory, so that a run that is continued, exported or read by
another has the same one.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxspeed.config import DataConfig, config_error
from jaxspeed.data.documents import Source, atomic
from jaxspeed.data.tokenize import (
    CONFIG_FILE,
    END_TOKEN,
    TOKENIZER_FILE,
    ByteTokenizer,
    SubwordTokenizer,
    load_tokenizer,
)
from jaxspeed.hf import is_hugging_face


if TYPE_CHECKING:
    import tokenizers

_logger = logging.getLogger(__name__)

SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
"""Tokens that stand for missing spans, as T5 names them; the first has the largest id."""

_TRAIN_BYTES = 1 << 26
_PATIENCE_SECONDS = 3600


def build_tokenizer(
    cfg: DataConfig,
    texts: Sequence[Source[str]],
    *,
    vocab_size: int,
    workdir: Path,
    init: str = "",
    leads: bool = True,
) -> ByteTokenizer | SubwordTokenizer:
    """Returns the tokenizer that `data.tokenizer` names, and says which.

    A file's is copied into the run directory. A trained one is kept there and read from
    there the next time, and by the other processes, which wait for it: no two trainings of
    a wordpiece or unigram vocabulary give the same.

    Args:
        cfg: the data configuration.
        texts: what to train one on.
        vocab_size: of the model; also how large a vocabulary is trained.
        workdir: the run directory.
        init: where the model's parameters come from.
        leads: whether this is the process that trains and writes it.

    Raises:
        ConfigError: no such tokenizer, more ids than the model has, or not the one that the
            model of `init` was trained with.
    """
    kept = workdir / TOKENIZER_FILE
    file = _file(cfg, kept, init)
    if file is None:
        tokenizer = ByteTokenizer()
    else:
        if cfg.tokenizer in TRAINERS and not file.exists():
            _train(cfg.tokenizer, texts, vocab_size, kept) if leads else _await(kept)
        tokenizer = load_tokenizer(file)
    _logger.info("tokenizer: %s, %d ids", file or "bytes", tokenizer.vocab_size)
    if tokenizer.vocab_size > vocab_size:
        why = f"it has {tokenizer.vocab_size} ids but the model only {vocab_size}"
        change = f"set model.vocab_size to {tokenizer.vocab_size} or more"
        if cfg.tokenizer in TRAINERS:
            change += f", or remove {kept} to train another"
        raise config_error("data.tokenizer", cfg.tokenizer, why, change)
    if init and cfg.tokenizer != "auto":
        _check_same(cfg, tokenizer, Path(init).expanduser() / TOKENIZER_FILE)
    if leads and file not in (None, kept):
        _keep(file, kept)
    return tokenizer


def _file(cfg: DataConfig, kept: Path, init: str) -> Path | None:
    """Returns the file of the tokenizer, which need not be there yet; None for bytes."""
    if cfg.tokenizer == "byte":
        return None
    if cfg.tokenizer in TRAINERS:
        return kept
    if cfg.tokenizer != "auto":
        return Path(cfg.tokenizer).expanduser()
    begun_with = Path(init).expanduser() / TOKENIZER_FILE
    if kept.is_file() or not init:
        return kept if kept.is_file() else None
    if begun_with.is_file():
        return begun_with
    if is_hugging_face(init):
        why = f"{init} has no {TOKENIZER_FILE}, so what its token ids mean is not known"
        change = "copy the model's there, or name it: --data.tokenizer PATH"
        raise config_error("data.tokenizer", cfg.tokenizer, why, change)
    return None


def _check_same(
    cfg: DataConfig, tokenizer: ByteTokenizer | SubwordTokenizer, theirs: Path
) -> None:
    """Raises if the model to begin with was trained with another vocabulary."""
    if not theirs.is_file():
        return
    known = load_tokenizer(theirs)
    if (
        isinstance(tokenizer, ByteTokenizer)
        or tokenizer.vocabulary() != known.vocabulary()
    ):
        why = f"the model to begin with was trained with another vocabulary, {theirs}"
        raise config_error("data.tokenizer", cfg.tokenizer, why, "leave it at auto")


def _keep(file: Path, kept: Path) -> None:
    """Copies a tokenizer, and what stands beside it, into the run directory."""
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        source = file if name == TOKENIZER_FILE else file.with_name(name)
        if source.is_file():
            _write(kept.with_name(name), source.read_bytes())


def _write(path: Path, data: bytes) -> None:
    try:
        with atomic(path) as file:
            file.write(data)
    except OSError as err:
        why = f"the tokenizer cannot be written there ({err})"
        change = "give a folder that can be written"
        raise config_error("workdir", str(path.parent), why, change) from err


# Training -----------------------------------------------------------------------------


class Trainer(NamedTuple):
    """How a kind of vocabulary is trained."""

    train: Callable[[Iterator[str], int], "tokenizers.Tokenizer"]
    end_token: str
    smallest: int
    """Ids that it needs."""
    why: str


def _await(path: Path) -> None:
    """Waits until the process that leads has written the tokenizer."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            why = f"no {path.name} in it after {_PATIENCE_SECONDS} s, which process 0 was to train"
            change = "give all processes the same folder, or train it first and name it: --data.tokenizer PATH"
            raise config_error("workdir", str(path.parent), why, change)
        time.sleep(0.2)


def _train(
    kind: str, texts: Sequence[Source[str]], vocab_size: int, path: Path
) -> None:
    trainer = TRAINERS[kind]
    if vocab_size < trainer.smallest:
        raise config_error(
            "data.tokenizer",
            kind,
            f"it needs at least {trainer.smallest} ids ({trainer.why}) but the model has {vocab_size}",
            f"set model.vocab_size to {trainer.smallest} or more",
        )
    _logger.info("training a tokenizer (%s) of %d ids", kind, vocab_size)
    _write(path, train_tokenizer(kind, texts, vocab_size).to_json())


def train_tokenizer(
    kind: str, texts: Sequence[Source[str]], vocab_size: int
) -> SubwordTokenizer:
    """Trains a vocabulary on up to 64 MiB, spread over the documents.

    Args:
        kind: bpe (bytes), wordpiece (BERT's, lower case) or unigram (T5's, with its sentinels).
        texts: what to train on.
        vocab_size: most ids.
    """
    trained = TRAINERS[kind].train(_sample(texts), vocab_size)
    end = trained.token_to_id(TRAINERS[kind].end_token)
    assert end is not None
    return SubwordTokenizer(trained, end)


def _train_bpe(texts: Iterator[str], vocab_size: int) -> "tokenizers.Tokenizer":
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
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(texts: Iterator[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """Trains as BERT's were: lower case without accents, [CLS] text [SEP]."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(x, special.index(x)) for x in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _train_unigram(texts: Iterator[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """Trains as T5's was: SentencePiece's unigram model, text </s>, sentinels on top."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(SENTINELS),
        special_tokens=special,
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SENTINELS[::-1]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


TRAINERS: Mapping[str, Trainer] = {
    "bpe": Trainer(_train_bpe, END_TOKEN, 257, "bytes and end"),
    "wordpiece": Trainer(_train_wordpiece, "[SEP]", 200, "letters and special tokens"),
    "unigram": Trainer(_train_unigram, "</s>", 300, "100 sentinels, and letters"),
}
"""By the names of `data.tokenizer`."""


def _sample(sources: Sequence[Source[str]]) -> Iterator[str]:
    """Yields every k-th document, so that about _TRAIN_BYTES are read."""
    every = -(-sum(source.num_bytes for source in sources) // _TRAIN_BYTES)
    for source in sources:
        for index in range(0, len(source), max(every, 1)):
            yield source[index]
