# SPDX-License-Identifier: Apache-2.0
"""The three batch sizes of a run, each from the others and the mesh. Layer 0: standard library only."""

from dataclasses import dataclass

from jaxspeed.checks import ConfigError


@dataclass(frozen=True)
class BatchShape:
    """The three batch sizes of a run, which agree: global_size = micro_size * shards * accumulate."""

    global_size: int
    micro_size: int
    accumulate: int
    shards: int


def resolve_batch(
    global_size: int | None, micro: int | None, accumulate: int | None, shards: int
) -> BatchShape:
    """Derives the batch sizes that were not given.

    Args:
        global_size: sequences per update.
        micro: sequences per device and micro-step.
        accumulate: micro-steps per update.
        shards: how many ways the mesh splits a batch (data x fsdp).

    Raises:
        ConfigError: none given, or they contradict; names the divisor that fails and the nearest legal values.
    """
    if global_size is None and micro is None:
        raise ConfigError(
            "global_batch_size and micro_batch_size are both missing, so the batch is not defined; give --global_batch_size or --micro_batch_size"
        )
    if global_size is None:
        assert micro is not None
        accumulate = accumulate or 1
        return BatchShape(micro * shards * accumulate, micro, accumulate, shards)
    divisor = shards * (micro or 1) * (accumulate or 1)
    parts = [f"{shards} batch shards of the mesh"]
    parts += [f"micro_batch_size={micro}"] if micro is not None else []
    parts += [f"accumulate={accumulate}"] if accumulate is not None else []
    if micro is not None and accumulate is not None and global_size != divisor:
        raise ConfigError(
            f"global_batch_size={global_size} is not {' x '.join(parts)} = {divisor}; "
            f"set global_batch_size to {divisor}, or leave one of the three out"
        )
    if global_size % divisor:
        low = global_size // divisor * divisor
        nearest = f"{low} or {low + divisor}" if low else f"{divisor}"
        raise ConfigError(
            f"global_batch_size={global_size} does not divide by {' x '.join(parts)} = {divisor}; nearest legal: {nearest}"
        )
    rest = global_size // divisor
    if micro is not None:
        return BatchShape(global_size, micro, accumulate or rest, shards)
    return BatchShape(global_size, rest, accumulate or 1, shards)
