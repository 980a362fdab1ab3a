# SPDX-License-Identifier: Apache-2.0
"""What is learnt from the data: the part of the run configuration that a task reads. Layer 0: standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxspeed.checks import check_types, config_error, positive, reject_unread


TaskName = Literal[
    "lm",
    "masked_lm",
    "span_corruption",
    "sft",
    "classification",
    "token_classification",
    "question_answering",
    "seq2seq",
    "speech",
    "image_qa",
    "image_classification",
]

_FIELDS = frozenset({"input_fields", "target_field"})
_RECORDS = _FIELDS | {"buckets", "pool_batches"}
_WRITTEN = frozenset({"metrics", "decoder_prompt"})

TASK_FIELDS: Mapping[str, frozenset[str]] = {
    "lm": frozenset(),
    "masked_lm": frozenset({"mask_rate", "whole_word"}),
    "span_corruption": frozenset({"mask_rate", "mean_span"}),
    "sft": _FIELDS | {"prefix", "max_target_len", "metrics"},
    "classification": _RECORDS | {"labels", "prefix"},
    "token_classification": _RECORDS | {"labels"},
    "question_answering": _RECORDS | {"stride", "max_answer_len"},
    "seq2seq": _RECORDS | _WRITTEN | {"prefix", "max_target_len"},
    "speech": _RECORDS | _WRITTEN | {"sample_rate"},
    "image_qa": _RECORDS | {"metrics", "prefix"},
    "image_classification": _FIELDS | {"labels"},
}
"""What each task reads of `TaskConfig`."""

TASK_COLUMNS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "sft": (("prompt",), "completion"),
    "classification": (("text",), "label"),
    "token_classification": (("tokens",), "tags"),
    "question_answering": (("question", "context"), "answers"),
    "seq2seq": (("source",), "target"),
    "speech": (("speech",), "text"),
    "image_qa": (("image", "question"), "answer"),
    "image_classification": (("image",), "label"),
}
"""Fields of a record that hold a task's inputs and its target, unless the configuration names others."""

TASK_METRICS: Mapping[str, tuple[str, ...]] = {
    "sft": ("accuracy",),
    "seq2seq": ("bleu", "chrf"),
    "speech": ("wer",),
    "image_qa": ("accuracy",),
}
"""What is measured of written answers, unless the configuration names others."""

TASK_SETTINGS: Mapping[str, frozenset[str]] = {
    "data.tokenizer": frozenset(TASK_FIELDS) - {"image_classification"},
    "data.text_field": frozenset({"lm", "masked_lm", "span_corruption"}),
    "data.document_mask": frozenset({"lm", "masked_lm", "span_corruption", "sft"}),
} | dict.fromkeys(
    ("eval.sample_tokens", "eval.prompt", "eval.temperature"), frozenset({"lm"})
)
"""Which tasks read these settings of other sections; all tasks read those that are not here."""  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learnt from the data. A field that the chosen task does not read must keep its default.

    seq_len is the length of a row of tokens: of the text (lm, masked_lm, span_corruption,
    classification, token_classification), of prompt and answer (sft, image_qa), of question and
    passage (question_answering), of the source (seq2seq), of the transcript (speech).
    """

    name: TaskName = "lm"
    """lm: the next token. masked_lm: masked tokens (BERT). span_corruption: missing spans (T5). sft: the answer to a prompt. seq2seq: a text from a text. The others by their names; docs/tasks.md has them all."""
    input_fields: tuple[str, ...] = ()
    """Fields of a record that hold the input; classification takes one text or two, speech the sample rate too. Empty: the task's usual names (docs/tasks.md)."""
    target_field: str = ""
    """Field that holds the target; empty: the task's usual name."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers, where the data holds names; for numbers they are optional."""
    prefix: str = ""
    """Text before each input, as in "summarize: "."""
    max_target_len: int = 128
    """Most tokens of a target, and of what is written in an evaluation; longer targets are cut, which is said once."""
    stride: int = 128
    """Tokens that neighbouring windows of a long passage share."""
    max_answer_len: int = 30
    """Most tokens of an extracted answer."""
    mask_rate: float = 0.15
    """Share of the tokens that is hidden."""
    whole_word: bool = False
    """Hide whole words, not parts of them."""
    mean_span: float = 3.0
    """Mean length of a hidden span, in tokens."""
    decoder_prompt: tuple[str, ...] = ()
    """Special tokens that the decoder begins with, as in `<|en|>` `<|transcribe|>`; empty: those that the tokenizer itself puts before a text. The model's start token is always the first."""
    sample_rate: int = 0
    """Samples per second of sound that does not tell its own rate; 0: 16,000."""
    metrics: tuple[Literal["accuracy", "bleu", "chrf", "rouge", "wer"], ...] = ()
    """How written answers are compared with the targets; empty: the task's usual."""
    buckets: tuple[int, ...] = ()
    """Lengths that rows are padded to, besides seq_len; the step is compiled once for each. Of `speech` they are lengths of the transcript, and sound is padded to the same share of the model's longest and masked behind its end; without, there is silence up to the longest, as published models want it."""
    pool_batches: int = 16
    """Batches that are sorted by length together, where there are buckets."""

    def __post_init__(self) -> None:
        check_types(self, "task")
        for name in ("max_target_len", "max_answer_len", "mean_span", "pool_batches"):
            positive(f"task.{name}", getattr(self, name))
        for name in ("stride", "sample_rate"):
            positive(f"task.{name}", getattr(self, name), allow_zero=True)
        if not 0 < self.mask_rate < 1:
            why = "a share lies between 0 and 1"
            raise config_error("task.mask_rate", self.mask_rate, why, "give 0.15, say")
        if self.mean_span < 1:
            why = "a span has a token at least"
            raise config_error("task.mean_span", self.mean_span, why, "give 3, say")
        if (
            list(self.buckets) != sorted(set(self.buckets))
            or min(self.buckets, default=1) < 1
        ):
            raise config_error(
                "task.buckets", self.buckets, "lengths ascend from 1", "sort them"
            )
        reject_unread(self, "task", {"name"}, TASK_FIELDS)
