# SPDX-License-Identifier: Apache-2.0
"""The loss scale against DeepSpeed's scaler, written again as stateful Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspeed.config import ConfigError, LossScaleConfig
from jaxspeed.loss_scale import LossScale, init_loss_scale, update_loss_scale


class AtMinimum(Exception):
    """What DeepSpeed raises where our state says `exhausted`."""


class Oracle:
    """DeepSpeed's dynamic scaler, by iteration numbers."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.scale = 2.0**cfg.initial_power
        self.iteration, self.last_overflow = 0, -1
        self.hysteresis = cfg.hysteresis

    def update(self, overflow):
        cfg = self.cfg
        if overflow:
            if cfg.hysteresis == 1 or self.hysteresis == 1:
                if self.scale == cfg.minimum:
                    raise AtMinimum
                self.scale = max(self.scale / 2.0, cfg.minimum)
            else:
                self.hysteresis -= 1
            self.last_overflow = self.iteration
        else:
            if cfg.consecutive_hysteresis:
                self.hysteresis = cfg.hysteresis
            stable = (self.iteration - self.last_overflow) - 1
            if stable > 0 and stable % cfg.window == 0:
                if not cfg.consecutive_hysteresis:
                    self.hysteresis = cfg.hysteresis
                self.scale *= 2.0
        self.iteration += 1


def run(cfg, finite):
    """Returns the states after each step of one or more scripts, as numpy arrays."""

    def step(state, ok):
        state = update_loss_scale(cfg, state, ok)
        return state, state

    def scan(script):
        return jax.lax.scan(step, init_loss_scale(cfg), script)[1]

    finite = jnp.asarray(finite)
    scan = scan if finite.ndim == 1 else jax.vmap(scan)
    return jax.tree.map(np.asarray, jax.jit(scan)(finite))


def check(cfg, finite, states):
    """Compares every state up to the end or to the exhausted one; returns the oracle."""
    oracle = Oracle(cfg)
    for at, ok in enumerate(finite):
        try:
            oracle.update(not ok)
        except AtMinimum:
            assert states.exhausted[at:].all()
            return oracle
        assert states.scale[at] == np.float32(oracle.scale), (at, finite[: at + 1])
        assert states.hysteresis[at] == oracle.hysteresis, (at, finite[: at + 1])
        assert not states.exhausted[at]
    return oracle


G, B = True, False
SCRIPTS = {
    "all good": [G] * 12,
    "all bad": [B] * 12,
    "bad at once": [B, B, B, G, G, G, G, G, G, G],
    "bad once, later": [G, G, B, G, G, G, G, B, G, G, G, G, G],
    "alternating": [G, B] * 8,
    "bad at the growth": [G, G, G, B, G, G, G, G, B, B, G, G, G, G, G, G, G],
}


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("consecutive", [False, True])
def test_scripted_overflows_give_deepspeeds_scales(hysteresis, consecutive):
    cfg = LossScaleConfig(
        initial_power=4,
        window=3,
        hysteresis=hysteresis,
        consecutive_hysteresis=consecutive,
    )
    length = max(map(len, SCRIPTS.values()))
    scripts = [s + [G] * (length - len(s)) for s in SCRIPTS.values()]
    states = run(cfg, scripts)
    for at, script in enumerate(scripts):
        check(cfg, script, jax.tree.map(lambda x, at=at: x[at], states))


def test_random_overflows_give_deepspeeds_scales():
    rng = np.random.default_rng(0)
    exhausted = grown = 0
    for _ in range(6):
        cfg = LossScaleConfig(
            initial_power=int(rng.integers(2, 17)),
            window=int(rng.integers(1, 7)),
            hysteresis=int(rng.integers(1, 5)),
            consecutive_hysteresis=bool(rng.integers(2)),
            minimum=float(rng.choice([0.1, 0.25, 1.0, 3.0])),
        )
        finite = rng.random((40, 80)) < rng.choice([0.3, 0.7, 0.95], (40, 1))
        states = run(cfg, finite)
        for at, script in enumerate(finite.tolist()):
            row = jax.tree.map(lambda x, at=at: x[at], states)
            oracle = check(cfg, script, row)
            exhausted += oracle.iteration < len(script)
            grown += oracle.scale > 2.0**cfg.initial_power
    # The draw reaches both ends, so the comparison means something.
    assert exhausted > 20
    assert grown > 20


def test_defaults_double_after_1001_good_steps_and_then_every_1000():
    states = run(LossScaleConfig(), [True] * 2002)
    assert states.scale[999] == 2**16
    assert states.scale[1000] == 2**17
    assert states.scale[1999] == 2**17
    assert states.scale[2000] == 2**18


def test_exhausted_stays_and_the_scale_stays_at_its_minimum():
    cfg = LossScaleConfig(initial_power=1, hysteresis=1, window=2, minimum=1.0)
    states = run(cfg, [B, B, B, G, G, G])
    assert states.exhausted.tolist() == [False, True, True, True, True, True]
    assert states.scale.tolist()[:3] == [1.0, 1.0, 1.0]


def test_a_static_scale_never_changes():
    cfg = LossScaleConfig(static=128.0, window=1, hysteresis=1)
    states = run(cfg, [B, B, G, G, G, B])
    assert set(states.scale.tolist()) == {128.0}
    assert not states.exhausted.any()


def test_the_scale_stays_finite():
    cfg = LossScaleConfig(initial_power=32, window=1)
    states = run(cfg, [True] * 200)
    assert np.isfinite(states.scale).all()
    assert states.scale[-1] == 2.0**127


def test_state_keeps_its_types():
    cfg = LossScaleConfig()
    before = init_loss_scale(cfg)
    after = update_loss_scale(cfg, before, jnp.asarray(False))
    assert isinstance(after, LossScale)
    for a, b in zip(before, after, strict=True):
        assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (LossScaleConfig(initial_power=2, minimum=8.0), "loss_scale.minimum=8.0"),
        (LossScaleConfig(static=1e39), "loss_scale.static=1e"),
    ],
)
def test_a_scale_that_cannot_work_is_refused(cfg, message):
    with pytest.raises(ConfigError, match=message):
        init_loss_scale(cfg)
