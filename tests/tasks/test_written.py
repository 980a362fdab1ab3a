# SPDX-License-Identifier: Apache-2.0
"""Written answers: rows of the decoder, what is read of sound and images, and the model writing."""

import dataclasses
import random
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspeed.config import ConfigError, RunConfig
from jaxspeed.data.audio import log_mel
from jaxspeed.program import Program
from jaxspeed.tasks import Evaluation, Task
from jaxspeed.tasks.features import pixels_in, spectrogram_in
from jaxspeed.tasks.records import BadRecordError
from jaxspeed.tasks.scores import written_scores
from tests.toy_tasks import PairConfig


MakeRun = Callable[..., RunConfig]
Opened = Callable[[RunConfig], tuple[Program, Task]]
Trained = Callable[[RunConfig], Evaluation]

TEXT = PairConfig()
SOUND = PairConfig(feature_shape=(40, 8))
IMAGE = PairConfig(feature_shape=(8, 8, 3))


def said(row: Any) -> bytes:
    """Returns the bytes of a row of tokens, special ones as < (start) and > (end)."""
    special = {256: ord(">"), 257: ord("<")}
    return bytes(special.get(int(i), int(i) % 256) for i in row)


def test_source_and_target_are_rows_of_their_own(
    make_run: MakeRun, opened: Opened
) -> None:
    pairs = [{"source": "abc", "target": "xyz"}] * 9
    run = make_run(TEXT, pairs, name="seq2seq", prefix="say: ", max_target_len=8)
    _, task = opened(run)
    batch = next(task.train_iterator())
    inputs, inside, targets, mask = (
        batch[name][0] for name in ("inputs", "decoder_inputs", "targets", "mask")
    )
    assert said(inputs[batch["segment_ids"][0] == 1]) == b"say: abc>"
    assert said(inside[:4]) == b"<xyz"
    assert said(targets[mask]) == b"xyz>"
    assert inside.shape == (8,)


def test_long_target_is_cut_which_is_said(make_run: MakeRun, opened: Opened) -> None:
    pairs = [{"source": "abc", "target": "x" * n} for n in range(1, 21)]
    run = make_run(
        TEXT, pairs, name="seq2seq", max_target_len=8, buckets=(16,), data={"eval_fraction": 0.05},
    )  # fmt: skip
    _, task = opened(run)
    said_of_it = (
        "12 of 19 examples looked at are longer than task.max_target_len and are cut"
    )
    assert task.describe()[2] == said_of_it
    batch = next(task.train_iterator())
    assert batch["targets"].shape[1] in (4, 8)
    assert (batch["mask"].sum(1) <= 8).all()


def test_texts_are_written_and_measured(make_run: MakeRun, trained: Trained) -> None:
    draw = random.Random(0)
    pairs = []
    for _ in range(100):
        letters = draw.choices(draw.choice(["ab", "xy"]), k=draw.randint(2, 8))
        target = "left" if letters[0] in "ab" else "right"
        pairs.append({"source": "".join(letters), "target": target})
    run = make_run(
        TEXT, pairs, name="seq2seq", max_target_len=8, metrics=("accuracy", "chrf"),
        run={"steps": 60, "seq_len": 16},
    )  # fmt: skip
    evaluation = trained(run)
    assert evaluation.metrics["eval/accuracy"] > 0.8
    assert evaluation.metrics["eval/chrf"] > 80
    assert "(true: right)" in evaluation.samples


def test_question_is_given_and_answer_written(
    make_run: MakeRun, trained: Trained
) -> None:
    draw = np.random.default_rng(0)
    rows = []
    for n in range(60):
        pixels = draw.integers(0, 40, (8, 8, 3)) + 200 * (n % 2)
        rows.append({"image": pixels.tolist(), "question": "how?", "answer": ["dark", "bright"][n % 2]})  # fmt: skip
    run = make_run(
        IMAGE, rows, name="image_qa", run={"steps": 30, "seq_len": 16}, data={"eval_fraction": 0.3},
    )  # fmt: skip
    evaluation = trained(run)
    assert evaluation.metrics["eval/accuracy"] == 1.0
    assert "how?" in evaluation.samples


def test_question_does_not_count_in_the_loss(make_run: MakeRun, opened: Opened) -> None:
    row = {
        "image": np.zeros((4, 4, 3), int).tolist(),
        "question": "hue",
        "answer": "red",
    }
    run = make_run(IMAGE, [row] * 9, name="image_qa", run={"seq_len": 16})
    _, task = opened(run)
    batch = next(task.train_iterator())
    assert batch["inputs"].shape == (8, 8, 8, 3)
    assert said(batch["decoder_inputs"][0][:8]) == b"<hue red"
    assert said(batch["targets"][0][batch["mask"][0]]) == b" red>"


def write_wav(path: Path, sound: np.ndarray) -> str:
    """Writes 16-bit sound at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((sound * 32768).astype(np.int16).tobytes())
    return str(path)


def test_sound_is_transcribed(
    make_run: MakeRun, trained: Trained, tmp_path: Path
) -> None:
    phase = 2 * np.pi * np.arange(6400) / 16_000
    rows = [
        {"speech": write_wav(tmp_path / text, np.sin(hertz * phase) / 2), "text": text}
        for hertz, text in [(300, "low"), (5000, "high")] * 10
    ]
    run = make_run(SOUND, rows, name="speech", run={"steps": 60, "seq_len": 8})
    assert trained(run).metrics["eval/wer"] == 0.0


def test_sound_that_is_too_long_is_left_out_and_rates_are_read(
    make_run: MakeRun, opened: Opened
) -> None:
    rows = [
        {"speech": [0.1] * 400 * n, "sample_rate": 1000 * n, "text": "x" * n}
        for n in range(1, 10)
    ]
    rows[3]["sample_rate"] = 1000
    run = make_run(
        SOUND, rows, name="speech", input_fields=("speech", "sample_rate"),
    )  # fmt: skip
    _, task = opened(run)
    assert task.describe()[2] == "1 of 7 records are left out: too long for the model"
    batch = next(task.train_iterator())
    assert 4 not in (batch["mask"].sum(1) - 1).tolist()


@pytest.mark.parametrize("form", ["samples", "rated", "integers", "file"])
def test_sound_may_be_samples_or_a_file(form: str, tmp_path: Path) -> None:
    sound = np.sin(np.arange(3200) / 9).astype(np.float32) * 0.5
    whole = (sound * 32768).astype(np.int64)
    path = write_wav(tmp_path / "a.wav", sound)
    value = {
        "samples": sound.tolist(),
        "rated": {"array": sound, "sampling_rate": 16_000},
        "integers": whole,
        "file": path,
    }[form]
    found = spectrogram_in({"s": value}, "s", (40, 8), 0)
    expected = log_mel(sound, num_mel_bins=8, frames=40)
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_sound_of_another_rate_is_resampled() -> None:
    slow = np.sin(np.arange(1600) * 2 * np.pi * 440 / 8000)
    fast = np.sin(np.arange(3200) * 2 * np.pi * 440 / 16_000)
    ours = spectrogram_in({"s": slow.tolist()}, "s", (40, 8), 8000)
    rated = {"array": slow, "sampling_rate": 8000}
    np.testing.assert_array_equal(ours, spectrogram_in({"s": rated}, "s", (40, 8), 0))
    theirs = log_mel(fast, num_mel_bins=8, frames=40)
    assert np.abs(ours[:, :3] - theirs[:, :3])[2:15].max() < 0.1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.0] * 16_000, "1.0 seconds are longer than 40 frames"),
        ([0.0] * 9, "9 samples are shorter than a frame"),
        ("none.wav", "none.wav: No such file"),
        ([[0.0] * 900] * 2, "not one row of samples"),
        ({"array": [0.0] * 900, "sampling_rate": 3}, "3 samples a second"),
    ],
)
def test_bad_sound_is_named(value: Any, message: str) -> None:
    with pytest.raises(BadRecordError, match=f"'s' that cannot be used: .*{message}"):
        spectrogram_in({"s": value}, "s", (40, 8), 0)


def test_image_is_brought_to_the_models_size(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.full((16, 12, 3), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for value in (pixels, str(tmp_path / "a.png"), pixels[..., 0], pixels[..., :1]):
        found = pixels_in({"i": value}, "i", (8, 4, 3))
        assert found.shape == (8, 4, 3)
        np.testing.assert_allclose(found, 1.0)
    assert pixels_in({"i": pixels}, "i", (8, 4, 1)).shape == (8, 4, 1)
    for bad, why in (
        ("none.png", "none.png: No such file"),
        ([["a"]], "no image"),
        ({}, "no image"),
    ):
        with pytest.raises(BadRecordError, match=f"'i' that cannot be used: {why}"):
            pixels_in({"i": bad}, "i", (8, 4, 3))


@pytest.mark.parametrize(
    ("changes", "task", "message"),
    [
        ({"end_id": 1}, {}, "model.end_id=1: the tokenizer ends a text with 256"),
        ({"start_id": 264}, {}, "model.start_id=264: the model has 264 tokens"),
        ({}, {"decoder_prompt": ("<|en|>",)}, "tokenizer has no such token"),
    ],
)
def test_special_tokens_that_do_not_fit_are_named(
    changes: dict[str, Any],
    task: dict[str, Any],
    message: str,
    make_run: MakeRun,
    opened: Opened,
) -> None:
    model = dataclasses.replace(TEXT, **changes)
    pairs = [{"source": "a", "target": "b"}] * 9
    with pytest.raises(ConfigError, match=message):
        opened(make_run(model, pairs, name="seq2seq", **task))


def test_scores_of_texts_are_those_of_the_field() -> None:
    pytest.importorskip("sacrebleu")
    ours, targets = ["The cat sat down.", "no"], ["the cat sat  down.", "Yes, sir."]
    names = ("accuracy", "bleu", "chrf", "rouge", "wer")
    scores = written_scores(names, ours, targets)
    assert scores["accuracy"] == 0.5
    # Of 4 + 1 words the first 4 are right; "no" is one wrong, "sir" one missing.
    assert scores["wer"] == pytest.approx(2 / 6)
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(50)
    assert 0 < scores["bleu"] < scores["chrf"] < 100
    same = written_scores(names, targets, targets)
    assert same == pytest.approx(
        dict.fromkeys(("bleu", "chrf", "rouge1", "rouge2", "rougeL"), 100) | {"accuracy": 1, "wer": 0}, rel=1e-6
    )  # fmt: skip
