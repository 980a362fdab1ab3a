# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a model or a task's data is one line on stderr and exit code 2, before anything is trained."""

import json
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from jaxspeed import cli, launch
from jaxspeed.config import RunConfig
from jaxspeed.hf import export_params
from jaxspeed.program import build_program
from models import bert, gpt2
from tests.command import ROOT


SIZES: dict[str, Any] = {
    "num_layers": 1,
    "num_heads": 2,
    "d_model": 16,
    "max_seq_len": 64,
}
ENCODER: dict[str, Any] = SIZES | {"d_ff": 32, "vocab_size": 300}
ROW = ["--seq_len", "32", "--global_batch_size", "8", "--steps", "2"]
EARS: dict[str, Any] = SIZES | {
    "num_decoder_layers": 1,
    "d_ff": 32,
    "max_source_len": 64,
}

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a GPT-2 and a BERT, both without tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, cfg in (
        ("gpt2", gpt2.Config(vocab_size=300, **SIZES)),
        ("bert", bert.Config(head="classify", num_labels=2, **ENCODER)),
    ):
        run = RunConfig(model=cfg, steps=1, seq_len=8, micro_batch_size=1)
        program = build_program(run, devices=jax.devices()[:1])
        export_params(program.init_state()["params"], cfg, folder / name)
    return folder


@pytest.fixture
def refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Returns `refused(command, *flags)`: the one line on stderr of a command that ends with code 2."""
    monkeypatch.setattr(launch, "keep_freed_memory", lambda: None)
    monkeypatch.chdir(ROOT)

    def run(command: str, *flags: object) -> str:
        args = [*map(str, flags), "--compile_cache", ""]
        capfd.readouterr()
        if command.startswith("configs/"):
            cache = str(tmp_path / "cache")
            workdir = str(tmp_path / "run")
            args += ["--workdir", workdir, "--data.cache_dir", cache, *ROW]
            code = cli.train([command, *args])
        else:
            code = cli.main([command, *args])
        said = capfd.readouterr().err
        assert code == 2, said
        assert said.startswith("error: ")
        assert said.count("\n") == 1, said
        return said

    return run


def sizes(given: dict[str, int]) -> list[str]:
    return [x for k, v in given.items() for x in (f"--model.{k}", str(v))]


def lines(path: Path, record: Callable[[int], dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record(i)) + "\n" for i in range(40)))
    return path


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_truncated_tensors(folders: Path, tmp_path: Path, refused: Refused) -> None:
    cut = copied(folders / "gpt2", tmp_path / "cut")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    said = refused("generate", cut, "--prompt-ids", "1")
    assert said.startswith(f"error: {file}: truncated: tensor transformer.")


def test_unknown_architecture(folders: Path, tmp_path: Path, refused: Refused) -> None:
    odd = copied(folders / "gpt2", tmp_path / "odd")
    settings = json.loads((odd / "config.json").read_text())
    changed = settings | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (odd / "config.json").write_text(json.dumps(changed))
    said = refused("generate", odd, "--prompt-ids", "1")
    assert "model_type='mamba': no such family. Did you mean 'mbart'?" in said


def classify(data: Path, *flags: object) -> list[object]:
    path = ["--data.path", data, "--task.buckets", "16"]
    return ["configs/bert_imdb.py", *path, *sizes(ENCODER), *flags]


def reviews(tmp_path: Path, **changes: Any) -> Path:
    """Returns labelled texts, in which the sixth record is another."""
    usual = lambda i: {"text": f"some text {i}", "label": ("neg", "pos")[i % 2]}
    record = lambda i: usual(i) | (changes if i == 5 else {})
    return lines(tmp_path / "reviews.jsonl", record)


def test_another_family_than_the_recipes(
    folders: Path, tmp_path: Path, refused: Refused
) -> None:
    flags = ["--init", folders / "gpt2", "--data.tokenizer", "byte"]
    said = refused(*classify(reviews(tmp_path), *flags))
    assert "gpt2" in said
    assert "bert" in said


def test_model_without_tokenizer(
    folders: Path, tmp_path: Path, refused: Refused
) -> None:
    said = refused(*classify(reviews(tmp_path), "--init", folders / "bert"))
    assert f"{folders / 'bert'} has no tokenizer.json" in said


def test_tokenizer_of_another_vocabulary(
    folders: Path, tmp_path: Path, refused: Refused
) -> None:
    model = copied(folders / "bert", tmp_path / "model")
    words = {f"w{i}": i for i in range(500)}
    larger = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    larger.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    larger.save(str(model / "tokenizer.json"))
    said = refused(*classify(reviews(tmp_path), "--init", model))
    assert "it has 503 ids but the model only 300" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": "good"}, "record 5 has 'good' as 'label', only neg, pos"),
        ({"label": 7}, "record 5 has 7 as 'label', which is no class"),
        ({"text": ""}, "record 5 has an empty 'text'; remove it"),
        ({"text": None}, "record 5"),
    ],
)
def test_bad_review(
    changes: dict[str, Any], words: str, tmp_path: Path, refused: Refused
) -> None:
    data = reviews(tmp_path, **changes)
    assert words in refused(*classify(data, "--data.tokenizer", "byte"))


def test_answer_that_is_not_in_its_passage(tmp_path: Path, refused: Refused) -> None:
    answer = {"text": ["nobody"], "answer_start": [3]}
    data = lines(
        tmp_path / "questions.jsonl",
        lambda i: {"question": f"who {i}?", "context": "it was he", "answers": answer},
    )
    flags = ["--data.path", data, "--data.tokenizer", "byte", "--task.buckets", "16"]
    said = refused("configs/bert_squad.py", *flags, *sizes(ENCODER), "--task.stride", 4)
    assert (
        "record 0 has the answer 'nobody' at 3 of its passage, where 'was he'" in said
    )


def test_sound_of_a_rate_that_is_none(tmp_path: Path, refused: Refused) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(500)
        file.writeframes(np.zeros(500, "<i2").tobytes())
    sound = str(tmp_path / "a.wav")
    data = lines(tmp_path / "s.jsonl", lambda i: {"speech": sound, "text": f"word {i}"})
    flags = [
        "--data.path",
        data,
        "--task.input_fields",
        "speech",
        "--task.buckets",
        "8",
    ]
    said = refused("configs/whisper_speech.py", *flags, *sizes(EARS))
    assert "a.wav: 500 samples a second; sound has 1000 to 768000" in said
