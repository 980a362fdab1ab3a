# SPDX-License-Identifier: Apache-2.0
"""Sampling and scoring text, by the same forward pass that trains the model.

Each sampled token runs the model over a window of what came before, at most `seq_len` tokens; layers
are gathered one at a time, so it fits wherever training does. It is for a look at the model during
a run, not for serving: there is no key-value cache.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxspeed.ambient import ambient
from jaxspeed.config import config_error
from jaxspeed.nn import merge
from jaxspeed.ops import linear
from jaxspeed.program import Program
from jaxspeed.step import compute_weights, on_zero_axes
from jaxspeed.types import Params


def sample_tokens(
    program: Program,
    params: Params,
    prompt: Int[np.ndarray, " T"],
    *,
    num_tokens: int,
    temperature: float,
    key: Key[Array, ""],
) -> Int[np.ndarray, " S"]:
    """Returns the prompt followed by `num_tokens` sampled tokens.

    Args:
        program: of the run whose model samples.
        params: the train state's parameters.
        prompt: tokens to start from; at least one.
        num_tokens: how many to add.
        temperature: 0 takes the likeliest token.
        key: of the draws.
    """
    window = _window(len(prompt) + num_tokens, program.run.seq_len)
    start = np.asarray(prompt[-window:], np.int32)
    buffer = np.zeros(window, np.int32)
    buffer[: len(start)] = start
    sampler = _make_sampler(program, window, num_tokens, temperature > 0)
    drawn = sampler(
        params, buffer, np.int32(len(start)), np.float32(max(temperature, 1e-6)), key
    )
    return np.concatenate([np.asarray(prompt, np.int32), np.asarray(drawn)])


def token_logprobs(
    program: Program, params: Params, ids: Int[np.ndarray, " T"]
) -> Float[np.ndarray, " T-1"]:
    """Returns log p(ids[t] | ids[:t]) for every token but the first, in nats, by the forward pass that trains.

    Args:
        program: of the model.
        params: its parameters.
        ids: at least two, at most the model's longest sequence.

    Raises:
        ConfigError: there are too few or too many of them, or one is no token of the model.
    """
    vocab, longest = program.run.model.vocab_size, program.run.seq_len
    if not 2 <= len(ids) <= longest:
        raise config_error(
            "ids", len(ids), "that many tokens cannot be scored", f"give 2 to {longest}"
        )
    if min(ids) < 0 or max(ids) >= vocab:
        odd = next(int(x) for x in ids if not 0 <= x < vocab)
        raise config_error(
            "ids", odd, "the model has no such token", f"give ids from 0 to {vocab - 1}"
        )
    padded = np.zeros(_window(len(ids), longest), np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_make_scorer(program)(params, padded))[: len(ids) - 1]


@functools.lru_cache(maxsize=4)
def _make_scorer(program: Program) -> Callable[..., jax.Array]:
    """Returns `(params, tokens (S,)) -> log p of each but the first, (S-1,)`, jitted."""
    spec = program.spec

    def local(params: Params, tokens: jax.Array) -> jax.Array:
        with ambient(spec.settings):
            model = merge(spec.graphdef, compute_weights(spec, params))
            hidden = model.hidden(tokens[None])[0, :-1]
            logits = linear(hidden, model.output_embedding().T)
        logps = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(logps, tokens[1:, None], -1)[:, 0]

    return jax.jit(on_zero_axes(spec, local, (P(),), P()))


def _window(wanted: int, seq_len: int) -> int:
    """Returns how many tokens the model looks at: no more than will be there, in whole blocks of the attention kernels."""
    return min(seq_len, -(-wanted // 128) * 128)


@functools.lru_cache(maxsize=4)
def _make_sampler(
    program: Program, window: int, num_tokens: int, draws: bool
) -> Callable[..., jax.Array]:
    """Returns `(params, tokens, length, temperature, key) -> (num_tokens,)`, jitted; `tokens` has `window` slots."""
    spec = program.spec

    def local(
        params: Params,
        tokens: jax.Array,
        length: jax.Array,
        temperature: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        weights = compute_weights(spec, params)

        def next_token(
            carry: tuple[jax.Array, jax.Array], index: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            tokens, length = carry
            with ambient(spec.settings):
                model = merge(spec.graphdef, weights)
                last = jax.lax.dynamic_slice_in_dim(
                    model.hidden(tokens[None])[0], length - 1, 1
                )[0]
                logits = model.output_embedding() @ last.astype(jnp.float32)
            draw = jax.random.categorical(
                jax.random.fold_in(key, index), logits / temperature
            )
            token = (draw if draws else jnp.argmax(logits)).astype(jnp.int32)
            full = length == window
            tokens = jnp.where(full, jnp.roll(tokens, -1), tokens)
            tokens = tokens.at[jnp.where(full, window - 1, length)].set(token)
            return (tokens, jnp.minimum(length + 1, window)), token

        return jax.lax.scan(next_token, (tokens, length), jnp.arange(num_tokens))[1]

    return jax.jit(on_zero_axes(spec, local, (P(),) * 4, P()))
