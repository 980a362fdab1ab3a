# SPDX-License-Identifier: Apache-2.0
"""A byte-level LSTM on the bundled Shakespeare, of the size and on as much text as the Transformer of configs/tiny.py.

Command:   python train.py configs/lm_rnn.py
Hardware:  any; 1 min 54 s on two cores (AMD EPYC, Zen 4)
Expect:    1.60 nats per byte on held-out scenes
Next:      --model.cell gru, --data.path my.txt
"""

from jaxspeed.config import (
    CheckpointConfig,
    DTypeConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from models.rnn import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(cell="lstm", vocab_size=264, num_layers=2, d_model=224),
        steps=400,
        seq_len=128,
        global_batch_size=32,
        dtype=DTypeConfig(compute="float32"),
        optim=OptimConfig(name="adamw", lr=8e-3, b2=0.99, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_steps=20),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=200, batches=8, prompt="\nROMEO."),
    )
