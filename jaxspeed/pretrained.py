# SPDX-License-Identifier: Apache-2.0
"""A model from where it lies: a run directory or a Hugging Face folder, onto the devices that are here."""

import dataclasses
import importlib
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxspeed import nn
from jaxspeed.config import (
    ConfigError,
    DTypeConfig,
    LoraConfig,
    MeshConfig,
    RunConfig,
    ZeroConfig,
    config_error,
    suggest,
)
from jaxspeed.data.tokenize import TOKENIZER_FILE, load_tokenizer
from jaxspeed.frozen import restore_all
from jaxspeed.gguf_files import read_gguf
from jaxspeed.hf import (
    Fresh,
    check_tensors,
    config_of,
    export_params,
    head_paths,
    import_params,
    is_hugging_face,
    is_other_head,
    named_tensors,
    read_config,
    read_settings,
    refuse_another_model,
    write_model,
)
from jaxspeed.lora import (
    ADAPTERS,
    find_targets,
    folded,
    frozen_paths,
    with_adapters,
)
from jaxspeed.paths import dotted, paths_of
from jaxspeed.peft import write_adapters
from jaxspeed.program import Program, build_program
from jaxspeed.state import with_shardings
from jaxspeed.types import Params


logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)
"""What goes with a model, beside its tensors: what its inputs and outputs mean."""


class Pretrained(NamedTuple):
    """A model with its parameters on the devices."""

    program: Program
    params: Params


def open_model(
    path: str | Path,
    *,
    compute: str = "float32",
    models: str = "models",
    mesh: MeshConfig | None = None,
    zero: ZeroConfig | None = None,
) -> Pretrained:
    """Returns the model of a run directory or a Hugging Face folder, sharded over all devices.

    Args:
        path: either of them.
        compute: dtype of the products.
        models: package of the model families.
        mesh: the devices' arrangement; all on fsdp by default.
        zero: how the parameters are sharded over them.

    Raises:
        ConfigError: there is no model, it is damaged, or no family is of its kind.
    """
    cfg = model_config(path, models=models)
    run = RunConfig(
        model=cfg,
        steps=1,
        seq_len=getattr(cfg, "max_seq_len", 1024),
        micro_batch_size=1,
        dtype=DTypeConfig(compute=cast(Any, compute)),
        mesh=mesh or MeshConfig(),
        zero=zero or ZeroConfig(),
    )
    program = build_program(run)
    return Pretrained(program, read_params(path, cfg, program.abstract_state["params"]))


def model_config(path: str | Path, *, models: str = "models") -> Any:
    """Returns the family's Config of the model that lies there.

    Raises:
        ConfigError: there is none, or no family is of its kind.
    """
    if is_hugging_face(path):
        return read_config(path, models)
    settings, where = read_settings(path), Path(path) / "config.json"
    family = settings.get("family")
    if not isinstance(family, str) or not family.startswith(models + "."):
        raise ConfigError(
            f"{where}: family={family!r} is not in the package {models!r}; give a run directory, a Hugging Face folder, or --models NAME"
        )
    try:
        config = importlib.import_module(family).Config
        known = {f.name for f in dataclasses.fields(config)}
        for name in settings["model"]:
            if name not in known:
                raise ConfigError(
                    f"{where}: model.{name}: {family} has no such field.{suggest(name, known)}"
                )
        given = dict(settings["model"])
        named = settings.get("task", {}).get("labels")
        if named and given.get("labels") == []:
            given["labels"] = named
        plain = lambda value: tuple(value) if isinstance(value, list) else value
        return config(**{name: plain(value) for name, value in given.items()})
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: the model cannot be made ({error})") from None


def run_config(path: str | Path, *, models: str = "models") -> RunConfig:
    """Returns the configuration that a run was trained with.

    Raises:
        ConfigError: there is no run, or it cannot be made again here.
    """
    settings, where = read_settings(path), Path(path) / "config.json"
    given: dict[str, Any] = {"model": model_config(path, models=models)}
    try:
        for f in dataclasses.fields(RunConfig):
            if f.name in settings and f.name != "model":
                given[f.name] = _of_type(f.type, settings[f.name])
        return RunConfig(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: it is of another version ({error}); give --recipe"
        ) from None


def _of_type(annotation: Any, value: Any) -> Any:
    """Returns a value of config.json as the configuration has it."""
    if dataclasses.is_dataclass(annotation):
        kinds = {f.name: f.type for f in dataclasses.fields(annotation)}
        made: Any = annotation
        return made(**{name: _of_type(kinds.get(name), x) for name, x in value.items()})
    return tuple(_of_type(None, x) for x in value) if isinstance(value, list) else value


def read_params(
    path: str | Path, cfg: Any, abstract_params: Params, *, fresh: Fresh | None = None
) -> Params:
    """Returns the parameters that lie there (a run's newest, or a Hugging Face folder's), in the dtypes and shards asked for.

    Args:
        path: of the run or folder.
        cfg: of the model that takes them.
        abstract_params: a ShapeDtypeStruct with its NamedSharding for every leaf.
        fresh: draws the parameters of the head where the model there has another one; None: it
            must have the same.

    Raises:
        ConfigError: there are none, they are damaged, or of another model.
    """
    if is_hugging_face(path):
        return import_params(path, cfg, abstract_params, fresh=fresh)
    if fresh is not None and (Path(path).expanduser() / "config.json").is_file():
        there = model_config(path, models=type(cfg).__module__.partition(".")[0])
        if type(there) is type(cfg) and is_other_head(there, cfg):
            refuse_another_model(path, there, cfg, any_head=True)
            return _with_new_head(path, there, cfg, abstract_params, fresh)
    return _run_params(path, cfg, abstract_params)


def _run_params(path: str | Path, cfg: Any, abstract_params: Params) -> Params:
    """Returns a run's parameters, its adapters added to their matrices."""
    lora = _lora_of(path)
    if not lora.rank:
        return restore_all(path, abstract_params)
    adapted = restore_all(path, _with_adapters(_wide(abstract_params), cfg, lora))
    narrow = lambda x, like: x.astype(like.dtype)
    fold = lambda params: jax.tree.map(narrow, folded(params, lora), abstract_params)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params)
    return jax.jit(fold, out_shardings=shardings)(adapted)


def _wide(abstract_params: Params) -> Params:
    return jax.tree.map(lambda x: x.update(dtype=np.float32), abstract_params)


def _with_adapters(abstract_params: Params, cfg: Any, lora: LoraConfig) -> Params:
    """Returns the abstract parameters with those of the adapters, whole on each device."""
    _, shapes, dims = nn.abstract(lambda: cfg.build(nn.rngs(jax.random.key(0))))
    targets = find_targets(lora, shapes, dims)
    adapters = with_adapters(targets, lora.rank, shapes, dims)[0][ADAPTERS]
    mesh = jax.tree.leaves(abstract_params)[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: x.update(sharding=whole), adapters)
    return {**abstract_params, ADAPTERS: placed}


def _lora_of(path: str | Path) -> LoraConfig:
    """Returns the adapters of the run that a path lies in."""
    path = Path(path).expanduser().absolute()
    for folder in (path, *path.parents[:2]):
        if (folder / "config.json").is_file():
            return _of_type(LoraConfig, read_settings(folder).get("lora", {}))
    return LoraConfig()


def refuse_frozen_head(path: str | Path, cfg: Any, frozen: Collection[str]) -> None:
    """Raises if parameters that a run does not train are new, as the model that it begins with has another head.

    Args:
        path: of that model.
        cfg: the run's.
        frozen: paths of the parameters that it does not train.

    Raises:
        ConfigError: names one of them.
    """
    if not (Path(path).expanduser() / "config.json").is_file():
        return
    there = model_config(path, models=type(cfg).__module__.partition(".")[0])
    if type(there) is type(cfg) and is_other_head(there, cfg):
        if new := sorted(head_paths(cfg) & set(frozen)):
            raise ConfigError(
                f"init={str(path)!r}: its model has another head, so {new[0]} is new and would stay so, frozen; "
                "name it in lora.trained, or leave it out of freeze"
            )


def _with_new_head(
    path: str | Path, there: Any, cfg: Any, abstract_params: Params, fresh: Fresh
) -> Params:
    """Returns a run's parameters, but for the head, which is drawn by `fresh`."""
    taken, tree = jax.tree_util.tree_flatten_with_path(abstract_params)
    wanted = paths_of(abstract_params)
    whole = jax.sharding.NamedSharding(
        taken[0][1].sharding.mesh, jax.sharding.PartitionSpec()
    )
    heads = head_paths(there) | head_paths(cfg)

    def sharded(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        same = dotted(path) in wanted and dotted(path) not in heads
        return wanted[dotted(path)] if same else leaf.update(sharding=whole)

    shapes = shapes_of(there)
    shapes = jax.tree_util.tree_map_with_path(sharded, shapes)
    held = jax.tree_util.tree_leaves_with_path(_run_params(path, there, shapes))
    found = {dotted(path): leaf for path, leaf in held if dotted(path) not in heads}
    new = sorted(set(wanted) - set(found))
    logger.warning("%s: new, for they are of the head: %s", path, ", ".join(new))
    found |= paths_of(fresh(new))
    return tree.unflatten([found[dotted(path)] for path, _ in taken])


def import_model(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: Any = np.float32,
    shard_bytes: int = 5 * 10**9,
    models: str = "models",
) -> list[Path]:
    """Writes a GGUF file, or a Hugging Face folder, as a checked Hugging Face folder with its tokenizer; returns the files.

    One tensor at a time is in memory.

    Raises:
        ConfigError: the source is damaged or nothing here is of its kind, or the folder cannot be
            written or holds a model.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        cfg, settings = read_config(source, models), read_settings(source)
        tensors, texts = named_tensors(source, cfg), tokenizer_files(source)
    else:
        settings, tensors, texts = read_gguf(source)
        cfg = config_of(settings, models)
    parts = check_tensors(tensors, cfg, _abstract_params(cfg), source=str(source))
    wanted = {name for part in parts.values() for name in part.names}
    kept = ((name, info) for name, info in tensors.items() if name in wanted)
    how: dict[str, Any] = {"dtype": dtype, "shard_bytes": shard_bytes, "texts": texts}
    return write_model(folder, kept, settings, cfg, **how)


def export_run(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: Any = np.float32,
    shard_bytes: int = 5 * 10**9,
    models: str = "models",
) -> list[Path]:
    """Writes a run's newest parameters, and its tokenizer, as a Hugging Face folder; returns the files.

    Raises:
        ConfigError: there is no such run, or the folder cannot be written or holds a model.
    """
    cfg = model_config(path, models=models)
    params = read_params(path, cfg, _abstract_params(cfg))
    how: dict[str, Any] = {"dtype": dtype, "shard_bytes": shard_bytes}
    how |= {"texts": tokenizer_files(path), "settings": _token_ids(path)}
    return export_params(params, cfg, folder, **how)


def export_adapters(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: Any = np.float32,
    models: str = "models",
) -> list[Path]:
    """Writes a run's newest adapters as a folder that PEFT loads; returns the files.

    Raises:
        ConfigError: there is no such run, it has no adapters, PEFT's format cannot hold them, or
            the folder cannot be written.
    """
    cfg, lora = model_config(path, models=models), _lora_of(path)
    if not lora.rank:
        raise config_error(
            "to", "peft", f"{path} has no adapters (lora.rank=0)", "give --to hf DIR"
        )
    abstract = _abstract_params(cfg)
    params = restore_all(path, _with_adapters(abstract, cfg, lora))
    targets = {name.rpartition(".")[0] for name in paths_of(params[ADAPTERS])}
    paths = set(paths_of(abstract))
    trained = paths - frozen_paths(lora, targets, paths)
    base = str(read_settings(path).get("init", ""))
    return write_adapters(params, cfg, lora, trained, folder, base=base, dtype=dtype)


def _abstract_params(cfg: Any) -> Params:
    """Returns the shapes of a family's parameters, whole on one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("one",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = shapes_of(cfg)
    return with_shardings(shapes, jax.tree.map(lambda _: whole, shapes))


def shapes_of(cfg: Any) -> Params:
    """Returns the shapes of a family's parameters."""
    return nn.abstract(lambda: cfg.build(nn.rngs(jax.random.key(0))))[1]


def tokenizer_files(path: str | Path) -> dict[str, str]:
    """Returns the files of a folder that say what its token ids mean, by name."""
    files = (Path(path).expanduser() / name for name in TOKENIZER_FILES)
    return {file.name: file.read_text() for file in files if file.is_file()}


def _token_ids(path: str | Path) -> dict[str, int]:
    """Returns the settings of config.json that say which tokens end a text and fill a row."""
    file = Path(path).expanduser() / TOKENIZER_FILE
    if not file.is_file():
        return {}
    tokenizer = load_tokenizer(file)
    return {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
