# SPDX-License-Identifier: Apache-2.0
"""Questions on pictures of coloured shapes: easy-VQA."""

import io
import json
from typing import Any

from jaxspeed.data.documents import Record
from jaxspeed.data.download import Downloads, PipFile, members
from jaxspeed.data.prepare import DataSet, SetInfo, divide


_PACKAGE = PipFile(
    package="easy-vqa",
    file="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
)


def _read(downloads: Downloads) -> dict[str, list[Record]]:
    file = downloads.pip(_PACKAGE)
    return {split: _records(file, split) for split in ("train", "test")}


def _records(file: Any, split: str) -> list[Record]:
    """Returns the questions of one of the package's own splits: they share no picture."""
    folder = f"easy_vqa/data/{split}/"
    found = dict(members(file, f"{folder}questions.json", f"{folder}images/*.png"))
    records = [
        {
            "id": f"{split}-{number}",
            "image": io.BytesIO(found[f"{folder}images/{picture}.png"]),
            "question": question,
            "answer": answer,
        }
        for number, (question, answer, picture) in enumerate(
            json.loads(found[f"{folder}questions.json"])
        )
    ]
    return divide(records, lambda record: [record["id"]], {})["train"]


def _features() -> dict[str, Any]:
    from tensorflow_datasets import features

    return {
        "id": features.Text(),
        "image": features.Image(shape=(64, 64, 3), encoding_format="png"),
        "question": features.Text(),
        "answer": features.Text(),
    }


SET = DataSet(
    info=SetInfo(
        name="jaxspeed_easy_vqa",
        version="1.0.0",
        features=_features,
        description="Questions on pictures of one coloured shape, 13 answers (easy-VQA).",
        licence="MIT",
    ),
    fetched="easy-vqa 1.0 from pip, 3 MB",
    read=_read,
)
