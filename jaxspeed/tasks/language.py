# SPDX-License-Identifier: Apache-2.0
"""Language modelling: the next token of packed documents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from jaxspeed.config import RunConfig
from jaxspeed.data import (
    EvalSet,
    Tokenizer,
    build_tokenizer,
    open_corpus,
    train_iterator,
)
from jaxspeed.generate import Writer
from jaxspeed.metrics import bits_per_byte, perplexity
from jaxspeed.program import Program
from jaxspeed.sampling import SamplingConfig
from jaxspeed.tasks.base import Evaluation
from jaxspeed.types import Params


class LanguageModel:
    """The task `lm`: the loss on held-out text, its bits per byte, and a sample."""

    unit = "tokens"
    tokenizer: Tokenizer

    def __init__(self, run: RunConfig, program: Program) -> None:
        """Opens the text."""
        index, count = program.process_rows
        self.run, self.corpus = run, open_corpus(run.data)
        self.batch_amount = program.batch.global_size * run.seq_len
        self._shape: dict[str, Any] = {
            "seq_len": run.seq_len,
            "global_batch_size": program.batch.global_size,
            "process_index": index,
            "process_count": count,
        }

    def prepare(self, workdir: Path) -> None:
        """Reads or trains the tokenizer."""
        self.tokenizer = build_tokenizer(
            self.run.data,
            self.corpus.train,
            vocab_size=self.run.model.vocab_size,
            workdir=workdir,
            init=self.run.init,
            leads=jax.process_index() == 0,
        )

    def describe(self) -> list[str]:
        """Returns what is read."""
        return [f"data: {self.corpus.describe()}"]

    def train_iterator(self) -> grain.DatasetIterator:
        """Returns the batches of packed rows."""
        run = self.run
        return train_iterator(
            run.data, self.corpus, self.tokenizer, seed=run.seed, **self._shape
        )

    def evaluate(
        self,
        program: Program,
        params: Params,
        *,
        step: int,
        stopped: Callable[[], int] = lambda: 0,
    ) -> Evaluation | None:
        """Returns loss, perplexity and bits per byte, and a sample of what the model says."""
        held_out = EvalSet(
            cfg=self.run.data,
            corpus=self.corpus,
            tokenizer=self.tokenizer,
            batches=self.run.eval.batches,
            **self._shape,
        )
        nats = targets = num_bytes = 0.0
        for rows, size in held_out:
            if stopped():
                return None
            batch = program.put_batch(rows, training=False)
            sums = jax.device_get(program.eval_step(params, batch))
            nats, targets = nats + float(sums.total), targets + float(sums.count)
            num_bytes += size
        loss = nats / max(targets, 1.0)
        bits = bits_per_byte(loss, num_tokens=targets, num_bytes=num_bytes)
        return Evaluation(
            {
                "eval/loss": loss,
                "eval/perplexity": perplexity(loss),
                "eval/bits_per_byte": bits,
            },
            f"{self.run.data.evaluated} loss {loss:.4f} nats/token, perplexity {perplexity(loss):.2f}, {bits:.3f} bits/byte",
            f"{self.run.data.evaluated} loss {loss:.4f} nats/token ({bits * np.log(2):.4f} nats/byte)",
            self._sample(program, params, step) if self._samples(program) else "",
        )

    def _samples(self, program: Program) -> bool:
        return bool(self.run.eval.sample_tokens) and program.mesh.shape["stage"] == 1

    def _sample(self, program: Program, params: Params, step: int) -> str:
        cfg = self.run.eval
        prompt = self.tokenizer.encode(cfg.prompt)
        if not len(prompt):
            prompt = np.asarray([self.tokenizer.end_id], np.int32)
        sampling = SamplingConfig(
            max_new_tokens=cfg.sample_tokens,
            temperature=cfg.temperature,
            seed=self.run.seed + step,
        )
        (text,) = Writer(program, params).write([prompt], sampling, shift=True)
        return self.tokenizer.decode(np.concatenate([prompt, text.ids]))
