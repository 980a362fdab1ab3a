# SPDX-License-Identifier: Apache-2.0
"""Llama 2 7B (arXiv 2307.09288) under ZeRO stage 3: sequence 4096, four sequences a chip on 64 chips.

Command:   python train.py configs/llama2_7b.py --data.path DIR_OF_TEXT --data.tokenizer tokenizer.json
Hardware:  a v5p slice of 64 chips (4x4x4), or eight hosts of eight H100; 12 bytes a parameter / 64 of state a chip
"""

from jaxspeed.config import (
    DataConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    ZeroConfig,
)
from models.llama import LLAMA2_7B


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=LLAMA2_7B,
        steps=100_000,
        seq_len=4096,
        micro_batch_size=4,
        zero=ZeroConfig(stage=3),
        optim=OptimConfig(lr=3e-4, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=2000),
        data=DataConfig(tokenizer="bpe"),
        remat="full",
    )
