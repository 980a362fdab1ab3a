# SPDX-License-Identifier: Apache-2.0
"""Speech recognition: a small Whisper (4M parameters) from scratch on 20 minutes of spoken prompts.

Once:      jaxspeed data jaxspeed_prompts    (480 prompts of one voice to train on, docs/data.md)
Command:   python train.py configs/whisper_speech.py
Hardware:  any; measured ones are in benchmarks/results/tasks.md
Expect:    after these 600 updates (17 minutes on two cores) little yet: a word error rate of 1.10 on held-out
           prompts and of 1.14 on those it was trained on; the loss still falls
Next:      --init WHISPER_FOLDER (with its sizes by --model...) for a model that has heard more
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
from models.whisper import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(
            vocab_size=264,
            num_mel_bins=80,
            max_source_len=600,
            max_seq_len=256,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            d_model=192,
            d_ff=768,
            dropout=0.1,
            pad_id=256,
            end_id=256,
            start_id=257,
        ),
        task=TaskConfig(name="speech", input_fields=("speech", "sample_rate")),
        steps=600,
        seq_len=256,
        global_batch_size=16,
        optim=OptimConfig(lr=1e-3, b2=0.98, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_steps=60),
        data=DataConfig(path=("tfds:jaxspeed_prompts",), tokenizer="byte"),
        checkpoint=CheckpointConfig(every=200),
        eval=EvalConfig(every=0, batches=0),
    )
