# SPDX-License-Identifier: Apache-2.0
"""A decoder that compiles in a moment, for tests of all that is around a model."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspeed import ops
from jaxspeed.ambient import current
from jaxspeed.config import (
    DTypeConfig,
    LossScaleConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    ZeroConfig,
)
from jaxspeed.nn import Layers, param
from jaxspeed.program import Program, State, build_program
from jaxspeed.sharding import shard
from jaxspeed.types import LossFn, Sums


T, V, D, G = 8, 16, 16, 16

NORMAL = jax.nn.initializers.normal(0.3)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the toy."""

    vocab_size: int = V
    max_seq_len: int = T
    num_layers: int = 2
    d_model: int = D
    dropout: float = 0.0

    def build(self, rngs: nnx.Rngs) -> "Toy":
        """Returns a new model."""
        return Toy(self, rngs)


class Block(nnx.Module):
    """A product, a running mean over earlier tokens, a bias."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.dropout = cfg.dropout
        self.w = param(NORMAL, rngs, (cfg.d_model, cfg.d_model), ("embed", "mlp"))
        self.b = param(jax.nn.initializers.zeros, rngs, (cfg.d_model,), ("embed",))

    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        y = shard(ops.linear(x, self.w[...], self.b[...]), "batch", "seq", "mlp")
        total = jnp.cumsum(y * real[..., None].astype(y.dtype), axis=1)
        count = jnp.cumsum(real, axis=1)
        if (cache := current().cache) is not None:
            if (before := cache.take()) is not None:
                total, count = total + before[0], count + before[1]
            cache.keep((total[:, -1:], count[:, -1:]))
        past = total / jnp.maximum(count, 1)[..., None].astype(y.dtype)
        return x + ops.dropout(jnp.tanh(past), self.dropout, site=0)


class Toy(nnx.Module):
    """The decoder."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs) -> None:
        self.embed = param(
            NORMAL, rngs, (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
        )
        self.layers = Layers(lambda rngs: Block(cfg, rngs), cfg.num_layers, rngs)

    def hidden(
        self, inputs: Any, positions: Any = None, segment_ids: Any = None
    ) -> jax.Array:
        """Returns the last hidden states."""
        del positions
        # Documents are not kept apart, but the padding of a prompt is.
        real = jnp.ones(inputs.shape, bool)
        if segment_ids is not None and current().cache is not None:
            real = segment_ids > 0
        return self.layers(ops.embed(self.embed[...], inputs), real.astype(jnp.int32))

    def output_embedding(self) -> jax.Array:
        """Returns the input embedding."""
        return self.embed[...]


def run_of(**changes: Any) -> RunConfig:
    """Returns a run with `stage`, `compute`, `optim` or any field of RunConfig changed."""
    stage, compute = changes.pop("stage", 0), changes.pop("compute", "float32")
    run = RunConfig(
        model=Config(),
        steps=10,
        seq_len=T,
        global_batch_size=G,
        zero=ZeroConfig(stage=stage, param_persistence_threshold=0),
        dtype=DTypeConfig(compute=compute),
        optim=OptimConfig(lr=1e-2, weight_decay=0.1),
        schedule=ScheduleConfig(name="constant"),
        compile_cache="",
    )
    return dataclasses.replace(run, **changes)


@functools.cache
def program_of(
    devices: int = 1, loss_fn: LossFn | None = None, **changes: Any
) -> Program:
    """Returns the run's program, the same one for the same arguments."""
    more: dict[str, Any] = {} if loss_fn is None else {"loss_fn": loss_fn}
    return build_program(run_of(**changes), devices=jax.devices()[:devices], **more)


@functools.cache
def parameters() -> Any:
    """Returns the initial parameters, made once on one device."""
    return jax.device_get(program_of().init_state()["params"])


def start(program: Program) -> State:
    """Returns the state at step 0 from these parameters; drawing them would take compiling."""

    def fresh(params: Any) -> State:
        return {**program.init(jax.random.key(0)), "params": params}

    params = jax.tree.map(jax.device_put, parameters(), program.shardings["params"])
    return jax.jit(fresh, out_shardings=program.shardings)(params)


def batch_of(seed: int = 0, rows: int = G) -> dict[str, np.ndarray]:
    """Returns rows of text that can be learnt, with ragged masks."""
    rng = np.random.default_rng(seed)
    inputs = (rng.integers(0, V, (rows, 1)) + 3 * np.arange(T)) % V
    return {
        "inputs": inputs.astype(np.int32),
        "mask": rng.random((rows, T)) < rng.random((rows, 1)),
    }


def boom_loss(model: Toy, batch: Any) -> Sums:
    """Returns the next-token loss times `boom`: infinity or NaN makes the step fail."""
    from jaxspeed.losses import next_token_loss

    sums = next_token_loss(model, {"inputs": batch["inputs"]})
    return Sums(sums.total * jnp.max(batch["boom"]), sums.count)


def float16_program() -> Program:
    """Returns a program whose loss scale moves fast and whose steps can be made to fail."""
    cfg = LossScaleConfig(initial_power=4, window=2, hysteresis=2, minimum=2.0)
    return program_of(loss_fn=boom_loss, compute="float16", loss_scale=cfg)


def boom(value: float, rows: int = G) -> dict[str, np.ndarray]:
    """Returns a batch for `boom_loss`."""
    return {
        "inputs": batch_of(rows=rows)["inputs"],
        "boom": np.full((rows,), value, np.float32),
    }


def host(tree: Any) -> Any:
    """Returns the arrays of a tree as numpy arrays, PRNG keys as their data."""
    plain = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    return jax.device_get(jax.tree.map(plain, tree))


def assert_same(ours: Any, theirs: Any) -> None:
    """Asserts that two trees agree to the last bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, host(ours), host(theirs))
