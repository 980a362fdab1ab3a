# SPDX-License-Identifier: Apache-2.0
"""Every example comes once an epoch, in rows hardly longer than it, wherever one begins."""

import itertools
from typing import Any

import grain
import numpy as np
import pytest

from jaxspeed.config import ConfigError
from jaxspeed.data.buckets import BatchSpec, BucketIterator, Buckets, Example
from jaxspeed.objectives import Leaf


LENGTHS = (4, 8, 16)
SHAPES = tuple(
    {
        "inputs": Leaf((n,), fill=-7),
        "mask": Leaf((n,), np.bool_),
        "labels": Leaf(fill=-1),
        "sound": Leaf((n // 2, 2), np.float32),
    }
    for n in LENGTHS
)
SIZES = np.random.default_rng(0).integers(1, 17, 50)


class Source:
    """Examples whose tokens are their number."""

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, index: int) -> Example:
        size = int(SIZES[index])
        arrays = {
            "inputs": np.full(size, index, np.int32),
            "mask": np.ones(size, bool),
            "labels": np.asarray(index, np.int32),
            "sound": np.full((size // 2, 2), index, np.float32),
        }
        return Example((index, 0), arrays)


def buckets(
    *,
    endless: bool = True,
    rows: tuple[int, int] = (0, 4),
    size: int = 4,
    **changes: Any,
) -> BucketIterator:
    fields: dict[str, Any] = {"shapes": SHAPES, "pool_batches": 3, "seed": 5} | changes
    spec = BatchSpec(
        global_batch_size=size, first_row=rows[0], num_rows=rows[1], **fields
    )
    examples: Any = grain.MapDataset.source(Source()).shuffle(seed=1)
    examples = (examples.repeat() if endless else examples).to_iter_dataset()
    return Buckets(examples, spec, identity={"size": size}).__iter__()


def test_every_example_comes_once_an_epoch() -> None:
    # 75 batches are three pools of 12 and two epochs: 300 examples, six epochs.
    keys = [key for batch in itertools.islice(buckets(), 75) for key in batch.keys]
    assert len(keys) == 300
    assert sorted(keys) == sorted([(i, 0) for i in range(50)] * 6)


def test_rows_are_those_of_their_examples() -> None:
    for inputs, mask, labels, sound in itertools.islice(
        (
            (b.arrays[n] for n in ("inputs", "mask", "labels", "sound"))
            for b in buckets()
        ),
        30,
    ):
        length = inputs.shape[1]
        assert length in LENGTHS
        assert sound.shape == (4, length // 2, 2)
        np.testing.assert_array_equal(mask.sum(1), SIZES[labels])
        np.testing.assert_array_equal(inputs, np.where(mask, labels[:, None], -7))
        np.testing.assert_array_equal(
            sound.sum((1, 2)), SIZES[labels] // 2 * 2 * labels
        )
        # No shorter rows would hold the longest.
        assert length == min(n for n in LENGTHS if n >= SIZES[labels].max())


def test_pool_is_sorted_so_that_little_is_padding() -> None:
    def padding(**changes: Any) -> float:
        batches = list(itertools.islice(buckets(**changes), 60))
        return 1 - sum(b.arrays["mask"].sum() for b in batches) / sum(
            b.arrays["mask"].size for b in batches
        )

    assert padding(pool_batches=12) < padding(pool_batches=1) - 0.05
    assert padding(shapes=SHAPES[-1:]) > padding() + 0.1


def test_order_of_batches_is_shuffled_by_the_seed_or_ascends() -> None:
    def lengths(seed: int | None) -> list[int]:
        batches = itertools.islice(buckets(seed=seed, pool_batches=12), 12)
        return [batch.arrays["inputs"].shape[1] for batch in batches]

    assert lengths(None) == sorted(lengths(None)) == sorted(lengths(1))
    assert lengths(1) != lengths(2)


@pytest.mark.parametrize("taken", [0, 1, 3, 7])
def test_restored_iterator_goes_on_where_the_saved_one_was(taken: int) -> None:
    saved, restored = buckets(), buckets()
    list(itertools.islice(saved, taken))
    restored.set_state(saved.get_state())
    for ours, theirs in zip(
        itertools.islice(saved, 9), itertools.islice(restored, 9), strict=True
    ):
        assert ours.keys == theirs.keys
        assert ours.arrays.keys() == theirs.arrays.keys()
        for name in ours.arrays:
            np.testing.assert_array_equal(ours.arrays[name], theirs.arrays[name])


def test_state_of_other_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match="size was 4 when .* and is 8 now"):
        buckets(size=8, rows=(0, 8)).set_state(buckets().get_state())


def test_processes_share_the_rows_of_each_batch() -> None:
    whole, first, second = buckets(), buckets(rows=(0, 2)), buckets(rows=(2, 2))
    for batch, one, two in itertools.islice(zip(whole, first, second, strict=True), 10):
        assert batch.keys == one.keys == two.keys
        for name, x in batch.arrays.items():
            both = np.concatenate([one.arrays[name], two.arrays[name]])
            np.testing.assert_array_equal(x, both)


def test_last_batch_of_finite_examples_is_filled_up() -> None:
    batches = list(buckets(endless=False, seed=None))
    assert sorted(key for b in batches for key in b.keys) == [(i, 0) for i in range(50)]
    (last,) = (b for b in batches if len(b.keys) < 4)
    assert last.arrays["labels"].tolist()[2:] == [-1, -1]
    assert not last.arrays["mask"][2:].any()
    assert len(buckets(endless=False, rows=(2, 2)).__next__().keys) == 4
