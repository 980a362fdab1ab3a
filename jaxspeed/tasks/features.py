# SPDX-License-Identifier: Apache-2.0
"""Sound and images of records as what a model reads."""

import contextlib
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxspeed.config import ConfigError
from jaxspeed.data.audio import RATE, log_mel, read_wav, resample
from jaxspeed.data.documents import Record
from jaxspeed.data.images import read_image, scale_pixels
from jaxspeed.tasks.records import BadRecordError


def spectrogram_in(
    record: Record, field: str, shape: tuple[int | None, int], rate: int
) -> Float32[np.ndarray, "F M"]:
    """Returns a field's sound as a log-mel spectrogram.

    Args:
        record: of the data.
        field: holds samples (a list or an array, of integers or in [-1, 1]), samples with their
            rate (`{"array": ..., "sampling_rate": ...}`), or the path of a WAV file.
        shape: frames, by silence at the end (None: those of the sound), and channels.
        rate: samples a second where the field does not tell; 0: 16,000.

    Raises:
        BadRecordError: it holds something else, or the sound is too long.
    """
    value = record[field]
    if isinstance(value, dict) and {"array", "sampling_rate"} <= value.keys():
        value, rate = value["array"], int(value["sampling_rate"])
    with _told_of(field):
        if isinstance(value, str):
            sound = read_wav(value)
        else:
            sound = resample(_samples(value, field), rate or RATE, name=field)
        return log_mel(sound, num_mel_bins=shape[1], frames=shape[0])


def seconds_in(record: Record, field: str, rate: int) -> float:
    """Returns how long a field's sound is, by its samples or by a file's header; the rest as `spectrogram_in`."""
    value = record[field]
    try:
        if isinstance(value, str):
            with wave.open(str(Path(value).expanduser())) as file:
                return file.getnframes() / file.getframerate()
    except (OSError, EOFError, wave.Error):
        return 0.0  # what is wrong with it, reading it will tell
    if isinstance(value, dict):
        value, rate = value.get("array", ()), int(value.get("sampling_rate", rate))
    return len(value) / (rate or RATE)


def pixels_in(
    record: Record, field: str, shape: tuple[int, ...]
) -> Float32[np.ndarray, "H W C"]:
    """Returns a field's image in the model's size, its values between -1 and 1.

    Args:
        record: of the data.
        field: holds pixels (height, width, channels) from 0 to 255, or the path of a file.
        shape: the model's height, width and channels.

    Raises:
        BadRecordError: it holds something else.
    """
    value = record[field]
    with _told_of(field):
        if isinstance(value, str):
            return read_image(value, shape)
        return scale_pixels(value, shape)


@contextlib.contextmanager
def _told_of(field: str) -> Iterator[None]:
    """Says of what is wrong in which field it is."""
    try:
        yield
    except ConfigError as error:
        what, _, change = str(error).partition("; ")
        why = f"has a {field!r} that cannot be used: {what}"
        raise BadRecordError(why, change) from error


def _samples(value: Any, field: str) -> Float32[np.ndarray, " T"]:
    sound = np.asarray(value)
    if sound.ndim != 1 or sound.dtype.kind not in "iuf":
        raise ConfigError(
            f"it holds {type(value).__name__} and not one row of samples; set task.input_fields"
        )
    # TFDS gives 16-bit samples in 64 bits.
    return (sound / (32768.0 if sound.dtype.kind != "f" else 1.0)).astype(np.float32)
