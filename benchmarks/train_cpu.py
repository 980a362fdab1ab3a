# SPDX-License-Identifier: Apache-2.0
"""Times jaxspeed's train step on GPT-2's shape, as a user's run would make it. One JSON line.

Weights and data may come from a peer's dump (`--npz`, Hugging Face names), so that `PARITY=1`
prints losses that must equal the peer's to 1e-5. Pin it to one core to compare CPU-seconds:

    taskset -c 0 python benchmarks/train_cpu.py --vocab 8192 [--bf16]
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

import numpy as np

from jaxspeed import launch


def main() -> None:
    """Runs the benchmark."""
    args = _arguments()
    launch.quiet()
    launch.keep_freed_memory()
    import jax

    from jaxspeed.config import (
        DTypeConfig,
        MeshConfig,
        OptimConfig,
        RunConfig,
        ScheduleConfig,
        ZeroConfig,
    )
    from jaxspeed.program import build_program
    from models.gpt2 import Config

    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    run = RunConfig(
        model=Config(vocab_size=args.vocab, max_seq_len=args.seq, num_layers=args.layers, num_heads=args.heads, d_model=args.dim),
        steps=1_000, seq_len=args.seq, global_batch_size=args.batch, accumulate=args.accumulate,
        mesh=MeshConfig(), zero=ZeroConfig(stage=args.stage),
        dtype=DTypeConfig(compute="bfloat16" if args.bf16 else "float32"),
        optim=OptimConfig(lr=1e-4, b2=0.999, weight_decay=0.01, decay="all", clip_norm=0.0),
        schedule=ScheduleConfig(name="constant"), remat=args.remat,
    )  # fmt: skip
    program = build_program(run)
    state = program.init_state()
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, args.vocab, (args.batch, args.seq), np.int32)
    if args.npz:
        dump = np.load(args.npz)
        inputs = dump["ids"].astype(np.int32)
        state["params"] = jax.tree.map(
            jax.device_put, _from_hugging_face(dump, args), program.shardings["params"]
        )
    step = program.lower_step(["inputs"]).compile()
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(step.as_text() or "")
    batch = {"inputs": inputs}
    losses, walls, cpus = [], [], []
    for i in range(args.warmup + args.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        state, metrics = step(state, program.put_batch(batch))
        losses.append(float(metrics["train/loss"]))
        if i >= args.warmup:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    tokens = args.batch * args.seq
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row = {
        "name": f"jaxspeed_{'bf16' if args.bf16 else 'fp32'}", "vocab": args.vocab, "devices": args.devices, "stage": args.stage,
        "tok_per_cpu_s": round(tokens / statistics.median(cpus), 1), "tok_s": round(tokens / statistics.median(walls), 1),
        "step_s": round(statistics.median(walls), 4), "rss_gb": round(peak, 2), "loss0": round(losses[0], 5), "lossN": round(losses[-1], 5),
    }  # fmt: skip
    if os.environ.get("PARITY"):
        row = {"parity": "jaxspeed", "losses": [round(x, 5) for x in losses[:8]]}
    sys.stdout.write(json.dumps(row) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {
        "vocab": 8192,
        "layers": 6,
        "heads": 6,
        "dim": 384,
        "seq": 256,
        "batch": 8,
        "warmup": 2,
        "steps": 8,
        "devices": 1,
        "accumulate": 1,
        "stage": 0,
    }
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--npz", help="weights and ids dumped by a peer")
    parser.add_argument("--hlo", help="write the optimised program here")
    return parser.parse_args()


def _from_hugging_face(dump: "np.lib.npyio.NpzFile", args: argparse.Namespace) -> dict:
    """Returns jaxspeed's parameters from GPT2LMHeadModel's state_dict."""
    D, N, H = args.dim, args.heads, args.dim // args.heads

    def stack(name: str) -> np.ndarray:
        return np.stack([dump[f"transformer.h.{i}.{name}"] for i in range(args.layers)])

    qkv, bias = stack("attn.c_attn.weight"), stack("attn.c_attn.bias")
    wq, wk, wv = (x.reshape(-1, D, N, H) for x in np.split(qkv, 3, -1))
    bq, bk, bv = (x.reshape(-1, N, H) for x in np.split(bias, 3, -1))
    attn = {"wq": wq, "wk": wk, "wv": wv, "bq": bq, "bk": bk, "bv": bv}
    attn |= {
        "wo": stack("attn.c_proj.weight").reshape(-1, N, H, D),
        "bo": stack("attn.c_proj.bias"),
    }
    mlp = {
        "w_up": stack("mlp.c_fc.weight"),
        "b_up": stack("mlp.c_fc.bias"),
        "w_down": stack("mlp.c_proj.weight"),
        "b_down": stack("mlp.c_proj.bias"),
    }
    norm = lambda name: {
        "scale": stack(f"{name}.weight"),
        "bias": stack(f"{name}.bias"),
    }
    return {
        "embed": dump["transformer.wte.weight"],
        "positions": dump["transformer.wpe.weight"],
        "final_norm": {
            "scale": dump["transformer.ln_f.weight"],
            "bias": dump["transformer.ln_f.bias"],
        },
        "layers": {
            "block": {
                "attn": attn,
                "mlp": mlp,
                "attn_norm": norm("ln_1"),
                "mlp_norm": norm("ln_2"),
            }
        },
    }


if __name__ == "__main__":
    main()
