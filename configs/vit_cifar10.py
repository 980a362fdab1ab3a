# SPDX-License-Identifier: Apache-2.0
"""Classes of small pictures (CIFAR-10), by a ViT from scratch.

Once:      jaxspeed data cifar10    (8,943 pictures to train on, a fifth of the public set: docs/data.md)
Command:   python train.py configs/vit_cifar10.py
Hardware:  two CPU cores: 9.5 minutes beside compilers
Expect:    45.2 % of held-out pictures right (a guess: 10 %); 8,943 pictures are few for a ViT
Next:      a trained ViT by --init (its sizes by --model.image_size and so on), --data.path mine.jsonl
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
from models.vit import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(
            image_size=32,
            patch_size=4,
            num_layers=4,
            num_heads=4,
            d_model=128,
            d_ff=512,
            dropout=0.1,
            num_labels=10,
        ),
        task=TaskConfig(name="image_classification"),
        steps=1400,
        seq_len=64,
        global_batch_size=64,
        optim=OptimConfig(lr=1e-3, b2=0.98, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=100, min_ratio=0.0),
        data=DataConfig(path=("tfds:cifar10",)),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=0, batches=0),
    )
