# SPDX-License-Identifier: Apache-2.0
"""Laws that every model family obeys, at a tiny size; a new family gets them by a word."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxspeed import nn
from jaxspeed.ambient import ambient
from jaxspeed.config import REMAT_POLICIES
from jaxspeed.losses import next_token_loss
from models import gpt2, llama
from tests.dist.runs import FAMILIES, T, V


B, D, L = 2, 32, 2

RESIDUAL_STD = {"gpt2": 0.02 / math.sqrt(2 * L), "llama": 0.02}
"""Standard deviation of the matrices that write to the residual stream."""

NAMED = {
    "GPT-2": (gpt2.SMALL, 124_439_808),
    "GPT-2 medium": (gpt2.MEDIUM, 354_823_168),
    "GPT-2 large": (gpt2.LARGE, 774_030_080),
    "GPT-2 XL": (gpt2.XL, 1_557_611_200),
    "Llama 2 7B": (llama.LLAMA2_7B, 6_738_415_616),
    "Llama 3 8B": (llama.LLAMA3_8B, 8_030_261_248),
}

LOGICAL_DIMS = {
    "batch",
    "seq",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "vocab",
    "expert",
    "layers",
}

by_family = pytest.mark.parametrize("family", list(FAMILIES))


@functools.cache
def initialiser(family: str) -> Callable[[jax.Array], Any]:
    return jax.jit(
        lambda key: nn.initialise(lambda: FAMILIES[family].build(nn.rngs(key)))
    )


@functools.cache
def init(family: str, seed: int = 0) -> Any:
    return initialiser(family)(jax.random.key(seed))


@functools.cache
def parameters(family: str) -> Any:
    """Returns parameters in which biases and norms matter, as they do after training."""
    leaves, treedef = jax.tree.flatten(init(family))
    rng = np.random.default_rng(0)
    noisy = [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


@functools.cache
def graphdef(cfg: Any) -> Any:
    return nn.abstract(lambda: cfg.build(nn.rngs(jax.random.key(0))))[0]


@functools.cache
def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    return {
        "inputs": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "mask": jnp.asarray(rng.random((B, T)) < 0.7),
        "segment_ids": jnp.asarray(
            np.repeat([[1, 2], [4, 4]], T // 2, axis=1), jnp.int32
        ),
    }


def mean_loss(cfg: Any, **settings: Any) -> Callable[..., jax.Array]:
    """Returns `(params, batch) -> mean loss` with ambient settings inside, as the step has them."""

    def loss(params: Any, batch: Any) -> jax.Array:
        with ambient(**settings):
            sums = next_token_loss(nn.merge(graphdef(cfg), params), batch)
        return sums.total / sums.count

    return loss


def apply(
    cfg: Any, method: str = "__call__", **settings: Any
) -> Callable[..., jax.Array]:
    def run(params: Any, *args: Any) -> jax.Array:
        with ambient(**settings):
            return getattr(nn.merge(graphdef(cfg), params), method)(*args)

    return run


def assert_trees_close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        ours,
        theirs,
    )


@by_family
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_shapes_and_dtypes(family: str, activations: str) -> None:
    cfg, dtype = FAMILIES[family], jnp.dtype(activations)
    settings = {"compute": jnp.bfloat16, "activations": dtype}
    inputs = jax.ShapeDtypeStruct((B, T), jnp.int32)
    params = nn.abstract(lambda: cfg.build(nn.rngs(jax.random.key(0))))[1]
    logits = jax.eval_shape(apply(cfg, **settings), params, inputs)
    hidden = jax.eval_shape(apply(cfg, "hidden", **settings), params, inputs)
    table = jax.eval_shape(apply(cfg, "output_embedding"), params)
    assert (logits.shape, logits.dtype) == ((B, T, V), dtype)
    assert (hidden.shape, hidden.dtype) == ((B, T, D), dtype)
    assert table.shape == (V, D)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@by_family
def test_hidden_at_t_ignores_tokens_after_t(family: str) -> None:
    cfg = FAMILIES[family]
    tokens = jnp.asarray(np.random.default_rng(0).permutation(V)[:T], jnp.int32)

    @jax.jit
    @jax.grad
    def sensitivity(table: jax.Array, t: int) -> jax.Array:
        hidden = apply(cfg, "hidden")(
            {**parameters(family), "embed": table}, tokens[None]
        )
        return jnp.sum(jnp.sin(hidden[0, t]))

    for t in range(T):
        used = np.any(sensitivity(parameters(family)["embed"], t)[tokens] != 0, axis=-1)
        np.testing.assert_array_equal(used, np.arange(T) <= t)


@by_family
def test_packed_documents_equal_separate_ones(family: str) -> None:
    forward = jax.jit(apply(FAMILIES[family]))
    inputs, params = batch()["inputs"][:1], parameters(family)
    first, second = inputs[:, :6], inputs[:, 6:13]
    positions = np.array([[*range(6), *range(7), *range(3)]], np.int32)
    segments = np.array([[1] * 6 + [2] * 7 + [0] * 3], np.int32)
    packed = forward(params, inputs, positions, segments)
    assert_trees_close(packed[:, :6], forward(params, first))
    assert_trees_close(packed[:, 6:13], forward(params, second))


@by_family
def test_positions_count_from_zero_by_default(family: str) -> None:
    forward, params, inputs = (
        jax.jit(apply(FAMILIES[family])),
        parameters(family),
        batch()["inputs"],
    )
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), inputs.shape)
    default = forward(params, inputs)
    assert_trees_close(default, forward(params, inputs, positions))
    assert np.abs(default - forward(params, inputs, positions[:, ::-1])).max() > 1e-3


@by_family
def test_jit_equals_no_jit(family: str) -> None:
    loss = mean_loss(FAMILIES[family])
    assert_trees_close(
        loss(parameters(family), batch()), jax.jit(loss)(parameters(family), batch())
    )


@functools.cache
def gradients(family: str, remat: str = "none") -> Any:
    loss = mean_loss(FAMILIES[family], remat=remat)
    return jax.jit(jax.value_and_grad(loss))(parameters(family), batch())


@pytest.mark.slow
@by_family
@pytest.mark.parametrize("policy", [p for p in REMAT_POLICIES if p != "none"])
def test_rematerialisation_changes_neither_loss_nor_gradients(
    family: str, policy: str
) -> None:
    assert_trees_close(gradients(family, policy), gradients(family))


@by_family
def test_scanned_layers_equal_a_loop_over_layers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looped(self: nn.Layers, x: jax.Array, *args: Any) -> jax.Array:
        definition, weights = nnx.split(self.block)
        for i in range(self.num_layers):
            block = nnx.merge(definition, jax.tree.map(lambda w, i=i: w[i], weights))
            x = block(x, *args)
        return x

    scanned = gradients(family)
    monkeypatch.setattr(nn.Layers, "__call__", looped)
    loss = mean_loss(FAMILIES[family])
    assert_trees_close(
        jax.jit(jax.value_and_grad(loss))(parameters(family), batch()), scanned
    )


@by_family
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_backward_pass_is_traced_with_the_settings_of_the_forward_pass(
    family: str, platform: str
) -> None:
    settings = {"compute": jnp.bfloat16, "platform": platform, "attention": "xla"}
    args = (parameters(family), batch())
    inside = jax.make_jaxpr(jax.grad(mean_loss(FAMILIES[family], **settings)))(*args)
    with ambient(**settings):
        around = jax.make_jaxpr(jax.grad(mean_loss(FAMILIES[family], **settings)))(
            *args
        )
    inside, around = (
        re.sub(r"0x[0-9a-f]+", "", str(program)) for program in (inside, around)
    )
    assert inside == around


@pytest.mark.slow
@by_family
def test_low_precision_loss_and_gradients_are_close(family: str) -> None:
    loss = mean_loss(FAMILIES[family], compute=jnp.bfloat16)
    value, slopes = jax.jit(jax.value_and_grad(loss))(parameters(family), batch())
    exact, exact_slopes = gradients(family)
    assert float(value) == pytest.approx(float(exact), rel=1e-2)
    norm = lambda tree: math.sqrt(
        sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(tree))
    )
    assert norm(jax.tree.map(np.subtract, slopes, exact_slopes)) < 0.03 * norm(
        exact_slopes
    )
    assert {x.dtype for x in jax.tree.leaves(slopes)} == {jnp.dtype("float32")}


@by_family
def test_forward_and_gradient_pass_under_strict_promotion(family: str) -> None:
    for compute, activations in (
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
    ):
        loss = mean_loss(FAMILIES[family], compute=compute, activations=activations)
        with jax.numpy_dtype_promotion("strict"):
            value, _ = jax.eval_shape(
                jax.value_and_grad(loss), parameters(family), batch()
            )
        assert value.dtype == jnp.float32


@by_family
def test_num_params_equals_the_real_tree(family: str) -> None:
    assert (
        sum(x.size for x in jax.tree.leaves(parameters(family)))
        == FAMILIES[family].num_params()
    )


@pytest.mark.parametrize("name", list(NAMED))
def test_named_size_has_its_published_number_of_parameters(name: str) -> None:
    cfg, published = NAMED[name]
    _, params, _ = nn.abstract(lambda: cfg.build(nn.rngs(jax.random.key(0))))
    assert (
        sum(math.prod(p.shape) for p in jax.tree.leaves(params))
        == cfg.num_params()
        == published
    )


@by_family
def test_abstract_model_has_shapes_and_no_arrays(family: str) -> None:
    big = dataclasses.replace(FAMILIES[family], vocab_size=10**8, num_layers=1000)
    before = len(jax.live_arrays())
    _, params, dims = nn.abstract(lambda: big.build(nn.rngs(jax.random.key(0))))
    assert {type(p) for p in jax.tree.leaves(params)} == {jax.ShapeDtypeStruct}
    # The key is the one array that was made.
    assert len(jax.live_arrays()) <= before + 1
    assert params["embed"].shape == (10**8, D)
    names = jax.tree.map(lambda p, d: d, params, dims)
    assert jax.tree.structure(
        names, is_leaf=lambda x: isinstance(x, tuple)
    ) == jax.tree.structure(params)


@by_family
def test_every_parameter_names_its_dims(family: str) -> None:
    cfg = FAMILIES[family]
    _, params, dims = nn.abstract(lambda: cfg.build(nn.rngs(jax.random.key(0))))
    named = jax.tree.map(lambda p, d: (p.shape, d), params, dims)
    for shape, names in jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, tuple)):
        assert len(shape) == len(names)
        assert set(names) <= LOGICAL_DIMS
        assert (names[0] == "layers") == (shape[0] == L)


def dot_flops(jaxpr: Any, *, attention: bool) -> float:
    """Returns FLOPs of attention's products (they have batch dims), or of the others."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), (batched, _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            free = math.prod(
                n for i, n in enumerate(left) if i not in (*contract, *batched)
            )
            # A row of ones times a matrix is how a bias's gradient is summed.
            if bool(batched) == attention and free > 1:
                total += (
                    2.0
                    * math.prod(equation.outvars[0].aval.shape)
                    * math.prod(left[i] for i in contract)
                )
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(
            dot_flops(inner, attention=attention)
            for inner in jaxprs_in_params(equation.params)
        )
    return total


@by_family
@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_flops_per_token_counts_the_products_of_a_step(
    family: str, kernel: str
) -> None:
    cfg = FAMILIES[family]
    step = jax.grad(mean_loss(cfg, attention=kernel))
    jaxpr = jax.make_jaxpr(step)(
        parameters(family), {"inputs": batch()["inputs"]}
    ).jaxpr
    # Of the scores the formula counts the causal half.
    counted = dot_flops(jaxpr, attention=False) + dot_flops(jaxpr, attention=True) / 2
    assert counted / (B * T) == pytest.approx(cfg.flops_per_token(T), rel=0.01)


@pytest.mark.parametrize("name", list(NAMED))
def test_flops_per_token_is_about_six_per_parameter_and_grows_with_the_sequence(
    name: str,
) -> None:
    cfg, parameters = NAMED[name]
    assert 0.75 * 6 * parameters < cfg.flops_per_token(1) < 1.05 * 6 * parameters
    assert cfg.flops_per_token(2048) > cfg.flops_per_token(1024) > 0


@pytest.mark.slow
@by_family
def test_dropout_is_off_without_a_key_and_changes_with_it(family: str) -> None:
    cfg = dataclasses.replace(FAMILIES[family], dropout=0.3)

    @jax.jit
    def loss(key: Any) -> jax.Array:
        return mean_loss(cfg, dropout_key=key)(parameters(family), batch())

    first, again, second = (float(loss(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again
    assert len({first, second, float(loss(None))}) == 3
    assert float(loss(None)) == pytest.approx(float(gradients(family)[0]), rel=1e-5)


@by_family
def test_initial_parameters_have_the_published_spread(family: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(init(family)):
        layers = np.asarray(leaf).reshape(leaf.shape[0], -1)
        name = path[-1].key
        if name.startswith("b"):
            assert not np.any(leaf), path
        elif name == "scale":
            assert np.all(leaf == 1), path
        else:
            std = (
                RESIDUAL_STD[family]
                if name in ("wo", "w_down")
                else 0.01
                if name == "positions"
                else 0.02
            )
            assert np.std(leaf) == pytest.approx(std, rel=0.1), path
            assert abs(np.mean(leaf)) < 0.15 * std, path
            assert len(np.unique(layers[:, 0])) == len(layers), path


@by_family
def test_initial_loss_is_that_of_a_uniform_guess(family: str) -> None:
    loss = jax.jit(mean_loss(FAMILIES[family]))(init(family), batch())
    assert float(loss) == pytest.approx(math.log(V), rel=0.02)


@by_family
def test_seed_decides_the_parameters(family: str) -> None:
    first, again, other = (
        initialiser(family)(jax.random.key(seed))["embed"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_grouped_query_model_equals_one_with_repeated_heads() -> None:
    grouped, params = FAMILIES["llama"], parameters("llama")
    whole = dataclasses.replace(grouped, num_kv_heads=grouped.num_heads)
    attn = params["layers"]["block"]["attn"]
    repeated = {
        n: np.repeat(attn[n], grouped.num_heads // grouped.num_kv_heads, axis=2)
        for n in ("wk", "wv")
    }
    block = {**params["layers"]["block"], "attn": {**attn, **repeated}}
    wide = {**params, "layers": {"block": block}}
    assert_trees_close(jax.jit(mean_loss(whole))(wide, batch()), gradients("llama")[0])


@pytest.mark.slow
def test_tied_model_equals_an_untied_one_with_the_same_matrix_twice() -> None:
    untied, params = FAMILIES["llama"], parameters("llama")
    tied = dataclasses.replace(untied, tie_embeddings=True)
    one = {name: x for name, x in params.items() if name != "lm_head"}
    assert tied.num_params() == sum(x.size for x in jax.tree.leaves(one))
    loss, slopes = jax.jit(jax.value_and_grad(mean_loss(tied)))(one, batch())
    two = {**params, "lm_head": params["embed"]}
    expected, parts = jax.jit(jax.value_and_grad(mean_loss(untied)))(two, batch())
    assert_trees_close(loss, expected)
    assert_trees_close(slopes["embed"], parts["embed"] + parts["lm_head"])


def test_sequence_longer_than_learned_positions_is_refused() -> None:
    inputs = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    with pytest.raises(
        ValueError,
        match=f"{T + 1} tokens; the model has {T} positions; raise model.max_seq_len",
    ):
        jax.eval_shape(apply(FAMILIES["gpt2"]), parameters("gpt2"), inputs)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (
            gpt2.Config,
            {"d_model": 33, "num_heads": 4},
            "model.d_model=33 does not divide by model.num_heads=4; nearest legal: 32",
        ),
        (
            llama.Config,
            {"num_heads": 4, "num_kv_heads": 3},
            "model.num_heads=4 does not divide by model.num_kv_heads=3",
        ),
        (llama.Config, {"head_dim": 7}, "model.head_dim=7 is odd"),
        (gpt2.Config, {"num_heads": 0}, "model.num_heads=0: give 1 or more"),
        (llama.Config, {"num_kv_heads": 0}, "model.num_kv_heads=0: give 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    cls: Any, values: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**values)
