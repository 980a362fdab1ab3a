# SPDX-License-Identifier: Apache-2.0
"""Sound in from WAV files of any rate, and spectrograms equal to those of transformers."""

import io
import wave
from pathlib import Path

import numpy as np
import pytest

from jaxspeed.config import ConfigError
from jaxspeed.data.audio import (
    RATE,
    decode_wav,
    log_mel,
    mel_filters,
    read_wav,
    resample,
)


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def speechlike(seconds: float) -> np.ndarray:
    """Returns gliding tones that come and go, with noise."""
    t, rng = np.arange(round(seconds * RATE)) / RATE, np.random.default_rng(0)
    glide = np.sin(2 * np.pi * (200 + 300 * t) * t) * (np.sin(9 * t) > 0)
    return (0.3 * glide + 0.01 * rng.normal(size=t.shape)).astype(np.float32)


def wav(
    audio: np.ndarray, rate: int = RATE, width: int = 2, channels: int = 1
) -> bytes:
    """Returns a WAV file; its channels are all the same."""
    scaled = np.round(np.repeat(audio, channels) * (2 ** (8 * width - 1) - 1))
    whole = (scaled + (128 if width == 1 else 0)).astype("<i4")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(whole.view(np.uint8).reshape(-1, 4)[:, :width].tobytes())
    return file.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_of_any_width_is_read(width: int, channels: int) -> None:
    audio = tone(440, 0.1)
    read = decode_wav(wav(audio, width=width, channels=channels), name="x")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, audio, atol=1.1 / 2 ** (8 * min(width, 2) - 1))


def test_channels_are_averaged(tmp_path: Path) -> None:
    audio = np.stack([tone(440, 0.1), np.zeros(RATE // 10)], 1).reshape(-1)
    (tmp_path / "x.wav").write_bytes(wav(audio))
    data = bytearray((tmp_path / "x.wav").read_bytes())
    data[22:24], data[32:34] = b"\x02\x00", b"\x04\x00"  # two channels, interleaved
    (tmp_path / "x.wav").write_bytes(data)
    read = read_wav(tmp_path / "x.wav")
    np.testing.assert_allclose(read, tone(440, 0.1) / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000])
def test_tone_at_another_rate_is_the_same_tone(rate: int) -> None:
    read = decode_wav(wav(tone(440, 0.5, rate), rate), name="x")
    assert len(read) == RATE // 2
    inner = slice(RATE // 10, -RATE // 10)
    np.testing.assert_allclose(read[inner], tone(440, 0.5)[inner], atol=5e-3)


def test_what_16_khz_cannot_hold_is_filtered_out() -> None:
    assert np.abs(resample(tone(11_000, 0.2, 48_000), 48_000)[800:-800]).max() < 0.01


def test_tone_is_loudest_in_its_own_channel() -> None:
    bins = np.linspace(0, RATE / 2, 201)
    centres = bins[mel_filters(80).argmax(0)]
    for hertz in (300, 1000, 3000):
        loudest = log_mel(tone(hertz, 0.3), num_mel_bins=80)[10].argmax()
        assert abs(centres[loudest] - hertz) < 0.07 * hertz


def test_silence_is_the_floor() -> None:
    silence = log_mel(np.zeros(800), num_mel_bins=80)
    np.testing.assert_allclose(silence, (np.log10(1e-10) + 4) / 4, rtol=1e-6)


def test_frames_are_those_asked_for_or_an_even_number() -> None:
    audio = speechlike(0.305)
    assert log_mel(audio, num_mel_bins=8).shape == (32, 8)
    assert log_mel(audio, num_mel_bins=8, frames=50).shape == (50, 8)


@pytest.mark.hf
@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_spectrogram_is_that_of_transformers(num_mel_bins: int) -> None:
    transformers = pytest.importorskip("transformers")
    extract = transformers.WhisperFeatureExtractor(feature_size=num_mel_bins)
    audio = speechlike(2.04)
    theirs = extract(audio, sampling_rate=RATE, return_tensors="np").input_features[0]
    ours = log_mel(audio, num_mel_bins=num_mel_bins, frames=3000)
    np.testing.assert_allclose(ours, theirs.T, atol=1e-4)
    short = {"padding": "max_length", "max_length": 206 * 160}
    theirs = extract(audio, sampling_rate=RATE, return_tensors="np", **short)
    ours = log_mel(audio, num_mel_bins=num_mel_bins, frames=206)
    np.testing.assert_allclose(ours, theirs.input_features[0].T, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav(tone(440, 0.1))[:-100], "x: truncated, 3100 of 3200 bytes"),
        (wav(np.zeros(0)), "x: there is no sound in it"),
        (b"", r"x: no PCM WAV file \(it ends too early\); convert it: ffmpeg"),
        (b"OggS" + bytes(100), "x: no PCM WAV file .*RIFF.*; convert it"),
        (
            wav(tone(440, 0.1)).replace(b"\x01\x00\x01\x00", b"\x03\x00\x01\x00", 1),
            r"x: no PCM WAV file \(unknown format: 3\)",
        ),
        (wav(tone(440, 0.1), rate=100), "x: 100 samples a second; sound has 1000 to"),
    ],
)
def test_file_that_holds_no_sound_is_one_clear_line(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode_wav(data, name="x")


def test_sound_that_does_not_fit_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.wav: No such file"):
        read_wav(tmp_path / "absent.wav")
    with pytest.raises(ConfigError, match=r"1.0 seconds are longer than 50 frames"):
        log_mel(tone(440, 1.0), num_mel_bins=80, frames=50)
    with pytest.raises(ConfigError, match="100 samples are shorter than a frame"):
        log_mel(np.zeros(100), num_mel_bins=80)
