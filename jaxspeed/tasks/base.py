# SPDX-License-Identifier: Apache-2.0
"""What a task is to the training loop: batches, and what the model makes of held-out data."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import grain

from jaxspeed.program import Program
from jaxspeed.types import Params


class Evaluation(NamedTuple):
    """What the held-out data says about a model."""

    metrics: Mapping[str, float]
    """By their names in metrics.jsonl, `eval/...`."""
    summary: str
    """The metrics in words."""
    verdict: str
    """The same for the last line of a run."""
    samples: str = ""
    """What the model says, to look at."""


@runtime_checkable
class Task(Protocol):
    """A run's task, its data opened. Open it with `jaxspeed.tasks.open_task`."""

    unit: str
    """What amounts of data are counted in: tokens, or examples."""
    batch_amount: int
    """How many of those a global batch holds."""

    def prepare(self, workdir: Path) -> None:
        """Makes or reads what lies in the run directory: the tokenizer."""
        ...

    def describe(self) -> list[str]:
        """Returns lines for the run's log."""
        ...

    def train_iterator(self) -> grain.DatasetIterator:
        """Returns the endless iterator of this process's rows of training batches."""
        ...

    def evaluate(
        self,
        program: Program,
        params: Params,
        *,
        step: int,
        stopped: Callable[[], int] = lambda: 0,
    ) -> Evaluation | None:
        """Returns what the model makes of the held-out data, the same in every process; None if it was stopped.

        Args:
            program: of the model.
            params: of the model.
            step: how far it was trained; samples are drawn anew at each.
            stopped: asked between batches whether to leave.
        """
        ...
