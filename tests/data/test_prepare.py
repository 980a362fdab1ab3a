# SPDX-License-Identifier: Apache-2.0
"""Records to TFDS sets, and their division into splits."""

import random
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxspeed.data.prepare import SetInfo, counts_of, divide, write_set


SHARES = {"validation": 0.1, "test": 0.1}


def numbers(count: int) -> list[str]:
    return [f"item {number}" for number in range(count)]


def test_division_takes_each_item_once_by_about_the_shares() -> None:
    splits = divide(numbers(2000), lambda item: [item], SHARES)
    assert sorted(sum(splits.values(), [])) == sorted(numbers(2000))
    assert list(splits) == ["train", "validation", "test"]
    assert all(150 < len(splits[name]) < 250 for name in SHARES)


def test_division_does_not_depend_on_the_order() -> None:
    items = numbers(300)
    random.Random(0).shuffle(items)
    one, other = (divide(x, lambda item: [item], SHARES) for x in (items, numbers(300)))
    assert one == other
    assert one["train"] != sorted(one["train"])


def test_items_that_share_a_key_are_in_one_split() -> None:
    draw = random.Random(0)
    pairs = [(f"a{draw.randrange(900)}", f"b{draw.randrange(900)}") for _ in range(600)]
    splits = divide(pairs, lambda pair: pair, {"test": 0.3})
    seen = {
        name: {key for pair in part for key in pair} for name, part in splits.items()
    }
    assert min(map(len, splits.values())) > 50
    assert not seen["train"] & seen["test"]


def test_keys_are_compared_without_case_and_white_space() -> None:
    texts = [text for n in range(50) for text in (f"The  {n}\n", f"the {n}")]
    splits = divide(texts, lambda text: [text], {"test": 0.5})
    assert all(len(part) % 2 == 0 for part in splits.values())


def features() -> dict[str, Any]:
    return {"text": tfds.features.Text()}


def test_set_under_a_name_of_tfds_is_served_by_tfds(tmp_path: Path) -> None:
    info = SetInfo(
        name="imdb_reviews",
        config="plain_text",
        version="1.0.0",
        features=features,
        description="not the public set",
    )
    splits = {"train": [{"text": "b"}, {"text": "a"}], "test": [{"text": "c"}]}
    folder = write_set(info, tmp_path, splits)
    assert folder == tmp_path / "imdb_reviews" / "plain_text" / "1.0.0"
    assert counts_of(folder) == {"train": 2, "test": 1}
    served: Any = tfds.data_source("imdb_reviews", data_dir=tmp_path, download=False)
    assert [record["text"] for record in served["train"]] == [b"b", b"a"]
    assert [path.name for path in tmp_path.iterdir()] == ["imdb_reviews"]
