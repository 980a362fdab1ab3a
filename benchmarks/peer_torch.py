# SPDX-License-Identifier: Apache-2.0
"""The same GPT-2 training step by PyTorch and Hugging Face, or by DeepSpeed on CPU.

What a user would run instead of jaxspeed. It shares no code with `bare_jax.py` but prints the
same JSON line, and `--dump FILE` writes the weights and token ids that `bare_jax.py --npz`
starts from. Needs its own environment: `pip install torch==2.13.0 transformers deepspeed`.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/peer_torch.py --vocab 8192 --bf16
"""

import argparse
import json
import logging
import os
import resource
import statistics
import sys
import time


LAYERS, HEADS, D, T, B = 6, 6, 384, 256, 8


def main() -> None:
    """Times the step and writes one JSON line."""
    args = _arguments()
    if args.deepspeed:  # before torch: DeepSpeed reads these when it is imported
        os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "RANK": "0"}
        os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    import torch

    model, ids = _model(args.vocab)
    if args.dump:
        _dump(args.dump, model, ids)
    step = (
        _deepspeed_step(args, model, ids) if args.deepspeed else _step(args, model, ids)
    )
    losses, cpu, wall = [], [], []
    for _ in range(args.warmup + args.steps):
        c, w = time.process_time(), time.perf_counter()
        losses.append(step())
        cpu.append(time.process_time() - c)
        wall.append(time.perf_counter() - w)
    cpu, wall = cpu[args.warmup :], wall[args.warmup :]
    cpu_s, step_s = statistics.median(cpu), statistics.median(wall)
    kind = "deepspeed" if args.deepspeed else "torch"
    out = {
        "name": f"{kind}_{'bf16' if args.bf16 else 'fp32'}",
        "vocab": args.vocab,
        "tok_per_cpu_s": round(B * T / cpu_s, 1),
        "cpu_s": round(cpu_s, 4),
        "cpu_s_min": round(min(cpu), 4),
        "tok_s": round(B * T / step_s, 1),
        "step_s": round(step_s, 4),
        "rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "loss0": round(losses[0], 5),
        "lossN": round(losses[-1], 5),
        "torch": torch.__version__,
    }
    if os.environ.get("PARITY"):
        out["losses"] = [round(x, 5) for x in losses[:8]]
    sys.stdout.write(json.dumps(out) + "\n")


def _model(vocab):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab,
        n_positions=T,
        n_embd=D,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(1))
    return model, ids


def _dump(path, model, ids):
    import numpy as np

    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    np.savez(path, ids=ids.numpy(), **weights)


def _step(args, model, ids):
    import torch

    opt = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.01, fused=args.fused
    )

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _deepspeed_step(args, model, ids):
    import deepspeed
    import torch

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = {
        "train_batch_size": B,
        "zero_optimization": {"stage": args.stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # its default is 1.0 since 0.19.3
        "bf16": {"enabled": args.bf16},
    }
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=opt, config=config)

    def step():
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--stage", type=int, default=0, help="ZeRO stage of DeepSpeed")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dump", help="write weights and token ids to this .npz first")
    parser.add_argument("--port", type=int, default=29577)
    return parser.parse_args()


if __name__ == "__main__":
    main()
