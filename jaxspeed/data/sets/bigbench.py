# SPDX-License-Identifier: Apache-2.0
"""Two sets out of the BIG-bench package: questions as `squad`, pictures as `cifar10`.

Its files ask not to be mixed into a training corpus of language models: they carry a
canary for that. Training a task's model on one of these sets and saying so is what they
are for here.
"""

import base64
import io
import json
from typing import Any

from jaxspeed.data.documents import Record
from jaxspeed.data.download import Downloads, PipFile, members
from jaxspeed.data.prepare import DataSet, SetInfo, divide
from jaxspeed.data.squad_json import flatten


_PACKAGE = PipFile(
    package="bigbench",
    file="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)
_FETCHED = "bigbench 1.0.0 from pip, 358 MB"
_FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks"

_TRAIN = ("nyt_v1.0.json", "new_wiki_v1.0.json", "reddit_v1.0.json")
_VALIDATION = "squaddev_v1.1.json"


def _read_squad(downloads: Downloads) -> dict[str, list[Record]]:
    names = [f"{_FOLDER}/squad_shifts/{name}" for name in (*_TRAIN, _VALIDATION)]
    found = dict(members(downloads.pip(_PACKAGE), *names))
    parts = [_answerable(flatten(json.loads(found[name]))) for name in names]
    *train, validation = parts
    shuffled = divide([r for part in train for r in part], lambda r: [r["id"]], {})
    return {"train": shuffled["train"], "validation": validation}


def _answerable(records: list[Record]) -> list[Record]:
    """Returns the records with the answers that are in their contexts, where one is.

    Some starts are one too small: BIG-bench cut a point or comma off the answer.
    """
    for record in records:
        answers, context = record["answers"], record["context"]
        found = []
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            starts = [s for s in (start, start + 1) if context.startswith(text, s)]
            found += [(text, s) for s in starts[:1]]
        answers["text"] = [text for text, _ in found]
        answers["answer_start"] = [start for _, start in found]
    return [record for record in records if record["answers"]["text"]]


def _squad_features() -> dict[str, Any]:
    import numpy as np
    from tensorflow_datasets import features

    answers = {"text": features.Text(), "answer_start": np.int32}
    return {
        "id": np.str_,
        "title": features.Text(),
        "context": features.Text(),
        "question": features.Text(),
        "answers": features.Sequence(answers),
    }


def _read_cifar(downloads: Downloads) -> dict[str, list[Record]]:
    name = f"{_FOLDER}/cifar10_classification/base64/task.json"
    ((_, content),) = members(downloads.pip(_PACKAGE), name)
    records = [
        {
            "id": f"test_{number:05}",
            "image": example["input"],
            "label": next(k for k, v in example["target_scores"].items() if v),
        }
        for number, example in enumerate(json.loads(content)["examples"])
    ]
    splits = divide(records, lambda record: [record["image"]], {"test": 0.1})
    for record in records:
        record["image"] = io.BytesIO(base64.b64decode(record["image"]))
    return splits


def _cifar_features() -> dict[str, Any]:
    from tensorflow_datasets import features

    names = "airplane automobile bird cat deer dog frog horse ship truck"
    return {
        "id": features.Text(),
        "image": features.Image(shape=(32, 32, 3), encoding_format="png"),
        "label": features.ClassLabel(names=names.split()),
    }


SQUAD = DataSet(
    info=SetInfo(
        name="squad",
        config="v1.1",
        version="3.0.0",
        features=_squad_features,
        description="Questions on passages. validation: SQuAD v1.1 dev, without the 5 "
        "questions that BIG-bench took as examples. train: SQuADShifts (New York Times, "
        "new Wikipedia, Reddit), because no package holds SQuAD's own training set; "
        "figures are not to be compared with published ones. It carries BIG-bench's canary: "
        "keep it out of pretraining text.",
        licence="SQuAD CC BY-SA 4.0, SQuADShifts CC BY 4.0",
    ),
    fetched=_FETCHED,
    read=_read_squad,
)

CIFAR10 = DataSet(
    info=SetInfo(
        name="cifar10",
        version="3.0.2",
        features=_cifar_features,
        description="Pictures of ten kinds of thing: the 10,000 of CIFAR-10's test set, "
        "divided into train and test, because no package holds the training set; figures "
        "are not to be compared with published ones.",
        licence="none stated (Krizhevsky 2009)",
    ),
    fetched=_FETCHED,
    read=_read_cifar,
)
