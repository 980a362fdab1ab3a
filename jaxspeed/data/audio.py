# SPDX-License-Identifier: Apache-2.0
"""Sound on the host: WAV files at any rate, and the log-mel spectrograms that Whisper reads.

All is mono, float32 in [-1, 1], at 16 kHz. A spectrogram has a frame every 10 ms; two frames are
one position of the encoder.
"""

import functools
import io
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from jaxspeed.config import ConfigError


RATE = 16_000
"""Samples a second."""
HOP = 160
"""Samples from one frame to the next."""
WINDOW = 400
"""Samples that a frame looks at (25 ms)."""

_CONVERT = "convert it: ffmpeg -i IN -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav"


def read_wav(path: str | Path) -> Float32[np.ndarray, " T"]:
    """Returns the sound of a WAV file: channels averaged, resampled to 16 kHz.

    Raises:
        ConfigError: it cannot be read, is truncated, or is no PCM WAV file.
    """
    path = Path(path).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give a WAV file that can be read"
        ) from None
    return decode_wav(data, name=str(path))


def decode_wav(data: bytes, *, name: str) -> Float32[np.ndarray, " T"]:
    """Returns the sound of a WAV file's bytes; see `read_wav`.

    Args:
        data: the file.
        name: what an error calls it.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            rate, length = file.getframerate(), file.getnframes()
            samples = file.readframes(length)
    except (wave.Error, EOFError) as error:
        raise ConfigError(
            f"{name}: no PCM WAV file ({str(error) or 'it ends too early'}); {_CONVERT}"
        ) from None
    whole = length * width * channels
    if not whole:
        raise ConfigError(f"{name}: there is no sound in it; remove it from the data")
    if len(samples) != whole:
        raise ConfigError(
            f"{name}: truncated, {len(samples)} of {whole} bytes of sound are there; copy it anew"
        )
    if width not in _DECODERS:
        raise ConfigError(f"{name}: samples of {8 * width} bits; {_CONVERT}")
    mono = _DECODERS[width](samples).reshape(-1, channels).mean(1, dtype=np.float32)
    return resample(mono, rate, name=name)


def resample(
    audio: Float[np.ndarray, " T"], rate: int, *, name: str = "audio"
) -> Float32[np.ndarray, " S"]:
    """Returns the sound at 16 kHz, by a polyphase low-pass filter.

    Args:
        audio: samples.
        rate: how many of them are a second.
        name: what an error calls it.

    Raises:
        ConfigError: the rate is none that sound has.
    """
    if not 1000 <= rate <= 768_000:
        raise ConfigError(
            f"{name}: {rate} samples a second; sound has 1000 to 768000, so give its real rate"
        )
    if rate != RATE:
        # Imported here: it takes half a second.
        from scipy.signal import resample_poly

        common = math.gcd(rate, RATE)
        audio = resample_poly(audio, RATE // common, rate // common)
    return np.asarray(audio, np.float32)


def log_mel(
    audio: Float[np.ndarray, " T"], *, num_mel_bins: int, frames: int | None = None
) -> Float32[np.ndarray, "F M"]:
    """Returns the log-mel spectrogram that Whisper reads, a row every 10 ms.

        y = log10(max(mel |STFT|^2, 1e-10));  (max(y, max(y) - 8) + 4) / 4

    with a periodic Hann window of 25 ms, and Slaney's mel scale up to 8 kHz. Reference: arXiv
    2212.04356 section 2.2 and its published code, to which this is equal to 1e-4.

    Args:
        audio: at 16 kHz.
        num_mel_bins: channels (M): 80, or 128 for large-v3.
        frames: how many there will be, by silence at the end, as published models want it (3000
            for 30 seconds); None: those of the sound, filled up to an even number.

    Raises:
        ConfigError: the sound is longer than that, or shorter than a frame.
    """
    if len(audio) <= WINDOW // 2:
        raise ConfigError(
            f"audio: {len(audio)} samples are shorter than a frame; leave such sounds out"
        )
    length = -(-len(audio) // (2 * HOP)) * 2 * HOP if frames is None else frames * HOP
    if len(audio) > length:
        raise ConfigError(
            f"audio: {len(audio) / RATE:.1f} seconds are longer than {frames} frames of 10 ms; cut it, or raise model.max_source_len"
        )
    # Imported here, as above; NumPy's FFT knows only 64 bits.
    from scipy.fft import rfft

    whole = np.zeros(length, np.float32)
    whole[: len(audio)] = audio
    padded = np.pad(whole, WINDOW // 2, mode="reflect")
    views = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:-1:HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    spectrum: Any = rfft(views * window.astype(np.float32))
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    mel = np.log10(np.maximum(power @ mel_filters(num_mel_bins), 1e-10))
    return ((np.maximum(mel, mel.max() - 8) + 4) / 4).astype(np.float32)


@functools.cache
def mel_filters(num_mel_bins: int) -> Float32[np.ndarray, "K M"]:
    """Returns triangles between neighbouring mel frequencies, each of area 1 in Hz.

    Slaney's scale: linear, 3 mel in 200 Hz, up to 1 kHz, then logarithmic, 27 mel a factor of 6.4.
    """
    ends = 0.0, 15 + 27 * math.log(RATE / 2 / 1000) / math.log(6.4)
    mels = np.linspace(*ends, num_mel_bins + 2)
    above = 1000 * np.exp(np.log(6.4) / 27 * (mels - 15))
    edges = np.where(mels < 15, mels * 200 / 3, above)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rise, fall = (bins - low) / (centre - low), (high - bins) / (high - centre)
    triangles = np.maximum(0, np.minimum(rise, fall))
    return (triangles * 2 / (high - low)).astype(np.float32)


def _unsigned(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128


def _signed(dtype: str, data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype).astype(np.float32) / -float(np.iinfo(dtype).min)


def _three_bytes(data: bytes) -> np.ndarray:
    padded = np.zeros((len(data) // 3, 4), np.uint8)
    padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    return _signed("<i4", padded.tobytes())


_DECODERS = {
    1: _unsigned,
    2: functools.partial(_signed, "<i2"),
    3: _three_bytes,
    4: functools.partial(_signed, "<i4"),
}
"""Bytes a sample -> how they become numbers."""
