# SPDX-License-Identifier: Apache-2.0
"""Answers in passages (SQuAD), by a MiniLM (22.7M parameters) that is fine-tuned.

Once:      jaxspeed data squad minilm-l6    (it trains on SQuADShifts: SQuAD's own training set needs the network, docs/data.md)
Command:   python train.py configs/bert_squad.py --init ~/.cache/jaxspeed/weights/minilm-l6
Hardware:  any; 64 min on two cores (AMD EPYC, Zen 4) beside tests, evaluation included
Expect:    exact match 60.9 and F1 73.6 on the 10,570 questions of SQuAD v1.1's development set
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
        model=Config(num_layers=6, d_model=384, d_ff=1536, head="span"),
        task=TaskConfig(name="question_answering", stride=64, buckets=(128, 192)),
        steps=1300,
        seq_len=256,
        global_batch_size=24,
        optim=OptimConfig(lr=1e-4, b2=0.999, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_steps=130, min_ratio=0.0),
        data=DataConfig(path=("tfds:squad",)),
        checkpoint=CheckpointConfig(every=200),
        eval=EvalConfig(every=0, batches=0),
    )
