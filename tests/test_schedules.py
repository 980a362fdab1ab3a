# SPDX-License-Identifier: Apache-2.0
"""The schedules against DeepSpeed's schedulers, written again as stateful Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.config import ConfigError, ScheduleConfig
from jaxspeed.schedules import make_momentum_schedule, make_schedule


LR = 3e-4


class WarmupOracle:
    """Steps like WarmupLR (no total) or WarmupDecayLR: rates are set after each update."""

    def __init__(self, *, low=0.0, high=LR, warmup, shape="log", total=None):
        self.low, self.high, self.shape, self.total = low, high, shape, total
        self.n, self.i = max(2, warmup), -1
        self.lr = low

    def step(self):
        self.i += 1
        if self.i < self.n:
            log = math.log(self.i + 1) / math.log(self.n)
            gamma = log if self.shape == "log" else self.i / self.n
        elif self.total is None:
            gamma = 1.0
        else:
            gamma = max(0.0, (self.total - self.i) / max(1.0, self.total - self.n))
        self.lr = self.low + (self.high - self.low) * gamma


class WarmupCosineOracle:
    def __init__(self, *, low=0.0, end=0.1, warmup, shape="log", total):
        self.low, self.end, self.shape, self.total = low, end, shape, total
        self.n, self.i = max(2, warmup), -1
        self.lr = 0.0

    def step(self):
        self.i += 1
        if self.i < self.n:
            log = math.log(self.i + 1) / math.log(self.n)
            ratio = log if self.shape == "log" else self.i / self.n
            ratio = self.low + (1 - self.low) * ratio
        else:
            done = (self.i - self.n + 1) / max(1, self.total - self.n)
            half = (1 + math.cos(math.pi * min(1.0, done))) / 2
            ratio = max(0.0, self.end + (1 - self.end) * half)
        self.lr = LR * ratio


class OneCycleOracle:
    def __init__(self, *, low=0.0, first, second=None, stairs=(0, None), decay=(0, 0.0),
                 momentum=(0.8, 0.9, 0.0)):  # fmt: skip
        self.low, self.first, self.second = low, first, second or first
        self.stairs = (stairs[0], stairs[0] if stairs[1] is None else stairs[1])
        self.decay_steps, self.rate = decay
        self.mom_low, self.mom_high, self.mom_rate = momentum
        self.total, self.i = self.first + self.second, -1
        self.lr, self.mom = low, self.mom_low

    def height(self):
        batch = self.i + 1
        x = 1.0 + batch / self.total - math.floor(1 + batch / self.total)
        ratio = self.first / self.total
        rising = x <= ratio
        height = x / ratio if rising else (x - 1) / (ratio - 1)
        stairs = self.stairs[0 if rising else 1]
        if stairs:
            at = batch % self.total
            left = (self.total - at) * stairs / self.second
            up = at * stairs / self.first
            height = math.floor(up if at <= self.first else left) / stairs
        return height

    def step(self):
        self.i += 1
        if self.i < self.total:
            self.lr = self.low + (LR - self.low) * self.height()
            span = self.mom_high - self.mom_low
            self.mom = self.mom_high - span * self.height()
            return
        intervals = (self.i - self.total + 1) / (self.decay_steps or math.inf)
        self.lr = self.low / (1 + self.rate * intervals)
        self.mom = self.mom_high * (1 + self.mom_rate * intervals)


class RangeTestOracle:
    def __init__(self, *, low=1e-3, size=2000, rate=1.0, staircase=False):
        self.low, self.size, self.rate, self.staircase = low, size, rate, staircase
        self.i, self.lr = -1, low

    def step(self):
        self.i += 1
        x = (self.i + 1) / self.size
        self.lr = self.low * (1 + self.rate * (math.floor(x) if self.staircase else x))


def rates(oracle, updates, field="lr"):
    """Returns what each update sees: the rate is read before it and stepped after it."""
    seen = []
    for _ in range(updates):
        seen.append(getattr(oracle, field))
        oracle.step()
    return seen


CASES = {
    "warmup": (dict(warmup_steps=10), WarmupOracle(warmup=10)),
    "warmup_linear": (
        dict(name="warmup", warmup_steps=7, warmup_shape="linear", warmup_min_lr=1e-5),
        WarmupOracle(warmup=7, shape="linear", low=1e-5),
    ),
    "warmup_of_one_counts_as_two": (
        dict(name="warmup", warmup_steps=1),
        WarmupOracle(warmup=1),
    ),
    "warmup_down": (
        dict(name="warmup", warmup_steps=5, warmup_min_lr=1e-2),
        WarmupOracle(warmup=5, low=1e-2),
    ),
    "warmup_decay": (
        dict(warmup_steps=10, total_steps=30, warmup_min_lr=1e-6),
        WarmupOracle(warmup=10, total=30, low=1e-6),
    ),
    "warmup_decay_linear_to_steps": (
        dict(name="warmup_decay", warmup_steps=10, warmup_shape="linear"),
        WarmupOracle(warmup=10, shape="linear", total=40),
    ),
    "warmup_decay_all_warmup": (
        dict(name="warmup_decay", warmup_steps=10, total_steps=10),
        WarmupOracle(warmup=10, total=10),
    ),
    "warmup_cosine": (
        dict(warmup_steps=10, total_steps=35, min_ratio=1e-4),
        WarmupCosineOracle(warmup=10, total=35, end=1e-4),
    ),
    "warmup_cosine_from_ratio": (
        dict(name="warmup_cosine", warmup_steps=6, warmup_shape="linear",
             warmup_min_ratio=0.25, total_steps=20),
        WarmupCosineOracle(warmup=6, shape="linear", low=0.25, total=20),
    ),
    "warmup_cosine_all_warmup": (
        dict(name="warmup_cosine", warmup_steps=8, total_steps=8),
        WarmupCosineOracle(warmup=8, total=8),
    ),
    "one_cycle": (
        dict(cycle_first_steps=10, cycle_min_lr=1e-5),
        OneCycleOracle(first=10, low=1e-5),
    ),
    "one_cycle_uneven_then_decay": (
        dict(name="one_cycle", cycle_first_steps=7, cycle_second_steps=12,
             cycle_min_lr=1e-5, decay_steps=4, decay_lr_rate=0.5,
             decay_momentum_rate=0.01),
        OneCycleOracle(first=7, second=12, low=1e-5, decay=(4, 0.5),
                       momentum=(0.8, 0.9, 0.01)),
    ),
    "one_cycle_stairs": (
        dict(name="one_cycle", cycle_first_steps=13, cycle_second_steps=11,
             cycle_first_stairs=4, cycle_min_momentum=0.5, cycle_max_momentum=0.95),
        OneCycleOracle(first=13, second=11, stairs=(4, None),
                       momentum=(0.5, 0.95, 0.0)),
    ),
    "one_cycle_other_stairs_down": (
        dict(name="one_cycle", cycle_first_steps=9, cycle_first_stairs=3,
             cycle_second_stairs=2),
        OneCycleOracle(first=9, stairs=(3, 2)),
    ),
    "lr_range_test": (
        dict(range_min_lr=1e-4, range_step_size=5, range_step_rate=2.0),
        RangeTestOracle(low=1e-4, size=5, rate=2.0),
    ),
    "lr_range_test_stairs": (
        dict(name="lr_range_test", range_step_size=6, range_staircase=True),
        RangeTestOracle(size=6, staircase=True),
    ),
}  # fmt: skip


def table(schedule, updates):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(updates)))


@pytest.mark.parametrize("case", CASES)
def test_every_update_uses_deepspeeds_rate(case):
    fields, oracle = CASES[case]
    schedule = make_schedule(ScheduleConfig(**({"name": case} | fields)), LR, 40)
    # Past the end of every decay and cycle.
    np.testing.assert_allclose(
        table(schedule, 60), rates(oracle, 60), rtol=2e-6, atol=1e-11
    )


@pytest.mark.parametrize("case", [case for case in CASES if "one_cycle" in case])
def test_every_update_uses_deepspeeds_momentum(case):
    fields, oracle = CASES[case]
    oracle = type(oracle)(
        first=oracle.first, second=oracle.second, stairs=oracle.stairs,
        decay=(oracle.decay_steps, oracle.rate),
        momentum=(oracle.mom_low, oracle.mom_high, oracle.mom_rate),
    )  # fmt: skip
    cfg = ScheduleConfig(**({"name": case} | fields))
    schedule = make_momentum_schedule(cfg, 40)
    assert schedule is not None
    want = rates(oracle, 60, "mom")
    np.testing.assert_allclose(table(schedule, 60), want, rtol=2e-6)


def test_a_deepspeed_warmup_starts_with_two_updates_at_its_minimum():
    for shape in ("log", "linear"):
        cfg = ScheduleConfig(name="warmup", warmup_steps=4, warmup_shape=shape)
        got = table(make_schedule(cfg, 1.0, 10), 8)
        assert got[:2].tolist() == [0.0, 0.0]
        assert got[2] > 0
        # The full rate: log at count n, linear one update later.
        assert (got[4] == 1.0) == (shape == "log")
        assert got[5] == 1.0


@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_constant_rises_evenly_to_its_rate(warmup):
    cfg = ScheduleConfig(name="constant", warmup_steps=warmup)
    want = [LR * min(1.0, (c + 1) / (warmup + 1)) for c in range(20)]
    np.testing.assert_allclose(table(make_schedule(cfg, LR, 20), 20), want, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 9])
@pytest.mark.parametrize("total", [0, 9, 30])
def test_cosine_falls_to_its_ratio_and_stays(warmup, total):
    cfg = ScheduleConfig(warmup_steps=warmup, total_steps=total, min_ratio=0.2)
    end = total or 20

    def want(c):
        if c < warmup:
            return LR * (c + 1) / (warmup + 1)
        done = min(1.0, (c - warmup) / max(1, end - warmup))
        return LR * (0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2)

    got = table(make_schedule(cfg, LR, 20), 45)
    np.testing.assert_allclose(got, [want(c) for c in range(45)], rtol=2e-6)
    assert got[-1] == pytest.approx(0.2 * LR)


def test_rate_is_a_float32_scalar_of_a_plain_or_traced_count():
    for name in ("constant", "cosine", "one_cycle", "lr_range_test"):
        schedule = make_schedule(ScheduleConfig(name=name), LR, 10)
        for got in (schedule(2), jax.eval_shape(schedule, jnp.int32(2))):
            assert (got.dtype, got.shape) == (jnp.float32, ())


def test_cosine_is_exact_late_in_a_long_run():
    cfg = ScheduleConfig(warmup_steps=2000, min_ratio=0.0)
    got = make_schedule(cfg, 1.0, 10**7)(10**7 - 10**6)
    want = (1 + math.cos(math.pi * (9e6 - 2000) / (1e7 - 2000))) / 2
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_momentum_is_not_cycled_unless_asked():
    fixed = ScheduleConfig(name="one_cycle", cycle_momentum=False)
    assert make_momentum_schedule(fixed, 10) is None
    assert make_momentum_schedule(ScheduleConfig(name="cosine"), 10) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="cosine", warmup_steps=5, total_steps=4), "total_steps=4"),
        (dict(name="warmup_decay", warmup_steps=5, total_steps=4), "total_steps=4"),
        (dict(name="warmup_cosine", warmup_steps=5, total_steps=4), "total_steps=4"),
        (dict(name="warmup"), "warmup_steps=0: .* needs at least 1"),
        (dict(name="warmup_cosine"), "warmup_steps=0"),
        (dict(name="one_cycle", cycle_first_steps=0), "cycle_first_steps=0"),
        (
            dict(name="one_cycle", cycle_first_steps=10**6, cycle_first_stairs=10**4),
            "cycle_first_stairs=10000",
        ),
        (dict(name="lr_range_test", range_step_size=0), "range_step_size=0"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_clear_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_schedule(ScheduleConfig(**fields), LR, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(cycle_max_momentum=1.0), "cycle_max_momentum=1.0"),
        (dict(cycle_min_momentum=1.5), "cycle_min_momentum=1.5"),
        (
            dict(cycle_first_steps=2, decay_steps=1, decay_momentum_rate=0.1),
            "decay_momentum_rate=0.1: the momentum would grow to 1.35",
        ),
    ],
)
def test_a_momentum_of_one_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        make_momentum_schedule(ScheduleConfig(name="one_cycle", **fields), 10)


@pytest.mark.parametrize("name", ["cosine", "warmup_decay", "warmup_cosine"])
def test_a_run_shorter_than_its_warmup_ends_on_the_rise(name):
    cfg = ScheduleConfig(name=name, warmup_steps=20)
    short, long = (make_schedule(cfg, LR, steps) for steps in (5, 100))
    assert [float(short(c)) for c in range(5)] == [float(long(c)) for c in range(5)]
