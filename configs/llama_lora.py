# SPDX-License-Identifier: Apache-2.0
"""LoRA: SmolLM2-135M-Instruct learns to write Shakespeare, through 2.4M new parameters.

Once:      jaxspeed data smollm2-135m-instruct    (prints where the GGUF file lies)
           jaxspeed import FILE --to imported/smollm2
Command:   python train.py configs/llama_lora.py --init imported/smollm2
Hardware:  two CPU cores: 9 minutes beside compilers; 0.6 GB of state (float32 model on CPU; half of that elsewhere)
Expect:    held-out loss 3.92 nats a token after 60 updates, 4.42 before
Next:      jaxspeed generate runs/llama_lora --prompt "ROMEO.", jaxspeed export runs/llama_lora --to peft adapters;
           another model by --init (its sizes by --model.num_layers and so on), --data.path mine.txt
"""

from jaxspeed.config import (
    EvalConfig,
    LoraConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from models.llama import Config


def config() -> RunConfig:
    """Returns the recipe."""
    return RunConfig(
        model=Config(
            vocab_size=49_152,
            max_seq_len=8192,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            d_model=576,
            head_dim=64,
            d_ff=1536,
            rope_theta=100_000.0,
            tie_embeddings=True,
        ),
        lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05),
        steps=60,
        seq_len=128,
        global_batch_size=8,
        optim=OptimConfig(lr=1e-3, b2=0.99),
        schedule=ScheduleConfig(warmup_steps=5),
        eval=EvalConfig(every=0, batches=8, prompt="\nROMEO.", sample_tokens=60),
    )
