# SPDX-License-Identifier: Apache-2.0
"""Schedules against their definitions: order of each stage's work, what is in flight, and the bubble."""

import pytest

from jaxspeed.pipeline import pipeline_schedule


SIZES = [(2, 2, 1), (2, 8, 1), (4, 4, 1), (4, 16, 1), (8, 9, 1), (3, 7, 1)]
CHUNKED = [(2, 2, 2), (2, 8, 3), (4, 8, 2), (4, 4, 4), (3, 6, 2)]
every_size = pytest.mark.parametrize(("p", "m", "v"), SIZES + CHUNKED)
every_name = pytest.mark.parametrize("name", ["gpipe", "1f1b"])


@every_size
@every_name
def test_every_stage_does_every_item_once_each_way(
    name: str, p: int, m: int, v: int
) -> None:
    schedule = pipeline_schedule(name, p, m, v)
    for stage in range(p):
        forward, backward = schedule.forward[:, stage], schedule.backward[:, stage]
        when = {int(f): tick for tick, f in enumerate(forward) if f >= 0}
        again = {int(b): tick for tick, b in enumerate(backward) if b >= 0}
        assert sorted(when) == sorted(again) == list(range(m * v))
        assert (forward >= 0).sum() == (backward >= 0).sum() == m * v
        assert all(when[item] <= again[item] for item in when)


@every_size
@every_name
def test_work_comes_from_the_neighbour_at_the_tick_before(
    name: str, p: int, m: int, v: int
) -> None:
    """What is received is not kept: it must be used at the very next tick."""
    schedule = pipeline_schedule(name, p, m, v)
    forward, backward = schedule.forward, schedule.backward
    for tick in range(schedule.ticks):
        for stage in range(p):
            f, b = int(forward[tick, stage]), int(backward[tick, stage])
            if f >= 0 and stage:
                assert forward[tick - 1, stage - 1] == f
            elif f >= 0 and f % v:  # comes round from the last stage's chunk before
                assert forward[tick - 1, p - 1] == f - 1
            if b >= 0 and stage < p - 1:
                assert backward[tick - 1, stage + 1] == b
            elif b >= 0 and b % v < v - 1:
                assert backward[tick - 1, 0] == b + 1


@pytest.mark.parametrize(("p", "m", "v"), [(1, 1, 1), *SIZES])
def test_orders_are_those_of_the_papers(p: int, m: int, v: int) -> None:
    gpipe = pipeline_schedule("gpipe", p, m, v)
    for stage in range(p):
        forward, backward = ([f"{x}{i}" for i in range(m)] for x in "FB")
        assert gpipe.order(stage) == forward + backward
    one = pipeline_schedule("1f1b", p, m, v)
    for stage in range(p):
        # Warm-up, then one forward and one backward pass in turn, then what is left.
        ahead = min(m, 2 * (p - 1 - stage))
        expected = [f"F{i}" for i in range(ahead)]
        for i in range(m):
            expected += [f"F{i + ahead}"] if i + ahead < m else []
            expected += [f"B{i}"]
        assert one.order(stage) == expected


def test_chunks_take_turns_in_groups_of_micro_batches() -> None:
    """Figure 4 of arXiv 2104.04473, with two stages: 0 and 1 through both chunks, then 2 and 3."""
    order = pipeline_schedule("1f1b", 2, 4, 2).order(0)
    ahead = ["F0.0", "F1.0", "F0.1", "F1.1", "F2.0", "F3.0", "F2.1", "F3.1"]
    assert [x for x in order if x[0] == "F"] == ahead
    back = ["B0.1", "B1.1", "B0.0", "B1.0", "B2.1", "B3.1", "B2.0", "B3.0"]
    assert [x for x in order if x[0] == "B"] == back
    last = pipeline_schedule("1f1b", 2, 4, 2).order(1)
    assert last[:6] == ["F0.0", "F1.0", "F0.1", "B0.1", "F1.1", "B1.1"]


@every_size
@every_name
@pytest.mark.parametrize("cost", [1.0, 2.0, 3.0])
def test_the_bubble_is_the_formulas(
    name: str, cost: float, p: int, m: int, v: int
) -> None:
    schedule = pipeline_schedule(name, p, m, v)
    assert schedule.bubble(cost) == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m", "v"), SIZES)
def test_one_forward_one_backward_keeps_few_inputs(p: int, m: int, v: int) -> None:
    assert pipeline_schedule("gpipe", p, m, v).in_flight == m
    assert pipeline_schedule("1f1b", p, m, v).in_flight == min(m, 2 * p - 1)


@every_size
@every_name
def test_no_two_inputs_share_a_place(name: str, p: int, m: int, v: int) -> None:
    schedule = pipeline_schedule(name, p, m, v)
    places, depth = schedule.rooms()
    assert places.max() == depth - 1
    for stage in range(p):
        held: dict[int, int] = {}
        for f, b in zip(
            schedule.forward[:, stage], schedule.backward[:, stage], strict=True
        ):
            if f >= 0:
                place = int(places[stage, f])
                assert place not in held
                held[place] = int(f)
            if b >= 0:
                assert held.pop(int(places[stage, b])) == b


def test_phases_are_three_at_most() -> None:
    kinds = lambda s: [(goes, back) for _, goes, back in s.phases()]
    assert kinds(pipeline_schedule("1f1b", 4, 8, 2)) == [
        (True, False),
        (True, True),
        (False, True),
    ]
    assert kinds(pipeline_schedule("gpipe", 4, 8)) == [(True, False), (False, True)]
