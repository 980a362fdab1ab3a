# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face: their folders into our shards and back, by one table a family.

A family states how its parameters are called and laid out over there (`Row`), and how its
configuration translates (`Exchange`). Nothing here knows a family. Reading is lazy: each device's
shard of each parameter is sliced out of the file, so no whole parameter is in memory; and strict:
what is unknown, missing or of another shape is an error that names it.
"""

import functools
import importlib
import json
import logging
import math
import re
import sys
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspeed.config import ConfigError, suggest
from jaxspeed.paths import dotted, paths_of
from jaxspeed.tensorfiles import TensorInfo, read_folder, write_folder
from jaxspeed.types import Params


logger = logging.getLogger(__name__)

Heads = Sequence[tuple[str, str]]
"""(name in `architectures`, `head` of the Config): the first with a name is read, the first with a head is written."""


class Row(NamedTuple):
    """How one of their tensors is made of our parameters."""

    theirs: str
    """Its name, with {layer} and {expert} where their numbers stand: our leading dims."""
    ours: str | tuple[str, ...]
    """The parameter's path, dotted; several are parts of one tensor, first index `P` in `form`."""
    form: str = ""
    """`THEIRS -> OURS`, a letter a dim, in parentheses what is one dim there: "(N H) D -> D N H". Empty: the same."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters' paths."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


class Exchange(NamedTuple):
    """What a family is to Hugging Face."""

    architectures: Mapping[str, str | Heads]
    """Name in `architectures` of config.json, by `model_type`; one for each head where there are several."""
    read_config: Callable[[Mapping[str, Any]], Any]
    """From config.json to the family's Config; raises ConfigError for what the family does not do."""
    write_config: Callable[[Any], dict[str, Any]]
    """From the family's Config to config.json, `model_type` included."""
    rows: Callable[[Any], Sequence[Row]]
    """From the Config to the table."""
    prefix: str = ""
    """Regular expression of what the names of a headless model lack: r"transformer\\.", for instance."""
    ignored: str = r"(?!)"
    """Regular expression of names that hold no parameter (masks, rotary tables) or, unless the table has them, repeat one (a tied head)."""
    heads: str = r"(?!)"
    """Regular expression of names that belong to one head or another; new where a run has another head than its folder."""
    pooling: str = r"(?!)"
    """Regular expression of names that only some heads read, which are trained before them; taken where they are."""
    renamed: Sequence[tuple[str, str]] = ()
    """Regular expressions of what names were called once, with what that became."""
    companions: Callable[[Any], dict[str, Any]] = lambda cfg: {}
    """From the Config to JSON files that go with config.json, by name, where the model brought none."""
    grown_from: Mapping[str, Callable[[Any, int, int], Any]] = {}
    """What makes a Config with so many experts, so many a token, of a dense model's Config, by its `model_type`."""


def find_exchange(model_type: str, package: str = "models") -> Exchange:
    """Returns the table of the family that `model_type` names, from an importable package's `FAMILIES`.

    Raises:
        ConfigError: there is no such package or family.
    """
    families = _families(package)
    if model_type not in families:
        raise ConfigError(
            f"model_type={model_type!r}: no such family.{suggest(model_type, families)} There are {', '.join(sorted(families))}"
        )
    return _exchange_in(families[model_type])


def exchanges(package: str = "models") -> list[Exchange]:
    """Returns the tables of all families of an importable package.

    Raises:
        ConfigError: there is no such package.
    """
    return [_exchange_in(name) for name in sorted(set(_families(package).values()))]


def _families(package: str) -> Mapping[str, str]:
    try:
        return importlib.import_module(package).FAMILIES
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the package {package!r} of model families cannot be used ({error}); run from the repository's root, or give --models NAME"
        ) from None


def exchange_of(model_config: Any) -> Exchange:
    """Returns the table of the family that a Config belongs to.

    Raises:
        ConfigError: its module has none.
    """
    return _exchange_in(type(model_config).__module__)


def _exchange_in(name: str) -> Exchange:
    module = sys.modules.get(name) or importlib.import_module(name)
    if not hasattr(module, "EXCHANGE"):
        raise ConfigError(
            f"{name} has no EXCHANGE table, so its models cannot be exchanged with Hugging Face; write one, as in models/gpt2.py"
        )
    return module.EXCHANGE


def read_config(folder: str | Path, package: str = "models") -> Any:
    """Returns the family's Config that a folder's config.json describes.

    Raises:
        ConfigError: there is none, or nothing here is of that kind.
    """
    settings = read_settings(folder)
    if not isinstance(settings.get("model_type"), str):
        raise ConfigError(
            f"{Path(folder) / 'config.json'}: no model_type; it is not a Hugging Face model's"
        )
    return config_of(settings, package)


def config_of(settings: Mapping[str, Any], package: str = "models") -> Any:
    """Returns the family's Config that the settings of a config.json describe.

    Raises:
        ConfigError: nothing here is of that kind.
    """
    return find_exchange(settings["model_type"], package).read_config(settings)


def is_hugging_face(folder: str | Path) -> bool:
    """Whether a folder's config.json is one of Hugging Face."""
    try:
        return isinstance(read_settings(folder).get("model_type"), str)
    except ConfigError:
        return False


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Returns a folder's config.json.

    Raises:
        ConfigError: there is none, or it is not JSON.
    """
    path = Path(folder).expanduser() / "config.json"
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give a folder that holds a model"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return settings


Fresh = Callable[[Collection[str]], Params]
"""From dotted paths to new parameters, in a nested dict."""


def import_params(
    folder: str | Path,
    model_config: Any,
    abstract_params: Params,
    *,
    fresh: Fresh | None = None,
) -> Params:
    """Returns the parameters of a Hugging Face folder, in the dtypes and shards asked for.

    Args:
        folder: config.json and safetensors files.
        model_config: of the model that takes them; it must describe the folder's model.
        abstract_params: a ShapeDtypeStruct with its NamedSharding for every leaf.
        fresh: draws the parameters of the head where the folder's model has another one; None: it
            must have the same.

    Raises:
        ConfigError: the folder's model is another one, or its tensors are not just those wanted.
    """
    folder = Path(folder).expanduser()
    exchange = exchange_of(model_config)
    settings = read_settings(folder)
    if settings.get("model_type") not in exchange.architectures:
        raise ConfigError(
            f"{folder}: a model of type {settings.get('model_type')!r}, the run's family does {', '.join(exchange.architectures)}"
        )
    there = exchange.read_config(settings)
    refuse_another_model(folder, there, model_config, any_head=fresh is not None)
    fresh = fresh if is_other_head(there, model_config) else None
    tensors = named_tensors(folder, model_config, new_head=fresh is not None)
    parts = check_tensors(
        tensors,
        model_config,
        abstract_params,
        source=str(folder),
        new_head=fresh is not None,
    )
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params)
    new = paths_of(fresh(set(paths_of(abstract_params)) - set(parts))) if fresh else {}

    def take(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        part = parts.get(dotted(path))
        if part is None:
            return new[dotted(path)]
        read: Any = functools.partial(read_shard, part, tensors, leaf)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

    return jax.tree_util.tree_unflatten(tree, [take(*each) for each in leaves])


def check_tensors(
    tensors: Mapping[str, TensorInfo],
    model_config: Any,
    abstract_params: Params,
    *,
    source: str,
    new_head: bool = False,
) -> dict[str, "Part"]:
    """Raises unless these are the tensors of this model; returns how each parameter is part of them.

    Tensors of heads that the model has not are passed over, which the log says.

    Args:
        tensors: by the names of Hugging Face.
        model_config: of the model.
        abstract_params: its parameters' shapes.
        source: where they come from, for messages.
        new_head: its head is made anew, so the result lacks it.

    Raises:
        ConfigError: one is missing, unknown or of another shape.
    """
    shapes = paths_of(abstract_params)
    exchange = exchange_of(model_config)
    heads = f"(?:{exchange.heads})|(?:{exchange.pooling})"
    of_head = lambda name: re.fullmatch(heads, name) is not None
    parts = parts_of(exchange.rows(model_config), shapes)
    wanted = {name for part in parts.values() for name in part.names}
    new = wanted - set(tensors)
    if new_head:
        new |= {name for name in wanted if re.fullmatch(exchange.heads, name)}
    if missing := [name for name in new if not (new_head and of_head(name))]:
        raise ConfigError(
            f"{source}: lacks {_some(sorted(missing))}, which the model needs"
        )
    left = set(tensors) - (wanted - new)
    if unknown := [name for name in left if not of_head(name)]:
        raise ConfigError(
            f"{source}: holds {_some(sorted(unknown))}, which the model has no place for"
        )
    if left:
        names = ", ".join(sorted(left))
        logger.warning("%s: left out, for they are of another head: %s", source, names)
    if new:
        names = ", ".join(sorted(new))
        logger.warning("%s: new, for they are of the head: %s", source, names)
    found = {n: part for n, part in parts.items() if not set(part.names) & new}
    for part in found.values():
        for name in part.names:
            if tensors[name].shape != part.shape_there:
                raise ConfigError(
                    f"{source}: {name} is of shape {tensors[name].shape}, the model's is {part.shape_there}"
                )
    return found


def export_params(
    params: Params,
    model_config: Any,
    folder: str | Path,
    *,
    dtype: Any = np.float32,
    shard_bytes: int = 5 * 10**9,
    texts: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes parameters as a Hugging Face folder (config.json and safetensors files); returns its files.

    One tensor at a time leaves the devices.

    Args:
        params: arrays or numpy arrays, whole or sharded over this process's devices.
        model_config: the family's Config.
        folder: made if it is not there; must hold no model.
        dtype: of the tensors written.
        shard_bytes: most bytes of tensors in one file.
        texts: files to go with them, the tokenizer's for instance, by name.
        settings: of config.json that the model does not know, the ids of special tokens for instance.

    Raises:
        ConfigError: the folder holds a model, or cannot be written.
    """
    exchange = exchange_of(model_config)
    arrays = paths_of(params)
    parts = parts_of(exchange.rows(model_config), arrays)
    return write_model(
        folder,
        tensors_of(parts, arrays),
        {**(settings or {}), **exchange.write_config(model_config)},
        model_config,
        dtype=dtype,
        shard_bytes=shard_bytes,
        texts=texts,
    )


def write_model(
    folder: str | Path,
    tensors: Iterable[tuple[str, TensorInfo]],
    settings: Mapping[str, Any],
    model_config: Any,
    *,
    dtype: Any,
    shard_bytes: int,
    texts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes tensors under Hugging Face's names, and their config.json, as a folder; see `export_params`."""
    dtype = np.dtype(dtype)
    settings = {
        **settings,
        "architectures": [architecture_of(settings["model_type"], model_config)],
        "torch_dtype": dtype.name,
    }
    dumped = lambda settings: json.dumps(settings, indent=2) + "\n"
    companions = exchange_of(model_config).companions(model_config)
    return write_folder(
        Path(folder).expanduser(),
        ((name, info._replace(dtype=dtype)) for name, info in tensors),
        shard_bytes=shard_bytes,
        texts={
            **{name: dumped(those) for name, those in companions.items()},
            **(texts or {}),
            "config.json": dumped(settings),
        },
    )


def architecture_of(model_type: str, model_config: Any) -> str:
    """Returns what Hugging Face calls the class of a model of this type."""
    architecture = exchange_of(model_config).architectures[model_type]
    if isinstance(architecture, str):
        return architecture
    return next(name for name, head in architecture if head == model_config.head)


class Part(NamedTuple):
    """One of our parameters, as a part of each of its tensors over there."""

    path: str
    names: tuple[str, ...]
    """Of the tensors over there: one for each layer and expert, in order."""
    lead: tuple[int, ...]
    """Our leading dims, each index of which has a tensor of its own over there."""
    slot: int | None
    """Which part of the tensor; None: the whole."""
    groups: tuple[tuple[int, ...], ...]
    """Sizes that each dim over there is a product of."""
    order: tuple[int, ...]
    """Their dims, taken apart, in our order (part index first, if there is one)."""

    @property
    def shape_there(self) -> tuple[int, ...]:
        """Of each of its tensors over there."""
        return tuple(map(math.prod, self.groups))

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        """Returns our layout of a tensor over there: a view of it."""
        apart = theirs.reshape([n for group in self.groups for n in group])
        turned = apart.transpose(self.order)
        return turned if self.slot is None else turned[self.slot]

    def theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the tensor over there of our parameter, or of all its parts in order."""
        whole = ours[0] if self.slot is None else np.stack(ours)
        back = np.argsort(self.order)
        return whole.transpose(back).reshape(self.shape_there)


def parts_of(rows: Sequence[Row], shapes: Mapping[str, Any]) -> dict[str, Part]:
    """Returns a `Part` per parameter; the table must name each just once, and no other."""
    parts: dict[str, Part] = {}
    for row in rows:
        for number, path in enumerate(row.paths):
            assert path in shapes, f"the table names {path}, which the model lacks"
            assert path not in parts, f"the table names {path} twice"
            parts[path] = _part(row, number, path, shapes[path].shape)
    assert set(parts) == set(shapes), sorted(set(shapes) - set(parts))
    return parts


def _part(row: Row, number: int, path: str, shape: tuple[int, ...]) -> Part:
    counted = [n for n in ("layer", "expert") if f"{{{n}}}" in row.theirs]
    lead, one = shape[: len(counted)], shape[len(counted) :]
    several = len(row.paths) > 1
    letters = [chr(ord("a") + i) for i in range(len(one))]
    theirs, _, ours = (
        row.form or f"{' '.join(letters)} -> {' '.join(letters)}"
    ).partition(" -> ")
    groups = [g.strip("()").split() for g in re.findall(r"\([^)]*\)|\S+", theirs)]
    names = ours.split()
    sizes = dict(zip(names, (len(row.paths), *one) if several else one, strict=True))
    apart = [name for group in groups for name in group]
    assert sorted(apart) == sorted(names), row
    return Part(
        path,
        tuple(
            row.theirs.format(**dict(zip(counted, numbers, strict=True)))
            for numbers in np.ndindex(lead)
        ),
        lead,
        number if several else None,
        tuple(tuple(sizes[name] for name in group) for group in groups),
        tuple(apart.index(name) for name in names),
    )


def read_shard(
    part: Part,
    tensors: Mapping[str, TensorInfo],
    leaf: jax.ShapeDtypeStruct,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Returns the shard of a parameter that an index of the whole names, out of its tensors."""
    count = len(part.lead)
    if not count:
        whole = part.ours(tensors[part.names[0]].view())
        return np.ascontiguousarray(whole[index], leaf.dtype)
    held = [range(*i.indices(n)) for i, n in zip(index, part.lead, strict=False)]
    assert leaf.sharding is not None
    shard = np.empty(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    for slot in np.ndindex(*map(len, held)):
        numbers = [part_held[i] for part_held, i in zip(held, slot, strict=True)]
        name = part.names[np.ravel_multi_index(numbers, part.lead)]
        shard[slot] = part.ours(tensors[name].view())[index[count:]]
    return shard


def tensors_of(
    parts: Mapping[str, Part], arrays: Mapping[str, Any]
) -> Iterator[tuple[str, TensorInfo]]:
    """Yields the tensors over there, in the order of the table, layer by layer."""
    of: dict[str, list[tuple[Part, tuple[int, ...]]]] = {}
    for part in parts.values():
        for name, numbers in zip(part.names, np.ndindex(part.lead), strict=True):
            of.setdefault(name, []).append((part, numbers))

    def make(members: list[tuple[Part, tuple[int, ...]]]) -> Callable[[], np.ndarray]:
        def view() -> np.ndarray:
            ours = [np.asarray(arrays[p.path][numbers]) for p, numbers in members]
            return members[0][0].theirs(ours)

        return view

    for name, members in of.items():
        part = members[0][0]
        dtype = np.dtype(arrays[part.path].dtype)
        yield name, TensorInfo(part.shape_there, dtype, make(members))


def named_tensors(
    folder: Path, model_config: Any, *, new_head: bool = False
) -> dict[str, TensorInfo]:
    """Returns a folder's tensors under the names that the model has for them, without what holds no parameter.

    Args:
        folder: of Hugging Face.
        model_config: of the model.
        new_head: its head is made anew; so what looks like a copy may be a head of the folder's model.

    Raises:
        ConfigError: see `jaxspeed.tensorfiles.read_folder`.
    """
    tensors, exchange = read_folder(folder), exchange_of(model_config)
    for pattern, new in exchange.renamed:
        tensors = {re.sub(pattern, new, n): info for n, info in tensors.items()}
    # Of a model without its head the names are shorter.
    first = lambda names: next(
        filter(None, map(re.compile(exchange.prefix).match, names)), None
    )
    wanted = [row.theirs for row in exchange.rows(model_config)]
    here = first(wanted)
    if here is None:
        shorten = re.compile(f"^(?:{exchange.prefix})")
        tensors = {shorten.sub("", n): info for n, info in tensors.items()}
    elif first(tensors) is None:
        tensors = {here[0] + n: info for n, info in tensors.items()}
    kept = wanted + [n for n in tensors if new_head and re.fullmatch(exchange.heads, n)]
    ignored = re.compile(exchange.ignored)
    return {n: x for n, x in tensors.items() if n in kept or not ignored.fullmatch(n)}


def refuse_another_model(
    source: str | Path, there: Any, here: Any, *, any_head: bool = False
) -> None:
    """Raises unless a model's Config is the run's; it may train with dropout, and call its labels as it likes.

    Args:
        source: where the model lies, for messages.
        there: its Config.
        here: the run's.
        any_head: another head will do.

    Raises:
        ConfigError: they differ.
    """
    free = {"dropout", "labels"}
    if any_head and is_other_head(there, here):
        free |= {"head", "num_labels"}
    for name in there.__dataclass_fields__:
        theirs, ours = getattr(there, name), getattr(here, name)
        if theirs != ours and name not in free:
            raise ConfigError(
                f"{source}: its model has {name}={theirs}, the run's model.{name} is {ours}; give --model.{name} {theirs}"
            )


def is_other_head(there: Any, here: Any) -> bool:
    """Whether two Configs of a family name different heads."""
    return "head" in there.__dataclass_fields__ and there.head != here.head


def head_paths(model_config: Any) -> set[str]:
    """Returns the dotted paths of the parameters that belong to the model's head alone."""
    exchange = exchange_of(model_config)
    rows = exchange.rows(model_config)
    heads = [row for row in rows if re.fullmatch(exchange.heads, row.theirs)]
    return {path for row in heads for path in row.paths}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def setting(
    settings: Mapping[str, Any], name: str, allowed: Sequence[Any], default: Any = None
) -> None:
    """Raises unless a setting of config.json is one that the family does; a missing one is `default`.

    Raises:
        ConfigError: it is not.
    """
    value = settings.get(name, default)
    if value not in allowed:
        raise ConfigError(
            f"config.json: {name}={value!r} is not done here; this family does {', '.join(map(repr, allowed))}"
        )


def required(settings: Mapping[str, Any], name: str) -> Any:
    """Returns a setting that config.json must have.

    Raises:
        ConfigError: it lacks it.
    """
    if settings.get(name) is None:
        raise ConfigError(f"config.json: has no {name}, which this family needs")
    return settings[name]


def head_of(settings: Mapping[str, Any], heads: str | Heads) -> str:
    """Returns the head that `architectures` of config.json names; the first, if it names none.

    Raises:
        ConfigError: it names another one.
    """
    assert not isinstance(heads, str)
    named = settings.get("architectures") or [heads[0][0]]
    setting({"architectures": named[0]}, "architectures", [name for name, _ in heads])
    return next(head for name, head in heads if name == named[0])


def read_labels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `num_labels` and `labels` (their names; empty, if config.json has none) for a Config."""
    named = settings.get("id2label") or {}
    count = len(named) or settings.get("num_labels", 2)
    names = tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(count))
    known = names != _unnamed(count)
    return {"num_labels": count, "labels": names if known else ()}


def write_labels(num_labels: int, labels: Sequence[str]) -> dict[str, Any]:
    """Returns the settings of config.json that name the labels."""
    names = tuple(labels) or _unnamed(num_labels)
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _unnamed(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))
