# SPDX-License-Identifier: Apache-2.0
"""A model splits into parameters and dims; what cannot be trained is refused by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspeed import nn, ops
from jaxspeed.ambient import ambient
from jaxspeed.config import MESH_AXES, ConfigError, ZeroConfig
from jaxspeed.sharding import Weight, is_weight, place_all
from tests import toy


ONES = jax.nn.initializers.ones
NORMAL = jax.nn.initializers.normal(1.0)
KEY = jax.random.key(0)


def build(rngs: nnx.Rngs) -> toy.Toy:
    return toy.Config(num_layers=3).build(rngs)


def test_parameter_carries_names_and_is_float32() -> None:
    p = nn.param(NORMAL, nn.rngs(KEY), (4, 8), ("embed", "mlp"))
    assert p.get_metadata()["dims"] == ("embed", "mlp")
    assert (p[...].shape, p[...].dtype) == ((4, 8), jnp.float32)


def test_parameter_wants_a_name_for_each_dim() -> None:
    with pytest.raises(
        ValueError, match=r"shape \(4, 8\) has dims \('embed',\): one name per dim"
    ):
        nn.param(NORMAL, nn.rngs(KEY), (4, 8), ("embed",))


def test_split_gives_parameters_and_dims_of_one_structure() -> None:
    _, params, dims = nn.split(build(nn.rngs(KEY)))
    assert jax.tree.map(jnp.shape, params) == {
        "embed": (16, 16),
        "layers": {"block": {"w": (3, 16, 16), "b": (3, 16)}},
    }
    assert dims == {
        "embed": ("vocab", "embed"),
        "layers": {
            "block": {"w": ("layers", "embed", "mlp"), "b": ("layers", "embed")}
        },
    }


def test_merge_undoes_split() -> None:
    model = build(nn.rngs(KEY))
    graphdef, params, _ = nn.split(model)
    inputs = jnp.asarray(toy.batch_of(rows=2)["inputs"])
    np.testing.assert_array_equal(
        nn.merge(graphdef, params).hidden(inputs), model.hidden(inputs)
    )
    changed = jax.tree.map(lambda p: p + 1, params)
    toy.assert_same(nn.split(nn.merge(graphdef, changed))[1], changed)


def test_abstract_is_split_without_arrays() -> None:
    _, params, dims = nn.split(build(nn.rngs(KEY)))
    _, shapes, names = nn.abstract(lambda: build(nn.rngs(KEY)))
    assert names == dims
    assert jax.tree.map(lambda s: (type(s), s.shape, s.dtype), shapes) == jax.tree.map(
        lambda p: (jax.ShapeDtypeStruct, p.shape, p.dtype), params
    )


def test_initialise_gives_what_split_gives() -> None:
    made = jax.jit(lambda key: nn.initialise(lambda: build(nn.rngs(key))))(KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        made,
        nn.split(build(nn.rngs(KEY)))[1],
    )


def test_masters_are_float32_whatever_the_model_holds() -> None:
    make = lambda: nnx.Linear(4, 3, rngs=nn.rngs(KEY), param_dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(nn.initialise(make))} == {
        jnp.dtype("float32")
    }


def module(fill: Callable[[nnx.Module, nnx.Rngs], None]) -> Callable[[], nnx.Module]:
    """Returns a function that makes a module with a Linear and what `fill` adds."""

    class Made(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            fill(self, rngs)

    return lambda: Made(nn.rngs(KEY))


def adds(name: str, value: Callable[[nnx.Rngs], Any]) -> Callable[[], nnx.Module]:
    return module(lambda m, rngs: setattr(m, name, value(rngs)))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "batch norm": (
        adds("norm", lambda rngs: nnx.BatchNorm(2, rngs=rngs)),
        r"model.norm.mean is a BatchStat: .* such as LayerNorm",
    ),
    "nnx dropout": (
        adds("drop", lambda rngs: nnx.Dropout(0.1, rngs=rngs)),
        r"nnx.Rngs\); use jaxspeed.ops.dropout",
    ),
    "jax array": (
        adds("table", lambda _: jnp.ones((3,))),
        "model.table is an array but not a parameter; make it an nnx.Param",
    ),
    "numpy array": (
        adds("table", lambda _: np.ones((3,))),
        "model.table is an array but not a parameter",
    ),
    "integer parameter": (
        adds("ids", lambda _: nnx.Param(jnp.arange(3))),
        "model.ids is an nnx.Param of int32: only real numbers",
    ),
    "complex parameter": (
        adds("z", lambda _: nnx.Param(jnp.ones((2,), jnp.complex64))),
        "nnx.Param of complex64",
    ),
    "cache": (
        adds("seen", lambda _: nnx.Cache(jnp.ones((2,)))),
        "model.seen is a Cache",
    ),
    "no parameters": (lambda: nnx.Module(), "model Module has no parameters"),
    "not a module": (lambda: None, "model is a NoneType, not an nnx.Module"),
}


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_trained_is_refused_in_one_line(
    case: str, abstract: bool
) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        nn.abstract(make) if abstract else nn.split(make())
    assert "\n" not in str(caught.value)


def test_parameter_held_twice_is_one() -> None:
    def tie(m: Any, rngs: nnx.Rngs) -> None:
        m.other = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
        m.other.kernel = m.linear.kernel

    graphdef, params, _ = nn.split(module(tie)())
    assert len(jax.tree.leaves(params)) == 2
    merged = nn.merge(graphdef, jax.tree.map(lambda p: p + 1, params))
    assert merged.other.kernel is merged.linear.kernel


def test_layers_in_a_list_have_their_index_for_a_name() -> None:
    layers = adds(
        "layers",
        lambda rngs: nnx.List(
            [nnx.Linear(2, 2, use_bias=False, rngs=rngs) for _ in range(2)]
        ),
    )
    params = nn.split(layers())[1]
    assert list(params["layers"]) == [0, 1]


class Scale(nnx.Module):
    """A block that multiplies by a parameter and adds its arguments."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nn.param(NORMAL, rngs, (4,), ("embed",))

    def __call__(self, x: jax.Array, *more: jax.Array) -> jax.Array:
        return x * self.w[...] + sum(more)


def test_layers_run_one_after_another_with_their_arguments() -> None:
    layers = nn.Layers(Scale, 3, nn.rngs(KEY))
    x, a, b = jnp.ones((4,)), jnp.full((4,), 2.0), jnp.full((4,), 3.0)
    expected = x
    for w in nn.split(layers)[1]["block"]["w"]:
        expected = expected * w + a + b
    np.testing.assert_allclose(layers(x, a, b), expected, rtol=1e-6)


def test_layers_are_made_from_keys_of_their_own() -> None:
    params = nn.split(nn.Layers(Scale, 4, nn.rngs(KEY)))[1]
    assert len(np.unique(params["block"]["w"])) == 16


@pytest.mark.parametrize("num_layers", [1, 2])
def test_any_number_of_layers_is_stacked(num_layers: int) -> None:
    params = nn.split(nn.Layers(Scale, num_layers, nn.rngs(KEY)))[1]
    assert params["block"]["w"].shape == (num_layers, 4)


class Drop(nnx.Module):
    """A block whose result shows its dropout mask."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nn.param(ONES, rngs, (1,), ("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = ops.dropout(jnp.ones(x.shape), 0.5, site=0) / 2
        return 2 * x + mask


def test_each_layer_drops_other_elements() -> None:
    layers = nn.Layers(Drop, 4, nn.rngs(KEY))
    with ambient(dropout_key=KEY):
        bits = np.asarray(layers(jnp.zeros((512,)))).astype(int)
    masks = (bits[:, None] >> np.arange(4)) & 1
    agree = (masks[:, :, None] == masks[:, None, :]).mean(0)
    assert np.all(np.abs(agree[~np.eye(4, dtype=bool)] - 0.5) < 0.1)
    assert np.all(np.asarray(layers(jnp.zeros((512,)))) == 7.5)


def test_weights_of_layers_stay_weights_until_their_layer_runs() -> None:
    graphdef, params, dims = nn.split(build(nn.rngs(KEY)))
    places = place_all(params, dims, dict.fromkeys(MESH_AXES, 1), ZeroConfig())
    weights = jax.tree.map(
        lambda p, place: Weight(p, None, place, jnp.float32), params, places
    )
    merged = nn.merge(graphdef, weights)
    assert isinstance(merged.embed[...], jax.Array)
    assert is_weight(merged.layers.block.w.get_raw_value())
    inputs = jnp.asarray(toy.batch_of(rows=2)["inputs"])
    np.testing.assert_array_equal(
        merged.hidden(inputs), nn.merge(graphdef, params).hidden(inputs)
    )


def test_module_is_told_from_its_class_and_from_functions() -> None:
    assert nn.is_module(build(nn.rngs(KEY)))
    assert not any(map(nn.is_module, (toy.Toy, build, toy.Config(), None)))
