# SPDX-License-Identifier: Apache-2.0
"""Metrics of what a model says, by the libraries of the field.

scikit-learn, sacrebleu, rouge-score and jiwer come with the extra `tasks`.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from jaxspeed.config import ConfigError


def class_scores(
    labels: Sequence[int], predicted: Sequence[int], num_labels: int
) -> dict[str, float]:
    """Returns accuracy and F1: of class 1 where there are two, else the mean over the classes."""
    metrics = _library("sklearn.metrics", "scikit-learn")
    f1 = metrics.f1_score(
        labels,
        predicted,
        labels=list(range(num_labels)) if num_labels > 2 else None,
        average="macro" if num_labels > 2 else "binary",
        zero_division=0,
    )
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1": float(f1),
    }


def entity_f1(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> float:
    """Returns F1 over entities, each of which must have the right words and kind.

    Reference: CoNLL-2003's conlleval. B-KIND begins an entity, I-KIND goes on with it; an I-
    behind another kind begins one too.
    """
    right = total = 0
    for ours, theirs in zip(predicted, gold, strict=True):
        found, wanted = _entities(ours), _entities(theirs)
        right += len(found & wanted)
        total += len(found) + len(wanted)
    return 2 * right / total if total else 1.0


def _entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Returns (begin, end, kind) of each entity."""
    entities, begin, kind = set(), 0, ""
    for at, tag in enumerate([*tags, "O"]):
        mark, _, now = tag.partition("-")
        if kind and (mark != "I" or now != kind):
            entities.add((begin, at, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            begin, kind = at, now
    return entities


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the metrics of this task need {package} ({error}); pip install 'jaxspeed[tasks]'"
        ) from error
