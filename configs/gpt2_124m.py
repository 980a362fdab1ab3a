# SPDX-License-Identifier: Apache-2.0
"""GPT-2 124M (Radford et al. 2019) from scratch.

Command:   python train.py configs/gpt2_124m.py --data.path DIR_OF_TEXT --data.tokenizer tokenizer.json
Hardware:  any TPU slice or GPU host; the batch of 512 sequences of 1024 tokens is made up by accumulation
Data:      bring your own: .txt, .jsonl or .parquet files, or tfds:NAME; without --data.path it is the bundled
           text with a BPE trained on it, to try the machine out
Next:      --zero.stage 3 and --mesh.data to shard the state within a host and replicate it over hosts
"""

from jaxspeed.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    ZeroConfig,
)
from models.gpt2 import SMALL


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=SMALL,
        steps=19_073,
        seq_len=1024,
        global_batch_size=512,
        micro_batch_size=16,
        zero=ZeroConfig(stage=1),
        optim=OptimConfig(lr=6e-4, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=700),
        data=DataConfig(tokenizer="bpe"),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, batches=20),
        remat="dots",
    )
