# SPDX-License-Identifier: Apache-2.0
"""Text to batches of tokens: sources, tokenizers, packing and the Grain pipeline.

    corpus = open_corpus(cfg)
    tokenizer = build_tokenizer(cfg, corpus.train, vocab_size=..., workdir=...)
    iterator = train_iterator(cfg, corpus, tokenizer, seq_len=..., ...)
    held_out = EvalSet(cfg=cfg, corpus=corpus, tokenizer=tokenizer, ...)

`sources` gives documents by index (`examples` records with several fields), `corpus` splits
them, `clean` cleans them, `tokenize` (with the `vocabulary` of the run) makes ids of them,
`pack` rows of those and `loader` batches. `sets` fetches real data.
"""

from jaxspeed.data.corpus import Corpus, open_corpus, open_record_corpus
from jaxspeed.data.examples import open_examples
from jaxspeed.data.loader import EvalSet, train_iterator
from jaxspeed.data.tokenize import (
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
)
from jaxspeed.data.vocabulary import build_tokenizer


__all__ = [
    "ByteTokenizer",
    "Corpus",
    "EvalSet",
    "SubwordTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "open_corpus",
    "open_examples",
    "open_record_corpus",
    "train_iterator",
]
