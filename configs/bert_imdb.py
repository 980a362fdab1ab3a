# SPDX-License-Identifier: Apache-2.0
"""Sentiment of the IMDB reviews, by a MiniLM (22.7M parameters) that is fine-tuned.

Once:      jaxspeed data imdb_reviews minilm-l6    (18,000 reviews to train on, with the network 25,000: docs/data.md)
Command:   python train.py configs/bert_imdb.py --init ~/.cache/jaxspeed/weights/minilm-l6
Hardware:  any; 15.5 min on two cores (AMD EPYC, Zen 4), evaluation included
Expect:    accuracy 0.884, F1 0.883 on 4,898 held-out reviews
Next:      another BERT by --init (its sizes by --model.num_layers and so on), --task.labels, --data.path mine.jsonl
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
from models.bert import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(
            num_layers=6, d_model=384, d_ff=1536, head="classify", num_labels=2
        ),
        task=TaskConfig(
            name="classification", labels=("neg", "pos"), buckets=(64, 128, 192)
        ),
        steps=240,
        seq_len=256,
        global_batch_size=32,
        optim=OptimConfig(lr=1e-4, b2=0.999, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_steps=30, min_ratio=0.0),
        data=DataConfig(path=("tfds:imdb_reviews",), clean=("html",)),
        checkpoint=CheckpointConfig(every=200),
        eval=EvalConfig(every=0, batches=0),
    )
