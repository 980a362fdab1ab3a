# SPDX-License-Identifier: Apache-2.0
"""Speech with its text: the prompts of the telephone system Asterisk, and a little LibriVox."""

import gzip
import io
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np

from jaxspeed.data.documents import Record
from jaxspeed.data.download import Downloads, members
from jaxspeed.data.prepare import DataSet, SetInfo, divide


_PROMPTS = "usr/share/asterisk/sounds/en_US_f_Allison/"
_PROMPT_TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
_LIBRIVOX = "usr/share/pocketsphinx/test/data/librivox/"
_NOTE = re.compile(r"\[.*?\]|\(.*?\)")
LONGEST_S = 12.0
"""Seconds of the longest prompt taken: a model pads all to one length, and few are longer (up to 73)."""
_TRANSCRIPT = re.compile(r"<s> (.*) </s> \((.*)\)")


def _read(downloads: Downloads) -> dict[str, list[Record]]:
    sounds, texts, librivox = downloads.apt(
        "asterisk-core-sounds-en-wav",
        "asterisk-core-sounds-en",
        "pocketsphinx-testdata",
    )
    ((_, packed),) = members(texts, _PROMPT_TEXTS)
    said = {}
    for line in gzip.decompress(packed).decode().splitlines():
        key, _, text = line.partition(":")
        text = _NOTE.sub("", text).strip()
        # Semicolons begin comments; silence and tones have a note alone.
        if text and line[0] != ";":
            said[key.strip()] = text
    prompts = _spoken(sounds, _PROMPTS, said)
    prompts = [r for r in prompts if len(r["speech"]) <= LONGEST_S * r["sample_rate"]]
    splits = divide(prompts, lambda record: [record["text"]], {"test": 0.1})
    found = dict(members(librivox, f"{_LIBRIVOX}transcription"))
    matches = map(
        _TRANSCRIPT.match, found[f"{_LIBRIVOX}transcription"].decode().splitlines()
    )
    said = {match[2]: match[1] for match in matches if match}
    return splits | {"librivox": _spoken(librivox, _LIBRIVOX, said)}


def _spoken(file: Path, folder: str, texts: dict[str, str]) -> list[Record]:
    """Returns the recordings of a package that have a text, in the order of their names."""
    records = []
    for name, content in sorted(members(file, f"{folder}*.wav")):
        key = name.removeprefix(folder).removesuffix(".wav")
        if key in texts:
            with wave.open(io.BytesIO(content)) as sound:
                assert (sound.getnchannels(), sound.getsampwidth()) == (1, 2), name
                samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
                rate = sound.getframerate()
            record = {
                "id": key,
                "speech": samples,
                "sample_rate": rate,
                "text": texts[key],
            }
            records.append(record)
    return records


def _features() -> dict[str, Any]:
    from tensorflow_datasets import features

    return {
        "id": features.Text(),
        "speech": features.Tensor(shape=(None,), dtype=np.int16),
        "sample_rate": features.Scalar(dtype=np.int32),
        "text": features.Text(),
    }


SET = DataSet(
    info=SetInfo(
        name="jaxspeed_prompts",
        version="1.1.0",
        features=_features,
        description="train and test: prompts of the telephone system Asterisk, one voice, "
        "8 kHz, of at most 12 seconds. librivox: five sentences of Sense and Sensibility, 16 kHz. 16-bit samples.",
        licence="Asterisk CC BY-SA 3.0; LibriVox public domain",
    ),
    fetched="asterisk-core-sounds-en-wav and -en, pocketsphinx-testdata from apt, 20 MB",
    read=_read,
)
