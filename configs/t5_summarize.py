# SPDX-License-Identifier: Apache-2.0
"""One-line summaries of Debian's package descriptions, by a small T5 (5M parameters) from scratch.

Once:      jaxspeed data jaxspeed_package_summaries    (59,000 pairs, docs/data.md)
Command:   python train.py configs/t5_summarize.py
Hardware:  any; measured ones are in benchmarks/results/tasks.md
Expect:    ROUGE on held-out packages, above that of a description's first words and of the commonest summary
"""

from jaxspeed.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TaskConfig,
)
from models.t5 import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(
            vocab_size=4096,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            d_model=256,
            head_dim=64,
            d_ff=512,
            gated=True,
            dropout=0.1,
        ),
        task=TaskConfig(
            name="seq2seq",
            input_fields=("document",),
            target_field="summary",
            max_target_len=32,
            buckets=(64, 96),
            metrics=("rouge",),
        ),
        steps=2500,
        seq_len=160,
        global_batch_size=48,
        # T5's embedding begins with a standard deviation of 1: at the rate of the matrices it would hardly move.
        optim=OptimConfig(
            lr=2e-3, b2=0.98, weight_decay=0.01, lr_groups=(("*embed", 10.0),)
        ),
        schedule=ScheduleConfig(warmup_steps=300),
        data=DataConfig(path=("tfds:jaxspeed_package_summaries",), tokenizer="unigram"),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=0, batches=0),
    )
