# SPDX-License-Identifier: Apache-2.0
"""Packing: every token a target once, documents apart, and a position to return to."""

import dataclasses
import random
from collections.abc import Sequence

import grain
import numpy as np
import pytest

from jaxspeed.config import ConfigError
from jaxspeed.data.pack import PackedBatch, PackedRows, PackIterator, RowSpec
from jaxspeed.data.tokenize import Encoded


END = 1000
Documents = Sequence[Sequence[int]]


def spec(rows: int, seq_len: int, **fields: object) -> RowSpec:
    whole = RowSpec(
        seq_len=seq_len,
        global_batch_size=rows,
        first_row=0,
        num_rows=rows,
        end_id=END,
        document_mask=True,
    )
    return dataclasses.replace(whole, **fields)


def encoded(ids: Sequence[int]) -> Encoded:
    """Returns a document whose token k stands for k + 1 bytes."""
    num_bytes = np.append(np.arange(1, len(ids) + 1), 0).astype(np.int32)
    return Encoded(np.array(ids, np.int32), num_bytes)


def pack(documents: Documents, shape: RowSpec) -> PackIterator:
    stream = grain.MapDataset.source(list(documents)).map(encoded).to_iter_dataset()
    return iter(PackedRows(stream, shape, identity={"seed": 0}, patience=100))


def arrays(batches: Sequence[PackedBatch]) -> dict[str, np.ndarray]:
    """Returns the rows of several batches as one."""
    names = batches[0].arrays
    return {name: np.concatenate([b.arrays[name] for b in batches]) for name in names}


def draw(seed: int) -> tuple[Documents, RowSpec]:
    """Returns documents of unique tokens, some empty, some longer than many rows."""
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 2, 5, 13, 90]) for _ in range(rng.randint(1, 25))] + [
        1
    ]
    tokens = iter(range(END))
    documents = [[next(tokens) for _ in range(length)] for length in lengths]
    return documents, spec(rng.randint(1, 4), rng.choice([1, 3, 8, 17]))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_and_every_end_is_a_target_once(seed: int) -> None:
    documents, shape = draw(seed)
    rows = arrays(list(pack(documents, shape)))
    targets = rows["targets"][rows["mask"]].tolist()
    assert targets == [t for ids in documents if ids for t in [*ids, END]]


@pytest.mark.parametrize("seed", range(20))
def test_a_target_follows_its_input_in_the_same_document(seed: int) -> None:
    documents, shape = draw(seed)
    rows = arrays(list(pack(documents, shape)))
    pairs = zip(
        rows["inputs"][rows["mask"]].tolist(),
        rows["targets"][rows["mask"]].tolist(),
        strict=True,
    )
    framed = [[END, *ids, END] for ids in documents if ids]
    assert list(pairs) == [p for ids in framed for p in zip(ids, ids[1:], strict=False)]


@pytest.mark.parametrize("seed", range(20))
def test_a_segment_is_one_piece_of_one_document(seed: int) -> None:
    documents, shape = draw(seed)
    owner = {token: n for n, ids in enumerate(documents) for token in ids}
    rows = arrays(list(pack(documents, shape)))
    for targets, segments, positions, mask in zip(
        *(rows[n] for n in ("targets", "segment_ids", "positions", "mask")), strict=True
    ):
        assert (segments[mask] >= 1).all()
        assert (np.diff(segments[mask]) >= 0).all()
        assert set(segments[mask]) == set(range(1, segments.max() + 1))
        for segment in set(segments[mask]):
            inside = segments == segment
            count = int(inside.sum())
            np.testing.assert_array_equal(positions[inside], np.arange(count))
            ends = targets[inside] == END
            assert not ends[:-1].any()
            assert len({owner[t] for t in targets[inside][~ends].tolist()}) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_only_the_end_of_the_last_batch_is_padding(seed: int) -> None:
    documents, shape = draw(seed)
    rows = arrays(list(pack(documents, shape)))
    mask = rows["mask"].reshape(-1)
    filled = int(mask.sum())
    assert mask[:filled].all()
    assert len(mask) - filled < shape.seq_len * shape.global_batch_size
    for name in ("segment_ids", "positions"):
        assert (rows[name].reshape(-1)[filled:] == 0).all()
    assert (rows["inputs"].reshape(-1)[filled:] == END).all()


@pytest.mark.parametrize("seed", range(20))
def test_bytes_of_the_batches_add_up_to_the_documents(seed: int) -> None:
    documents, shape = draw(seed)
    counted = sum(batch.num_bytes for batch in pack(documents, shape))
    assert counted == sum(len(ids) * (len(ids) + 1) // 2 for ids in documents)


@pytest.mark.parametrize("seed", range(10))
def test_rows_without_document_mask_are_one_segment(seed: int) -> None:
    documents, shape = draw(seed)
    masked = arrays(list(pack(documents, shape)))
    shape = dataclasses.replace(shape, document_mask=False)
    rows = arrays(list(pack(documents, shape)))
    for name in ("inputs", "targets", "mask"):
        np.testing.assert_array_equal(rows[name], masked[name])
    np.testing.assert_array_equal(rows["segment_ids"], rows["mask"])
    slots = np.arange(shape.seq_len) * rows["mask"]
    np.testing.assert_array_equal(rows["positions"], slots)


def test_types_are_those_of_a_batch() -> None:
    (batch,) = pack([[1, 2, 3]], spec(2, 4))
    kinds = {name: (a.dtype, a.shape) for name, a in batch.arrays.items()}
    ints = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), np.int32)
    assert kinds == {
        n: (np.dtype(t), (2, 4)) for n, t in (ints | {"mask": bool}).items()
    }


def test_a_batch_shares_no_memory_with_another_array() -> None:
    (batch,) = pack([[1, 2, 3]], spec(2, 4))
    inputs, targets = batch.arrays["inputs"], batch.arrays["targets"]
    assert not np.shares_memory(inputs, targets)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_take_the_rows_of_one_batch(processes: int) -> None:
    documents = [list(range(n)) for n in (3, 40, 1, 0, 25, 7)]
    whole = [batch.arrays for batch in pack(documents, spec(4, 5))]
    rows = 4 // processes
    parts = [
        pack(documents, spec(4, 5, first_row=rows * process, num_rows=rows))
        for process in range(processes)
    ]
    for expected, *shares in zip(whole, *parts, strict=True):
        for name, array in expected.items():
            shared = np.concatenate([share.arrays[name] for share in shares])
            np.testing.assert_array_equal(shared, array)


@pytest.mark.parametrize("seed", range(10))
def test_restored_position_gives_the_next_batch(seed: int) -> None:
    documents, shape = draw(seed)
    iterator = pack(documents, shape)
    states, batches = [iterator.get_state()], []
    for batch in iterator:
        batches.append(batch)
        states.append(iterator.get_state())
    fresh = pack(documents, shape)
    for number in random.Random(seed).sample(range(len(batches)), len(batches)):
        fresh.set_state(states[number])
        assert fresh.get_state() == states[number]
        again = next(fresh)
        assert again.num_bytes == batches[number].num_bytes
        for name, array in batches[number].arrays.items():
            np.testing.assert_array_equal(again.arrays[name], array)
    fresh.set_state(states[-1])
    assert next(fresh, None) is None


def test_position_holds_for_another_shape_of_batch() -> None:
    documents = [list(range(n)) for n in (3, 40, 1, 0, 25, 7, 9)]
    iterator = pack(documents, spec(2, 8))
    next(iterator)
    before = iterator.get_state()
    rest = arrays(list(iterator))
    other = pack(documents, spec(1, 5))
    other.set_state(before)
    rows = arrays(list(other))
    for name in ("inputs", "targets"):
        np.testing.assert_array_equal(
            rows[name][rows["mask"]], rest[name][rest["mask"]]
        )


def test_position_of_another_stream_is_refused() -> None:
    iterator = pack([[1, 2, 3]], spec(1, 2))
    state = iterator.get_state() | {"identity": {"seed": 1}}
    with pytest.raises(
        ConfigError, match="seed was 1 when the checkpoint was saved and"
    ):
        iterator.set_state(state)


def test_documents_without_end_or_token_are_given_up() -> None:
    stream = grain.MapDataset.source([[]]).map(encoded).repeat().to_iter_dataset()
    iterator = iter(PackedRows(stream, spec(1, 2), identity={}, patience=5))
    with pytest.raises(ConfigError, match="no token in 6 documents in a row"):
        next(iterator)


# Whole documents ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_document_that_fits_into_a_row_is_not_cut(seed: int) -> None:
    documents, shape = draw(seed)
    shape = dataclasses.replace(shape, seq_len=14, whole=True)
    rows = arrays(list(pack(documents, shape)))
    found = []
    for inputs, segments in zip(rows["inputs"], rows["segment_ids"], strict=True):
        assert (np.diff(segments[segments > 0]) >= 0).all()
        for number in range(1, segments.max() + 1):
            found.append(inputs[segments == number].tolist())
    assert all([END, *d] in found for d in documents if 0 < len(d) <= 13)
    together = [token for part in found for token in part if token != END]
    assert together == [token for d in documents for token in d]
    assert (rows["mask"] == (rows["segment_ids"] > 0)).all()


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_position_of_whole_documents_is_restored(taken: int) -> None:
    documents, shape = draw(3)
    shape = dataclasses.replace(shape, seq_len=14, whole=True)
    saved, restored = pack([*documents] * 3, shape), pack([*documents] * 3, shape)
    for _ in range(taken):
        next(saved)
    restored.set_state(saved.get_state())
    for ours, theirs in zip(saved, restored, strict=True):
        for name, x in ours.arrays.items():
            np.testing.assert_array_equal(x, theirs.arrays[name])


def test_only_what_counts_is_in_the_mask() -> None:
    def counting(ids: list[int]) -> Encoded:
        counts = np.arange(len(ids) + 1) >= 2
        return Encoded(np.array(ids, np.int32), counts=counts)

    stream = grain.MapDataset.source([[1, 2, 3], [4, 5]]).map(counting)
    shape = spec(1, 10)
    (batch,) = PackedRows(stream.to_iter_dataset(), shape, identity={}, patience=9)
    targets, mask = batch.arrays["targets"][0], batch.arrays["mask"][0]
    assert targets[mask].tolist() == [3, END, END]
    assert batch.arrays["segment_ids"][0].tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]
