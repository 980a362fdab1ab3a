# SPDX-License-Identifier: Apache-2.0
"""Answers in passages: windows hold the whole passage, spans are exact, scores are SQuAD's."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxspeed.config import ConfigError, RunConfig, TaskConfig
from jaxspeed.data import ByteTokenizer
from jaxspeed.loop import fit
from jaxspeed.program import Program
from jaxspeed.tasks import Task
from jaxspeed.tasks.answers import QuestionAnswering, _best_span
from jaxspeed.tasks.records import Answered
from jaxspeed.tasks.scores import squad_scores
from tests.toy import run_of
from tests.toy_tasks import LabelConfig


MakeRun = Callable[..., RunConfig]
Opened = Callable[[RunConfig], tuple[Program, Task]]

MODEL = LabelConfig(head="token", num_labels=2)


def question(passage: str, *answers: str, asks: str = "what?") -> dict[str, Any]:
    begins = [passage.index(answer) for answer in answers]
    texts = {"text": list(answers), "answer_start": begins}
    return {"question": asks, "context": passage, "answers": texts}


def kind(seq_len: int = 32, **task: Any) -> QuestionAnswering:
    config = TaskConfig(name="question_answering", **task)
    run = run_of(model=MODEL, seq_len=seq_len, task=config)
    return QuestionAnswering(run, ByteTokenizer())


@pytest.mark.parametrize("length", [1, 20, 25, 26, 40, 200])
def test_windows_hold_the_passage_and_share_the_stride(length: int) -> None:
    text = "".join(random.Random(0).choices("abcdefgh", k=length))
    record, asked = question(text, text[-1]), kind(stride=7)
    items = asked.encode(record)
    assert len(items) == asked.parts(record)
    # 32 less 5 of the question and 2 ends.
    parts = [
        bytes(item.arrays["inputs"][6:-1].astype(np.uint8)).decode() for item in items
    ]
    assert all(len(part) == 25 for part in parts[:-1])
    assert "".join(parts[:1] + [part[7:] for part in parts[1:]]) == text
    for item in items:
        assert bytes(item.arrays["inputs"][:5].astype(np.uint8)) == b"what?"
        assert item.arrays["token_types"].tolist() == [0] * 6 + [1] * (
            len(item.arrays["inputs"]) - 6
        )


def test_answer_is_marked_where_it_is_whole() -> None:
    text = "x" * 22 + "right" + "y" * 30
    items = kind(stride=7).encode(question(text, "right"))
    marked = [(int(i.arrays["starts"]), int(i.arrays["ends"])) for i in items]
    # The first window has three of its letters, the second all.
    assert marked == [(0, 0), (6 + 22 - 18, 6 + 26 - 18), (0, 0)]
    inside = items[1].arrays["inputs"][marked[1][0] : marked[1][1] + 1]
    assert bytes(inside.astype(np.uint8)) == b"right"


def test_answer_of_several_bytes_a_letter_is_exact() -> None:
    asked = kind(seq_len=64, stride=7)
    record = question("der K\u00f6nig f\u00e4hrt \u20ac", "f\u00e4hrt")
    (item,) = asked.encode(record)
    first, last = int(item.arrays["starts"]), int(item.arrays["ends"])
    found = bytes(item.arrays["inputs"][first : last + 1].astype(np.uint8))
    assert found.decode() == "f\u00e4hrt"
    logits = np.zeros((2, 64), np.float32)
    logits[0, first] = logits[1, last] = 5.0
    assert asked.score([Answered(record, [logits])]) == {"exact_match": 100, "f1": 100}
    assert "-> f\u00e4hrt (true: f\u00e4hrt)" in asked.show(Answered(record, [logits]))


def test_best_piece_over_all_windows_counts() -> None:
    asked, record = kind(stride=7), question("a" * 20 + "right" + "b" * 20, "right")
    windows = len(asked.encode(record))
    outputs = [np.zeros((2, 32), np.float32) for _ in range(windows)]
    outputs[0][:, 8] = 2.0
    outputs[1][0, 6 + 20 - 18] = outputs[1][1, 6 + 24 - 18] = 3.0
    assert asked.score([Answered(record, outputs)])["exact_match"] == 100


def test_question_without_an_answer_wants_none() -> None:
    asked = kind(stride=7)
    record = question("abc")
    (item,) = asked.encode(record)
    assert (int(item.arrays["starts"]), int(item.arrays["ends"])) == (0, 0)
    none, some = np.zeros((2, 32), np.float32), np.zeros((2, 32), np.float32)
    none[:, 0], some[:, 7] = 4.0, 4.0
    assert asked.score([Answered(record, [none])]) == {"exact_match": 100, "f1": 100}
    assert asked.score([Answered(record, [some])]) == {"exact_match": 0, "f1": 0}


def test_piece_is_forward_and_not_too_long() -> None:
    logits = np.zeros((2, 9), np.float32)
    logits[0, 5], logits[1, 2] = 9.0, 9.0
    assert _best_span(logits, 9) in [(9.0, 5, n) for n in range(5, 9)] + [
        (9.0, n, 2) for n in range(3)
    ]
    logits[0, 0], logits[1, 8] = 7.0, 8.0
    assert _best_span(logits, 9) == (17.0, 5, 8)
    assert _best_span(logits, 3) == (16.0, 0, 2)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"text": ["cd"], "answer_start": [1]},
            "answer 'cd' at 1 .* where 'bc' stands",
        ),
        (
            {"text": ["cd"], "answer_start": [90]},
            "at 90 of its passage, where '' stands",
        ),
        ({"text": [""], "answer_start": [0]}, "has the answer '' at 0"),
        ({"text": ["cd"], "answer_start": []}, "no answers with text and answer_start"),
        ("cd", "no answers with text and answer_start in 'answers'"),
    ],
)
def test_bad_answer_is_named_before_training(
    answers: Any, message: str, make_run: MakeRun, opened: Opened
) -> None:
    good = question("abcd", "cd")
    rows = [good] * 6 + [good | {"answers": answers}] + [good] * 3
    run = make_run(MODEL, rows, name="question_answering", stride=4)
    with pytest.raises(ConfigError, match=f"record [56] .*{message}"):
        opened(run)


def test_windows_must_advance(make_run: MakeRun, opened: Opened) -> None:
    with pytest.raises(ConfigError, match="task.stride=128: .* give less than 15"):
        opened(make_run(MODEL, [question("abcd", "cd")] * 9, name="question_answering"))


def test_scores_are_those_of_squad() -> None:
    golds = [["the cat"], ["Cat!", "a dog"], []]
    assert squad_scores(["The  CAT.", "dog", ""], golds) == {
        "exact_match": 100,
        "f1": 100,
    }
    scores = squad_scores(["big cat", "bird", "x"], golds)
    assert scores == {"exact_match": 0, "f1": pytest.approx(100 * (2 / 3) / 3)}


def test_answers_are_learnt(make_run: MakeRun) -> None:
    draw = random.Random(0)
    rows = []
    for _ in range(80):
        words = ["".join(draw.choices("abcd", k=3)) for _ in range(draw.randint(3, 12))]
        at = draw.randrange(len(words))
        words[at] = "XZ"
        rows.append(question(" ".join(words), words[at]))
    run = make_run(
        MODEL, rows, name="question_answering", stride=8, run={"steps": 40},
    )  # fmt: skip
    metrics = fit(run, name="answers").metrics
    assert metrics["eval/f1"] > 60
