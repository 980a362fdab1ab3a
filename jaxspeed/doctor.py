# SPDX-License-Identifier: Apache-2.0
"""`jaxspeed doctor`: what this machine has, what works on it, what is missing and how to get it.

It runs products, attention, a collective and a checkpoint for real, in seconds; it does not guess
from version numbers. Layer 4.
"""

import importlib.metadata
import importlib.util
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspeed import launch
from jaxspeed.ambient import Ambient, ambient
from jaxspeed.config import ConfigError
from jaxspeed.ops.attention import attention, choose_attention


PACKAGES = (
    "jaxspeed",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "tokenizers",
    "numpy",
)
EXTRAS = {
    "libtpu": ("tpu", "TPUs, and planning for TPU slices without one"),
    "jax_cuda12_plugin": (
        "cuda12",
        "NVIDIA GPUs with CUDA 12, and planning for them without one",
    ),
    "jax_cuda13_plugin": ("cuda13", "NVIDIA GPUs with CUDA 13"),
    "transformers": ("hf", "GGUF files, and the tests that compare with Hugging Face"),
}


def examine() -> dict[str, Any]:
    """Returns what `jaxspeed doctor --json` prints: machine, versions, devices, checks, extras."""
    launch.quiet()
    devices = jax.devices()
    return {
        "machine": _machine(),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "devices": [_device(d) for d in devices],
        "process": {"index": jax.process_index(), "count": jax.process_count()},
        "checks": [_check(name, run) for name, run in CHECKS.items()],
        "extras": [
            {
                "extra": extra,
                "for": use,
                "installed": importlib.util.find_spec(module) is not None,
                "get": f"pip install 'jaxspeed[{extra}]'",
            }
            for module, (extra, use) in EXTRAS.items()
        ],
    }


def show(findings: dict[str, Any]) -> None:
    """Prints the findings for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    machine = findings["machine"]
    console.print(
        f"{machine['system']}, {machine['cpus']} CPUs, {machine['memory_gib']:.1f} GiB memory"
    )
    console.print(
        ", ".join(f"{name} {version}" for name, version in findings["versions"].items())
    )
    for device in findings["devices"]:
        memory = (
            f", {device['memory_bytes'] / 2**30:.1f} GiB"
            if device["memory_bytes"]
            else ""
        )
        console.print(
            f"device {device['id']}: {device['kind']} ({device['platform']}){memory}"
        )
    table = Table("check", "result", "seconds", "note")
    for check in findings["checks"]:
        table.add_row(
            check["name"],
            "works" if check["works"] else "FAILS",
            f"{check['seconds']:.1f}",
            check["note"],
        )
    console.print(table)
    for extra in findings["extras"]:
        if not extra["installed"]:
            console.print(
                f"not installed: {extra['for']}: {extra['get']}", markup=False
            )


def _machine() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"system": platform.platform(), "cpus": os.cpu_count(), "memory_gib": pages}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device(device: Any) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return {
        "id": device.id, "kind": device.device_kind, "platform": device.platform, "process": device.process_index,
        "memory_bytes": stats.get("bytes_limit", 0), "memories": [m.kind for m in device.addressable_memories()],
    }  # fmt: skip


def _attention(dtype: str) -> Callable[[], str]:
    def run() -> str:
        platform = jax.local_devices()[0].platform
        platform = "gpu" if platform in ("cuda", "rocm") else platform
        shape = (2, 256, 2, 64)
        kernel, why = choose_attention("auto", platform, jnp.dtype(dtype), shape)
        q, k, v = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
        documents = np.repeat([[1, 2], [1, 1]], 128, axis=1).astype(np.int32)
        results = []
        for settings in (
            Ambient(platform=platform, attention="xla"),
            Ambient(platform=platform, compute=jnp.dtype(dtype)),
        ):
            with ambient(settings):
                results.append(jax.jit(lambda *x: attention(*x))(q, k, v, documents))
        difference = np.max(np.abs(np.asarray(results[0]) - np.asarray(results[1])))
        if not difference < 0.05:
            raise RuntimeError(
                f"the {kernel} kernel differs from plain attention by {difference:.2g}"
            )
        return f"{kernel} kernel ({why})"

    return run


def _check(name: str, run: Callable[[], str]) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        note, works = run(), True
    except (ConfigError, ImportError, OSError, RuntimeError, ValueError) as error:
        note, works = " ".join(str(error).split())[:200], False
    return {
        "name": name,
        "works": works,
        "seconds": time.perf_counter() - begin,
        "note": note,
    }


def _collective() -> str:
    count = jax.local_device_count()
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("fsdp",))
    spec = jax.sharding.PartitionSpec("fsdp")
    scatter = jax.shard_map(
        lambda x: jax.lax.psum_scatter(
            jax.lax.all_gather(x, "fsdp", tiled=True), "fsdp", tiled=True
        ),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    result = jax.jit(scatter)(jnp.arange(count, dtype=jnp.float32))
    if not np.array_equal(result, count * np.arange(count)):
        raise RuntimeError(
            "gather and reduce-scatter over the local devices gave a wrong sum"
        )
    return f"gather and reduce-scatter over {count} local device(s)"


def _precision(dtype: str) -> Callable[[], str]:
    def run() -> str:
        x = jnp.full((64, 64), 1 / 8, dtype)
        product = jax.jit(
            lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32)
        )(x)
        if not np.array_equal(product, np.ones((64, 64))):
            raise RuntimeError(f"a {dtype} product is wrong")
        return "products summed in float32"

    return run


def _host_offload() -> str:
    device = jax.local_devices()[0]
    kinds = [m.kind for m in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise RuntimeError(f"this backend has no pinned_host memory, only {kinds}")
    return "pinned_host memory is there"


def _checkpoint() -> str:
    from jaxspeed.checkpoint import Checkpointer

    with tempfile.TemporaryDirectory() as folder:
        x = jnp.arange(8.0)
        with Checkpointer(Path(folder), keep=1, asynchronous=False) as checkpoints:
            checkpoints.save(1, {"params": {"x": x}}, meta={})
            abstract = {
                "params": {
                    "x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                }
            }
            state, _ = checkpoints.restore(1, abstract)
        if not np.array_equal(state["params"]["x"], x):
            raise RuntimeError("a checkpoint came back changed")
    return "written, checked and read back"


def _compile_cache() -> str:
    folder = Path("~/.cache/jaxspeed/xla").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".probe").write_bytes(b"")
    (folder / ".probe").unlink()
    return str(folder)


CHECKS: dict[str, Callable[[], str]] = {
    "bfloat16 products": _precision("bfloat16"),
    "float16 products": _precision("float16"),
    "attention in float32": _attention("float32"),
    "attention in bfloat16": _attention("bfloat16"),
    "attention in float16": _attention("float16"),
    "collectives": _collective,
    "checkpoints": _checkpoint,
    "compilation cache": _compile_cache,
    "host memory for offloading": _host_offload,
}
