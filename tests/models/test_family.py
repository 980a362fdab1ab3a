# SPDX-License-Identifier: Apache-2.0
"""Laws that every model family obeys, at a tiny size; a new family gets them by an entry in `zoo.py`."""

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
from jaxspeed.cache import Cache
from jaxspeed.config import REMAT_POLICIES
from tests.models.zoo import NAMED, ZOO, D, Kind, L, T, V, members


B = 2

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
    "gates",
    "router",
    "state",
    "patch",
    "labels",
}

by_member = pytest.mark.parametrize("name", members(variants=True))
by_family = pytest.mark.parametrize("name", members())


def by_kind(*kinds: Kind, also: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [*members(*kinds), *also])


WINDOWS = ("llama, windows",)
"""A variant whose attention differs from layer to layer."""


WITHOUT_TILES = ("lstm", "mixtral")
"""Families without an MLP that goes token by token: a mixture's tokens compete for room."""


@functools.cache
def initialiser(name: str) -> Callable[[jax.Array], Any]:
    return jax.jit(lambda key: nn.initialise(lambda: ZOO[name].cfg.build(nn.rngs(key))))


@functools.cache
def init(name: str, seed: int = 0) -> Any:
    return initialiser(name)(jax.random.key(seed))


@functools.cache
def abstract(cfg: Any) -> tuple[Any, Any, Any]:
    return nn.abstract(lambda: cfg.build(nn.rngs(jax.random.key(0))))


@functools.cache
def parameters(name: str) -> Any:
    """Returns parameters in which biases and norms matter, as they do after training."""
    leaves, treedef = jax.tree.flatten(init(name))
    rng = np.random.default_rng(0)
    noisy = [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


@functools.cache
def batch(name: str) -> dict[str, jax.Array]:
    made = ZOO[name].batch(np.random.default_rng(1), B)
    return {k: jnp.asarray(x) for k, x in made.items()}


def mean_loss(name: str, cfg: Any = None, **settings: Any) -> Callable[..., jax.Array]:
    """Returns `(params, batch) -> mean loss` with ambient settings inside, as the step has them."""
    graphdef = abstract(cfg or ZOO[name].cfg)[0]

    def loss(params: Any, batch: Any) -> jax.Array:
        with ambient(**settings):
            sums = ZOO[name].loss(nn.merge(graphdef, params), batch)
        return sums.total / sums.count

    return loss


@functools.cache
def loss_and_slopes(name: str) -> Callable[..., tuple[jax.Array, Any]]:
    return jax.jit(jax.value_and_grad(mean_loss(name)))


@functools.cache
def gradients(name: str) -> Any:
    return loss_and_slopes(name)(parameters(name), batch(name))


def states(name: str, model: Any, memory: Any, *args: Any) -> jax.Array:
    """Returns a decoder's hidden states, on what an encoder gave if there is one."""
    if ZOO[name].kind != "seq2seq":
        return model.hidden(*args)
    encoded, segments = memory
    return model.hidden(*args, memory=encoded, memory_segment_ids=segments)


@functools.cache
def memory(name: str, rows: int = T) -> Any:
    """Returns what the encoder makes of one input, and which of it counts, for each row."""
    if ZOO[name].kind != "seq2seq":
        return None
    inputs, segments = (batch(name).get(k) for k in ("inputs", "segment_ids"))
    model = nn.merge(abstract(ZOO[name].cfg)[0], parameters(name))
    repeat = lambda x: None if x is None else jnp.repeat(x[:1], rows, axis=0)
    return repeat(model.encode(inputs, segments)), repeat(segments)


@functools.cache
def hidden(name: str) -> Callable[..., jax.Array]:
    """Returns `(tokens, positions, segment_ids) -> hidden states`; of one shape, (T, T), to compile once."""

    @jax.jit
    def run(params: Any, memory: Any, *args: jax.Array) -> jax.Array:
        return states(name, nn.merge(abstract(ZOO[name].cfg)[0], params), memory, *args)

    return lambda *args: run(parameters(name), memory(name), *args)


@functools.cache
def written(name: str) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns a pass of a model that writes: the next tokens' hidden states, and what it keeps."""

    @jax.jit
    def run(
        params: Any, memory: Any, visible: Any, start: Any, before: Any, *args: Any
    ) -> Any:
        model = nn.merge(abstract(ZOO[name].cfg)[0], params)
        cache = Cache(visible.shape[1], visible, start, before)
        with ambient(cache=cache):
            return states(name, model, memory, *args), cache.kept

    return lambda *args: run(parameters(name), memory(name), *args)


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (T, T), np.int32)


POSITIONS = np.tile(np.arange(T, dtype=np.int32), (T, 1))
ONES = np.ones((T, T), np.int32)


def assert_trees_close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        ours,
        theirs,
    )


@by_kind("decoder", "recurrent")
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_shapes_and_dtypes(name: str, activations: str) -> None:
    cfg, dtype = ZOO[name].cfg, jnp.dtype(activations)
    graphdef, params, _ = abstract(cfg)

    def shape_of(method: str, *args: Any) -> Any:
        def run(params: Any, *args: Any) -> Any:
            with ambient(compute=jnp.bfloat16, activations=dtype):
                return getattr(nn.merge(graphdef, params), method)(*args)

        return jax.eval_shape(run, params, *args)

    inputs = jax.ShapeDtypeStruct((B, T), jnp.int32)
    logits, last = shape_of("__call__", inputs), shape_of("hidden", inputs)
    assert (logits.shape, logits.dtype) == ((B, T, V), dtype)
    assert (last.shape, last.dtype) == ((B, T, D), dtype)
    assert shape_of("output_embedding").shape == (V, D)


@by_kind("decoder", "recurrent", "seq2seq", also=WINDOWS)
def test_hidden_depends_on_just_the_tokens_so_far(name: str) -> None:
    base = np.repeat(tokens()[:1], T, axis=0)
    changed = base + np.eye(T, dtype=np.int32) * (1 - 2 * (base == V - 1))
    run = hidden(name)
    differs = np.any(
        run(base, POSITIONS, ONES) != run(changed, POSITIONS, ONES), axis=-1
    )
    np.testing.assert_array_equal(differs, np.triu(np.ones((T, T), bool)))


@by_kind("decoder", "recurrent", "encoder", also=WINDOWS)
def test_packed_documents_equal_separate_ones(name: str) -> None:
    run, inputs = hidden(name), tokens()
    positions = np.tile(np.array([*range(6), *range(7), *range(3)], np.int32), (T, 1))
    segments = np.tile(np.array([1] * 6 + [2] * 7 + [0] * 3, np.int32), (T, 1))
    packed = run(inputs, positions, segments)
    for begin, end in ((0, 6), (6, 13)):
        length = end - begin
        first = (POSITIONS < length).astype(np.int32)
        alone = run(np.roll(inputs, -begin, axis=1), POSITIONS, first)
        assert_trees_close(packed[:, begin:end], alone[:, :length])


@by_kind("seq2seq")
def test_packed_pairs_equal_separate_ones(name: str) -> None:
    given, graphdef = batch(name), abstract(ZOO[name].cfg)[0]
    if "segment_ids" not in given:
        pytest.skip("a row of its source is one thing")
    length = given["segment_ids"].shape[1]
    inputs, ids = np.asarray(given["inputs"]), tokens()[:B, :length]
    each, places = inputs.shape[1] // length, POSITIONS[:B, :length]

    @jax.jit
    def encoded_and_read(
        params: Any, inputs: Any, segments: Any, *args: jax.Array
    ) -> jax.Array:
        model = nn.merge(graphdef, params)
        given = {"memory": model.encode(inputs, segments)}
        return model.hidden(*args, **given, memory_segment_ids=segments)

    run = functools.partial(encoded_and_read, parameters(name))
    source, target = (0, 4, 9), (0, 5, 8)
    segments, decoder_segments = (
        sum((places >= cut).astype(np.int32) for cut in cuts[:2]) * (places < cuts[2])
        for cuts in (source, target)
    )
    positions = np.where(decoder_segments == 2, places - target[1], places)
    packed = run(inputs, segments, ids, positions, decoder_segments)
    for part in (0, 1):
        alone = run(
            np.roll(inputs, -source[part] * each, axis=1),
            (places < source[part + 1] - source[part]).astype(np.int32),
            np.roll(ids, -target[part], axis=1),
            places,
            np.ones_like(ids),
        )
        size = target[part + 1] - target[part]
        assert_trees_close(
            packed[:, target[part] : target[part + 1]], alone[:, :size], 2e-5
        )


@by_kind("decoder", "encoder")
def test_positions_count_from_zero_by_default(name: str) -> None:
    graphdef, inputs = abstract(ZOO[name].cfg)[0], tokens()
    run = jax.jit(lambda params, inputs: nn.merge(graphdef, params).hidden(inputs))
    default = run(parameters(name), inputs)
    assert_trees_close(default, hidden(name)(inputs, POSITIONS, ONES))
    other = hidden(name)(inputs, POSITIONS[:, ::-1], ONES)
    assert np.abs(default - other).max() > 1e-3


@by_kind("decoder", "recurrent", "seq2seq", also=WINDOWS)
@pytest.mark.parametrize("prompt", [1, 7])
def test_model_that_writes_has_the_hidden_states_of_one_that_reads(
    name: str, prompt: int
) -> None:
    """Rows begin behind 0, 1, 2 ... tokens of padding; the prompt is one pass, then each token is."""
    padding = (np.arange(T) % prompt)[:, None].astype(np.int32)
    inputs, visible = tokens(), POSITIONS >= padding
    positions = np.maximum(POSITIONS - padding, 0)
    got, before = [], None
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, T))]:
        part = slice(begin, end)
        so_far = visible & (POSITIONS < end)
        start = None if before is None else np.int32(begin)
        segments = visible[:, part].astype(np.int32)
        args = (inputs[:, part], positions[:, part], segments)
        last, before = written(name)(so_far, start, before, *args)
        got.append(last)
    whole = np.concatenate(got, axis=1)
    moved = np.take_along_axis(inputs, (POSITIONS + padding) % T, axis=1)
    alone = hidden(name)(moved, POSITIONS, ONES)
    for row, pad in enumerate(padding[:, 0]):
        assert_trees_close(whole[row, pad:], alone[row, : T - pad], tolerance=2e-5)


@by_member
def test_padding_does_not_matter(name: str) -> None:
    given = batch(name)
    padding = given.get("segment_ids", np.ones(1)) == 0
    if not padding.any() or given["inputs"].ndim != 2:
        pytest.skip("its batches have no padding")
    other = {**given, "inputs": jnp.where(padding, V - 1, given["inputs"])}
    assert_trees_close(loss_and_slopes(name)(parameters(name), other), gradients(name))


@by_member
def test_jit_equals_no_jit(name: str) -> None:
    assert_trees_close(
        mean_loss(name)(parameters(name), batch(name)), gradients(name)[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        (name, policy)
        for name in members()
        for policy in REMAT_POLICIES
        if policy == "full" or (policy != "none" and name in ("gpt2", "llama"))
    ],
)
def test_rematerialisation_changes_neither_loss_nor_gradients(
    name: str, policy: str
) -> None:
    step = jax.jit(jax.value_and_grad(mean_loss(name, remat=policy)))
    assert_trees_close(step(parameters(name), batch(name)), gradients(name))


@by_family
def test_tiles_change_neither_loss_nor_gradients(name: str) -> None:
    definition, _, _ = nn.abstract(
        lambda: ZOO[name].cfg.build(nn.rngs(jax.random.key(0)))
    )
    if not nn.goes_in_tiles(definition):
        assert name in WITHOUT_TILES
        return
    step = jax.jit(jax.value_and_grad(mean_loss(name, mlp_tiles=3)))
    assert_trees_close(step(parameters(name), batch(name)), gradients(name))


@pytest.mark.parametrize("name", [*members(), *WINDOWS])
def test_scanned_layers_equal_a_loop_over_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looped(self: nn.Layers, x: jax.Array, *args: Any, each: Any = ()) -> jax.Array:
        definition, weights = nnx.split(self.block)
        for i in range(self.num_layers):
            own, more = jax.tree.map(lambda w, i=i: w[i], (weights, each))
            x = nnx.merge(definition, own)(x, *args, *more)
        return x

    scanned = gradients(name)
    monkeypatch.setattr(nn.Layers, "__call__", looped)
    step = jax.jit(jax.value_and_grad(mean_loss(name)))
    assert_trees_close(step(parameters(name), batch(name)), scanned)


@by_member
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_backward_pass_is_traced_with_the_settings_of_the_forward_pass(
    name: str, platform: str
) -> None:
    settings = {"compute": jnp.bfloat16, "platform": platform, "attention": "xla"}
    args = (parameters(name), batch(name))
    inside = jax.make_jaxpr(jax.grad(mean_loss(name, **settings)))(*args)
    with ambient(**settings):
        around = jax.make_jaxpr(jax.grad(mean_loss(name, **settings)))(*args)
    inside, around = (
        re.sub(r"0x[0-9a-f]+", "", str(program)) for program in (inside, around)
    )
    assert inside == around


@pytest.mark.slow
@by_family
def test_low_precision_loss_and_gradients_are_close(name: str) -> None:
    step = jax.jit(jax.value_and_grad(mean_loss(name, compute=jnp.bfloat16)))
    value, slopes = step(parameters(name), batch(name))
    exact, exact_slopes = gradients(name)
    assert float(value) == pytest.approx(float(exact), rel=1e-2)
    norm = lambda tree: math.sqrt(
        sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(tree))
    )
    # T5's scores are not scaled down, so more of their rounding gets through; where OPT's small
    # sums are rounded to the other side of 0, the slope of its ReLU jumps.
    share = {"t5": 0.05, "opt": 0.08}.get(name, 0.03)
    assert norm(jax.tree.map(np.subtract, slopes, exact_slopes)) < share * norm(
        exact_slopes
    )
    assert {x.dtype for x in jax.tree.leaves(slopes)} == {jnp.dtype("float32")}


@by_member
def test_forward_and_gradient_pass_under_strict_promotion(name: str) -> None:
    for compute, activations in (
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
    ):
        loss = mean_loss(name, compute=compute, activations=activations)
        with jax.numpy_dtype_promotion("strict"):
            value, slopes = jax.eval_shape(
                jax.value_and_grad(loss), parameters(name), batch(name)
            )
        assert value.dtype == jnp.float32
        assert {x.dtype for x in jax.tree.leaves(slopes)} == {jnp.dtype("float32")}


@by_member
def test_num_params_equals_the_real_tree(name: str) -> None:
    cfg = ZOO[name].cfg
    _, params, _ = abstract(cfg)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert sum(x.size for x in jax.tree.leaves(params)) == cfg.num_params()


@pytest.mark.parametrize("size", list(NAMED))
def test_named_size_has_its_published_number_of_parameters(size: str) -> None:
    cfg, published = NAMED[size]
    _, params, _ = abstract(cfg)
    assert (
        sum(math.prod(p.shape) for p in jax.tree.leaves(params))
        == cfg.num_params()
        == published
    )


@by_member
def test_abstract_model_has_shapes_and_no_arrays(name: str) -> None:
    member = ZOO[name]
    big = dataclasses.replace(member.cfg, **member.large)
    before = len(jax.live_arrays())
    _, params, dims = nn.abstract(lambda: big.build(nn.rngs(jax.random.key(0))))
    assert {type(p) for p in jax.tree.leaves(params)} == {jax.ShapeDtypeStruct}
    # The key is the one array that was made.
    assert len(jax.live_arrays()) <= before + 1
    assert sum(x.size for x in jax.tree.leaves(params)) > 100 * member.cfg.num_params()
    names = jax.tree.map(lambda p, d: d, params, dims)
    assert jax.tree.structure(
        names, is_leaf=lambda x: isinstance(x, tuple)
    ) == jax.tree.structure(params)


@by_member
def test_every_parameter_names_its_dims(name: str) -> None:
    _, params, dims = abstract(ZOO[name].cfg)
    named = jax.tree.map(lambda p, d: (p.shape, d), params, dims)
    flat = jax.tree_util.tree_leaves_with_path(
        named, is_leaf=lambda x: isinstance(x, tuple)
    )
    for path, (shape, names) in flat:
        assert len(shape) == len(names), path
        assert set(names) <= LOGICAL_DIMS, path
        stacked = "block" in [key.key for key in path]
        assert (names[0] == "layers") == stacked, path
        assert shape[0] == L or not stacked, path


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


@by_kind("decoder", "recurrent", "encoder")
@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_flops_per_token_counts_the_products_of_a_step(name: str, kernel: str) -> None:
    member = ZOO[name]
    if hasattr(member.cfg, "num_experts"):
        pytest.skip("who has how many tokens is not known before: see test_mixtral.py")
    step = jax.grad(mean_loss(name, attention=kernel))
    jaxpr = jax.make_jaxpr(step)(parameters(name), batch(name)).jaxpr
    # Of the scores the formula counts the causal half.
    seen = 1.0 if member.kind == "encoder" else 0.5
    counted = dot_flops(jaxpr, attention=False)
    counted += dot_flops(jaxpr, attention=True) * seen
    # The CPU's own kernel computes the scores twice.
    close = {"auto": 0.02, "xla": 0.01}[kernel]
    assert counted / (B * T) == pytest.approx(member.cfg.flops_per_token(T), rel=close)


@pytest.mark.parametrize("size", [n for n in NAMED if "MiniLM" not in n])  # no head
def test_flops_per_token_is_about_six_per_parameter_and_grows_with_the_sequence(
    size: str,
) -> None:
    cfg, published = NAMED[size]
    if hasattr(cfg, "feature_shape"):
        pytest.skip("its source has a length of its own")
    if hasattr(cfg, "num_experts"):  # a token does not see all of them
        published += cfg.num_layers * (cfg.active_weights() - cfg.block_weights())
    assert 0.75 * 6 * published < cfg.flops_per_token(1) < 1.05 * 6 * published
    assert cfg.flops_per_token(2048) > cfg.flops_per_token(1024) > 0


@pytest.mark.slow
@by_family
def test_dropout_is_off_without_a_key_and_changes_with_it(name: str) -> None:
    cfg = dataclasses.replace(ZOO[name].cfg, dropout=0.3)

    @jax.jit
    def loss(key: Any) -> jax.Array:
        return mean_loss(name, cfg, dropout_key=key)(parameters(name), batch(name))

    first, again, second = (float(loss(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again
    assert len({first, second, float(loss(None))}) == 3
    assert float(loss(None)) == pytest.approx(float(gradients(name)[0]), rel=1e-5)


@by_family
def test_initial_parameters_have_the_published_spread(name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(init(name)):
        layers = np.asarray(leaf).reshape(leaf.shape[0], -1)
        last = path[-1].key
        if last.startswith("b"):
            assert not np.any(leaf), path
        elif last.endswith("scale"):
            assert np.all(leaf == 1), path
        else:
            std = ZOO[name].stds.get(last, 0.02)
            if std is None:
                continue
            # Of few numbers the spread says less.
            close = max(0.1, 2 / math.sqrt(leaf.size))
            assert np.std(leaf) == pytest.approx(std, rel=close), path
            assert abs(np.mean(leaf)) < 1.5 * close * std, path
            assert len(np.unique(layers[:, 0])) == len(layers), path


@by_member
def test_initial_loss_is_that_of_a_uniform_guess(name: str) -> None:
    expected = ZOO[name].initial_loss
    if expected is None:
        pytest.skip("its parameters begin with an opinion")
    loss, _ = loss_and_slopes(name)(init(name), batch(name))
    assert float(loss) == pytest.approx(expected, rel=0.04)


@by_family
def test_seed_decides_the_parameters(name: str) -> None:
    first, again, other = (
        jax.tree.leaves(initialiser(name)(jax.random.key(seed))) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any(np.any(a != b) for a, b in zip(first, other, strict=True))
