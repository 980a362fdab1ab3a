# SPDX-License-Identifier: Apache-2.0
"""What is learnt from the data: `task.name` of the configuration.

A task is a source, a tokenization, a loss and metrics. It makes the batches of the training loop
and says what a model makes of held-out data; it trains nothing itself. The loss, and the arrays
that it reads, are in `jaxspeed.objectives`, where the compiled step finds them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxspeed.config import LoraConfig, OptimConfig, RunConfig
from jaxspeed.pretrained import model_config, read_params
from jaxspeed.program import Program, build_program
from jaxspeed.tasks.answers import QuestionAnswering
from jaxspeed.tasks.base import Evaluation, Task
from jaxspeed.tasks.denoising import Denoising, HiddenSpans, MaskedTokens
from jaxspeed.tasks.labels import (
    Classification,
    ImageClassification,
    TokenClassification,
)
from jaxspeed.tasks.language import LanguageModel
from jaxspeed.tasks.prompted import PromptAndAnswer
from jaxspeed.tasks.records import RecordTask
from jaxspeed.tasks.written import ImageQuestions, SequenceToSequence, Speech


__all__ = ["TASKS", "Evaluation", "Task", "evaluate_at", "open_task"]

TASKS: Mapping[str, Callable[[RunConfig, Program], Task]] = {
    "lm": LanguageModel,
    "masked_lm": functools.partial(Denoising, make_noise=MaskedTokens),
    "span_corruption": functools.partial(Denoising, make_noise=HiddenSpans),
    "sft": PromptAndAnswer,
    **{
        name: functools.partial(RecordTask, make_kind=kind)
        for name, kind in (
            ("classification", Classification),
            ("token_classification", TokenClassification),
            ("question_answering", QuestionAnswering),
            ("seq2seq", SequenceToSequence),
            ("speech", Speech),
            ("image_qa", ImageQuestions),
        )
    },
    "image_classification": functools.partial(
        RecordTask, make_kind=ImageClassification, reads_text=False
    ),
}
"""By the names of `TaskConfig.name`."""


def evaluate_at(path: str | Path, run: RunConfig) -> Evaluation:
    """Returns what the model that lies there makes of a run's held-out data.

    Args:
        path: a run directory or a Hugging Face folder, whose model and tokenizer are taken.
        run: says the task, its data and the devices.

    Raises:
        ConfigError: there is no such model, or it is not one for this task.
    """
    model = model_config(path, models=type(run.model).__module__.partition(".")[0])
    own = dataclasses.replace(run.data, tokenizer="auto")
    # Of adapters, frozen parameters and groups nothing is left: the model is read whole.
    run = dataclasses.replace(
        run, model=model, data=own, init=str(path), lora=LoraConfig(), freeze=(),
        dtype=dataclasses.replace(run.dtype, frozen="auto"), optim=OptimConfig(),
    )  # fmt: skip
    program = build_program(run)
    params = read_params(path, model, program.abstract_state["params"])
    task = open_task(run, program)
    task.prepare(Path(path).expanduser())
    evaluation = task.evaluate(program, params, step=0)
    assert evaluation is not None
    return evaluation


def open_task(run: RunConfig, program: Program) -> Task:
    """Opens the data of a run's task.

    Raises:
        ConfigError: something in the data or the configuration cannot be.
    """
    return TASKS[run.task.name](run, program)
