# SPDX-License-Identifier: Apache-2.0
"""A dense model's folder as one of a mixture of experts, each of which begins as its MLP.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055 section 2): what both models have is taken
over, each expert is a copy of the dense MLP, routers are drawn. Where the weights of a token's
experts sum to 1 the new model says to the bit of rounding what the old one said, whatever its
routers do. Tensors are copied one at a time. Layer 4.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxspeed.config import ConfigError, config_error
from jaxspeed.hf import (
    Part,
    check_tensors,
    exchange_of,
    exchanges,
    named_tensors,
    parts_of,
    read_config,
    read_settings,
    write_model,
)
from jaxspeed.paths import paths_of
from jaxspeed.pretrained import shapes_of, tokenizer_files
from jaxspeed.tensorfiles import TensorInfo


STD = 0.02
"""Of the routers drawn."""


def upcycle(
    source: str | Path,
    folder: str | Path,
    *,
    experts: int,
    each: int,
    seed: int = 0,
    dtype: Any = np.float32,
    shard_bytes: int = 5 * 10**9,
    models: str = "models",
) -> list[Path]:
    """Writes a Hugging Face folder of a mixture that begins as a dense model; returns its files.

    Args:
        source: the dense model's folder.
        folder: made if it is not there; must hold no model.
        experts: of each layer (E).
        each: experts that a token goes to (k).
        seed: of the routers.
        dtype: of the tensors written.
        shard_bytes: most bytes of tensors in one file.
        models: package of the model families.

    Raises:
        ConfigError: no family with experts begins as this model, or a folder cannot be used.
    """
    source = Path(source).expanduser()
    dense, there_is = read_config(source, models), read_settings(source)
    kind = there_is["model_type"]
    known = {k: v for each in exchanges(models) for k, v in each.grown_from.items()}
    if kind not in known:
        raise config_error(
            "model",
            source,
            f"no family here with experts begins as a {kind}",
            f"give the folder of a {', '.join(sorted(known))}",
        )
    try:
        cfg = known[kind](dense, experts, each)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tensors = named_tensors(source, dense)
    there = check_tensors(tensors, dense, shapes_of(dense), source=str(source))
    here = parts_of(exchange_of(cfg).rows(cfg), paths_of(shapes_of(cfg)))
    texts = tokenizer_files(source)
    kept = {name: x for name, x in there_is.items() if name.endswith("_token_id")}
    settings = {**kept, **exchange_of(cfg).write_config(cfg)}
    return write_model(
        folder,
        _grown(here, there, tensors, np.random.default_rng(seed)),
        settings,
        cfg,
        dtype=dtype,
        shard_bytes=shard_bytes,
        texts=texts,
    )


def _grown(
    here: Mapping[str, Part],
    there: Mapping[str, Part],
    tensors: Mapping[str, TensorInfo],
    rng: np.random.Generator,
) -> Iterator[tuple[str, TensorInfo]]:
    """Yields the mixture's tensors: the dense model's, repeated for each expert, or drawn."""
    for path, part in here.items():
        for name, numbers in zip(part.names, np.ndindex(part.lead), strict=True):
            if path in there:
                lead = there[path].lead
                at = np.ravel_multi_index(numbers[: len(lead)], lead) if lead else 0
                yield name, tensors[there[path].names[at]]
            else:
                drawn = rng.normal(0, STD, part.shape_there).astype(np.float32)
                info = TensorInfo(drawn.shape, drawn.dtype, lambda drawn=drawn: drawn)
                yield name, info
