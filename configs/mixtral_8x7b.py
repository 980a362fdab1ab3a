# SPDX-License-Identifier: Apache-2.0
"""Mixtral 8x7B (arXiv 2401.04088; 46.7B parameters, 12.9B a token): sequence 4096, experts over eight devices.

Command:   python train.py configs/mixtral_8x7b.py --mesh.expert 8 --data.path DIR_OF_TEXT --data.tokenizer tokenizer.json
Hardware:  a v5p slice of 64 chips (4x4x4), or eight hosts of eight H100
Next:      --init MIXTRAL_FOLDER, --moe.capacity_factor 0 for dropless
"""

from jaxspeed.config import (
    DataConfig,
    MoeConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    ZeroConfig,
)
from models.mixtral import MIXTRAL_8X7B


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=MIXTRAL_8X7B,
        steps=100_000,
        seq_len=4096,
        micro_batch_size=1,
        zero=ZeroConfig(stage=3),
        moe=MoeConfig(capacity_factor=1.25, z_coef=1e-3),
        optim=OptimConfig(lr=2e-4, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=2000),
        data=DataConfig(tokenizer="bpe"),
        remat="full",
    )
