# SPDX-License-Identifier: Apache-2.0
"""Loss scaling for float16: DeepSpeed's state machine as a pure function.

float16 loses gradients below 6e-8, so the loss is multiplied by a scale before the backward
pass and the gradients divided by it after. The scale is searched: up after a window of good
steps, down on overflow. Not here: multiplying, the finite check and skipping the update (the
step does them), and the error at the lowest scale (a jitted function cannot raise: `exhausted`
tells the host). The same machine at every ZeRO stage; DeepSpeed's stage 0 has another, without
hysteresis.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspeed.config import LossScaleConfig, config_error


class LossScale(NamedTuple):
    """The scale and what decides its next value. A part of the train state."""

    scale: Float[Array, ""]
    """What to multiply the loss of the next step by."""
    hysteresis: Int[Array, ""]
    """Overflows up to the one that halves the scale; 1: the next one does."""
    good_steps: Int[Array, ""]
    """Steps without overflow since the last overflow, or since the start."""
    exhausted: Bool[Array, ""]
    """There was an overflow that had to lower the scale, at its minimum. Stays true."""


def init_loss_scale(cfg: LossScaleConfig) -> LossScale:
    """Returns the state before the first step.

    Raises:
        ConfigError: the scale does not fit float32, or starts below its minimum.
    """
    scale = cfg.static or 2.0**cfg.initial_power
    if scale >= 2.0**127:
        why = "the scale must fit float32 with room to grow"
        raise config_error("loss_scale.static", scale, why, "give at most 2**32")
    if not cfg.static and scale < cfg.minimum:
        why = f"the first scale is {scale}, so the first overflow would raise it"
        change = "give a smaller minimum or a larger initial_power"
        raise config_error("loss_scale.minimum", cfg.minimum, why, change)
    return LossScale(
        scale=jnp.asarray(scale, jnp.float32),
        hysteresis=jnp.asarray(cfg.hysteresis, jnp.int32),
        good_steps=jnp.asarray(0, jnp.int32),
        exhausted=jnp.asarray(False),
    )


def update_loss_scale(
    cfg: LossScaleConfig, state: LossScale, finite: Bool[Array, ""]
) -> LossScale:
    """Returns the state after a step whose gradients were, or were not, finite.

    Overflow: while hysteresis is above 1, lower it by one and keep the scale. Else halve the
    scale, down to `minimum`; if it is there already, set `exhausted`. The hysteresis is not
    refilled by halving, so further overflows halve again at once.

    Good step, with n good steps between the last overflow (or the start) and this one: if n is
    a positive multiple of `window`, double the scale and refill the hysteresis. So the first
    doubling takes window + 1 good steps and each further one window more. With
    `consecutive_hysteresis` every good step refills it.

    A static scale never changes and is never exhausted. Reference: DeepSpeed 0.19,
    DynamicLossScaler.update_scale, whose n is cur_iter - last_overflow_iter - 1.

    Args:
        cfg: the rules, all static.
        state: before the step.
        finite: whether every gradient of the step was finite.

    Returns:
        The next state. Where `exhausted` is true the caller must end the run.
    """
    if cfg.static:
        return state
    shrink = ~finite & (state.hysteresis <= 1)
    at_minimum = state.scale <= cfg.minimum
    grow = finite & (state.good_steps > 0) & (state.good_steps % cfg.window == 0)
    refill = finite if cfg.consecutive_hysteresis else grow

    # 2**127 is the largest power of two in float32: infinity would never come down again.
    doubled = jnp.minimum(state.scale * 2, 2.0**127)
    halved = jnp.maximum(state.scale / 2, cfg.minimum)
    spent = state.hysteresis - (~finite & ~shrink)
    return LossScale(
        scale=jnp.where(shrink, halved, jnp.where(grow, doubled, state.scale)),
        hysteresis=jnp.where(refill, cfg.hysteresis, spent).astype(jnp.int32),
        good_steps=jnp.where(finite, state.good_steps + 1, 0),
        exhausted=state.exhausted | (shrink & at_minimum),
    )
