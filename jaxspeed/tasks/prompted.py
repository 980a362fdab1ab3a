# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of a decoder: the answer to a prompt, in packed rows whose loss counts answers only.

A prompt and its answer are one document and are not cut where they fit into a row. In an
evaluation the model writes its answers, greedily.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import jax
import numpy as np

from jaxspeed.config import TASK_METRICS, RunConfig
from jaxspeed.data import EvalSet, Tokenizer, build_tokenizer, train_iterator
from jaxspeed.data.corpus import Corpus, open_record_corpus
from jaxspeed.data.documents import Joined, Record, RecordSource, Selected
from jaxspeed.data.loader import Packing
from jaxspeed.data.tokenize import Encoded
from jaxspeed.generate import Writer
from jaxspeed.metrics import perplexity
from jaxspeed.program import Program
from jaxspeed.sampling import SamplingConfig
from jaxspeed.tasks.base import Evaluation
from jaxspeed.tasks.records import (
    SAMPLES,
    Encodings,
    Texts,
    columns_of,
    looked_at,
    text_in,
)
from jaxspeed.tasks.scores import written_scores
from jaxspeed.types import Params


class PromptAndAnswer:
    """The task `sft`."""

    unit = "tokens"
    tokenizer: Tokenizer

    def __init__(self, run: RunConfig, program: Program) -> None:
        """Opens the records."""
        self.run = run
        (self._prompt,), self._target = columns_of(run)
        self.corpus = open_record_corpus(run.data, [self._prompt, self._target])
        self._rows, self._share = program.batch.global_size, program.process_rows
        self.batch_amount = self._rows * run.seq_len

    def prepare(self, workdir: Path) -> None:
        """Reads or trains the tokenizer, and looks at some records."""
        self.tokenizer = build_tokenizer(
            self.run.data,
            [Texts(source) for source in self.corpus.train],
            vocab_size=self.run.model.vocab_size,
            workdir=workdir,
            init=self.run.init,
            leads=jax.process_index() == 0,
        )
        # What the tokenizer puts before a text begins a row; without it, the end of the last.
        frame = self.tokenizer.frame(1)
        self._before = list(frame.before) or [self.tokenizer.end_id]
        self._end = [self.tokenizer.end_id] if frame.before else []
        where = "data.eval_path" if self.run.data.eval_path else "data.path"
        self._encodings: Corpus[Encoded] = Corpus(
            tuple(Encodings("data.path", s, self._encode) for s in self.corpus.train),
            tuple(Encodings(where, s, self._encode) for s in self.corpus.held_out),
            "record",
        )
        self._seen = self._look()

    def describe(self) -> list[str]:
        """Returns what is read and learnt, and what does not fit."""
        learnt = f"task: sft, {self._target} after {self._prompt}"
        return [f"data: {self.corpus.describe()}", learnt, *self._seen]

    def train_iterator(self) -> grain.DatasetIterator:
        """Returns the endless iterator of packed rows."""
        run, (index, count) = self.run, self._share
        return train_iterator(
            run.data, self._encodings, self.tokenizer, seed=run.seed, seq_len=run.seq_len,
            global_batch_size=self._rows, process_index=index, process_count=count, packing=self._packing(),
        )  # fmt: skip

    def evaluate(
        self,
        program: Program,
        params: Params,
        *,
        step: int,
        stopped: Callable[[], int] = lambda: 0,
    ) -> Evaluation | None:
        """Returns the loss of held-out answers, and metrics of those that the model writes."""
        del step
        index, count = self._share
        held_out = EvalSet(
            cfg=self.run.data, corpus=self._encodings, tokenizer=self.tokenizer, seq_len=self.run.seq_len,
            global_batch_size=self._rows, batches=self.run.eval.batches, packing=self._packing(),
            process_index=index, process_count=count,
        )  # fmt: skip
        nats = targets = 0.0
        for rows, _ in held_out:
            if stopped():
                return None
            batch = program.put_batch(rows, training=False)
            sums = jax.device_get(program.eval_step(params, batch))
            nats, targets = nats + float(sums.total), targets + float(sums.count)
        records = self._asked()
        written = self._write(program, params, records, stopped)
        if written is None:
            return None
        true = [record[self._target].strip() for record in records]
        names = self.run.task.metrics or TASK_METRICS["sft"]
        loss = nats / max(targets, 1.0)
        scores = {"loss": loss, "perplexity": perplexity(loss)}
        scores |= written_scores(names, written, true)
        said = f"{len(records):,} {self.run.data.evaluated} records: " + ", ".join(
            f"{name} {value:.4g}" for name, value in scores.items()
        )
        shown = [
            f"{record[self._prompt][:300]}\n-> {text}\n   (true: {right[:300]})"
            for record, text, right in zip(records, written, true, strict=True)
        ]
        metrics = {f"eval/{name}": value for name, value in scores.items()}
        return Evaluation(metrics, said, said, "\n\n".join(shown[:SAMPLES]))

    def _encode(self, record: Record) -> Encoded:
        prompt, target = self._prompt_ids(record), self._target_ids(record)
        target = target[: self.run.task.max_target_len]
        ids = np.concatenate([prompt[1:], target, np.asarray(self._end, np.int32)])
        counts = np.arange(len(ids) + 1) >= len(prompt) - 1
        # With an end of its own, what begins the next document is no target.
        counts[-1] = not self._end
        return Encoded(ids, counts=counts)

    def _prompt_ids(self, record: Record) -> np.ndarray:
        text = self.run.task.prefix + text_in(record, self._prompt)
        before = np.asarray(self._before, np.int32)
        return np.concatenate([before, self.tokenizer.encode(text)])

    def _target_ids(self, record: Record) -> np.ndarray:
        return self.tokenizer.encode(text_in(record, self._target))

    def _packing(self) -> Packing:
        task = self.run.task
        identity = {
            "task.name": task.name,
            "task's fields": [self._prompt, self._target],
        }
        identity |= {"seq_len": self.run.seq_len}
        return Packing(
            lambda encoded: encoded, self._before[0], whole=True, identity=identity
        )

    def _asked(self) -> list[Record]:
        """Returns the records whose answers are written in an evaluation."""
        parts: list[RecordSource] = list(self.corpus.held_out)
        source = parts[0] if len(parts) == 1 else Joined("data.eval_path", parts)
        wanted = self.run.eval.batches * self._rows or len(source)
        chosen = Selected(
            source, np.random.default_rng(0).permutation(len(source))[:wanted]
        )
        return [chosen[i] for i in range(len(chosen))]

    def _write(
        self,
        program: Program,
        params: Params,
        records: Sequence[Record],
        stopped: Callable[[], int],
    ) -> list[str] | None:
        """Returns the answers that the model writes, prompts of like lengths together."""
        task, model = self.run.task, self.run.model
        writer = Writer(program, params, end_ids=(self.tokenizer.end_id,))
        room = getattr(model, "max_seq_len", self.run.seq_len) - task.max_target_len
        # The end of a prompt that is too long says more than its beginning.
        prompts = [self._prompt_ids(record)[-max(1, room) :] for record in records]
        order = np.argsort([len(ids) for ids in prompts], kind="stable").tolist()
        texts = [""] * len(records)
        sampling = SamplingConfig(max_new_tokens=task.max_target_len, temperature=0.0)
        for at in range(0, len(order), self._rows):
            if stopped():
                return None
            numbers = order[at : at + self._rows]
            said = writer.write([prompts[i] for i in numbers], sampling)
            for number, text in zip(numbers, said, strict=True):
                texts[number] = self.tokenizer.decode(text.ids).strip()
        return texts

    def _look(self) -> list[str]:
        """Encodes some records; returns what does not fit."""
        cut = []
        for source, encoded in zip(
            self.corpus.train, self._encodings.train, strict=True
        ):
            for record in looked_at(source):
                assert len(encoded[record].ids)
                target = self._target_ids(source[record])
                cut.append(len(target) > self.run.task.max_target_len)
        if not any(cut):
            return []
        return [
            f"{sum(cut)} of {len(cut)} answers looked at are longer than task.max_target_len and are cut"
        ]
