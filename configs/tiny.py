# SPDX-License-Identifier: Apache-2.0
"""A byte-level GPT on the bundled Shakespeare: the first run.

Command:   make train        (or: python train.py configs/tiny.py)
Hardware:  any; two CPU cores take a few minutes
Expect:    about 1.73 nats per byte on held-out scenes, and lines that look like a play
Next:      --virtual_devices 8 --zero.stage 3, --deepspeed ds_config.json, --data.path my.txt
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
        model=Config(
            vocab_size=264, max_seq_len=128, num_layers=4, num_heads=4, d_model=128
        ),
        steps=400,
        seq_len=128,
        global_batch_size=32,
        dtype=DTypeConfig(compute="float32"),
        optim=OptimConfig(
            name="muon",
            lr=4e-3,
            muon_lr=0.02,
            momentum=0.95,
            nesterov=True,
            b2=0.99,
            weight_decay=0.01,
        ),
        schedule=ScheduleConfig(warmup_steps=20),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=200, batches=8, prompt="\nROMEO."),
    )
