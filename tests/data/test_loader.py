# SPDX-License-Identifier: Apache-2.0
"""The pipeline: same order always, on any number of processes, from any checkpoint."""

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxspeed.config import ConfigError, DataConfig
from jaxspeed.data import (
    ByteTokenizer,
    Corpus,
    EvalSet,
    Tokenizer,
    build_tokenizer,
    open_corpus,
    train_iterator,
)


Batch = dict[str, np.ndarray]
MakeConfig = Callable[..., DataConfig]
Train = Callable[..., grain.DatasetIterator]

LAYOUTS = ("bytes", "bpe", "mixture", "in order")


def write(path: Path, count: int, letter: str, size: int) -> str:
    """Writes documents that tell who they are: `letter`, their number, and filling."""
    texts = [f"{letter}{n:03}:{letter * (1 + n * size // count)}" for n in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def setup(tmp_path: Path, make_config: MakeConfig) -> Callable[..., Any]:
    """Returns `setup(layout, **fields) -> (cfg, corpus, tokenizer)`."""

    def build(layout: str = "bytes", **fields: object) -> Any:
        paths = [write(tmp_path / "a.jsonl", 300, "a", 60)]
        if layout == "mixture":
            paths.append(write(tmp_path / "b.jsonl", 150, "b", 300))
            fields = {"weights": (1.0, 3.0)} | fields
        fields = {
            "tokenizer": "bpe" if layout == "bpe" else "byte",
            "shuffle": layout != "in order",
        } | fields
        cfg = make_config(*paths, **fields)
        corpus = open_corpus(cfg)
        tokenizer = build_tokenizer(cfg, corpus.train, vocab_size=300, workdir=tmp_path)
        return cfg, corpus, tokenizer

    return build


@pytest.fixture
def train() -> Iterator[Train]:
    """Returns `train(cfg, corpus, tokenizer, **changes)`; closes what it gave."""
    given = []

    def build(
        cfg: DataConfig, corpus: Corpus, tokenizer: Tokenizer, **changes: Any
    ) -> grain.DatasetIterator:
        shape: Any = {"seq_len": 16, "global_batch_size": 4, "seed": 7} | changes
        iterator = train_iterator(cfg, corpus, tokenizer, **shape)
        given.append(iterator)
        return iterator

    yield build
    for iterator in given:
        iterator.close()


def take(iterator: grain.DatasetIterator, count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def documents_of(batches: list[Batch]) -> list[str]:
    """Returns the documents that end in these batches of bytes, in order."""
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
    ends = np.flatnonzero(targets == 256)
    parts = np.split(targets, ends + 1)[:-1]
    return [ByteTokenizer().decode(part) for part in parts]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_seed_gives_the_same_batches(
    setup: Callable[..., Any], train: Train, layout: str
) -> None:
    parts = setup(layout)
    assert_equal(take(train(*parts), 30), take(train(*parts), 30))


def test_seed_and_epoch_change_the_order(
    setup: Callable[..., Any], train: Train
) -> None:
    parts = setup()
    count = len(parts[1].train[0])
    first = documents_of(take(train(*parts, seq_len=512), 12))
    other = documents_of(take(train(*parts, seq_len=512, seed=8), 6))
    orders = [first[:count], first[count : 2 * count], other[:count]]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("layout", ["bytes", "in order"])
def test_an_epoch_has_each_training_document_once(
    setup: Callable[..., Any], train: Train, texts: Any, layout: str
) -> None:
    parts = setup(layout)
    wanted = texts(parts[1].train[0])
    seen = documents_of(take(train(*parts, seq_len=512), 6))[: len(wanted)]
    assert (seen if layout == "in order" else sorted(seen)) == wanted
    assert not set(seen) & set(texts(parts[1].held_out[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", [2, 4])
def test_process_count_does_not_change_the_global_batch(
    setup: Callable[..., Any], train: Train, layout: str, processes: int
) -> None:
    parts = setup(layout)
    whole = take(train(*parts), 12)
    shares = [
        take(train(*parts, process_index=index, process_count=processes), 12)
        for index in range(processes)
    ]
    joined = [
        {name: np.concatenate([share[name] for share in batch]) for name in batch[0]}
        for batch in zip(*shares, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stop", [0, 1, 5, 23])
def test_resuming_equals_not_having_stopped(
    setup: Callable[..., Any], train: Train, layout: str, stop: int
) -> None:
    parts = setup(layout)
    uninterrupted = take(train(*parts), 40)
    first = train(*parts)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    second = train(*setup(layout))
    take(second, 3)
    second.set_state(state)
    assert_equal(take(second, 40 - stop), uninterrupted[stop:])


def test_state_is_that_of_the_batch_taken_not_of_those_prefetched(
    setup: Callable[..., Any], train: Train
) -> None:
    slow = train(*setup(prefetch=1))
    eager = train(*setup(prefetch=16))
    for _ in range(5):
        take(slow, 3)
        take(eager, 3)
        assert slow.get_state() == eager.get_state()


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 4])
def test_resuming_on_another_number_of_processes_is_exact(
    setup: Callable[..., Any], train: Train, before: int, after: int
) -> None:
    parts = setup("mixture")
    uninterrupted = take(train(*parts), 20)
    states = []
    for index in range(before):
        iterator = train(*parts, process_index=index, process_count=before)
        take(iterator, 9)
        states.append(iterator.get_state())
    assert all(state == states[0] for state in states)
    shares = []
    for index in range(after):
        iterator = train(*parts, process_index=index, process_count=after)
        iterator.set_state(copy.deepcopy(states[0]))
        shares.append(take(iterator, 11))
    joined = [
        {name: np.concatenate([share[name] for share in batch]) for name in batch[0]}
        for batch in zip(*shares, strict=True)
    ]
    assert_equal(joined, uninterrupted[9:])


def test_resuming_with_another_batch_goes_on_with_the_next_token(
    setup: Callable[..., Any], train: Train
) -> None:
    parts = setup()
    first = train(*parts)
    take(first, 7)
    second = train(*parts, seq_len=32, global_batch_size=6)
    second.set_state(first.get_state())
    wanted, got = (
        np.concatenate([batch["targets"].reshape(-1) for batch in take(i, count)])
        for i, count in ((first, 9), (second, 3))
    )
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("layout", ["bytes", "mixture"])
def test_orbax_saves_and_restores_the_position(
    setup: Callable[..., Any], train: Train, tmp_path: Path, layout: str
) -> None:
    parts = setup(layout)
    first = train(*parts)
    take(first, 5)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        save = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first))
        manager.save(0, args=save)
        manager.wait_until_finished()
        wanted = take(first, 10)
        second = train(*parts)
        restore = grain.checkpoint.CheckpointRestore(second)
        manager.restore(0, args=ocp.args.Composite(data=restore))
    assert_equal(take(second, 10), wanted)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"seed": 8}, "seed"),
        ({"tokenizer": "bpe"}, r"data\.tokenizer"),
        ({"shuffle": False}, r"data\.shuffle"),
        ({"eval_fraction": 0.2}, r"data\.path \(its text\)"),
        ({"text": "other"}, r"data\.path \(its text\)"),
        ({"weights": (1.0, 2.0)}, r"data\.weights"),
    ],
)
def test_resuming_in_another_stream_is_refused(
    tmp_path: Path,
    setup: Callable[..., Any],
    train: Train,
    fields: dict[str, Any],
    name: str,
) -> None:
    layout = "mixture" if "weights" in fields else "bytes"
    state = train(*setup(layout)).get_state()
    settings = {key: fields[key] for key in fields.keys() - {"seed", "text"}}
    cfg, corpus, tokenizer = setup(layout, **settings)
    if "text" in fields:
        write(tmp_path / "a.jsonl", 300, "z", 60)
        corpus = open_corpus(cfg)
    other = train(cfg, corpus, tokenizer, seed=fields.get("seed", 7))
    with pytest.raises(
        ConfigError, match=f"{name} was .* when the checkpoint was saved"
    ):
        other.set_state(state)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 4.0), (7.0, 1.0)])
def test_weights_are_shares_of_the_text(
    setup: Callable[..., Any], train: Train, weights: tuple[float, float]
) -> None:
    iterator = train(*setup("mixture", weights=weights), seq_len=512)
    seen = documents_of(take(iterator, 40))
    size = Counter()
    for text in seen:
        size[text[0]] += len(text)
    assert size["b"] / size["a"] == pytest.approx(weights[1] / weights[0], rel=0.05)


def test_without_weights_a_mixture_is_one_text(
    setup: Callable[..., Any], train: Train, texts: Any
) -> None:
    parts = setup("mixture", weights=())
    wanted = [text for source in parts[1].train for text in texts(source)]
    seen = documents_of(take(train(*parts, seq_len=512), 25))
    assert sorted(seen[: len(wanted)]) == sorted(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_rows_are_full(
    setup: Callable[..., Any], train: Train, layout: str
) -> None:
    assert all(batch["mask"].all() for batch in take(train(*setup(layout)), 20))


def test_batch_that_does_not_divide_over_the_processes_is_named(
    setup: Callable[..., Any], train: Train
) -> None:
    with pytest.raises(
        ConfigError, match="global_batch_size=4: .* 3 processes; give a"
    ):
        train(*setup(), process_count=3)


def test_error_while_reading_reaches_the_loop(
    tmp_path: Path, setup: Callable[..., Any], train: Train
) -> None:
    iterator = train(*setup())
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="changed while it was in use"):
        take(iterator, 100)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_pipeline_is_silent_needs_no_tensorflow_and_ends_with_its_process(
    tmp_path: Path, tokenizer: str
) -> None:
    code = f"""
import pathlib, sys
from jaxspeed import config, data

cfg = config.DataConfig(cache_dir={str(tmp_path)!r}, tokenizer={tokenizer!r})
corpus = data.open_corpus(cfg)
run = pathlib.Path({str(tmp_path)!r})
tokenizer = data.build_tokenizer(cfg, corpus.train, vocab_size=300, workdir=run)
rows = dict(seq_len=16, global_batch_size=2)
left_open = data.train_iterator(cfg, corpus, tokenizer, seed=0, **rows)
next(left_open)
held_out = data.EvalSet(cfg=cfg, corpus=corpus, tokenizer=tokenizer, batches=9, **rows)
left_unfinished = iter(held_out)
next(left_unfinished)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Evaluation ---------------------------------------------------------------------------


def held_out(
    cfg: DataConfig, corpus: Corpus, tokenizer: Tokenizer, **f: Any
) -> EvalSet:
    shape: Any = {"seq_len": 16, "global_batch_size": 4, "batches": 0} | f
    return EvalSet(cfg=cfg, corpus=corpus, tokenizer=tokenizer, **shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_is_the_same_each_time(
    setup: Callable[..., Any], layout: str
) -> None:
    evaluation = held_out(*setup(layout))
    first, second = list(evaluation), list(evaluation)
    assert_equal([batch for batch, _ in first], [batch for batch, _ in second])
    assert [size for _, size in first] == [size for _, size in second]


def test_evaluation_has_each_held_out_document_once(
    setup: Callable[..., Any], texts: Any
) -> None:
    parts = setup("mixture", eval_fraction=0.3)
    batches = [batch for batch, _ in held_out(*parts)]
    wanted = [text for source in parts[1].held_out for text in texts(source)]
    assert sorted(documents_of(batches)) == sorted(wanted)
    targets = sum(int(batch["mask"].sum()) for batch in batches)
    assert targets == sum(len(text) + 1 for text in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_an_evaluation_are_those_of_the_held_out_text(
    setup: Callable[..., Any], texts: Any, layout: str
) -> None:
    parts = setup(layout, eval_fraction=0.3)
    wanted = [text for source in parts[1].held_out for text in texts(source)]
    size = sum(len(text.encode()) for text in wanted)
    assert sum(counted for _, counted in held_out(*parts)) == size


def test_number_of_evaluation_batches_is_kept_to(setup: Callable[..., Any]) -> None:
    parts = setup(eval_fraction=0.5)
    everything = list(held_out(*parts))
    assert len(everything) > 3
    some = list(held_out(*parts, batches=3))
    assert_equal([b for b, _ in some], [b for b, _ in everything[:3]])
    assert len(list(held_out(*parts, batches=10_000))) == len(everything)


def test_processes_share_an_evaluation(setup: Callable[..., Any]) -> None:
    parts = setup(eval_fraction=0.3)
    whole = list(held_out(*parts))
    shares = [held_out(*parts, process_index=i, process_count=2) for i in range(2)]
    for (batch, size), (first, one), (second, other) in zip(
        whole, *shares, strict=True
    ):
        assert size == one == other
        joined = {name: np.concatenate([first[name], second[name]]) for name in batch}
        assert_equal([batch], [joined])


def test_bits_per_byte_of_a_uniform_model_are_exact(
    setup: Callable[..., Any], texts: Any
) -> None:
    parts = setup(eval_fraction=0.3)
    nats = size = 0.0
    for batch, num_bytes in held_out(*parts):
        nats += batch["mask"].sum() * math.log(256)
        size += num_bytes
    wanted = [text for source in parts[1].held_out for text in texts(source)]
    documents, characters = len(wanted), sum(map(len, wanted))
    bits = nats / math.log(2) / size
    assert bits == pytest.approx(8 * (characters + documents) / characters)
