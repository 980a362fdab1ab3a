# SPDX-License-Identifier: Apache-2.0
"""The choice of a token: what each filter leaves, and that it is what transformers leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.choice import choose, keep_likely, knobs_of, rule_of
from jaxspeed.sampling import SamplingConfig


B, V = 4, 50

FILTERS = {
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.6},
    "top-p of one token": {"top_p": 1e-6},
    "min-p": {"min_p": 0.2},
    "all": {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
}


def logits() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, V)) * 2, jnp.float32)


def keys(seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), B)


def kept(cfg: SamplingConfig) -> np.ndarray:
    return np.isfinite(
        keep_likely(logits() / cfg.temperature, rule_of(cfg), knobs_of(cfg))
    )


@pytest.mark.hf
@pytest.mark.parametrize("name", list(FILTERS))
def test_filters_leave_what_those_of_transformers_leave(name: str) -> None:
    torch: Any = pytest.importorskip("torch")
    generation: Any = pytest.importorskip("transformers")
    cfg = SamplingConfig(**FILTERS[name])  # pyright: ignore[reportArgumentType]
    warpers = [
        generation.TemperatureLogitsWarper(cfg.temperature),
        generation.TopKLogitsWarper(cfg.top_k or V),
        generation.TopPLogitsWarper(cfg.top_p),
        generation.MinPLogitsWarper(cfg.min_p),
    ]
    scores = torch.from_numpy(np.array(logits()))
    for warper in warpers:
        scores = warper(None, scores)
    np.testing.assert_array_equal(kept(cfg), np.isfinite(scores.numpy()))


@pytest.mark.hf
def test_repetition_penalty_is_that_of_transformers() -> None:
    torch: Any = pytest.importorskip("torch")
    generation: Any = pytest.importorskip("transformers")
    cfg = SamplingConfig(repetition_penalty=4.0, temperature=0.0)
    # The likeliest token and some others have been said.
    said = np.stack([np.argsort(row)[[-1, -2, 0]] for row in np.asarray(logits())])
    process = generation.RepetitionPenaltyLogitsProcessor(4.0)
    theirs = process(torch.from_numpy(said), torch.from_numpy(np.array(logits())))
    seen = jnp.zeros((B, V), bool).at[np.arange(B)[:, None], said].set(True)
    ours = choose(logits(), keys(), rule_of(cfg), knobs_of(cfg), seen)
    np.testing.assert_array_equal(ours, theirs.argmax(-1).numpy())
    assert np.all(ours != said[:, 0])


def test_filters_keep_at_least_the_likeliest() -> None:
    cfg = SamplingConfig(top_k=1, top_p=1e-6, min_p=1.0)
    np.testing.assert_array_equal(np.argmax(logits(), -1), np.argmax(kept(cfg), -1))
    assert kept(cfg).sum() == B


def test_draws_have_the_probabilities_of_the_model() -> None:
    cfg = SamplingConfig(temperature=0.7)
    row = jnp.broadcast_to(logits()[:1], (4000, V))
    many = jax.random.split(jax.random.key(0), 4000)
    drawn = choose(row, many, rule_of(cfg), knobs_of(cfg), None)
    counts = np.bincount(np.asarray(drawn), minlength=V) / 4000
    expected = np.asarray(jax.nn.softmax(logits()[0] / 0.7))
    # Five standard deviations of a count.
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected / 4000) + 1e-3)


def test_greedy_needs_no_key() -> None:
    cfg = SamplingConfig(temperature=0.0)
    same = [
        choose(logits(), keys(s), rule_of(cfg), knobs_of(cfg), None) for s in (0, 1)
    ]
    np.testing.assert_array_equal(same[0], np.argmax(logits(), -1))
    np.testing.assert_array_equal(same[0], same[1])


def test_greedy_takes_the_first_of_the_largest() -> None:
    tied = jnp.array([[1.0, 3.0, 3.0], [5.0, -1.0, 5.0], [-jnp.inf, -jnp.inf, 0.0]])
    rule = rule_of(SamplingConfig(temperature=0.0))
    token = choose(tied, keys()[:3], rule, knobs_of(SamplingConfig()), None)
    assert token.tolist() == [1, 0, 2]
