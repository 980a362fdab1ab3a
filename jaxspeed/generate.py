# SPDX-License-Identifier: Apache-2.0
"""Writing and scoring text with the module that trains: a prefill, then a compiled loop, a token a pass.

    writer = Writer(program, params, end_ids=(2,))
    texts = writer.write([prompt_ids], SamplingConfig(max_new_tokens=64))

There is no second model: the passes are the module's own `hidden` under `ambient(cache=...)`
(`jaxspeed.cache`), on the mesh and with the ZeRO placements of training. Rows are split over the
batch axes; at stage 3 each layer is gathered as it is used. Prompts are padded on the left, so that
all rows write into the same slot. Not here: how a token is chosen (`jaxspeed.choice`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxspeed.ambient import Ambient, ambient, current
from jaxspeed.cache import Cache
from jaxspeed.choice import Knobs, Rule, choose, knobs_of, rule_of
from jaxspeed.config import BATCH_AXES, ConfigError, config_error
from jaxspeed.nn import Unstacked, unstack
from jaxspeed.ops.linear import dot
from jaxspeed.program import Program
from jaxspeed.sampling import SamplingConfig
from jaxspeed.sharding import (
    Placement,
    Weight,
    is_placement,
    is_weight,
    matrix_inputs,
)
from jaxspeed.step import (
    StepSpec,
    compute_weights,
    manual_axes,
    model_of,
    on_zero_axes,
)
from jaxspeed.tiles import Tiled, dot_tiled, tiled
from jaxspeed.types import (
    CausalLM,
    MaskedLM,
    Params,
    PyTree,
    Seq2Seq,
    output_bias,
)


STOP_EVERY = 16
"""Tokens between two looks for stop strings."""


class Text(NamedTuple):
    """What was written for one prompt (or for one of its samples)."""

    ids: Int[np.ndarray, " T"]
    """The new tokens, an end token included."""
    logprobs: Float[np.ndarray, " T"]
    """log p of each given those before it, in nats: the model's own, before temperature and filters."""
    ended: bool
    """Whether it ended by an end token or a stop string, not by its length."""


class Encoded(NamedTuple):
    """What the encoder of a sequence-to-sequence model reads, a row per prompt."""

    inputs: np.ndarray
    """Token ids (B, S), audio features (B, T, M) or pixels (B, H, W, C)."""
    segment_ids: Int[np.ndarray, "B S"] | None = None
    """1 where there is something, 0 on padding; None: nowhere padding."""


class Writer:
    """Writes text with a model's parameters. Compiled passes are kept per program."""

    def __init__(
        self, program: Program, params: Params, *, end_ids: Sequence[int] = ()
    ) -> None:
        """Prepares the parameters for writing: in the compute dtype, layer by layer.

        Args:
            program: of the model.
            params: its parameters, as they are trained.
            end_ids: tokens that end a text.

        Raises:
            ConfigError: the model is not one that writes.
        """
        model = model_of(program.spec, program.abstract_state["params"])
        decodes = isinstance(model, CausalLM) and not isinstance(model, MaskedLM)
        if not (decodes or isinstance(model, Seq2Seq)):
            raise ConfigError(
                f"model: a {type(model).__name__} does not write text; give a decoder, or an encoder-decoder"
            )
        self.program, self.params = program, params
        self.end_ids = tuple(sorted(set(map(int, end_ids))))
        self.weights = _make_weights(program)(params)

    def write(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: SamplingConfig,
        **how: Any,
    ) -> list[Text]:
        """Returns the texts, prompt by prompt, the samples of each together; `how` as for `stream`."""
        texts: list[Text] = []
        for texts in self.stream(prompts, sampling, **how):  # noqa: B007 - the last counts
            pass
        return texts

    def stream(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: SamplingConfig,
        *,
        encoded: Encoded | None = None,
        decode: Callable[[np.ndarray], str] | None = None,
        shift: bool = False,
        every: int = 0,
    ) -> Iterator[list[Text]]:
        """Yields all texts as far as they are written, at last whole.

        Args:
            prompts: token ids; of a sequence-to-sequence model its decoder's first ones.
            sampling: how to choose.
            encoded: what the encoder reads, a row per prompt.
            decode: ids to text, for stop strings.
            shift: where the model's positions are used up, go on with the latter half of the
                tokens as prompt; without it, that is an error before anything is written.
            every: tokens between two yields; 0: the end only (stop strings are looked for now
                and then).

        Raises:
            ConfigError: a prompt is empty, too long or holds what is no token of the model; the
                model keeps nothing between passes; or stop strings without `decode`.
        """
        limit = self._check(prompts, sampling, decode, shift)
        chunk = every or (STOP_EVERY if sampling.stop else sampling.max_new_tokens)
        rows = [np.asarray(p, np.int32) for p in prompts]
        copies = sampling.num_samples
        empty = Text(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
        said = [empty] * (len(rows) * copies)
        left = sampling.max_new_tokens
        while True:
            # The last token of a text has no successor, so it needs no position.
            room = min(left, limit + 1 - max(map(len, rows))) if limit else left
            ended = np.array([text.ended for text in said])
            session = _Session(
                self, rows, sampling, copies=copies, room=room, encoded=encoded,
                written=sampling.max_new_tokens - left, ended=ended,
            )  # fmt: skip
            while True:
                session.advance(min(chunk, room), ended)
                texts = [
                    _join(*pair) for pair in zip(said, session.texts(), strict=True)
                ]
                texts = [_until_stop(text, sampling.stop, decode) for text in texts]
                ended = np.array([text.ended for text in texts])
                full, whole = session.count >= room, ended.all()
                if whole or session.count >= left:
                    yield texts
                    return
                if every:
                    yield texts
                if full:
                    break
            rows = [
                np.concatenate([rows[i // copies], text.ids])[-(limit // 2) :]
                for i, text in enumerate(session.texts())
            ]
            if encoded is not None and copies > 1:
                again = functools.partial(np.repeat, repeats=copies, axis=0)
                encoded = jax.tree.map(again, encoded)
            said, copies, left = texts, 1, left - session.count

    def _check(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: SamplingConfig,
        decode: Callable[[np.ndarray], str] | None,
        shift: bool,
    ) -> int:
        """Returns the model's positions, 0 if it has no limit."""
        vocab = self.program.run.model.vocab_size
        limit = getattr(self.program.run.model, "max_seq_len", 0)
        if not len(prompts):
            raise ConfigError("prompt: there is none; give one or more")
        for ids in prompts:
            if not len(ids):
                raise ConfigError("prompt: it has no token; give at least one")
            odd = next((int(x) for x in ids if not 0 <= x < vocab), None)
            if odd is not None:
                why, change = "the model has no such token", f"give 0 to {vocab - 1}"
                raise config_error("prompt", odd, why, change)
            wanted = 1 if shift else sampling.max_new_tokens
            if limit and len(ids) + wanted - 1 > limit:
                why = f"with a prompt of {len(ids)} tokens the text does not fit the model's {limit} positions"
                change = (
                    f"give at most {limit + 1 - len(ids)}"
                    if len(ids) <= limit
                    else "shorten the prompt"
                )
                raise config_error(
                    "max_new_tokens", sampling.max_new_tokens, why, change
                )
        if sampling.stop and decode is None:
            raise ConfigError(
                "stop: stop strings are looked for in text; give a tokenizer, or end by token"
            )
        return limit


def token_logprobs(
    program: Program, params: Params, ids: Int[np.ndarray, " T"]
) -> Float[np.ndarray, " T-1"]:
    """Returns log p(ids[t] | ids[:t]) for every token but the first, in nats, by the forward pass that trains.

    Args:
        program: of the model.
        params: its parameters.
        ids: at least two, at most the model's longest sequence.

    Raises:
        ConfigError: there are too few or too many of them, or one is no token of the model.
    """
    vocab, longest = program.run.model.vocab_size, program.run.seq_len
    if not 2 <= len(ids) <= longest:
        raise config_error(
            "ids", len(ids), "that many tokens cannot be scored", f"give 2 to {longest}"
        )
    if min(ids) < 0 or max(ids) >= vocab:
        odd = next(int(x) for x in ids if not 0 <= x < vocab)
        raise config_error(
            "ids", odd, "the model has no such token", f"give ids from 0 to {vocab - 1}"
        )
    padded = np.zeros(min(longest, _rounded(len(ids))), np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_make_scorer(program)(params, padded))[: len(ids) - 1]


@functools.lru_cache(maxsize=4)
def _make_scorer(program: Program) -> Callable[..., jax.Array]:
    """Returns `(params, tokens (S,)) -> log p of each but the first, (S-1,)`, jitted."""
    spec = program.spec

    def local(params: Params, tokens: jax.Array) -> jax.Array:
        with ambient(spec.whole_rows):
            model = model_of(spec, compute_weights(spec, params))
            logits = _logits(model.hidden(tokens[None])[0], _head(model))
            logps = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(logps[:-1], tokens[1:, None], -1)[:, 0]

    return jax.jit(on_zero_axes(spec, local, (P(),), P()))


class _Head(NamedTuple):
    """What makes logits of hidden states."""

    embedding: Float[Array, "D V"] | Tiled
    """The output embedding as the products of a few rows read it fast, in the compute dtype."""
    bias: Float[Array, " V"] | None


def _head(model: Any) -> _Head:
    settings = current()
    table = model.output_embedding().astype(settings.compute).T
    tiles = _reads_tiles(settings)
    return _Head(tiled(table, 1) if tiles else table, output_bias(model))


def _logits(hidden: Float[Array, "B D"], head: _Head) -> Float[Array, "B V"]:
    hidden = hidden.astype(current().compute)
    if isinstance(head.embedding, Tiled):
        logits = dot_tiled(hidden, head.embedding)
    else:
        logits = dot(hidden, head.embedding, (1, 0))
    return logits if head.bias is None else logits + head.bias[None]


def _rounded(tokens: int) -> int:
    """Returns a length that many lengths share, so that few programs are compiled; in whole blocks of the kernels."""
    block = 16 if tokens <= 128 else 128
    return -(-tokens // block) * block


def _join(said: Text, new: Text) -> Text:
    return Text(
        np.concatenate([said.ids, new.ids]),
        np.concatenate([said.logprobs, new.logprobs]),
        said.ended or new.ended,
    )


def _until_stop(
    text: Text, stop: Sequence[str], decode: Callable[[np.ndarray], str] | None
) -> Text:
    """Returns the text up to the token that makes a stop string whole."""
    if not stop:
        return text
    assert decode is not None
    contains = lambda ids: any(s in decode(ids) for s in stop)
    if not contains(text.ids):
        return text
    low, high = 0, len(text.ids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if contains(text.ids[:middle]) else (middle, high)
    return Text(text.ids[:high], text.logprobs[:high], True)


class _Shape(NamedTuple):
    """What a compiled pass depends on, beside the program."""

    slots: int
    """For the tokens of prompt and text."""
    room: int
    """For the tokens of the text."""
    copies: int
    """Texts per prompt."""
    rule: Rule
    end_ids: tuple[int, ...]
    min_new: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rows:
    """The state between passes that each text has for itself: the first dim counts texts."""

    kept: PyTree
    """What the model keeps (`jaxspeed.cache`)."""
    first: Int[Array, " B"]
    """The slot of the prompt's first token."""
    tokens: Int[Array, "B R"]
    logprobs: Float[Array, "B R"]
    length: Int[Array, " B"]
    """Tokens written."""
    last: Int[Array, " B"]
    """The newest token, which the model has not read yet."""
    position: Int[Array, " B"]
    """Of that token."""
    done: Bool[Array, " B"]
    key: UInt32[Array, "B k"]
    """Of the draws."""
    seen: Bool[Array, "B V"] | None
    """Tokens that occurred, where the choice depends on them."""
    memory_segment_ids: Int[Array, "B M"] | None


class _Page(NamedTuple):
    """The state between passes, on the devices."""

    rows: Any
    """`_Rows`, split over the batch axes."""
    slot: Any
    """Where the newest token will lie."""
    count: Any
    """Tokens written into the longest row."""
    alive: Any
    """Whether any row, on any device, goes on."""


_PAGE = _Page(P(BATCH_AXES), P(), P(), P())
"""How a page lies on the ZeRO axes."""


class _Session:
    """One prefill and what is written after it."""

    def __init__(
        self,
        writer: Writer,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        *,
        copies: int,
        room: int,
        encoded: Encoded | None,
        written: int,
        ended: np.ndarray,
    ) -> None:
        """Reads the prompts and writes the first token.

        Args:
            writer: whose model.
            prompts: a row each.
            sampling: how to choose.
            copies: texts per prompt.
            room: tokens that may be written.
            encoded: what the encoder reads.
            written: tokens written in sessions before.
            ended: texts that have ended already.
        """
        self.writer, self.knobs, self.written = writer, knobs_of(sampling), written
        self._texts, self._room = len(ended), room
        if self._texts == 1 and writer.program.spec.settings.platform == "cpu":
            copies = (
                2  # one row costs more than two, and copies of the cache (jaxlib 0.10)
            )
        rows, lengths = _padded(prompts, writer.program.batch.shards)
        self._shape = _Shape(
            rows.shape[1] + _rounded(room), _rounded(room), copies, rule_of(sampling),
            writer.end_ids, max(0, sampling.min_new_tokens - written),
        )  # fmt: skip
        seeds = np.arange(len(rows) * copies, dtype=np.uint32)
        done = np.ones(len(rows) * copies, bool)
        done[: self._texts] = ended
        arrays = {"tokens": rows, "lengths": lengths, "done": done, "row": seeds}
        if encoded is not None:
            extra = len(rows) - len(prompts)
            arrays |= {
                name: np.concatenate([x, np.repeat(x[-1:], extra, 0)])
                for name, x in encoded._asdict().items()
                if x is not None
            }
        begin = _make_begin(writer.program, self._shape, tuple(sorted(arrays)))
        self._page, self._view = begin(
            writer.params,
            arrays,
            self.knobs,
            np.uint32(sampling.seed),
            np.int32(written),
        )

    @property
    def count(self) -> int:
        """Tokens written into the longest row."""
        return int(self._view.written)

    def advance(self, tokens: int, ended: np.ndarray) -> None:
        """Writes so many tokens more, fewer if all rows end; `ended` texts are left as they are."""
        until = min(self.count + tokens, self._room)
        stopped = np.ones(self._page.rows.done.shape, bool)
        stopped[: len(ended)] = ended
        advance = _make_advance(self.writer.program, self._shape)
        self._page, self._view = advance(
            self.writer.weights, self._page, stopped, np.int32(until), self.knobs,
            np.int32(self.written),
        )  # fmt: skip

    def texts(self) -> list[Text]:
        """Returns what is written so far."""
        view = jax.device_get(self._view)
        return [
            Text(view.tokens[i, :n], view.logprobs[i, :n], bool(view.done[i]))
            for i, n in enumerate(view.length[: self._texts].tolist())
        ]


class _View(NamedTuple):
    """The part of a page that the host reads."""

    tokens: Array
    logprobs: Array
    length: Array
    done: Array
    written: Array
    """Tokens in the longest row."""


def _padded(
    prompts: Sequence[np.ndarray], shards: int
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"]]:
    """Returns the prompts, padded on the left and with rows of one token to a multiple of the shards, and their lengths."""
    count = -(-len(prompts) // shards) * shards
    lengths = np.ones(count, np.int32)
    lengths[: len(prompts)] = [len(ids) for ids in prompts]
    rows = np.zeros((count, _rounded(int(lengths.max()))), np.int32)
    for row, ids in zip(rows, prompts, strict=False):
        row[-len(ids) :] = ids
    return rows, lengths


@functools.lru_cache(maxsize=4)
def _make_weights(program: Program) -> Callable[[Params], PyTree]:
    """Returns the jitted function from parameters to what the passes read, made once a text.

    Each is in the compute dtype, taken apart by layer, and lies where the ZeRO stage has its
    compute copy: whole, or at stage 3 this device's shard. A CPU's matrices are in tiles.
    """
    spec = program.spec

    def copies(weight: Any) -> Any:
        if isinstance(weight, Unstacked):
            return Unstacked(tuple(map(copies, weight.layers)))
        copy = weight.copy.astype(spec.settings.compute)
        inputs = _tile_inputs(spec, weight.placement)
        return tiled(copy, inputs) if inputs else copy

    def local(params: Params) -> PyTree:
        apart = unstack(compute_weights(spec, params))
        whole = lambda x: is_weight(x) or isinstance(x, Unstacked)
        return jax.tree.map(copies, apart, is_leaf=whole)

    return jax.jit(on_zero_axes(spec, local, (), _weight_specs(spec)))


def _weight_specs(spec: StepSpec) -> PyTree:
    def one(place: Placement) -> Any:
        if _tile_inputs(spec, place):
            return Unstacked((P(),) * place.shape[0])
        whole = place.spec("compute", manual_only=True)
        return Unstacked((P(*whole[1:]),) * place.shape[0]) if place.stacked else whole

    return jax.tree.map(one, spec.placements, is_leaf=is_placement)


def _tile_inputs(spec: StepSpec, place: Placement) -> int:
    """Returns how many dims a product with this parameter sums over, if it is to be in tiles; else 0.

    It is where it is a layer's matrix that a CPU has whole, and has no adapter.
    """
    whole = place.zero_dim is None or "compute" not in place.sharded
    if not (_reads_tiles(spec.settings) and whole and place.stacked) or spec.lora.rank:
        return 0
    return matrix_inputs(place.dims)


def _reads_tiles(settings: Ambient) -> bool:
    """Whether products of a few rows are faster with matrices in tiles."""
    return settings.platform == "cpu" and settings.tensor == 1


def _as_weights(spec: StepSpec, copies: PyTree) -> PyTree:
    """Returns the `Weight`s again of the copies that `_make_weights` made."""

    def one(place: Placement, copy: Any) -> Any:
        if isinstance(copy, Unstacked):
            return Unstacked(tuple(one(place, layer) for layer in copy.layers))
        if isinstance(copy, Tiled):
            return copy
        return Weight(copy, None, place, spec.reduce_dtype)

    return jax.tree.map(one, spec.placements, copies, is_leaf=is_placement)


@functools.lru_cache(maxsize=16)
def _make_begin(
    program: Program, shape: _Shape, names: tuple[str, ...]
) -> Callable[..., tuple[_Page, _View]]:
    """Returns the jitted prefill, `(params, arrays, knobs, seed, written) -> (page, view)`."""
    spec = program.spec

    def local(
        params: Params,
        arrays: dict[str, Array],
        knobs: Knobs,
        seed: Array,
        written: Array,
    ) -> _Page:
        tokens, lengths = arrays["tokens"], arrays["lengths"]
        B, length = tokens.shape
        slots = jnp.arange(length)[None]
        first = length - lengths
        real = slots >= first[:, None]
        room = [(0, 0), (0, shape.slots - length)]
        cache = Cache(shape.slots, jnp.pad(real, room))
        with ambient(spec.whole_rows):
            model = model_of(spec, compute_weights(spec, params))
            memory = {}
            if "inputs" in arrays:
                segments = arrays.get("segment_ids")
                memory["memory"] = model.encode(arrays["inputs"], segments)
                memory["memory_segment_ids"] = segments
            with ambient(cache=cache):
                positions = jnp.maximum(slots - first[:, None], 0)
                hidden = model.hidden(
                    tokens, positions, real.astype(jnp.int32), **memory
                )
            logits = _logits(hidden[:, -1], _head(model))
        if not jax.tree.leaves(cache.kept):
            raise ConfigError(
                "the model keeps nothing from one token to the next, so it cannot write; "
                "let its layers be of jaxspeed.ops (attention, recurrence) or use jaxspeed.cache"
            )
        seen = None
        if shape.rule.penalised:
            numbers = jnp.arange(B)[:, None]
            seen = jnp.zeros(logits.shape, bool).at[numbers, tokens].max(real)
        each = lambda x: jnp.repeat(x, shape.copies, axis=0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), arrays["row"]
        )
        texts = B * shape.copies
        rows = _Rows(
            kept=jax.tree.map(each, cache.kept),
            first=each(first),
            tokens=jnp.zeros((texts, shape.room), jnp.int32),
            logprobs=jnp.zeros((texts, shape.room), jnp.float32),
            length=jnp.zeros(texts, jnp.int32),
            last=jnp.zeros(texts, jnp.int32),
            position=each(lengths) - 1,
            done=arrays["done"],
            key=jax.random.key_data(keys),
            seen=None if seen is None else each(seen),
            memory_segment_ids=None
            if "segment_ids" not in arrays
            else each(arrays["segment_ids"]),
        )
        page = _Page(rows, jnp.int32(length - 1), jnp.int32(0), jnp.bool_(True))
        return _append(page, each(logits), shape, knobs, written)

    arrays = dict.fromkeys(names, P(BATCH_AXES))
    run = on_zero_axes(spec, local, (arrays, P(), P(), P()), _PAGE)
    return _viewed(program, run, donate=())


@functools.lru_cache(maxsize=16)
def _make_advance(
    program: Program, shape: _Shape
) -> Callable[..., tuple[_Page, _View]]:
    """Returns the jitted loop, `(weights, page, stopped, until, knobs, written) -> (page, view)`."""
    spec = program.spec

    def local(
        weights: PyTree,
        page: _Page,
        stopped: Array,
        until: Array,
        knobs: Knobs,
        written: Array,
    ) -> _Page:
        def one(page: _Page) -> _Page:
            rows, slots = page.rows, jnp.arange(shape.slots)[None]
            visible = (slots <= page.slot) & (slots >= rows.first[:, None])
            cache = Cache(shape.slots, visible, page.slot, rows.kept)
            with ambient(spec.whole_rows):
                model = model_of(spec, _as_weights(spec, weights))
                memory: dict[str, Any] = {}
                if isinstance(model, Seq2Seq):
                    segments = rows.memory_segment_ids
                    memory = {"memory": None, "memory_segment_ids": segments}
                with ambient(cache=cache):
                    hidden = model.hidden(
                        rows.last[:, None], rows.position[:, None], None, **memory
                    )
                logits = _logits(hidden[:, 0], head)
            rows = dataclasses.replace(rows, kept=cache.kept)
            return _append(page._replace(rows=rows), logits, shape, knobs, written)

        # Once for all passes: turned on a CPU, gathered at stage 3.
        with ambient(spec.whole_rows):
            head = _head(model_of(spec, _as_weights(spec, weights)))
        done = page.rows.done | stopped
        rows = dataclasses.replace(page.rows, done=done)
        goes_on = lambda page: page.alive & (page.count < until)
        page = page._replace(rows=rows, alive=_any(~done))
        return jax.lax.while_loop(goes_on, one, page)

    run = jax.shard_map(
        local,
        mesh=spec.mesh,
        in_specs=(_weight_specs(spec), _PAGE, P(BATCH_AXES), P(), P(), P()),
        out_specs=_PAGE,
        axis_names=manual_axes(spec.mesh),
        check_vma=False,
    )
    return _viewed(program, run, donate=(1,))


def _viewed(
    program: Program, run: Callable[..., _Page], donate: tuple[int, ...]
) -> Callable[..., tuple[_Page, _View]]:
    """Returns the function jitted, with what the host reads of the page beside it, on every process."""
    whole = NamedSharding(program.mesh, P())

    def both(*args: Any) -> tuple[_Page, _View]:
        page = run(*args)
        rows = page.rows
        return page, _View(
            rows.tokens, rows.logprobs, rows.length, rows.done, page.count
        )

    return jax.jit(both, donate_argnums=donate, out_shardings=(None, whole))


def _append(
    page: _Page,
    logits: Float[Array, "B V"],
    shape: _Shape,
    knobs: Knobs,
    written: Int[Array, ""],
) -> _Page:
    """Returns the page with the next token of each row that goes on."""
    rows, number = page.rows, written + page.count
    logps = jax.nn.log_softmax(logits, -1)
    if shape.min_new and shape.end_ids:
        early = jnp.where(page.count < shape.min_new, -jnp.inf, 0.0)
        logits = logits.at[:, jnp.array(shape.end_ids)].add(early)
    keys = jax.random.wrap_key_data(rows.key)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    goes_on = ~rows.done
    token = jnp.where(goes_on, choose(logits, keys, shape.rule, knobs, rows.seen), 0)
    chosen = jnp.take_along_axis(logps, token[:, None], -1)[:, 0]

    def put(buffer: Array, column: Array) -> Array:
        column = column[:, None]
        return jax.lax.dynamic_update_slice_in_dim(buffer, column, page.count, 1)

    done, seen = rows.done, rows.seen
    for end in shape.end_ids:
        done |= goes_on & (token == end)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].max(goes_on)
    rows = dataclasses.replace(
        rows,
        tokens=put(rows.tokens, token),
        logprobs=put(rows.logprobs, jnp.where(goes_on, chosen, 0.0)),
        length=rows.length + goes_on,
        last=token,
        position=rows.position + goes_on,
        done=done,
        seen=seen,
    )
    return _Page(rows, page.slot + 1, page.count + 1, _any(~done))


def _any(flags: Bool[Array, " B"]) -> Bool[Array, ""]:
    """Returns whether any is true, on any device."""
    return jax.lax.psum(jnp.any(flags).astype(jnp.int32), BATCH_AXES) > 0
