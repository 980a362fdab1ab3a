# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters on disk: once in a run directory, not in each of its checkpoints.

They never change, and under LoRA they are nearly all of a model. `RUN/frozen` is a checkpoint of
its own, whole or not at all like the others (`jaxspeed.checkpoint`); so a run directory holds all
of its model whatever becomes of the folder that it began with. Layer 2.
"""

import shutil
from pathlib import Path

import jax

from jaxspeed.checkpoint import Checkpointer, names_in, restore_params
from jaxspeed.paths import paths_of, subtree, with_part
from jaxspeed.types import Params


FOLDER = "frozen"


def save_frozen(workdir: Path, params: Params) -> None:
    """Writes a new run's frozen parameters in place of what an earlier try left; called by every process.

    Raises:
        ConfigError: they cannot be written.
    """
    if jax.process_index() == 0:
        shutil.rmtree(workdir / FOLDER, ignore_errors=True)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(
            "frozen parameters of an earlier try removed"
        )
    with Checkpointer(workdir / FOLDER, keep=1, asynchronous=False) as writer:
        writer.save(0, {"params": params}, meta={})


def restore_frozen(workdir: Path, abstract_params: Params) -> Params:
    """Returns a run's frozen parameters, in the dtypes and shards asked for.

    Raises:
        ConfigError: they are not there, not whole, or others.
    """
    return restore_params(workdir / FOLDER, abstract_params)


def restore_all(path: str | Path, abstract_params: Params) -> Params:
    """Returns all parameters of a run, trained and frozen, in the dtypes and shards asked for.

    Args:
        path: a run directory, its `checkpoints`, or the directory of one step.
        abstract_params: a ShapeDtypeStruct with its NamedSharding for every leaf.

    Raises:
        ConfigError: see `jaxspeed.checkpoint.restore_params`.
    """
    path = Path(path).expanduser()
    kept = (folder / FOLDER / "0" for folder in (path, *path.absolute().parents[:2]))
    there = next((folder for folder in kept if folder.is_dir()), None)
    if there is None:
        return restore_params(path, abstract_params)
    names = names_in(there)
    frozen = restore_params(there, subtree(abstract_params, names))
    rest = set(paths_of(abstract_params)) - names
    return with_part(restore_params(path, subtree(abstract_params, rest)), frozen)
