# SPDX-License-Identifier: Apache-2.0
"""Sampling is the training model's own forward pass, token by token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed import nn
from jaxspeed.ambient import ambient
from jaxspeed.config import MeshConfig
from jaxspeed.generate import _window, sample_tokens
from jaxspeed.program import Program, State
from tests.toy import T, V, program_of, start


PROMPT = np.array([3, 1, 4], np.int32)


def sampled(program: Program, state: State, prompt: np.ndarray, **how: float) -> list:
    given: dict[str, Any] = {"num_tokens": 12, "temperature": 0.0, "seed": 0} | how
    key = jax.random.key(int(given.pop("seed")))
    tokens = sample_tokens(program, state["params"], prompt, key=key, **given)
    return tokens.tolist()


def likeliest(program: Program, state: State, prompt: np.ndarray, count: int) -> list:
    """Returns the greedy continuation by one forward pass a token, without padding."""
    tokens = prompt.tolist()
    for _ in range(count):
        with ambient(program.spec.settings):
            model = nn.merge(program.spec.graphdef, state["params"])
            hidden = model.hidden(jnp.asarray([tokens[-T:]], jnp.int32))
            logits = model.output_embedding() @ hidden[0, -1]
        tokens.append(int(jnp.argmax(logits)))
    return tokens


@pytest.fixture(scope="module")
def alone() -> tuple[Program, State]:
    program = program_of()
    return program, start(program)


@pytest.mark.parametrize("length", [1, T - 1, T + 5])
def test_greedy_sample_is_the_likeliest_token_each_time(
    length: int, alone: tuple[Program, State]
) -> None:
    """Twelve tokens more than fill the window, so it also slides."""
    prompt = np.arange(length, dtype=np.int32) * 5 % V
    assert sampled(*alone, prompt) == likeliest(*alone, prompt, 12)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_sample_does_not_depend_on_mesh_and_stage(
    mesh: MeshConfig, alone: tuple[Program, State]
) -> None:
    program = program_of(devices=8, stage=3, mesh=mesh)
    assert sampled(program, start(program), PROMPT) == sampled(*alone, PROMPT)


def test_draws_come_from_the_key(alone: tuple[Program, State]) -> None:
    draw = lambda seed: sampled(*alone, PROMPT, temperature=1.0, seed=seed)
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0)[:3] == PROMPT.tolist()


def test_temperature_flattens(alone: tuple[Program, State]) -> None:
    def distinct(temperature: float) -> float:
        how = {"temperature": temperature, "num_tokens": 60}
        draws = [sampled(*alone, PROMPT, seed=seed, **how) for seed in range(3)]
        return float(np.mean([len(set(draw)) for draw in draws]))

    assert distinct(100.0) > distinct(0.2)


@pytest.mark.parametrize(
    ("wanted", "seq_len", "window"),
    [
        (5, 8, 8),
        (200, 4096, 256),
        (256, 4096, 256),
        (257, 4096, 384),
        (9000, 4096, 4096),
    ],
)
def test_window_holds_what_is_wanted_and_no_more(
    wanted: int, seq_len: int, window: int
) -> None:
    assert _window(wanted, seq_len) == window
