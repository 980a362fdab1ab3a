# SPDX-License-Identifier: Apache-2.0
"""Adapters in the files of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`, both ways.

A family's table (`jaxspeed.hf.Row`) says how a matrix lies over there; the rows of its A and B follow
from that. Where several of our matrices are one of theirs (GPT-2's c_attn is query, key and value)
their adapters become one of as many times the rank, whose B is zero off the blocks; such a one, or
one of the plain rank, becomes theirs again. Reading is strict, as for models. Layer 3.
"""

import functools
import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspeed.config import ConfigError, LoraConfig, config_error
from jaxspeed.hf import (
    Part,
    Row,
    architecture_of,
    exchange_of,
    parts_of,
    read_shard,
    tensors_of,
)
from jaxspeed.lora import ADAPTERS, scale_of
from jaxspeed.paths import dotted, paths_of, subtree
from jaxspeed.tensorfiles import TensorInfo, read_file, write_folder
from jaxspeed.types import Params


CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

TASK_TYPES = {
    "CausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""PEFT's `task_type`, by the end of the architecture's name."""

REFUSED = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "layer_replication": (None,),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
}
"""Settings of adapter_config.json, and the values that are done here."""


def write_adapters(
    params: Params,
    model_config: Any,
    lora: LoraConfig,
    trained: Collection[str],
    folder: str | Path,
    *,
    base: str,
    dtype: Any,
) -> list[Path]:
    """Writes adapters, and what is trained beside them, as a folder that PEFT loads; returns its files.

    Args:
        params: of the whole model, adapters included, on this process's devices.
        model_config: the family's Config.
        lora: what the adapters are.
        trained: paths of the model's own parameters that are trained (PEFT: modules_to_save).
        folder: made if it is not there; must hold no tensors.
        base: the folder or name of the model that they adapt.
        dtype: of the tensors written.

    Raises:
        ConfigError: PEFT's format cannot hold them, or the folder cannot be written.
    """
    arrays, dtype = paths_of(params), np.dtype(dtype)
    modules = _modules(model_config, arrays)
    saved = _saved(model_config, modules, trained)
    rows = _rows(modules, saved)
    parts = parts_of(rows, {path: arrays[path] for row in rows for path in row.paths})
    several = {name: k for _, name, k in _of_several(modules, parts)}
    tensors = (
        (name, _spread(info, several.get(name, 1))._replace(dtype=dtype))
        for name, info in tensors_of(parts, arrays)
    )
    settings = _settings(model_config, lora, modules, saved, base)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    return write_folder(
        Path(folder).expanduser(),
        tensors,
        shard_bytes=sys.maxsize,
        texts={CONFIG: text},
        single=TENSORS,
    )


def read_adapters(
    folder: str | Path,
    model_config: Any,
    lora: LoraConfig,
    trained: Collection[str],
    abstract_params: Params,
) -> Params:
    """Returns the adapters of a PEFT folder, and what was trained beside them, in the dtypes and shards asked for.

    Args:
        folder: holds the two files.
        model_config: of the model that takes them.
        lora: of the run that takes them; the folder's must be the same.
        trained: paths of the model's own parameters that the folder must hold.
        abstract_params: a ShapeDtypeStruct with its NamedSharding for every leaf of the model.

    Raises:
        ConfigError: the folder is damaged, or its adapters are others.
    """
    folder = Path(folder).expanduser()
    settings = _read_settings(folder / CONFIG)
    tensors = read_file(folder / TENSORS)
    leaves = paths_of(abstract_params)
    modules = _modules(model_config, leaves)
    rows = _rows(modules, _saved(model_config, modules, trained))
    wanted = subtree(abstract_params, {path for row in rows for path in row.paths})
    parts = parts_of(rows, paths_of(wanted))
    names = {name for part in parts.values() for name in part.names}
    if missing := sorted(names - set(tensors)):
        raise ConfigError(
            f"{folder}: lacks {missing[0]}, which lora.targets or lora.trained ask for; leave its matrix out there"
        )
    if unknown := sorted(set(tensors) - names):
        raise ConfigError(
            f"{folder}: holds {unknown[0]}, which lora.targets and lora.trained leave out; name its matrix there"
        )
    _check_scales(folder, settings, lora, modules, parts, tensors)
    for a, b, k in _of_several(modules, parts):
        tensors[a], tensors[b] = _apart(folder, tensors[a], tensors[b], k, lora.rank)
    for part in parts.values():
        for name in part.names:
            if tensors[name].shape != part.shape_there:
                raise ConfigError(
                    f"{folder}: {name} is of shape {tensors[name].shape}, the run's is {part.shape_there} with lora.rank={lora.rank}"
                )

    def take(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        read: Any = functools.partial(read_shard, parts[dotted(path)], tensors, leaf)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

    return jax.tree_util.tree_map_with_path(take, wanted)


class _Module(NamedTuple):
    """A module of theirs that has an adapter."""

    name: str
    """With {layer} where the layer's number stands."""
    paths: tuple[str, ...]
    """Our matrices that its weight is made of."""
    a: Row
    b: Row
    """Of several matrices, as if A were theirs side by side, and B had one column for each of the rank."""
    transposed: bool
    """Whether its weight lies inputs first, as GPT-2's do."""


def _modules(model_config: Any, leaves: Mapping[str, Any]) -> list[_Module]:
    """Returns the modules that have an adapter; `leaves` are all parameters, anything with a shape, by path."""
    modules = []
    for row in exchange_of(model_config).rows(model_config):
        adapted = [path for path in row.paths if f"{ADAPTERS}.{path}.a" in leaves]
        if adapted and len(adapted) < len(row.paths):
            raise config_error(
                "lora.targets",
                adapted[0],
                f"in PEFT's format {_module_of(row)} is one matrix, of {' and '.join(row.paths)}",
                "adapt all of them, or none",
            )
        if adapted:
            a = leaves[f"{ADAPTERS}.{adapted[0]}.a"]
            modules.append(_module(row, len(a.shape) - 1 - ("{layer}" in row.theirs)))
    return modules


def _module(row: Row, inputs: int) -> _Module:
    """Returns the module of a row, whose matrices have so many input dims."""
    letters = " ".join("abcdefgh"[: inputs + 1])
    theirs, _, ours = (row.form or f"{letters} -> {letters}").partition(" -> ")
    first, second = re.findall(r"\([^)]*\)|\S+", theirs)
    dims = ours.split()
    k = len(row.paths)
    part, dims = (dims[:1], dims[1:]) if k > 1 else ([], dims)
    into, out = dims[:inputs], dims[inputs:]
    transposed = set(first.strip("()").split()) == set(into)
    of_in, of_out = (first, second) if transposed else (second, first)
    if part and not of_out.startswith(f"({part[0]} "):
        raise ConfigError(
            f"lora.targets: the parts of {_module_of(row)} lie interleaved, which PEFT's format has no adapter for; leave {row.paths[0]} out"
        )
    rank = f"({part[0]} r)" if part else "r"
    ours_a, ours_b = ([*part, *into, "r"], [*part, "r", *out])
    name = _module_of(row)
    paths = lambda x: tuple(f"{ADAPTERS}.{path}.{x}" for path in row.paths)
    return _Module(
        name,
        row.paths,
        _row(f"{PREFIX}{name}.lora_A.weight", paths("a"), f"{rank} {of_in}", ours_a),
        _row(f"{PREFIX}{name}.lora_B.weight", paths("b"), f"{of_out} r", ours_b),
        transposed,
    )


def _row(name: str, paths: tuple[str, ...], theirs: str, ours: Sequence[str]) -> Row:
    first, *more = paths
    one = paths if more else first
    return Row(name, one, f"{theirs} -> {' '.join(ours)}")


def _saved(
    model_config: Any, modules: Sequence[_Module], trained: Collection[str]
) -> list[Row]:
    """Returns the rows of the modules that have a parameter which is trained as a whole."""
    rows = exchange_of(model_config).rows(model_config)
    whole = {_module_of(row) for row in rows if set(row.paths) & set(trained)}
    if both := sorted(whole & {module.name for module in modules}):
        raise config_error(
            "lora.trained",
            sorted(trained)[0],
            f"a parameter of {both[0]}, which has an adapter; PEFT's format holds one or the other",
            "leave it out, or its matrix in lora.targets",
        )
    return [row for row in rows if _module_of(row) in whole]


def _rows(modules: Sequence[_Module], saved: Sequence[Row]) -> list[Row]:
    """Returns how each tensor of the file is made of our parameters."""
    whole = [row._replace(theirs=PREFIX + row.theirs) for row in saved]
    return [row for module in modules for row in (module.a, module.b)] + whole


def _of_several(
    modules: Sequence[_Module], parts: Mapping[str, Part]
) -> Iterator[tuple[str, str, int]]:
    """Yields the names of A and B, and the number of our matrices, of each tensor that is made of several."""
    for module in modules:
        if len(module.paths) > 1:
            a, b = parts[module.a.paths[0]].names, parts[module.b.paths[0]].names
            yield from ((*names, len(module.paths)) for names in zip(a, b, strict=True))


def _spread(b: TensorInfo, k: int) -> TensorInfo:
    """Returns B of k matrices in blocks: (k outputs, rank) becomes (k outputs, k rank), zero off the blocks."""
    if k == 1:
        return b
    outputs, rank = b.shape

    def view() -> np.ndarray:
        whole = np.zeros((k, outputs // k, k, rank), b.dtype)
        for i, block in enumerate(b.view().reshape(k, outputs // k, rank)):
            whole[i, :, i] = block
        return whole.reshape(outputs, k * rank)

    return TensorInfo((outputs, k * rank), b.dtype, view)


def _apart(
    folder: Path, a: TensorInfo, b: TensorInfo, k: int, rank: int
) -> tuple[TensorInfo, TensorInfo]:
    """Returns A and B of k matrices side by side, of an adapter in blocks or of one that they share."""
    there, inputs = a.shape
    if there == rank:
        tiled = lambda: np.tile(a.view(), (k, 1))
        return TensorInfo((k * rank, inputs), a.dtype, tiled), b
    blocks = b.view().reshape(k, -1, k, there // k) if there == k * rank else None
    if blocks is None or any(
        blocks[i, :, j].any() for i in range(k) for j in range(k) if i != j
    ):
        raise ConfigError(
            f"{folder}: an adapter of rank {there} for {k} matrices in one is neither of rank {rank} nor of {k} blocks of it; give --lora.rank {there}"
        )
    own = np.concatenate([blocks[i, :, i] for i in range(k)])
    return a, TensorInfo(own.shape, b.dtype, lambda: own)


def _settings(
    model_config: Any,
    lora: LoraConfig,
    modules: Sequence[_Module],
    saved: Sequence[Row],
    base: str,
) -> dict[str, Any]:
    """Returns adapter_config.json."""
    exchange = exchange_of(model_config)
    names = {_module_of(row) for row in exchange.rows(model_config)}
    kind = exchange.write_config(model_config)["model_type"]
    architecture = architecture_of(kind, model_config)
    task = (t for end, t in TASK_TYPES.items() if architecture.endswith(end))
    several = {_short(m.name, modules, names): len(m.paths) for m in modules}
    wider = {name: k for name, k in several.items() if k > 1}
    root = math.sqrt if lora.rslora else float
    return {
        "peft_type": "LORA",
        "task_type": next(task, None),
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": any(module.transposed for module in modules),
        "target_modules": sorted(several),
        "modules_to_save": sorted({_last(_module_of(row)) for row in saved}) or None,
        "rank_pattern": {name: k * lora.rank for name, k in wider.items()},
        "alpha_pattern": {name: lora.alpha * root(k) for name, k in wider.items()},
        "inference_mode": True,
    }


def _short(name: str, modules: Sequence[_Module], names: Collection[str]) -> str:
    """Returns the end of a module's name that no module without an adapter has."""
    others = set(names) - {module.name for module in modules}
    words = name.split(".")
    for count in range(1, len(words)):
        end = ".".join(words[-count:])
        if "{layer}" not in end and not any(
            f".{n}".endswith(f".{end}") for n in others
        ):
            return end
    return name


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give a folder that PEFT, or jaxspeed export --to peft, wrote"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(settings, dict) or "r" not in settings:
        raise ConfigError(f"{path}: not the settings of an adapter: there is no r")
    for name, done in REFUSED.items():
        if settings.get(name, done[0]) not in done:
            raise ConfigError(
                f"{path}: {name}={settings[name]!r} is not done here, {done[0]!r} is"
            )
    return settings


def _check_scales(
    folder: Path,
    settings: Mapping[str, Any],
    lora: LoraConfig,
    modules: Sequence[_Module],
    parts: Mapping[str, Part],
    tensors: Mapping[str, TensorInfo],
) -> None:
    """Raises unless each adapter's factor is the run's."""
    for module in modules:
        for name in parts[module.a.paths[0]].names:
            path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            alphas = settings.get("alpha_pattern") or {}
            alpha = next(
                (x for key, x in alphas.items() if re.match(rf"(.*\.)?({key})$", path)),
                settings.get("lora_alpha", 8),
            )
            rank = tensors[name].shape[0]
            scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
            if not math.isclose(scale, scale_of(lora), rel_tol=1e-6):
                raise ConfigError(
                    f"{folder}: its {path} counts {scale:g} times (rank {rank}, alpha {alpha:g}), the run's {scale_of(lora):g} times "
                    f"(lora.rank={lora.rank}, lora.alpha={lora.alpha:g}, lora.rslora={lora.rslora}); set lora as it was"
                )


def _module_of(row: Row) -> str:
    return row.theirs.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition("{layer}.")[2]
