# SPDX-License-Identifier: Apache-2.0
"""Bytes and collectives of the compiled step equal ZeRO's formulas (arXiv 1910.02054 sections 5 and 7)."""

import math
import re
from typing import Any

import jax
import pytest

from jaxspeed.config import MeshConfig, ZeroConfig
from jaxspeed.ledger import Ledger, read_ledger
from jaxspeed.program import Program
from jaxspeed.sharding import is_placement
from jaxspeed.state import bytes_per_device
from tests.dist.runs import batches, config, program_of
from tests.models.zoo import ZOO, D, L, T


pytestmark = pytest.mark.slow

NAMES = ["inputs", "mask"]
FSDP = {"fsdp": MeshConfig(fsdp=8), "data x fsdp": MeshConfig(data=2, fsdp=4)}


def memory_of(step: Any) -> Any:
    """Returns the compiler's account of a compiled step's memory."""
    memory = step.memory_analysis()
    assert memory is not None
    return memory


def compiled(**changes: Any) -> tuple[Program, Ledger, jax.stages.Compiled]:
    program = program_of(config(**changes))
    step = program.lower_step(NAMES).compile()
    return program, read_ledger(step, program.mesh.shape), step


def num_params(program: Program) -> int:
    return sum(
        math.prod(p.shape) for p in jax.tree.leaves(program.abstract_state["params"])
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_takes_12_bytes_a_parameter_divided_by_the_shards(
    stage: int, family: str
) -> None:
    program, _, step = compiled(family=family, stage=stage, mesh=FSDP["fsdp"])
    whole = sum(
        math.prod(p.shape)
        for p in jax.tree.leaves(program.spec.placements, is_leaf=is_placement)
        if p.zero_dim is None
    )
    psi = num_params(program)
    formula = 12 * psi if stage == 0 else 12 * ((psi - whole) / 8 + whole)
    arguments = memory_of(step).argument_size_in_bytes
    assert arguments - bytes_per_device(program.abstract_batch(NAMES)) == pytest.approx(
        formula, rel=0.02
    )


@pytest.mark.parametrize("mesh", list(FSDP))
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_collectives_per_step_equal_the_formula(
    stage: int, accumulate: int, mesh: str
) -> None:
    program, ledger, _ = compiled(stage=stage, accumulate=accumulate, mesh=FSDP[mesh])
    psi, A = num_params(program), accumulate
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * A}[stage]
    scatters = {0: 0, 1: 1, 2: A, 3: A}[stage]
    reduced = 1 if stage == 0 else 0
    # Hybrid sharding sums each shard over the replicas once a step.
    replicas = 1 / 4 if mesh == "data x fsdp" and stage > 0 else 0
    assert ledger.elements("all-gather") <= 1.05 * gathers * psi
    assert ledger.elements("all-gather") >= 0.9 * (gathers > 0) * psi * (
        A if stage == 3 else 1
    )
    assert ledger.elements("reduce-scatter") == pytest.approx(scatters * psi, rel=0.05)
    assert ledger.elements("all-reduce") <= 1.05 * (reduced + replicas) * psi + 200
    assert ledger.elements("all-to-all") == ledger.elements("collective-permute") == 0


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
def test_stage_3_gathers_again_in_the_backward_pass_whatever_is_kept(
    remat: str,
) -> None:
    _, ledger, _ = compiled(stage=3, remat=remat, mesh=FSDP["fsdp"])
    program = program_of(config(stage=3, mesh=FSDP["fsdp"]))
    layers = sum(
        math.prod(p.shape)
        for p in jax.tree.leaves(program.abstract_state["params"]["layers"])
    )
    rest = num_params(program) - layers
    # Biases are added, not multiplied by: the backward pass has no use for them.
    assert 1.9 * layers + rest < ledger.elements("all-gather") <= 2 * layers + rest


@pytest.mark.parametrize(
    ("family", "stage", "ordered"),
    [("llama", 3, True), ("llama", 2, True), ("llama", 1, False), ("gpt2", 3, False)],
)
def test_output_embedding_of_its_own_is_reduced_before_the_layers_go_back(
    family: str, stage: int, *, ordered: bool
) -> None:
    program = program_of(config(family=family, stage=stage, mesh=FSDP["fsdp"]))
    vocab = ZOO[family].cfg.vocab_size
    text = program.lower_step(NAMES).as_text()
    barriers = re.findall(r"optimization_barrier .*", text)
    shard = f"tensor<{vocab // 8}x{D}xf32>"
    assert any(shard in barrier for barrier in barriers) == ordered


def test_stage_2_and_3_keep_no_whole_gradient() -> None:
    sizes = {
        s: memory_of(
            compiled(stage=s, accumulate=2, mesh=FSDP["fsdp"])[2]
        ).temp_size_in_bytes
        for s in (1, 2)
    }
    program = program_of(config())
    assert sizes[1] - sizes[2] > 4 * num_params(program) * 0.5


@pytest.mark.parametrize("stage", [1, 3])
def test_tensor_axis_halves_what_is_gathered(stage: int) -> None:
    program, ledger, _ = compiled(stage=stage, mesh=MeshConfig(fsdp=4, tensor=2))
    per_device = sum(
        math.prod(p.shape) / (2 if p.tensor_dim is not None else 1)
        for p in jax.tree.leaves(program.spec.placements, is_leaf=is_placement)
    )
    gathers = {1: 1, 3: 2}[stage]
    assert ledger.elements("all-gather", "fsdp") <= 1.05 * gathers * per_device
    assert ledger.elements("reduce-scatter", "fsdp") == pytest.approx(
        per_device, rel=0.05
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_second_copy_keeps_layer_gathers_inside_a_group(accumulate: int) -> None:
    """ZeRO++ hpZ (arXiv 2306.10209 section 3.2): between groups each shard travels once a step, in neither pass."""
    mesh, A = FSDP["data x fsdp"], accumulate
    zero = ZeroConfig(stage=3, param_persistence_threshold=0, secondary=True)
    program, ledger, step = compiled(zero=zero, mesh=mesh, accumulate=accumulate)
    psi = num_params(program)
    whole = sum(
        math.prod(p.shape)
        for p in jax.tree.leaves(program.spec.placements, is_leaf=is_placement)
        if p.zero_dim is None
    )
    inside = ledger.elements("all-gather", ("fsdp",))
    assert 0.9 * (1 + A) * psi < inside <= 1.05 * 2 * A * psi
    between = ledger.elements("all-gather", ("data",))
    assert between == pytest.approx((psi - whole) / 4, rel=0.05)
    assert ledger.elements("reduce-scatter", ("fsdp",)) == pytest.approx(A * psi, rel=0.05)
    assert ledger.elements("reduce-scatter", ("data",)) == pytest.approx(psi / 4, rel=0.05)
    state = memory_of(step).argument_size_in_bytes
    state -= bytes_per_device(program.abstract_batch(NAMES))
    assert state == pytest.approx(12 * ((psi - whole) / 8 + whole), rel=0.02)


@pytest.mark.parametrize(
    ("family", "stage", "tensor"),
    [
        ("gpt2", 0, 2), ("gpt2", 3, 4), ("llama", 0, 2), ("llama", 3, 2), ("opt", 1, 4),
        ("llama", 0, 4), ("llama", 3, 4),  # of two key heads
    ],
)  # fmt: skip
def test_tensor_axis_gathers_and_scatters_sequences_around_products(
    family: str, stage: int, tensor: int
) -> None:
    """Megatron's g and its conjugate (arXiv 2205.05198 section 4.2.2), in each pass twice a layer, and what a product read gathered once more for its weight's gradient. Nothing of a vocabulary's or a matrix's size travels."""
    mesh = MeshConfig(data=8 // tensor if stage == 0 else 1, tensor=tensor)
    program = program_of(config(family, stage=stage, mesh=mesh), family=family)
    names = list(batches(family)[0])
    ledger = read_ledger(program.lower_step(names).compile(), program.mesh.shape)
    unit = 16 * tensor // 8 * T * D

    def count(kind: str, trips: int) -> float:
        each = [e for e in ledger.select(kind, ("tensor",)) if e.trips == trips]
        return sum(e.elements for e in each if e.elements > 0.1 * unit) / unit

    assert count("all-gather", L) == 2 + 4
    assert count("reduce-scatter", L) == 2 + 2
    # The embedding's rows and the head's hidden states, each there and back; and the gradient of a
    # table of positions, which is whole.
    assert count("all-gather", 1) - (family != "llama") == count("reduce-scatter", 1) == 2
    for kind in ("all-to-all", "collective-permute"):
        assert ledger.elements(kind, ("tensor",)) == 0
    whole = [p for p in jax.tree.leaves(program.spec.placements, is_leaf=is_placement) if p.tensor_dim is None]
    of_tokens = 4 * unit / D  # the loss's maxima, sums and targets
    reduced = ledger.elements("all-reduce", ("tensor",))
    assert reduced <= sum(math.prod(p.shape) for p in whole) + of_tokens
