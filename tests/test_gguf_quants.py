# SPDX-License-Identifier: Apache-2.0
"""Quantised tensors of a GGUF file mean what llama.cpp's format says, block by block.

The `gguf` package cannot make K-quants, so blocks of random bits are read, and read again by the
formulas of ggml-quants.c, written out here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed.gguf_files import read_gguf
from tests.gguf_maker import weights, write


gguf: Any = pytest.importorskip("gguf", reason="needs pip install 'jaxspeed[hf]'")

ROWS, BLOCKS, SIZE = 3, 2, 256
"""Of the tensor, a row's, and weights in a block."""


def half(block: np.ndarray, at: int) -> np.float32:
    return np.float32(block[at : at + 2].view(np.float16)[0])


def scale_and_min(packed: np.ndarray, j: int) -> tuple[int, int]:
    """Returns two of the sixteen numbers of six bits in twelve bytes."""
    q = packed.astype(int)
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    low = q[j + 4] & 15, q[j + 4] >> 4
    return low[0] | (q[j - 4] >> 6) << 4, low[1] | (q[j] >> 6) << 4


def q2_k(block: np.ndarray) -> list[float]:
    scales, qs, d, low = block[:16], block[16:80], half(block, 80), half(block, 82)
    y = []
    for i in range(SIZE):
        part, rest = divmod(i, 128)
        shift, place = divmod(rest, 32)
        s = int(scales[i // 16])
        q = (int(qs[32 * part + place]) >> (2 * shift)) & 3
        y.append(d * (s & 15) * q - low * (s >> 4))
    return y


def q3_k(block: np.ndarray) -> list[float]:
    mask, qs, packed = block[:32], block[32:96], block[96:108].astype(int)
    d, y = half(block, 108), []
    for i in range(SIZE):
        part, rest = divmod(i, 128)
        shift, place = divmod(rest, 32)
        j = i // 16
        low = packed[j] & 15 if j < 8 else packed[j - 8] >> 4
        high = (packed[8 + j % 4] >> (2 * (j // 4))) & 3
        q = (int(qs[32 * part + place]) >> (2 * shift)) & 3
        kept = (int(mask[place]) >> (4 * part + shift)) & 1
        y.append(d * ((low | high << 4) - 32) * (q - (0 if kept else 4)))
    return y


def q45_k(block: np.ndarray, fifth: np.ndarray | None, qs: np.ndarray) -> list[float]:
    d, low, y = half(block, 0), half(block, 2), []
    for i in range(SIZE):
        j, place = divmod(i, 32)
        s, m = scale_and_min(block[4:16], j)
        q = (int(qs[32 * (j // 2) + place]) >> (4 * (j % 2))) & 15
        if fifth is not None:
            q += 16 * ((int(fifth[place]) >> j) & 1)
        y.append(d * s * q - low * m)
    return y


def q4_k(block: np.ndarray) -> list[float]:
    return q45_k(block, None, block[16:144])


def q5_k(block: np.ndarray) -> list[float]:
    return q45_k(block, block[16:48], block[48:176])


def q6_k(block: np.ndarray) -> list[float]:
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    d, y = half(block, 208), []
    for i in range(SIZE):
        part, rest = divmod(i, 128)
        quarter, place = divmod(rest, 32)
        four = int(low[64 * part + 32 * (quarter % 2) + place]) >> (4 * (quarter // 2))
        two = (int(high[32 * part + place]) >> (2 * quarter)) & 3
        y.append(d * int(scales[i // 16]) * (((four & 15) | two << 4) - 32))
    return y


K_QUANTS: dict[str, tuple[Callable[[np.ndarray], list[float]], tuple[int, ...]]] = {
    "Q2_K": (q2_k, (80, 82)),
    "Q3_K": (q3_k, (108,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q5_K": (q5_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
}
"""How a block is read, and where its float16 numbers stand."""


@pytest.mark.parametrize("quantise", list(K_QUANTS))
def test_k_quants_are_read_by_the_formulas(tmp_path: Path, quantise: str) -> None:
    formula, halves = K_QUANTS[quantise]
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantise]]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (ROWS, BLOCKS, size), np.uint8)
    for at in halves:
        numbers = rng.normal(size=(ROWS, BLOCKS, 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = numbers.view(np.uint8)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {name: blocks.reshape(ROWS, -1)}
    info = read_gguf(write(tmp_path / "m.gguf", tensors, quantise)).tensors[name]
    assert info.shape == (ROWS, BLOCKS * SIZE)
    expected = [[formula(block) for block in row] for row in blocks]
    np.testing.assert_allclose(
        info.view(), np.reshape(expected, info.shape), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("quantise", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])  # fmt: skip
def test_quantised_tensors_are_the_packages(tmp_path: Path, quantise: str) -> None:
    tensors = weights()
    del tensors["lm_head.weight"]
    found = read_gguf(write(tmp_path / "model.gguf", tensors, quantise))
    assert found.settings["tie_word_embeddings"]
    kind = gguf.GGMLQuantizationType[quantise]
    for name, info in found.tensors.items():
        array = tensors[name]
        if array.ndim > 1:  # whole rows are quantised, so their order does not matter
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        np.testing.assert_array_equal(info.view(), array)
