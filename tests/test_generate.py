# SPDX-License-Identifier: Apache-2.0
"""What is written is what the training model's own forward pass would say, on any mesh, in any batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed import nn
from jaxspeed.ambient import ambient
from jaxspeed.config import ConfigError, MeshConfig
from jaxspeed.generate import Text, Writer, _until_stop, token_logprobs
from jaxspeed.program import Program, State
from jaxspeed.sampling import SamplingConfig
from tests.toy import Config, T, V, program_of, start


LONG = Config(max_seq_len=64)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)


def made(**how: Any) -> tuple[Program, State]:
    program = program_of(model=LONG, seq_len=64, **how)
    return program, start(program)


@pytest.fixture(scope="module")
def alone() -> tuple[Program, State]:
    return made()


def ids(
    of: tuple[Program, State], prompts: Any = PROMPTS, end: Any = (), **how: Any
) -> list:
    settings = {"max_new_tokens": 12, "temperature": 0.0} | how
    writer = Writer(of[0], of[1]["params"], end_ids=end)
    texts = writer.write(prompts, SamplingConfig(**settings))
    return [text.ids.tolist() for text in texts]


def likeliest(
    of: tuple[Program, State], prompt: list[int], count: int, window: int = 64
) -> list:
    """Returns the greedy continuation by one forward pass a token, without padding or cache."""
    (program, state), tokens = of, list(prompt)
    for _ in range(count):
        with ambient(program.spec.settings):
            model = nn.merge(program.spec.graphdef, state["params"])
            hidden = model.hidden(jnp.asarray([tokens[-window:]], jnp.int32))
            logits = model.output_embedding() @ hidden[0, -1]
        tokens.append(int(jnp.argmax(logits)))
    return tokens[len(prompt) :]


def test_greedy_text_is_the_likeliest_token_each_time(
    alone: tuple[Program, State],
) -> None:
    """Prompts of two lengths in one batch: the shorter is padded."""
    assert ids(alone) == [likeliest(alone, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("mesh", "stage"),
    [
        (MeshConfig(data=2, fsdp=4), 1),
        (MeshConfig(data=2, fsdp=2, tensor=2), 3),
        (MeshConfig(fsdp=8), 3),
    ],
)
def test_text_does_not_depend_on_mesh_and_stage(
    mesh: MeshConfig, stage: int, alone: tuple[Program, State]
) -> None:
    """Five prompts do not divide by the shards; draws are the same too."""
    other = made(devices=8, stage=stage, mesh=mesh)
    how: dict[str, Any] = {"prompts": [[i] for i in range(5)], "num_samples": 2}
    assert ids(other, **how) == ids(alone, **how)
    assert ids(other, temperature=1.0, **how) == ids(alone, temperature=1.0, **how)


def test_logprobs_are_those_of_the_forward_pass(alone: tuple[Program, State]) -> None:
    program, state = alone
    sampling = SamplingConfig(max_new_tokens=12, temperature=2.0, top_k=9)
    (text,) = Writer(program, state["params"]).write(PROMPTS[:1], sampling)
    whole = np.array([*PROMPTS[0], *text.ids])
    expected = token_logprobs(program, state["params"], whole)[-12:]
    np.testing.assert_allclose(text.logprobs, expected, atol=1e-5)


def test_draws_come_from_the_seed_and_samples_differ(
    alone: tuple[Program, State],
) -> None:
    draw = lambda seed: ids(alone, temperature=1.0, num_samples=3, seed=seed)
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert len({tuple(text) for text in draw(0)[:3]}) == 3


def test_temperature_flattens(alone: tuple[Program, State]) -> None:
    def distinct(temperature: float) -> int:
        how = {"num_samples": 4, "max_new_tokens": 50}
        texts = ids(alone, PROMPTS[:1], temperature=temperature, **how)
        return sum(len(set(text)) for text in texts)

    assert distinct(100.0) > distinct(0.2)


def test_text_ends_at_an_end_token_and_not_before_the_minimum(
    alone: tuple[Program, State],
) -> None:
    first, second = ids(alone)
    at = max(first.index(token) for token in first)
    end = first[at]
    until = lambda text: text[: text.index(end) + 1] if end in text else text
    assert ids(alone, end=[end]) == [until(first), until(second)]
    later = ids(alone, end=[end], min_new_tokens=at + 2)[0]
    assert end not in later[: at + 2]
    assert later[:at] == first[:at]


def test_a_finished_batch_is_left_early(alone: tuple[Program, State]) -> None:
    program, state = alone
    end = ids(alone, PROMPTS[:1])[0][1]
    writer = Writer(program, state["params"], end_ids=[end])
    yields = list(writer.stream(PROMPTS[:1], GREEDY, every=1))
    assert len(yields) == 1
    assert yields[-1][0].ended


def test_streamed_text_grows_to_the_whole_one(alone: tuple[Program, State]) -> None:
    program, state = alone
    writer = Writer(program, state["params"])
    parts = [
        [text.ids.tolist() for text in texts]
        for texts in writer.stream(PROMPTS, GREEDY, every=5)
    ]
    assert parts[-1] == ids(alone)
    assert len(parts) == 3
    assert all(w[: len(p)] == p for p, w in zip(parts[0], parts[-1], strict=True))


def test_stop_string_ends_the_text(alone: tuple[Program, State]) -> None:
    program, state = alone
    decode = lambda ids: "".join(chr(97 + int(i)) for i in ids)
    whole = decode(ids(alone, PROMPTS[:1])[0])
    stop = whole[3:5]
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0, stop=(stop, "?"))
    writer = Writer(program, state["params"])
    (text,) = writer.write(PROMPTS[:1], sampling, decode=decode)
    assert text.ended
    assert decode(text.ids) == whole[: whole.index(stop) + 2]


def test_first_stop_string_counts() -> None:
    text = Text(np.arange(10, dtype=np.int32), np.zeros(10, np.float32), False)
    decode = lambda ids: "".join(map(str, ids))
    assert _until_stop(text, ("78", "34"), decode).ids.tolist() == [0, 1, 2, 3, 4]
    assert _until_stop(text, ("x",), decode) is text


def test_text_longer_than_the_model_goes_on_from_its_latter_half(
    alone: tuple[Program, State],
) -> None:
    program, state = alone
    sampling = SamplingConfig(max_new_tokens=90, temperature=0.0)
    (text,) = Writer(program, state["params"]).write(PROMPTS[:1], sampling, shift=True)
    first = likeliest(alone, PROMPTS[0], 62)
    # With every position used, the last 32 of 64 tokens are the prompt of the rest.
    rest = likeliest(alone, first[-32:], 28)
    assert text.ids.tolist() == first + rest


def test_a_longer_prompt_than_fits_is_refused_before_anything_runs(
    alone: tuple[Program, State],
) -> None:
    refuse = lambda message: pytest.raises(ConfigError, match=message)
    with refuse(
        "max_new_tokens=60: with a prompt of 7 tokens .* 64 positions; give at most 58"
    ):
        ids(alone, max_new_tokens=60)
    with refuse(f"prompt={V}: the model has no such token; give 0 to {V - 1}"):
        ids(alone, [[V]])
    with refuse("prompt: it has no token"):
        ids(alone, [[]])
    with refuse("prompt: there is none"):
        ids(alone, [])
    with refuse("stop: stop strings are looked for in text"):
        ids(alone, stop=("a",))


def test_model_that_keeps_nothing_is_refused() -> None:
    program = program_of(model=LONG, seq_len=64)
    state = start(program)

    class Forgetful(type(nn.merge(program.spec.graphdef, state["params"]))):
        def hidden(self, inputs: Any, *_: Any) -> jax.Array:
            return self.output_embedding()[inputs]

    import dataclasses

    make = lambda rngs: Forgetful(LONG, rngs)
    graphdef = nn.abstract(lambda: make(nn.rngs(jax.random.key(0))))[0]
    spec = dataclasses.replace(program.spec, graphdef=graphdef)
    with pytest.raises(ConfigError, match="the model keeps nothing from one token"):
        ids((dataclasses.replace(program, spec=spec), state))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0.0}, "top_p=0.0: out of range; give 1e-06 or more, at most 1"),
        ({"top_p": 1.5}, "top_p=1.5: out of range"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: out of range; give 1 or more"),
        ({"temperature": float("nan")}, "temperature=nan: not a number"),
        ({"temperature": 0.0, "top_k": 5}, "top_k, top_p and min_p have no effect"),
        ({"stop": ("",)}, "an empty string ends every text"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**values)


assert T < LONG.max_seq_len
