# SPDX-License-Identifier: Apache-2.0
"""Metrics of what a model says, by the libraries of the field.

scikit-learn, sacrebleu, rouge-score and jiwer come with the extra `tasks`. Accuracy, the F1 of
classes and the word error rate are shares; what is named after a data set's own script (SQuAD's
exact match and F1, BLEU, chrF, ROUGE) is in percent, as that script prints it.
"""

import collections
import importlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
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


def squad_scores(
    answers: Sequence[str], golds: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns exact match and F1 in percent, each the best over a question's answers.

    Reference: SQuAD's evaluate-v1.1.py (arXiv 1606.05250 section 6.1), and v2.0 for questions
    without an answer, where only an empty one is right.
    """
    exact = f1 = 0.0
    for answer, right in zip(answers, golds, strict=True):
        exact += max(normalised(answer) == normalised(gold) for gold in right or [""])
        f1 += max(_word_f1(answer, gold) for gold in right or [""])
    count = max(1, len(answers))
    return {"exact_match": 100 * exact / count, "f1": 100 * f1 / count}


def normalised(text: str) -> str:
    """Returns a text as SQuAD compares it: lower case, without punctuation and articles, words apart by one space."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _word_f1(answer: str, gold: str) -> float:
    ours, theirs = normalised(answer).split(), normalised(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def written_scores(
    metrics: Sequence[str], written: Sequence[str], targets: Sequence[str]
) -> dict[str, float]:
    """Returns the metrics of written texts against one target each.

    Args:
        metrics: names of `TaskConfig.metrics`.
        written: what the model wrote.
        targets: what it should have written.
    """
    scores: dict[str, float] = {}
    for name in metrics:
        scores |= _WRITTEN[name](written, targets)
    return scores


def _accuracy(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Returns the share of texts that are equal but for case and white space."""
    plain = lambda text: " ".join(text.lower().split())
    same = [plain(w) == plain(t) for w, t in zip(written, targets, strict=True)]
    return {"accuracy": sum(same) / max(1, len(same))}


def _bleu(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Returns BLEU of the whole corpus, as sacrebleu tokenises it (13a)."""
    sacrebleu = _library("sacrebleu", "sacrebleu")
    return {"bleu": sacrebleu.corpus_bleu(list(written), [list(targets)]).score}


def _chrf(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    sacrebleu = _library("sacrebleu", "sacrebleu")
    return {"chrf": sacrebleu.corpus_chrf(list(written), [list(targets)]).score}


def _rouge(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Returns the mean F of ROUGE-1, -2 and -L in percent, words reduced to their stems."""
    rouge = _library("rouge_score.rouge_scorer", "rouge-score")
    names = ("rouge1", "rouge2", "rougeL")
    scorer = rouge.RougeScorer(names, use_stemmer=True)
    totals = dict.fromkeys(names, 0.0)
    for ours, target in zip(written, targets, strict=True):
        for name, score in scorer.score(target, ours).items():
            totals[name] += score.fmeasure
    return {name: 100 * x / max(1, len(written)) for name, x in totals.items()}


def _wer(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Returns the word error rate of the whole corpus: lower case, without punctuation."""
    jiwer = _library("jiwer", "jiwer")
    plain = lambda text: " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())
    pairs = [(plain(t), plain(w)) for t, w in zip(targets, written, strict=True)]
    # Against a target without a word there is no rate.
    pairs = [pair for pair in pairs if pair[0]]
    return {"wer": jiwer.wer(*map(list, zip(*pairs, strict=True))) if pairs else 0.0}


_WRITTEN: Mapping[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "accuracy": _accuracy,
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
    "wer": _wer,
}


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
