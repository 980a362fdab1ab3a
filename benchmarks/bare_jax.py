# SPDX-License-Identifier: Apache-2.0
"""A GPT-2 training step written by hand in jax and optax: the bar that jaxspeed is held to.

It is one file without abstractions, and not a second engine: no mesh, no checkpoint, no
configuration. It imports nothing of jaxspeed, so the ratio of the two says what the library
costs. Weights and data come from the file that `peer_torch.py --dump` writes, so the
losses can be compared with PyTorch's to the fifth digit.

    taskset -c 1 python benchmarks/bare_jax.py --vocab 8192 --bf16 --npz weights.npz

The one design decision: every product is arranged so that XLA's CPU backend gives it to its
quick matrix library. That library takes a product only if the left operand is contracted over
its last dimension and no operand is a bare transpose; anything else falls back to fp32 loops
at half the speed of bf16. On other backends the arrangement costs nothing.
"""

import argparse
import ctypes
import functools
import json
import os
import resource
import statistics
import sys
import time
from typing import Any


os.environ.setdefault("JAX_PLATFORMS", "cpu")
if sys.platform == "linux":  # keep freed memory; must happen before jax starts threads
    for _option, _value in ((-8, 1), (-4, 0), (-1, -1)):  # one arena, no mmap, no trim
        ctypes.CDLL(None).mallopt(_option, _value)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


LAYERS, HEADS, D, T, B = 6, 6, 384, 256, 8
H = D // HEADS
M = B * T
LOSS_CHUNK = 1024  # tokens of logits alive at once
KEY_BLOCK = 128  # keys per block of causal attention
MASKED = -1e30
BARRIER = lax.optimization_barrier


def main() -> None:
    """Times the step and writes one JSON line."""
    args = _arguments()
    params, ids = _load(args.npz) if args.npz else _random(args.vocab)
    tx = optax.adamw(1e-4, weight_decay=0.01)
    opt = tx.init(params)
    step = make_step(tx, jnp.bfloat16 if args.bf16 else jnp.float32)
    started = time.perf_counter()
    compiled = step.lower(params, opt, ids).compile()
    compile_s = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None
    losses, cpu, wall = [], [], []
    for _ in range(args.warmup + args.steps):
        c, w = time.process_time(), time.perf_counter()
        params, opt, loss = compiled(params, opt, ids)
        losses.append(float(loss))
        jax.block_until_ready((params, opt))
        cpu.append(time.process_time() - c)
        wall.append(time.perf_counter() - w)
    cpu, wall = cpu[args.warmup :], wall[args.warmup :]
    cpu_s, step_s = statistics.median(cpu), statistics.median(wall)
    out = {
        "name": f"bare_jax_{'bf16' if args.bf16 else 'fp32'}",
        "vocab": int(params["wte"].shape[0]),
        "tok_per_cpu_s": round(M / cpu_s, 1),
        "cpu_s": round(cpu_s, 4),
        "cpu_s_min": round(min(cpu), 4),
        "tok_s": round(M / step_s, 1),
        "step_s": round(step_s, 4),
        "compile_s": round(compile_s, 1),
        "rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "temp_mb": memory.temp_size_in_bytes >> 20,
        "loss0": round(losses[0], 5),
        "lossN": round(losses[-1], 5),
        "jax": jax.__version__,
    }
    if os.environ.get("PARITY"):
        out["losses"] = [round(x, 5) for x in losses[:8]]
    sys.stdout.write(json.dumps(out) + "\n")


def make_step(tx, dtype):
    """Returns the jitted, donated `(params, opt, ids) -> (params, opt, loss)`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt, ids):
        loss, grads = jax.value_and_grad(_loss)(params, ids, dtype)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    return step


def _loss(params, ids, dtype):
    x = (params["wte"][ids] + params["wpe"]).reshape(M, D)

    def body(x, layer):
        return _block(x, layer, dtype), None

    x, _ = lax.scan(body, x, params["layers"])
    x = _layer_norm(x, *params["ln_f"], dtype)
    mask = jnp.broadcast_to(jnp.arange(T) < T - 1, (B, T)).reshape(M)
    total, count = _cross_entropy(
        x, params["wte"], jnp.roll(ids, -1, 1).reshape(M), mask, dtype
    )
    return total / count


def _block(x, layer, dtype):
    h = _layer_norm(x, *layer["ln_1"], dtype)
    q, k, v = (
        _linear(h, *layer[name], dtype).reshape(B, T, HEADS, H) for name in "qkv"
    )
    h = _attention(q, k, v, dtype).reshape(M, D)
    x = x + _linear(h, *layer["proj"], dtype)
    h = _layer_norm(x, *layer["ln_2"], dtype)
    h = _gelu(_linear(h, *layer["fc"], dtype), dtype)
    return x + _linear(h, *layer["out"], dtype)


def _dot(a, b, contract_b=0):
    """Returns a @ b (or a @ b.T) in fp32; `a` is contracted over its last dimension."""
    batch = tuple(range(a.ndim - 2))
    dims = ((a.ndim - 1,), (a.ndim - 2 + contract_b,))
    return lax.dot_general(
        a, b, (dims, (batch, batch)), preferred_element_type=jnp.float32
    )


def _transpose(x):
    """Swaps the last two dimensions so that XLA keeps the copy.

    A plain `x.T` is folded into the product that reads it, which then misses the quick
    library. A transpose of one more dimension followed by a reshape is not folded.
    """
    *lead, m, n = x.shape
    split = next(s for s in (8, 4, 2, 1) if m % s == 0)
    axes = (*range(len(lead)), len(lead) + 2, len(lead), len(lead) + 1)
    return x.reshape(*lead, split, m // split, n).transpose(axes).reshape(*lead, n, m)


def _pack(x):
    """bf16 as uint16: XLA on CPU would turn a stack of bf16 residuals into fp32."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _unpack(x):
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _custom_vjp(static: int) -> Any:
    return functools.partial(jax.custom_vjp, nondiff_argnums=(static,))


@_custom_vjp(3)
def _linear(x, w, b, dtype):
    return _linear_fwd(x, w, b, dtype)[0]


def _linear_fwd(x, w, b, dtype):
    x = x.astype(dtype)
    return _dot(x, w.astype(dtype)) + b, (_pack(x), w)


def _linear_bwd(dtype, saved, g):
    x, w = _unpack(saved[0]), saved[1].astype(dtype)
    g = g.astype(dtype)
    if dtype == jnp.float32:  # both contract over rows: fp32 loses nothing by it
        dw = lax.dot_general(x, g, (((0,), (0,)), ((), ())))
    elif x.shape[1] <= g.shape[1]:
        dw = _dot(_transpose(x), g)
    else:  # transpose the smaller operand; the barrier keeps XLA from undoing it
        dw = BARRIER(_dot(_transpose(g), x)).T
    return _dot(g, w, 1), dw, g.sum(0, dtype=jnp.float32)


_linear.defvjp(_linear_fwd, _linear_bwd)


@_custom_vjp(3)
def _layer_norm(x, scale, bias, dtype):
    return _layer_norm_fwd(x, scale, bias, dtype)[0]


def _layer_norm_fwd(x, scale, bias, dtype):
    centred = x - x.mean(-1, keepdims=True)
    rstd = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    normal = centred * rstd
    return normal * scale + bias, (_pack(normal.astype(dtype)), rstd, scale)


def _layer_norm_bwd(dtype, saved, g):
    normal, rstd, scale = _unpack(saved[0]).astype(jnp.float32), *saved[1:]
    d = g * scale
    mean, inner = d.mean(-1, keepdims=True), (d * normal).mean(-1, keepdims=True)
    return rstd * (d - mean - normal * inner), (g * normal).sum(0), g.sum(0)


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


@_custom_vjp(1)
def _gelu(x, dtype):
    return _gelu_fwd(x, dtype)[0]


def _gelu_fwd(x, dtype):
    return 0.5 * x * (1 + _gelu_tanh(x)), _pack(x.astype(dtype))


def _gelu_bwd(dtype, saved, g):
    x = _unpack(saved).astype(jnp.float32)
    t = _gelu_tanh(x)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x * x)
    return (g * 0.5 * (1 + t + x * (1 - t * t) * slope),)


def _gelu_tanh(x):
    return jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x))


_gelu.defvjp(_gelu_fwd, _gelu_bwd)


@_custom_vjp(3)
def _attention(q, k, v, dtype):
    return _attention_fwd(q, k, v, dtype)[0]


def _attention_fwd(q, k, v, dtype):
    """Scores are kept as (key, query), one sequence at a time so that they stay in cache."""

    def sequence(_, qkv):
        q, k, v = (x.astype(dtype) for x in qkv)
        q, k = _heads(q * dtype(H**-0.5)), _heads(k)
        v_t = _heads_t(v)
        v_ones = jnp.concatenate([v_t, jnp.ones((HEADS, 1, T), dtype)], 1)
        outs, lses = [], []
        for start in range(
            0, T, KEY_BLOCK
        ):  # blocks of queries; keys after them unseen
            stop = start + KEY_BLOCK
            s = _mask(_dot(k[:, :stop], q[:, start:stop], 1), start)
            top = s.max(1)
            e = jnp.exp(s - top[:, None]).astype(dtype)
            o = _dot(v_ones[:, :, :stop], e)  # the row of ones gives the normaliser
            outs.append(o[:, :H] * (1 / o[:, H:]))
            lses.append(top + jnp.log(o[:, H]))
        out = jnp.concatenate(outs, 2).transpose(2, 0, 1)
        saved = _pack(q), _pack(k), _pack(_heads(v)), jnp.concatenate(lses, 1)
        return None, (out, saved)

    _, (out, saved) = lax.scan(sequence, None, (q, k, v))
    return out, (saved, _pack(out.astype(dtype)))


def _attention_bwd(dtype, residuals, g):
    """Scores are computed again: cheaper than to keep (B, N, T, T) for every layer."""
    saved, out = residuals
    delta = (g * _unpack(out).astype(jnp.float32)).sum(-1)

    def sequence(_, x):
        (q, k, v, lse), delta, g = x
        q, k, v = _unpack(q), _unpack(k), _unpack(v)
        k_t, g, delta = _transpose(k), _heads(g.astype(dtype)), delta.T[:, None]
        dks, dvs, dq = [], [], None
        for start in range(
            0, T, KEY_BLOCK
        ):  # blocks of keys; queries before them unseen
            block = slice(start, start + KEY_BLOCK)
            s = _mask(_dot(k[:, block], q[:, start:], 1), 0)
            p = BARRIER(jnp.exp(s - lse[:, None, start:]).astype(dtype))
            dp = _dot(v[:, block], g[:, start:], 1)
            ds = (p.astype(jnp.float32) * (dp - delta[:, :, start:])).astype(dtype)
            dvs.append(_dot(p, g[:, start:]))
            dks.append(_dot(ds, q[:, start:]))
            d = _dot(k_t[:, :, block], ds)
            if dq is None:
                dq = d
            else:
                dq = jnp.concatenate([dq[:, :, :start], dq[:, :, start:] + d], 2)
        dk, dv = (jnp.concatenate(x, 1).transpose(1, 0, 2) for x in (dks, dvs))
        return None, ((dq * H**-0.5).transpose(2, 0, 1), dk, dv)

    return lax.scan(sequence, None, (saved, delta, g))[1]


_attention.defvjp(_attention_fwd, _attention_bwd)


def _heads(x):
    return x.reshape(1, T, HEADS, H).transpose(0, 2, 1, 3).reshape(HEADS, T, H)


def _heads_t(x):
    return x.reshape(1, T, HEADS, H).transpose(0, 2, 3, 1).reshape(HEADS, H, T)


def _mask(s, query_start):
    key = lax.broadcasted_iota(jnp.int32, s.shape[1:], 0)
    query = query_start + lax.broadcasted_iota(jnp.int32, s.shape[1:], 1)
    return jnp.where(key <= query, s, MASKED)


@_custom_vjp(4)
def _cross_entropy(h, w, targets, mask, dtype):
    return _cross_entropy_fwd(h, w, targets, mask, dtype)[0]


def _cross_entropy_fwd(h, w, targets, mask, dtype):
    """Takes loss and gradients of a chunk of tokens together; logits never outlive it."""
    w = w.astype(dtype)

    def chunk(carry, x):
        total, dw = carry
        h, targets, mask = x
        h = h.astype(dtype)
        logits = _dot(h, w, 1)
        top = logits.max(1)
        lse = top + jnp.log(jnp.exp(logits - top[:, None]).sum(1))
        at_target = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
        d = ((jnp.exp(logits - lse[:, None]) - hit) * mask[:, None]).astype(dtype)
        total = total + ((lse - at_target) * mask).sum()
        return (total, dw + _dot(_transpose(h), d)), _dot(d, w)

    split = lambda x: x.reshape(M // LOSS_CHUNK, LOSS_CHUNK, *x.shape[1:])
    zero = jnp.float32(0), jnp.zeros((D, w.shape[0]), jnp.float32)
    (total, dw), dh = lax.scan(
        chunk, zero, (split(h), split(targets), split(mask.astype(jnp.float32)))
    )
    return (total, mask.sum(dtype=jnp.float32)), (dh.reshape(M, D), dw)


def _cross_entropy_bwd(dtype, saved, g):
    dh, dw = saved
    return dh * g[0], (dw * g[0]).T, None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _load(path):
    z = np.load(path)
    get = lambda name: jnp.asarray(
        np.stack([z[f"transformer.h.{i}.{name}"] for i in range(LAYERS)])
    )
    pair = lambda name: (get(f"{name}.weight"), get(f"{name}.bias"))
    w, b = pair("attn.c_attn")
    layers = {
        c: (w[..., i * D : (i + 1) * D], b[..., i * D : (i + 1) * D])
        for i, c in enumerate("qkv")
    }
    names = {
        "ln_1": "ln_1",
        "ln_2": "ln_2",
        "proj": "attn.c_proj",
        "fc": "mlp.c_fc",
        "out": "mlp.c_proj",
    }
    layers |= {ours: pair(theirs) for ours, theirs in names.items()}
    top = lambda name: jnp.asarray(z[f"transformer.{name}"])
    params = {
        "wte": top("wte.weight"),
        "wpe": top("wpe.weight"),
        "ln_f": (top("ln_f.weight"), top("ln_f.bias")),
        "layers": layers,
    }
    return params, jnp.asarray(z["ids"], jnp.int32)


def _random(vocab):
    keys = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
    linear = lambda m, n: (normal(LAYERS, m, n), jnp.zeros((LAYERS, n)))
    norm = lambda *lead: (jnp.ones((*lead, D)), jnp.zeros((*lead, D)))
    layers = {"ln_1": norm(LAYERS), "ln_2": norm(LAYERS), "proj": linear(D, D)}
    layers |= {c: linear(D, D) for c in "qkv"}
    layers |= {"fc": linear(D, 4 * D), "out": linear(4 * D, D)}
    params = {
        "wte": normal(vocab, D),
        "wpe": normal(T, D),
        "ln_f": norm(),
        "layers": layers,
    }
    return params, jax.random.randint(next(keys), (B, T), 0, vocab)


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--npz", help="weights and token ids to start from")
    parser.add_argument(
        "--json", action="store_true", help="the default, and the only form"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
