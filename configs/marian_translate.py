# SPDX-License-Identifier: Apache-2.0
"""English to German, by a small Marian (6.6M parameters) from scratch on the help pages of LibreOffice.

Once:      jaxspeed data jaxspeed_help_en_de    (32,000 sentence pairs, docs/data.md)
Command:   python train.py configs/marian_translate.py
Hardware:  two CPU cores: 36 minutes beside other work
Expect:    BLEU 26.4 and chrF 53.6 on held-out pages (a copy of the English: 5.7 and 21.6; benchmarks/results/tasks.md)
Next:      --init OPUS_MT_FOLDER (with its sizes by --model...), --data.path tfds:wmt16_translate/de-en
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
from models.bart import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(
            vocab_size=4096,
            max_seq_len=128,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            d_model=256,
            d_ff=1024,
            activation="relu",
            norm_first=True,
            embed_norm=False,
            sinusoids=True,
            scale_embedding=True,
            dropout=0.1,
            pad_id=0,
            end_id=1,
            start_id=0,
        ),
        task=TaskConfig(
            name="seq2seq",
            input_fields=("en",),
            target_field="de",
            max_target_len=96,
            buckets=(32, 64),
        ),
        steps=2500,
        seq_len=96,
        global_batch_size=64,
        optim=OptimConfig(lr=1e-3, b2=0.98, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_steps=300),
        data=DataConfig(path=("tfds:jaxspeed_help_en_de",), tokenizer="unigram"),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=0, batches=0),
    )
