# SPDX-License-Identifier: Apache-2.0
"""English to German, by a small T5 (5M parameters) from scratch on the help pages of LibreOffice.

Once:      jaxspeed data jaxspeed_help_en_de    (32,000 sentence pairs, docs/data.md)
Command:   python train.py configs/t5_translate.py
Hardware:  two CPU cores: 107 minutes beside other work, about an hour alone
Expect:    BLEU 7.1 and chrF 23.3 on held-out pages (a copy of the English: 5.7 and 21.6; benchmarks/results/tasks.md)
Next:      --init FLAN_T5_FOLDER (with its sizes by --model...), --data.path tfds:wmt16_translate/de-en
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
from models.t5 import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(
            vocab_size=4096,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            d_model=256,
            head_dim=64,
            d_ff=512,
            gated=True,
            dropout=0.1,
        ),
        task=TaskConfig(
            name="seq2seq",
            input_fields=("en",),
            target_field="de",
            max_target_len=96,
            buckets=(32, 64),
        ),
        steps=5000,
        seq_len=96,
        global_batch_size=64,
        optim=OptimConfig(lr=1e-3, b2=0.98, weight_decay=0.01),
        schedule=ScheduleConfig(warmup_steps=400),
        data=DataConfig(path=("tfds:jaxspeed_help_en_de",), tokenizer="unigram"),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=0, batches=0),
    )
