# SPDX-License-Identifier: Apache-2.0
"""The ledger against real programs of known traffic, and against TPU and GPU HLO.

The TPU and GPU texts are cut down from compiles for v5p:2x2x2, v5e:4x4 and h100:8 (jax
0.10.2): shapes are smaller and attributes that the ledger does not read are gone.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxspeed.ledger import (
    KINDS,
    UNKNOWN_AXES,
    Ledger,
    LedgerError,
    axes_of_groups,
    read_cycles,
    read_ledger,
    read_partitioned,
)


AXES = {"data": 2, "fsdp": 2, "tensor": 2}
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(AXES, n)]
ROWS = 64


@pytest.fixture
def cube(mesh: Callable[..., Mesh]) -> Mesh:
    return mesh(data=2, fsdp=2, tensor=2)


def on_devices(mesh: Mesh, f: Callable[..., jax.Array], *shapes: tuple[int, ...]):
    """Lowers `f` as a shard_map whose arguments of these shapes are on every device."""
    whole = jax.shard_map(
        f, mesh=mesh, in_specs=P(), out_specs=P(tuple(AXES)), check_vma=False
    )
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(whole).lower(*args)


def scan(f: Callable[[jax.Array], jax.Array], x: jax.Array, length: int) -> jax.Array:
    return jax.lax.scan(lambda carry, _: (f(carry), None), x, None, length=length)[0]


def by_hand(kind: str, axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    """One collective of (ROWS, 4) or, for a gather, of a shard of that, back to (ROWS, 4)."""
    n = 2 ** len(axes)
    if kind == "all-gather":
        return x * jax.lax.all_gather(x[: ROWS // n], axes, tiled=True)
    if kind == "reduce-scatter":
        return jnp.tile(jax.lax.psum_scatter(x, axes, tiled=True), (n, 1)) * x
    if kind == "all-reduce":
        return x * jax.lax.psum(x, axes)
    if kind == "all-to-all":
        return x * jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
    return x * jax.lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)])


WIRE = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@pytest.mark.parametrize("axes", SUBSETS, ids="-".join)
def test_each_kind_is_counted_through_nested_scans(
    cube: Mesh, axes: tuple[str, ...]
) -> None:
    def f(x: jax.Array) -> jax.Array:
        for outer, kind in enumerate(WIRE, start=2):
            step = functools.partial(by_hand, kind, axes)
            x = scan(lambda y, step=step: scan(step, y, 3), x, outer)
        return x

    lowered = on_devices(cube, f, (ROWS, 4))
    for ledger in (
        read_ledger(lowered.compile(), AXES),
        read_partitioned(lowered, AXES),
    ):
        assert {e.kind for e in ledger} == set(WIRE)
        for outer, (kind, wire) in enumerate(WIRE.items(), start=2):
            trips, payload = outer * 3, ROWS * 4 * 4
            assert {e.axes for e in ledger.select(kind)} == {axes}
            assert {e.group_size for e in ledger.select(kind)} == {2 ** len(axes)}
            assert ledger.elements(kind) == trips * ROWS * 4
            assert ledger.total(kind) == trips * payload
            assert ledger.wire(kind) == trips * payload * wire(2 ** len(axes))
            assert ledger.total(kind, axes) == ledger.total(kind, axes[0])


def test_zero_3_gathers_twice_and_scatters_once(cube: Mesh) -> None:
    """The transpose of a gather in a rematerialised scan is a second gather and a scatter."""

    def layer(x: jax.Array, shard: jax.Array) -> tuple[jax.Array, None]:
        w = jax.lax.all_gather(shard, "fsdp", tiled=True)
        return jnp.tanh(x @ w), None

    def loss(shards: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(layer), x, shards)[0].sum()

    lowered = on_devices(cube, jax.grad(loss), (5, 16, 32), (8, 32))
    weights = 5 * 32 * 32
    for ledger in (
        read_ledger(lowered.compile(), AXES),
        read_partitioned(lowered, AXES),
    ):
        assert ledger.elements("all-gather", ("fsdp",)) == 2 * weights
        assert ledger.elements("reduce-scatter", ("fsdp",)) == weights
        assert ledger.elements() == 3 * weights


def test_combined_collective_counts_every_operand(cube: Mesh) -> None:
    def f(x: jax.Array, y: jax.Array) -> jax.Array:
        a, b = jax.lax.psum((x, y), "data")
        return a[:, :1] + b

    ledger = read_ledger(on_devices(cube, f, (8, 3), (8, 5)).compile(), AXES)
    assert ledger.elements("all-reduce", ("data",)) == 8 * 3 + 8 * 5


def test_only_the_larger_branch_of_a_conditional_is_counted(cube: Mesh) -> None:
    def f(x: jax.Array, flag: jax.Array) -> jax.Array:
        small = lambda x: jax.lax.psum(x[:1], "data") + x
        large = lambda x: scan(lambda y: jax.lax.psum(y, "fsdp"), x, 4)
        return jax.lax.cond(flag[0] > 0, small, large, x)

    lowered = on_devices(cube, f, (8, 3), (1,))
    for ledger in (
        read_ledger(lowered.compile(), AXES),
        read_partitioned(lowered, AXES),
    ):
        assert [(e.axes, e.trips) for e in ledger] == [(("fsdp",), 4)]
    (least,) = read_ledger(lowered.compile(), AXES, branch="least")
    assert (least.axes, least.trips) == (("data",), 1)


CYCLES = """
HloModule m, num_partitions=2
%fused (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8] parameter(0), backend_config={"estimated_cycles":"900"}
}
%work (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %f = f32[8] fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
}
%some (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %y = f32[8] call(%x), to_apply=%work
  ROOT %t = (s32[], f32[8]) tuple(%i, %y)
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %v = (s32[], f32[8]) while(%p), condition=%more, body=%some, backend_config={"known_trip_count":{"n":"3"}}
  %y = f32[8] get-tuple-element(%v), index=1
  %z = f32[8] add(%y, %y), backend_config={"estimated_cycles":"2"}
  ROOT %t = (s32[], f32[8]) tuple(%i, %z)
}
%more (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %c = pred[] constant(true)
}
ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%p), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"8"}}
}
"""


def test_cycles_are_multiplied_out() -> None:
    """Eight times two and three times ten; what a fusion is made of is in its own estimate."""
    assert read_cycles(CYCLES) == 8 * (2 + 3 * 10)
    unknown = re.sub(r', backend_config=\{"known[^}]*\}\}', "", CYCLES)
    assert read_cycles(unknown, unknown_trips=4) == 4 * (2 + 4 * 10)


def test_a_program_without_estimates_has_no_cycles(cube: Mesh) -> None:
    compiled = on_devices(cube, lambda x: x + 1, (8, 3)).compile()
    with pytest.raises(LedgerError, match="compiled for a TPU"):
        read_cycles(compiled)


def test_loop_that_depends_on_data_needs_a_trip_count(cube: Mesh) -> None:
    def f(x: jax.Array) -> jax.Array:
        body = lambda y: jax.lax.psum(y, "data")
        return jax.lax.while_loop(lambda y: y[0, 0] < 9, body, x)

    lowered = on_devices(cube, f, (8, 3))
    with pytest.raises(LedgerError, match="trip count depends on data.*unknown_trips"):
        read_partitioned(lowered, AXES)
    assert read_partitioned(lowered, AXES, unknown_trips=7).elements() == 7 * 24
    assert read_ledger(lowered.compile(), AXES, unknown_trips=7).elements() == 7 * 24


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 7, 1), (3, 20, 4), (9, 0, -2)])
def test_trip_count_is_read_from_the_condition(
    cube: Mesh, start: int, stop: int, step: int
) -> None:
    def f(x: jax.Array) -> jax.Array:
        holds = lambda c: (c[0] < stop) if step > 0 else (c[0] > stop)
        body = lambda c: (c[0] + step, jax.lax.psum(c[1], "data"))
        return jax.lax.while_loop(holds, body, (start, x))[1]

    text = on_devices(cube, f, (8, 3)).compile().as_text() or ""
    text = re.sub(r',?"known_trip_count":\{[^}]*\}', "", text)
    assert [e.trips for e in read_ledger(text, AXES)] == [len(range(start, stop, step))]


def test_counter_that_grows_by_another_is_followed(cube: Mesh) -> None:
    def f(x: jax.Array) -> jax.Array:
        body = lambda c: (c[0] + c[1], c[1] + 2, jax.lax.psum(c[2], "data"))
        return jax.lax.while_loop(lambda c: c[0] < 30, body, (0, 1, x))[2]

    (entry,) = read_partitioned(on_devices(cube, f, (8, 3)), AXES)
    assert entry.trips == 6  # 0, 1, 4, 9, 16, 25, 36


def test_counter_that_starts_outside_an_outer_loop_is_followed(cube: Mesh) -> None:
    """Inner loops may get their first count and their bound through the outer carry."""

    def f(x: jax.Array) -> jax.Array:
        def inner(c: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            return c[0] + 1, c[1], jax.lax.psum(c[2], "data")

        def outer(c: tuple[jax.Array, ...], _: None):
            first, last, x = c
            x = jax.lax.while_loop(lambda c: c[0] < c[1], inner, (first, last, x))[2]
            return (first, last, x), None

        start = (jnp.int32(2), jnp.int32(7), x)
        return jax.lax.scan(outer, start, None, length=3)[0][2]

    lowered = on_devices(cube, f, (8, 3))
    for ledger in (
        read_ledger(lowered.compile(), AXES),
        read_partitioned(lowered, AXES),
    ):
        assert ledger.elements("all-reduce") == 3 * 5 * 24


def test_collectives_of_the_partitioner_are_in_the_compiled_program_only(
    cube: Mesh,
) -> None:
    def sharded(*spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (8, 8), jnp.float32, sharding=NamedSharding(cube, P(*spec))
        )

    lowered = jax.jit(
        lambda x, w: x @ w, out_shardings=NamedSharding(cube, P("data"))
    ).lower(sharded("data", "tensor"), sharded("tensor", None))
    assert len(read_partitioned(lowered, AXES)) == 0
    (entry,) = read_ledger(lowered.compile(), AXES)
    assert (entry.kind, entry.axes, entry.elements) == ("all-reduce", ("tensor",), 32)


def test_partial_manual_program_is_read_before_and_after_compiling(cube: Mesh) -> None:
    def f(x: jax.Array) -> jax.Array:
        return scan(lambda y: jax.lax.psum(y, "fsdp") * y, x, 6)

    part = jax.shard_map(
        f, mesh=cube, in_specs=P(), out_specs=P(), axis_names={"data", "fsdp"}, check_vma=False
    )  # fmt: skip
    lowered = jax.jit(part).lower(jax.ShapeDtypeStruct((8, 4), jnp.float32))
    for ledger in (
        read_ledger(lowered.compile(), AXES),
        read_partitioned(lowered, AXES),
    ):
        assert ledger.elements("all-reduce", ("fsdp",)) == 6 * 32


def one(instruction: str, *, more: str = "") -> str:
    """A module of 8 devices whose entry is one instruction on an f32[16,4]."""
    return (
        f"HloModule m, num_partitions=8\n{more}\n"
        "ENTRY %main (p: f32[16,4]) -> f32[16,4] {\n"
        "  %p = f32[16,4]{1,0} parameter(0)\n"
        f"  ROOT %r = {instruction}\n"
        "}\n"
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("{{1,0},{3,2},{5,4},{7,6}}", ("tensor",)),
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor")),
        ("{{0,1,4,5},{2,3,6,7}}", ("data", "tensor")),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "tensor")),
        ("{}", ("data", "fsdp", "tensor")),
        ("[4,2]<=[8]", ("tensor",)),
        ("[2,4]<=[8]", ("fsdp", "tensor")),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}", ("data", "fsdp", "tensor")),
        ("mesh['x'=2,'y'=4] {'y'}", ("fsdp", "tensor")),
        ("mesh['x'=4,'y'=2] {'x'}", ("data", "fsdp")),
        ("mesh['x'=2,'y'=2,'z'=2] {'z','x'}", ("data", "tensor")),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", ("tensor",)),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", ("data", "fsdp")),
        ("{{0,3},{1,2},{4,7},{5,6}}", UNKNOWN_AXES),
        ("{{0,1,2},{3,4,5},{6,7}}", UNKNOWN_AXES),
        ("{{0,1},{2,3},{4,6},{5,7}}", UNKNOWN_AXES),
    ],
)
def test_axes_come_from_the_device_groups(groups: str, axes: tuple[str, ...]) -> None:
    text = one(f"f32[16,4]{{1,0}} all-reduce(%p), replica_groups={groups}")
    (entry,) = read_ledger(text, AXES)
    assert entry.axes == axes


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,1},{1,0},{2,3},{3,2}}", ("tensor",)),
        ("{{0,4},{1,5}}", ("data",)),
        ("{{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}", ("fsdp", "tensor")),
    ],
)
def test_axes_of_a_permutation_are_those_it_moves_along(
    pairs: str, axes: tuple[str, ...]
) -> None:
    text = one(f"f32[16,4]{{1,0}} collective-permute(%p), source_target_pairs={pairs}")
    (entry,) = read_ledger(text, AXES)
    assert (entry.axes, entry.wire_bytes) == (axes, 256)


def test_mesh_axis_of_size_one_is_never_named() -> None:
    assert axes_of_groups([[0, 1]], {"data": 1, "fsdp": 2}) == ("fsdp",)


def test_group_of_one_device_is_no_traffic() -> None:
    groups = "{{0},{1},{2},{3},{4},{5},{6},{7}}"
    text = one(f"f32[16,4]{{1,0}} all-reduce(%p), replica_groups={groups}")
    assert len(read_ledger(text, AXES)) == 0


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("f32", 256),
        ("bf16", 128),
        ("f8e4m3fn", 64),
        ("s4", 32),
        ("pred", 64),
        ("c64", 512),
    ],
)
def test_payload_bytes_follow_the_dtype(dtype: str, size: int) -> None:
    text = one("f32[16,4]{1,0} all-reduce(%p), replica_groups={}")
    (entry,) = read_ledger(text.replace("f32[", f"{dtype}["), AXES)
    assert (entry.dtype, entry.payload_bytes) == (dtype, size)


def test_operands_with_their_shapes_are_read() -> None:
    text = one(
        "f32[16,4]{1,0} all-reduce(f32[16,4]{1,0:T(8,128)S(1)} %p), replica_groups={}"
    )
    assert read_ledger(text, AXES).elements() == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            one("f32[16,4] all-reduce(%p), replica_groups=@axes{a}"),
            "groups not understood",
        ),
        (
            one("f32[16,4] all-reduce(%p), replica_groups={{0,9}}"),
            "not all in the mesh",
        ),
        (one("f32[16,4] all-reduce(%q), replica_groups={}"), "q is not defined"),
        (
            one("f32[16,4] all-shuffle(%p), replica_groups={}"),
            "no rule for.*all-shuffle",
        ),
        (one("f32[16,4] send(%p), channel_id=1"), "groups not understood"),
        (
            one("f32[16,4] all-reduce(%p), replica_groups=mesh['x'=8] {'x':(1)2}"),
            "groups",
        ),
        (one("f32[16,4] all-reduce(%p, replica_groups={}"), "unbalanced"),
        (one("f32[16,4] all-reduce(%p), replica_groups={}")[:-2], "no whole ENTRY"),
        (
            one("q7[16,4] all-reduce(%p), replica_groups={}").replace("f32", "q7"),
            "'q7'",
        ),
        ("", "no whole ENTRY"),
    ],
)
def test_collective_that_cannot_be_counted_is_an_error(text: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        read_ledger(text, AXES)


def test_collective_that_nothing_calls_is_an_error() -> None:
    orphan = (
        "%orphan (q: f32[2]) -> f32[2] {\n  %q = f32[2] parameter(0)\n"
        "  ROOT %lost = f32[2] all-reduce(%q), replica_groups={}\n}\n"
    )
    with pytest.raises(LedgerError, match="lost.*not reached"):
        read_ledger(one("f32[16,4] copy(%p)", more=orphan), AXES)


def test_axes_of_another_mesh_are_refused() -> None:
    text = one("f32[16,4] all-reduce(%p), replica_groups={}")
    with pytest.raises(LedgerError, match="are 16 devices but .* compiled for 8"):
        read_ledger(text, {"data": 2, "fsdp": 8})


# What backends print


TPU_LOOP = """
%cond (c: (s32[], bf16[8,4], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %c = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %one = s32[]{:T(128)} constant(1)
  %copy = s32[]{:T(128)} copy(%zero)
  %init = (s32[], bf16[8,4]{1,0}, /*index=2*/s32[]) tuple(%copy, %a, %one)
  %loop = (s32[], bf16[8,4]{1,0}, s32[]) while(%init), condition=%cond, body=%body
  ROOT %out = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""

CHAIN_STEP = (
    "channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, "
    'frontend_attributes={chain_id="0"}, metadata={op_name="while/body/all_gather"}'
)

TPU_CHAIN = f"""HloModule chain, is_scheduled=true, num_partitions=8

%fused_computation.69 (p0: bf16[8,4]) -> (bf16[8,4], bf16[32,4], u32[]) {{
  %p0 = bf16[8,4]{{1,0}} parameter(0)
  %all-gather.15 = bf16[32,4]{{1,0}} all-gather(%p0), {CHAIN_STEP}
  ROOT %start = (bf16[8,4]{{1,0}}, bf16[32,4]{{1,0}}, u32[]{{:S(2)}}) custom-call(%p0, %all-gather.15), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.130 (p1: bf16[8,4], p2: bf16[32,4]) -> (bf16[8,4], bf16[32,4]) {{
  %p1 = bf16[8,4]{{1,0}} parameter(0)
  %p2 = bf16[32,4]{{1,0}} parameter(1)
  %all-gather.17 = bf16[32,4]{{1,0}} all-gather(%p1), {CHAIN_STEP}
  ROOT %t = (bf16[8,4]{{1,0}}, bf16[32,4]{{1,0}}) tuple(%p1, %all-gather.17)
}}

%fused_computation.71 (p3: bf16[8,4], p4: bf16[32,4]) -> bf16[32,4] {{
  %p3 = bf16[8,4]{{1,0}} parameter(0)
  %p4 = bf16[32,4]{{1,0}} parameter(1)
  %all-gather.19 = bf16[32,4]{{1,0}} all-gather(%p3), {CHAIN_STEP}
  ROOT %done = bf16[32,4]{{1,0}} custom-call(%p3, %p4, %all-gather.19), custom_call_target="AsyncCollectiveDone"
}}

%body (b: (s32[], bf16[8,4], s32[])) -> (s32[], bf16[8,4], s32[]) {{
  %b = (s32[]{{:T(128)}}, bf16[8,4]{{1,0}}, s32[]{{:T(128)}}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %x = bf16[8,4]{{1,0}} get-tuple-element(%b), index=1
  %by = s32[] get-tuple-element(%b), index=2
  %all-gather.41 = bf16[32,4]{{1,0}} all-gather(%x), channel_id=2, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, dimensions={{0}}, frontend_attributes={{async_collective_name="all-gather-start.1"}}
  %async-collective-start = (bf16[8,4]{{1,0}}, bf16[32,4]{{1,0}}, u32[]) fusion(%x), kind=kCustom, calls=%fused_computation.69
  %s = bf16[32,4]{{1,0}} get-tuple-element(%async-collective-start), index=1
  %fusion.130 = (bf16[8,4]{{1,0}}, bf16[32,4]{{1,0}}) fusion(%x, %s), kind=kOutput, calls=%async_collective_fusion.130
  %m = bf16[32,4]{{1,0}} get-tuple-element(%fusion.130), index=1
  %async-collective-done = bf16[32,4]{{1,0}} fusion(%x, %m), kind=kCustom, calls=%fused_computation.71
  %cut = bf16[8,4]{{1,0}} slice(%async-collective-done), slice={{[0:8], [0:4]}}
  %next = s32[] add(%j, %by)
  ROOT %tuple = (s32[], bf16[8,4]{{1,0}}, s32[]) tuple(%next, %cut, %by)
}}
{TPU_LOOP}"""


def test_tpu_chain_of_fusions_is_one_overlapped_gather() -> None:
    blocking, chained = read_ledger(TPU_CHAIN, {"data": 2, "fsdp": 4})
    assert (blocking.is_async, chained.is_async) == (False, True)
    for entry in (blocking, chained):
        assert (entry.kind, entry.axes, entry.elements) == (
            "all-gather",
            ("fsdp",),
            128,
        )
        assert (entry.dtype, entry.payload_bytes, entry.trips) == ("bf16", 256, 6)
    assert chained.name == "while/body/all_gather"


TPU_SCATTER_FUSION = """HloModule scatter, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.clone.1 (input: f32[1024,16]) -> f32[288,16] {
  %input = f32[1024,16]{1,0:T(8,128)} parameter(0)
  %nil = f32[] constant(0)
  %pad = f32[1152,16]{1,0:T(8,128)} pad(%input, %nil), padding=0_128x0_0
  %all-reduce.8 = f32[1152,16]{1,0:T(8,128)} all-reduce(%pad), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %table = u32[8]{0:T(128)} constant({0, 1, 2, 3, 0, 1, 2, 3})
  %partition-id.18 = u32[] partition-id()
  %shard = u32[1]{0:T(128)} dynamic-slice(%table, %partition-id.18), dynamic_slice_sizes={1}
  %bitcast = u32[]{:T(128)} bitcast(%shard)
  %rows = u32[] constant(288)
  %offset = u32[]{:T(128)} multiply(%bitcast, %rows)
  %col = u32[] constant(0)
  ROOT %cut = f32[288,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.8, %offset, %col), dynamic_slice_sizes={288,16}
}

ENTRY %main (g: f32[1024,16]) -> f32[96,16] {
  %g = f32[1024,16]{1,0:T(8,128)} parameter(0)
  %fusion.125 = f32[288,16]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.clone.1, backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion","debug":"(colors: 2"}}
  %slice = f32[96,16]{1,0:T(8,128)} slice(%fusion.125), slice={[192:288], [0:16]}
  %collective-permute-start = (f32[96,16]{1,0}, f32[96,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%slice), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}
  ROOT %collective-permute-done = f32[96,16]{1,0} collective-permute-done(%collective-permute-start)
}
"""


def test_tpu_fusion_of_all_reduce_and_slice_is_a_padded_reduce_scatter() -> None:
    ledger = read_ledger(TPU_SCATTER_FUSION, {"data": 2, "fsdp": 4})
    scatter, permute = ledger
    assert (scatter.kind, scatter.axes, scatter.sliced) == (
        "reduce-scatter",
        ("fsdp",),
        False,
    )
    assert (scatter.elements, scatter.wire_bytes) == (1152 * 16, 1152 * 16 * 4 * 3 // 4)
    assert (permute.kind, permute.axes, permute.is_async) == (
        "collective-permute",
        ("fsdp",),
        True,
    )
    assert permute.wire_bytes == 96 * 16 * 4


def sliced_program(offset: str) -> str:
    """A loop that all-reduces and keeps rows from an offset given from outside it."""
    return f"""HloModule sliced, num_partitions=16

%fused (t0: f32[4,64,8], t1: s32[], t2: f32[1024,8], t3: u32[]) -> f32[4,64,8] {{
  %t0 = f32[4,64,8]{{2,1,0}} parameter(0)
  %t2 = f32[1024,8]{{1,0}} parameter(2)
  %t3 = u32[] parameter(3)
  %k = u32[] constant(0)
  %dynamic-slice.5 = f32[64,8]{{1,0}} dynamic-slice(%t2, %t3, %k), dynamic_slice_sizes={{64,8}}
  %row = f32[1,64,8]{{2,1,0}} bitcast(%dynamic-slice.5)
  %t1 = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %update = f32[4,64,8]{{2,1,0}} dynamic-update-slice(%t0, %row, %t1, %z, %z)
}}

%body (b: (s32[], f32[4,64,8], f32[1024,8], u32[])) -> (s32[], f32[4,64,8], f32[1024,8], u32[]) {{
  %b = (s32[], f32[4,64,8]{{2,1,0}}, f32[1024,8]{{1,0}}, u32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %acc = f32[4,64,8]{{2,1,0}} get-tuple-element(%b), index=1
  %g = f32[1024,8]{{1,0}} get-tuple-element(%b), index=2
  %at = u32[] get-tuple-element(%b), index=3
  %all-reduce.2 = f32[1024,8]{{1,0}} all-reduce(%g), replica_groups={{{{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}}}
  %new = f32[4,64,8]{{2,1,0}} fusion(%acc, %i, %all-reduce.2, %at), kind=kLoop, calls=%fused
  %inc = s32[] constant(1)
  %next = s32[] add(%i, %inc)
  ROOT %tuple = (s32[], f32[4,64,8]{{2,1,0}}, f32[1024,8]{{1,0}}, u32[]) tuple(%next, %new, %g, %at)
}}

%cond (c: (s32[], f32[4,64,8], f32[1024,8], u32[])) -> pred[] {{
  %limit = s32[] constant(4)
  %c = (s32[], f32[4,64,8]{{2,1,0}}, f32[1024,8]{{1,0}}, u32[]) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%n, %limit), direction=LT
}}

ENTRY %main (e0: f32[4,64,8], e1: f32[1024,8], e2: u32[]) -> f32[4,64,8] {{
  %e0 = f32[4,64,8]{{2,1,0}} parameter(0)
  %e1 = f32[1024,8]{{1,0}} parameter(1)
  %e2 = u32[] parameter(2)
  %zero = s32[] constant(0)
  %id = u32[] partition-id()
  %shard = u32[] constant(64)
  %place = u32[] multiply({offset}, %shard)
  %init = (s32[], f32[4,64,8]{{2,1,0}}, f32[1024,8]{{1,0}}, u32[]) tuple(%zero, %e0, %e1, %place)
  %loop = (s32[], f32[4,64,8]{{2,1,0}}, f32[1024,8]{{1,0}}, u32[]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[4,64,8]{{2,1,0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(("offset", "sliced"), [("%id", True), ("%e2", False)])
def test_all_reduce_of_which_each_device_keeps_its_shard_is_flagged(
    offset: str, sliced: bool
) -> None:
    (entry,) = read_ledger(sliced_program(offset), {"fsdp": 16})
    assert (entry.kind, entry.sliced, entry.trips) == ("all-reduce", sliced, 4)
    assert entry.wire_bytes == 2 * 1024 * 8 * 4 * 15 // 16


def gpu_config(sync: str) -> str:
    return f'backend_config={{"collective_backend_config":{{"is_sync":{sync}}}}}'


GPU = f"""HloModule gpu, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

%async_computation (q: f32[256,4]) -> f32[64,4] {{
  %q = f32[256,4]{{1,0}} parameter(0)
  ROOT %reduce-scatter.3 = f32[64,4]{{1,0}} reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={{0}}, to_apply=%add
}}

ENTRY %main (a: bf16[64,4], b: bf16[16,8], g: f32[256,4]) -> f32[64,4] {{
  %a = bf16[64,4]{{1,0}} parameter(0)
  %b = bf16[16,8]{{1,0}} parameter(1)
  %g = f32[256,4]{{1,0}} parameter(2)
  %all-gather-start = ((bf16[64,4]{{1,0}}, bf16[16,8]{{1,0}}), (bf16[256,4]{{1,0}}, bf16[64,8]{{1,0}})) all-gather-start(%a, %b), replica_groups=[2,4]<=[8], dimensions={{0}}, {gpu_config("false")}
  %all-gather-done = (bf16[256,4]{{1,0}}, bf16[64,8]{{1,0}}) all-gather-done(%all-gather-start)
  %all-reduce-start = f32[256,4]{{1,0}} all-reduce-start(%g), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add, {gpu_config("true")}
  %all-reduce-done = f32[256,4]{{1,0}} all-reduce-done(%all-reduce-start)
  %reduce-scatter-start = ((f32[256,4]{{1,0}}), f32[64,4]{{1,0}}) async-start(%all-reduce-done), calls=%async_computation, {gpu_config("false")}
  %update = ((f32[256,4]{{1,0}}), f32[64,4]{{1,0}}) async-update(%reduce-scatter-start), calls=%async_computation
  ROOT %reduce-scatter-done = f32[64,4]{{1,0}} async-done(%update), calls=%async_computation
}}
"""


def test_gpu_start_and_done_are_one_collective() -> None:
    gather, reduce, scatter = read_ledger(GPU, {"data": 2, "fsdp": 4})
    assert (gather.kind, gather.axes, gather.is_async) == (
        "all-gather",
        ("fsdp",),
        True,
    )
    assert (gather.dtype, gather.payload_bytes) == ("bf16", 2 * 4 * (64 * 4 + 16 * 8))
    assert (reduce.kind, reduce.axes, reduce.is_async) == (
        "all-reduce",
        ("data",),
        False,
    )
    assert (scatter.kind, scatter.axes, scatter.is_async) == (
        "reduce-scatter",
        ("fsdp",),
        True,
    )
    assert (scatter.elements, scatter.wire_bytes) == (1024, 1024 * 4 * 3 // 4)


SPARSE_CORE = """HloModule sparse, num_partitions=8

%called_computation (q: f32[64,4], t: token[]) -> f32[16,4] {
  %t = token[] parameter(1)
  %q = f32[64,4]{1,0} parameter(0)
  ROOT %reduce-scatter.6 = f32[16,4]{1,0} reduce-scatter(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[64,4]) -> f32[16,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %token = token[] after-all()
  %call-start = ((f32[64,4]{1,0}, token[]), f32[16,4]{1,0}) call-start(%p, %token), async_execution_thread="sparsecore", to_apply=%called_computation
  ROOT %call-done = f32[16,4]{1,0} call-done(%call-start)
}
"""


def test_collective_on_another_core_is_overlapped() -> None:
    (entry,) = read_ledger(SPARSE_CORE, {"data": 4, "fsdp": 2})
    assert (entry.kind, entry.axes) == ("reduce-scatter", ("data",))
    assert (entry.is_async, entry.elements) == (True, 256)


# Tables


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return read_ledger(GPU, {"data": 2, "fsdp": 4})


def test_rows_add_up_to_the_total(ledger: Ledger) -> None:
    rows = ledger.rows()
    assert [row["kind"] for row in rows] == [
        "all-gather",
        "reduce-scatter",
        "all-reduce",
    ]
    assert sum(row["payload_bytes"] for row in rows) == ledger.total()
    assert sum(row["wire_bytes"] for row in rows) == ledger.wire()
    assert sum(row["elements"] for row in rows) == ledger.elements()


def test_axis_selects_by_name_or_exactly(ledger: Ledger) -> None:
    assert ledger.total(axis="fsdp") + ledger.total(axis="data") == ledger.total()
    assert ledger.total(axis=("data", "fsdp")) == 0
    assert list(ledger.by_kind_and_axis()) == sorted(
        ledger.by_kind_and_axis(), key=lambda key: KINDS.index(key[0])
    )
    with pytest.raises(ValueError, match="no such collective"):
        ledger.total("allgather")


def test_table_and_json_show_every_row(ledger: Ledger) -> None:
    lines = str(ledger).splitlines()
    assert len(lines) == 1 + len(ledger.rows()) == 1 + ledger.table().row_count
    assert re.fullmatch(
        r"all-gather +fsdp +bf16 +1 +1,536 +3\.07 kB +2\.3 kB +100%", lines[1]
    )
    data = json.loads(ledger.to_json())
    assert [entry["kind"] for entry in data["entries"]] == [e.kind for e in ledger]
    assert data["rows"] == json.loads(json.dumps(ledger.rows()))


def test_unsliced_and_sliced_all_reduces_are_told_apart_in_the_table() -> None:
    assert "all-reduce (sliced)" in str(
        read_ledger(sliced_program("%id"), {"fsdp": 16})
    )
    assert "(sliced)" not in str(read_ledger(sliced_program("%e2"), {"fsdp": 16}))


def test_kernel_metadata_on_lines_of_its_own_does_not_end_a_computation() -> None:
    text = """HloModule m, num_partitions=2

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  %k = f32[8] custom-call(%p), custom_call_target="kernel", frontend_attributes={kernel_metadata={
"block":"{\\"q\\": 1024}"
}}, metadata={op_name="attention"}
  ROOT %r = f32[8] all-reduce(%k), replica_groups={{0,1}}, to_apply=%add
}
"""
    assert read_ledger(text, {"fsdp": 2}).elements("all-reduce") == 8
