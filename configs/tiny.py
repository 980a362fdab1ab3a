# SPDX-License-Identifier: Apache-2.0
"""A byte-level GPT on the bundled Shakespeare: the first run.

Command:   make train        (or: python train.py configs/tiny.py)
Hardware:  any; 2 CPU cores
"""

from jaxspeed.config import (
    CheckpointConfig,
    DTypeConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from models.gpt2 import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(vocab_size=264, max_seq_len=128, num_layers=4, num_heads=4, d_model=128),
        steps=600,
        seq_len=128,
        global_batch_size=32,
        dtype=DTypeConfig(compute="float32"),
        optim=OptimConfig(lr=3e-3, b2=0.99, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=30),
        checkpoint=CheckpointConfig(every=200),
        eval=EvalConfig(every=200, batches=8, prompt="\nROMEO."),
    )
