# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings: what an encoder makes of a text, as one vector of length 1.

    vectors = embed_texts("imported/minilm", ["A man is eating food.", "A man is eating a meal."])
    vectors @ vectors.T                           # cosines

The mean of the last hidden states over the text's tokens, special ones included, as
sentence-transformers has it for MiniLM (arXiv 1908.10084 section 3). Layer 4.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxspeed.ambient import ambient
from jaxspeed.config import BATCH_AXES, config_error
from jaxspeed.data import load_tokenizer
from jaxspeed.data.tokenize import TOKENIZER_FILE
from jaxspeed.pretrained import open_model
from jaxspeed.program import Program
from jaxspeed.step import compute_weights, model_of, on_zero_axes
from jaxspeed.types import Params


logger = logging.getLogger(__name__)


def embed_texts(
    path: str | Path, texts: Sequence[str], *, rows: int = 32, **how: Any
) -> Float[np.ndarray, "N D"]:
    """Returns the embeddings of texts by the encoder that lies in a run directory or Hugging Face folder.

    Args:
        path: of the model, with its tokenizer.json.
        texts: any number; longer ones than the model takes are cut, which the log says.
        rows: texts at once.
        how: as for `jaxspeed.pretrained.open_model`.

    Raises:
        ConfigError: there is no model, it has a head, or no tokenizer.
    """
    tokenizer = load_tokenizer(Path(path).expanduser() / TOKENIZER_FILE)
    program, params = open_model(path, **how)
    model = program.run.model
    if (head := getattr(model, "head", "")) != "none":
        change = "give an encoder without a head, such as a BertModel"
        raise config_error("model.head", head, "it does not end in states", change)
    frame = tokenizer.frame(1)
    room = program.run.seq_len - frame.size
    ids = [tokenizer.encode(text) for text in texts]
    if cut := sum(len(x) > room for x in ids):
        logger.warning("%d texts are cut to %d tokens", cut, program.run.seq_len)
    return embed_ids(program, params, [frame.around(x[:room])[0] for x in ids], rows)


def embed_ids(
    program: Program,
    params: Params,
    texts: Sequence[Int[np.ndarray, " _"]],
    rows: int = 32,
) -> Float[np.ndarray, "N D"]:
    """Returns the embeddings of texts that are token ids already.

    Args:
        program: of the encoder.
        params: its parameters.
        texts: ids, special tokens included, at most as many as the model takes.
        rows: texts at once.
    """
    shards = program.batch.shards
    rows = -(-rows // shards) * shards
    run = _make_embedder(program)
    # Texts of like length together: the padding is least.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    made = np.zeros((len(texts), program.run.model.d_model), np.float32)
    for begin in range(0, len(texts), rows):
        chosen = order[begin : begin + rows]
        longest = max(len(texts[i]) for i in chosen)
        length = min(program.run.seq_len, -(-longest // 32) * 32)
        inputs = np.zeros((rows, length), np.int32)
        for row, i in enumerate(chosen):
            inputs[row, : len(texts[i])] = texts[i]
        sizes = np.asarray([len(texts[i]) for i in chosen])
        segments = np.zeros((rows, length), np.int32)
        segments[: len(chosen)] = np.arange(length) < sizes[:, None]
        made[chosen] = np.asarray(run(params, inputs, segments))[: len(chosen)]
    return made


def mean_pooled(
    hidden: Float[Array, "B S D"], segment_ids: Int[Array, "B S"]
) -> Float[Array, "B D"]:
    """Returns the mean of each row's states, without padding, divided by its length."""
    counts = (segment_ids > 0).astype(jnp.float32)[..., None]
    total = jnp.sum(hidden.astype(jnp.float32) * counts, axis=1)
    mean = total / jnp.maximum(jnp.sum(counts, axis=1), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


@functools.lru_cache(maxsize=4)
def _make_embedder(program: Program) -> Callable[..., jax.Array]:
    """Returns `(params, inputs, segment_ids) -> (B, D)`, jitted; rows over the batch axes."""
    spec = program.spec

    def local(params: Params, inputs: jax.Array, segments: jax.Array) -> jax.Array:
        with ambient(spec.whole_rows):
            model = model_of(spec, compute_weights(spec, params))
            return mean_pooled(model.hidden(inputs, None, segments), segments)

    batch = P(BATCH_AXES)
    return jax.jit(on_zero_axes(spec, local, (batch, batch), batch))
