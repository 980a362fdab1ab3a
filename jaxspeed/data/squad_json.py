# SPDX-License-Identifier: Apache-2.0
"""SQuAD's JSON: articles of paragraphs of questions, as one record per question."""

from typing import Any

from jaxspeed.data.documents import Record


def flatten(squad: Any) -> list[Record]:
    """Returns a record per question, with the fields of TFDS's `squad`.

    Args:
        squad: the JSON; version 1.1 or 2.0 (there a question may have no answer).

    Raises:
        KeyError, TypeError: it is something else.
    """
    return [
        {
            "id": question["id"],
            "title": article.get("title", ""),
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                "text": [answer["text"] for answer in question["answers"]],
                "answer_start": [
                    answer["answer_start"] for answer in question["answers"]
                ],
            },
        }
        for article in squad["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
