# SPDX-License-Identifier: Apache-2.0
"""Times transformers' generate with its key-value cache on GPT-2's shape. One JSON line.

`--folder` is where the model is kept for `generate_cpu.py`: made at random the first time. Runs in
the environment of the extra hf; it imports torch and transformers.

    taskset -c 0 python benchmarks/peer_generate.py --folder runs/bench/gpt2 [--batch 1] [--bf16]
"""

from typing import Any

import numpy as np
import torch
from generate_workload import arguments, prompts, report
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    """Runs the benchmark."""
    args = arguments(__doc__)
    torch.set_num_threads(args.threads)
    if not (args.folder / "config.json").exists():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=args.vocab, n_positions=256, n_embd=384, n_layer=6, n_head=6,
            bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        new = GPT2LMHeadModel(config)
        with (
            torch.no_grad()
        ):  # as after training: greedy text does not repeat itself at once
            for parameter in new.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        new.save_pretrained(args.folder)
    made: Any = GPT2LMHeadModel.from_pretrained(args.folder, attn_implementation="sdpa")
    model: Any = made.eval().to(torch.bfloat16 if args.bf16 else torch.float32)
    ids = torch.from_numpy(prompts(args))

    def write() -> np.ndarray:
        with torch.no_grad():
            texts = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=args.new, min_new_tokens=args.new,
            )  # fmt: skip
        return texts[:, args.prompt :].numpy()

    report("transformers", args, write)


if __name__ == "__main__":
    main()
