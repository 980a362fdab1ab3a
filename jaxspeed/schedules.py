# SPDX-License-Identifier: Apache-2.0
"""Learning-rate and momentum schedules: functions of the number of updates applied so far.

`schedule(0)` is the rate of the first update. A schedule has no state and no step(): the
optimizer calls it with the count in its own state, which a skipped update leaves alone, so
rate and parameters cannot drift apart. Not here: what reads a schedule (`jaxspeed.optim`).

DeepSpeed numbers iterations from -1: its scheduler is stepped after each update, and an
update uses the rate set before it. So the update with `count` updates before it sees
DeepSpeed's iteration i = count - 1. i = -1 is the state at construction: the minimum of a
warm-up. i = 0 has a warm-up factor of 0 again, so a DeepSpeed warm-up from 0 makes its first
two updates with a rate of 0. The functions named after DeepSpeed keep all of that;
`constant` and `cosine` do not: they rise by lr / (warmup_steps + 1) from the first update on.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspeed.config import ScheduleConfig, config_error


Schedule = Callable[[jax.typing.ArrayLike], Float[Array, ""]]
"""From the number of updates applied (int32) to a float32 scalar. An `optax.Schedule`."""


def make_schedule(cfg: ScheduleConfig, lr: float, steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates applied.

    With c that number, i = c - 1, w = warmup_steps, n = max(2, w), T = total_steps or steps:

        constant        lr * min(1, (c + 1) / (w + 1))
        cosine          the same up to c = w, then lr * cos_ratio((c - w) / (T - w))
        warmup          low + (lr - low) * gamma(i), low = warmup_min_lr
        warmup_decay    the same, with gamma(i) = max(0, (T - i) / (T - n)) from i = n on
        warmup_cosine   lr * (low + (1 - low) * gamma(i)), low = warmup_min_ratio; 0 at c = 0;
                        from i = n on lr * cos_ratio((i - n + 1) / (T - n))
        one_cycle       low + (lr - low) * scale(c), low = cycle_min_lr; after the cycle of
                        C = first + second steps low / (1 + decay_lr_rate * (c - C) / decay_steps)
        lr_range_test   range_min_lr * (1 + range_step_rate * c / range_step_size)

        gamma(i) = log(i + 1) / log(n), or i / n if linear; 0 at i = -1, 1 from i = n on
        cos_ratio(x) = min_ratio + (1 - min_ratio) * (1 + cos(pi * min(1, x))) / 2
        scale(c) = c / first up to c = first, then (C - c) / second; rounded down to a stair

    The last five are DeepSpeed 0.19's WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle and
    LRRangeTest, update by update.

    Args:
        cfg: the schedule.
        lr: the peak rate. lr_range_test does not read it: it starts at `range_min_lr`.
        steps: updates of the run; the end of a decay where `total_steps` is 0.

    Returns:
        A function of an int32 count that gives a float32 rate and may be traced.

    Raises:
        ConfigError: a length of 0 where the formula divides by it, or a `total_steps` that is
            over before the warm-up. That the run itself is, is no error: it ends on the rise.
    """
    total = cfg.total_steps or steps
    if 0 < cfg.total_steps < cfg.warmup_steps:
        raise config_error(
            "schedule.total_steps",
            cfg.total_steps,
            f"the decay would end before the warm-up of {cfg.warmup_steps} steps does",
            "give a smaller schedule.warmup_steps or a larger schedule.total_steps",
        )
    if cfg.name in ("warmup", "warmup_decay", "warmup_cosine") and cfg.warmup_steps < 1:
        raise config_error(
            "schedule.warmup_steps",
            cfg.warmup_steps,
            f"{cfg.name} is DeepSpeed's warm-up, which needs at least 1",
            "give schedule.warmup_steps, or use schedule.name constant or cosine",
        )
    match cfg.name:
        case "constant":
            return lambda count: _float32(lr * _rise(cfg, count))
        case "cosine":
            return _make_cosine(cfg, lr, total)
        case "warmup" | "warmup_decay":
            return _make_warmup(cfg, lr, total)
        case "warmup_cosine":
            return _make_warmup_cosine(cfg, lr, total)
        case "one_cycle":
            return _make_one_cycle(cfg, lr)
        case "lr_range_test":
            return _make_range_test(cfg)


def make_momentum_schedule(cfg: ScheduleConfig, steps: int) -> Schedule | None:
    """Returns one_cycle's momentum as a function of the updates applied, or None.

        high - (high - low) * scale(c) inside the cycle, `low` at c = 0;
        high * (1 + decay_momentum_rate * (c - C) / decay_steps) after it

    `low` at the first update, where the cycle's formula has `high`, is DeepSpeed's: it is what
    its scheduler sets at construction.

    Returns:
        None if momentum is not cycled: the optimizer then uses its own constant.

    Raises:
        ConfigError: the momentum would reach 1 within the run.
    """
    if cfg.name != "one_cycle" or not cfg.cycle_momentum:
        return None
    low, high = cfg.cycle_min_momentum, cfg.cycle_max_momentum
    for field in ("cycle_min_momentum", "cycle_max_momentum"):
        value = getattr(cfg, field)
        if value >= 1:
            why = "a momentum lies in [0, 1)"
            raise config_error(f"schedule.{field}", value, why, "give less than 1")
    length, scale = _cycle(cfg)
    rate = cfg.decay_momentum_rate / cfg.decay_steps if cfg.decay_steps else 0.0
    last = high * (1 + rate * max(0, steps - 1 - length))
    if last >= 1:
        why = f"the momentum would grow to {last:.4g} by the last of {steps} updates"
        change = "give a smaller rate, or larger decay_steps"
        field = "schedule.decay_momentum_rate"
        raise config_error(field, cfg.decay_momentum_rate, why, change)

    def schedule(count: jax.typing.ArrayLike) -> Float[Array, ""]:
        c = _int32(count)
        cycled = jnp.where(c == 0, low, high - (high - low) * scale(c))
        decayed = high * (1 + rate * (c - length))
        return _float32(jnp.where(c <= length, cycled, decayed))

    return schedule


def _make_cosine(cfg: ScheduleConfig, lr: float, total: int) -> Schedule:
    warmup = cfg.warmup_steps

    def schedule(count: jax.typing.ArrayLike) -> Float[Array, ""]:
        c = _int32(count)
        decay = _cosine((c - warmup) / max(1, total - warmup), cfg.min_ratio)
        return _float32(lr * jnp.where(c < warmup, _rise(cfg, c), decay))

    return schedule


def _make_warmup(cfg: ScheduleConfig, lr: float, total: int) -> Schedule:
    low, n = cfg.warmup_min_lr, max(2, cfg.warmup_steps)

    def schedule(count: jax.typing.ArrayLike) -> Float[Array, ""]:
        i = _int32(count) - 1
        gamma = _gamma(cfg, i)
        if cfg.name == "warmup_decay":
            decay = jnp.maximum(0, total - i) / max(1, total - n)
            gamma = jnp.where(i < n, gamma, decay)
        return _float32(low + (lr - low) * gamma)

    return schedule


def _make_warmup_cosine(cfg: ScheduleConfig, lr: float, total: int) -> Schedule:
    low, n = cfg.warmup_min_ratio, max(2, cfg.warmup_steps)

    def schedule(count: jax.typing.ArrayLike) -> Float[Array, ""]:
        i = _int32(count) - 1
        rise = low + (1 - low) * _gamma(cfg, i)
        decay = _cosine((i - n + 1) / max(1, total - n), cfg.min_ratio)
        # DeepSpeed starts at 0 whatever warmup_min_ratio is.
        return _float32(
            lr * jnp.where(i < 0, 0.0, jnp.where(i < n, rise, decay)),
        )

    return schedule


def _make_one_cycle(cfg: ScheduleConfig, lr: float) -> Schedule:
    length, scale = _cycle(cfg)
    low = cfg.cycle_min_lr
    rate = cfg.decay_lr_rate / cfg.decay_steps if cfg.decay_steps else 0.0

    def schedule(count: jax.typing.ArrayLike) -> Float[Array, ""]:
        c = _int32(count)
        decayed = low / (1 + rate * jnp.maximum(0, c - length))
        return _float32(
            jnp.where(c <= length, low + (lr - low) * scale(c), decayed),
        )

    return schedule


def _make_range_test(cfg: ScheduleConfig) -> Schedule:
    size = cfg.range_step_size
    if size < 1:
        why = "the test raises the rate once per this many updates"
        raise config_error("schedule.range_step_size", size, why, "give 1 or more")

    def schedule(count: jax.typing.ArrayLike) -> Float[Array, ""]:
        c = _int32(count)
        intervals = c // size if cfg.range_staircase else c / size
        return _float32(cfg.range_min_lr * (1 + cfg.range_step_rate * intervals))

    return schedule


def _cycle(
    cfg: ScheduleConfig,
) -> tuple[int, Callable[[Int[Array, ""]], Float[Array, ""]]]:
    """Returns the cycle's length and its height in [0, 1] as a function of the count."""
    first = cfg.cycle_first_steps
    second = cfg.cycle_second_steps or first
    first_stairs = cfg.cycle_first_stairs
    second_stairs = cfg.cycle_second_stairs or first_stairs
    if first < 1:
        why = "the rate rises over this many updates"
        raise config_error("schedule.cycle_first_steps", first, why, "give 1 or more")
    if max(first * first_stairs, second * second_stairs) >= 2**31:
        why = "steps times stairs must stay below 2**31"
        change = "give fewer stairs, or 0 for a smooth cycle"
        field = "schedule.cycle_first_stairs"
        raise config_error(field, first_stairs, why, change)

    def stair(done: Int[Array, ""], size: int, stairs: int) -> Float[Array, ""]:
        # In integers: a float ratio may fall just short of its stair.
        return (done * stairs) // size / stairs if stairs else done / size

    def scale(count: Int[Array, ""]) -> Float[Array, ""]:
        rising = stair(jnp.minimum(count, first), first, first_stairs)
        left = jnp.clip(first + second - count, 0, second)
        falling = stair(left, second, second_stairs)
        return jnp.where(count <= first, rising, falling)

    return first + second, scale


def _rise(cfg: ScheduleConfig, count: jax.typing.ArrayLike) -> Float[Array, ""]:
    return jnp.minimum(1.0, (_int32(count) + 1) / (cfg.warmup_steps + 1))


def _gamma(cfg: ScheduleConfig, i: Int[Array, ""]) -> Float[Array, ""]:
    n = max(2, cfg.warmup_steps)
    inside = jnp.clip(i, 0, n)
    if cfg.warmup_shape == "linear":
        rising = inside / n
    else:
        rising = jnp.log(inside + 1.0) / math.log(n)
    return jnp.where(i < n, rising, 1.0)


def _cosine(progress: Float[Array, ""], low: float) -> Float[Array, ""]:
    half = (1 + jnp.cos(math.pi * jnp.clip(progress, 0.0, 1.0))) / 2
    return low + (1 - low) * half


def _int32(count: jax.typing.ArrayLike) -> Int[Array, ""]:
    return jnp.asarray(count, jnp.int32)


def _float32(rate: jax.typing.ArrayLike) -> Float[Array, ""]:
    return jnp.asarray(rate, jnp.float32)
