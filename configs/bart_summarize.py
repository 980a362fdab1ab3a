# SPDX-License-Identifier: Apache-2.0
"""One-line summaries of Debian's package descriptions, by a small BART (6.6M parameters) from scratch.

Once:      jaxspeed data jaxspeed_package_summaries    (59,000 pairs, docs/data.md)
Command:   python train.py configs/bart_summarize.py
Hardware:  two CPU cores: 81 minutes beside other work
Expect:    ROUGE-1 40.8, -2 20.3, -L 37.9 on held-out packages (a description's first 8 words: 29.0, 12.1, 25.8)
Next:      --init BART_FOLDER (with its sizes by --model...), --data.path mine.jsonl --task.input_fields document
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
from models.bart import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(
            vocab_size=4096,
            max_seq_len=192,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            d_model=256,
            d_ff=1024,
            activation="relu",
            norm_first=True,
            embed_norm=False,
            sinusoids=True,
            scale_embedding=True,
            dropout=0.1,
            pad_id=0,
            end_id=1,
            start_id=0,
        ),
        task=TaskConfig(
            name="seq2seq",
            input_fields=("document",),
            target_field="summary",
            max_target_len=32,
            buckets=(64, 96),
            metrics=("rouge",),
        ),
        steps=4000,
        seq_len=160,
        global_batch_size=48,
        optim=OptimConfig(lr=1e-3, b2=0.98, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_steps=300),
        data=DataConfig(path=("tfds:jaxspeed_package_summaries",), tokenizer="unigram"),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=0, batches=0),
    )
