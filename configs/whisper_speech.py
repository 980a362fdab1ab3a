# SPDX-License-Identifier: Apache-2.0
"""Speech recognition: a small Whisper (4M parameters) from scratch on 20 minutes of spoken prompts.

Once:      jaxspeed data jaxspeed_prompts    (480 prompts of one voice to train on, docs/data.md)
Command:   python train.py configs/whisper_speech.py
Hardware:  any; measured ones are in benchmarks/results/tasks.md
Expect:    after these 3,000 updates (half an hour on two cores) a word error rate of 0.04 on the prompts it was
           trained on and of 0.79 on held-out ones, of which it gets the short ones: 20 minutes of one voice are
           enough to show that all works, not to recognise speech
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
        task=TaskConfig(
            name="speech", input_fields=("speech", "sample_rate"), buckets=(32, 64, 128)
        ),
        steps=3000,
        seq_len=256,
        global_batch_size=16,
        optim=OptimConfig(lr=1e-3, b2=0.98, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_steps=200),
        data=DataConfig(path=("tfds:jaxspeed_prompts",), tokenizer="byte"),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=0, batches=0),
    )
