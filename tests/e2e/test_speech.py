# SPDX-License-Identifier: Apache-2.0
"""A model of speech that was trained with buckets: what it hears of a sound depends on nothing beside it."""

import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed import cli, launch
from tests.command import ROOT


SIZES = {
    "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 32,
    "max_source_len": 64, "max_seq_len": 32,
}  # fmt: skip


def write_wav(path: Path, seconds: float, hertz: float) -> Path:
    phase = 2 * np.pi * hertz * np.arange(int(seconds * 16_000)) / 16_000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((np.sin(phase) * 20_000).astype("<i2").tobytes())
    return path


def test_padding_behind_a_sound_is_not_heard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "keep_freed_memory", lambda: None)
    monkeypatch.chdir(ROOT)
    short = write_wav(tmp_path / "short.wav", 0.21, 300)
    long = write_wav(tmp_path / "long.wav", 0.9, 2000)
    data = tmp_path / "sounds.jsonl"
    pairs = [(short, "low"), (long, "a high one")] * 20
    rows = [json.dumps({"speech": str(f), "text": text}) for f, text in pairs]
    data.write_text("\n".join(rows) + "\n")
    workdir = tmp_path / "run"
    flags: dict[str, Any] = {
        "data.path": data, "task.input_fields": "speech", "task.buckets": 16, "seq_len": 32,
        "global_batch_size": 8, "steps": 4, "workdir": workdir, "compile_cache": "",
        "data.cache_dir": tmp_path / "cache", "dtype.compute": "float32",
    } | {f"model.{name}": size for name, size in SIZES.items()}  # fmt: skip
    given = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    assert cli.train(["configs/whisper_speech.py", *given]) == 0
    said = capsys.readouterr()
    assert re.search(r"rows are padded: [45]\d% to 16, [45]\d% to 32 tokens", said.out)

    def hear(*files: Path) -> list[list[float]]:
        heard = [str(x) for file in files for x in ("--audio", file)]
        flags = "--temperature 0 --max-new-tokens 5 --json --compile_cache".split()
        assert cli.main(["generate", str(workdir), *heard, *flags, ""]) == 0
        return json.loads(capsys.readouterr().out)["logprobs"]

    together = hear(short, long)
    for found, file in zip(together, (short, long), strict=True):
        assert found == pytest.approx(hear(file)[0], abs=1e-4)
    assert together[0] != pytest.approx(together[1], abs=1e-4)

    over = write_wav(tmp_path / "over.wav", 1.5, 300)
    code = cli.main(["generate", str(workdir), "--audio", str(over)])
    assert code == 2
    assert "over.wav is longer than 128 frames of 10 ms; cut it" in (
        capsys.readouterr().err
    )
