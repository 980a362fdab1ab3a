# SPDX-License-Identifier: Apache-2.0
"""A model that reads and writes text: a `Writer` with its tokenizer, end tokens and chat template.

    model = open_writer("runs/tiny")             # or a Hugging Face folder
    for (text,) in model.write([model.ids_of("To be")], SamplingConfig(), every=8):
        words = model.decode(text.ids)           # as far as it is written

What `jaxspeed generate` and `jaxspeed chat` are made of. Layer 4.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxspeed.config import ConfigError, MeshConfig, ZeroConfig
from jaxspeed.data import ByteTokenizer, Tokenizer, load_tokenizer
from jaxspeed.data.audio import log_mel, read_wav
from jaxspeed.data.chat import PLAIN, PLAIN_STOP, Message, Template, load_template
from jaxspeed.data.images import read_image
from jaxspeed.data.tokenize import TOKENIZER_FILE, SubwordTokenizer
from jaxspeed.generate import Encoded, Text, Writer
from jaxspeed.hf import is_hugging_face, read_settings
from jaxspeed.pretrained import open_model
from jaxspeed.sampling import SamplingConfig


TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end an answer in the usual chat templates."""


@dataclass(frozen=True, eq=False)
class TextModel:
    """A model and what its token ids mean. Make it with `open_writer`."""

    writer: Writer
    tokenizer: Tokenizer | None
    """None: the folder has none; then only ids go in and out."""
    template: Template | None
    """None: the folder has none."""
    lead: tuple[int, ...]
    """Ids before a prompt."""
    masks_sound: bool = False
    """Whether sound was masked behind its end in training (`task.buckets`), not filled up with silence."""

    @property
    def start_id(self) -> int | None:
        """The decoder's first id, of a model with an encoder; else None."""
        return getattr(self.writer.program.run.model, "start_id", None)

    @property
    def reads_source(self) -> bool:
        """Whether a prompt is for an encoder of text."""
        model = self.writer.program.run.model
        return self.start_id is not None and not hasattr(model, "feature_shape")

    @property
    def room(self) -> int:
        """Tokens of prompt and text together, at most; 0: no limit."""
        return getattr(self.writer.program.run.model, "max_seq_len", 0)

    def ids_of(self, prompt: str, *, named: bool = False) -> np.ndarray:
        """Returns a prompt's ids.

        Args:
            prompt: its text.
            named: special tokens may be written by name, and what comes before it is its own.

        Raises:
            ConfigError: there is no tokenizer.
        """
        tokenizer = self._need_tokenizer()
        if named and isinstance(tokenizer, SubwordTokenizer):
            return tokenizer.encode_named(prompt)
        if self.reads_source:
            return tokenizer.frame(1).around(tokenizer.encode(prompt))[0]
        ids = np.concatenate(
            [np.asarray(self.lead, np.int32), tokenizer.encode(prompt)]
        )
        return ids if len(ids) else np.asarray([tokenizer.end_id], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids."""
        return self._need_tokenizer().decode(ids)

    def write(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        *,
        every: int = 0,
        source: Sequence[np.ndarray] | np.ndarray | None = None,
    ) -> Iterator[list[Text]]:
        """Yields what is written after each prompt, as `Writer.stream` does.

        Args:
            prompts: ids. Of a model with an encoder of text these are its input, unless there is
                a source.
            sampling: how to choose.
            every: tokens between two yields.
            source: what the encoder reads; then prompts are the decoder's, behind its first id.
        """
        decode = self.decode if self.tokenizer else None
        encoded = None
        if self.start_id is not None:
            first = np.asarray([self.start_id], np.int32)
            if source is None:
                source, prompts = prompts, [first[:0]] * len(prompts)
            encoded = _encoded(source)
            prompts = [_behind(first, ids) for ids in prompts]
        elif source is not None:
            raise ConfigError("input: this model has no encoder; give a prompt only")
        return self.writer.stream(
            prompts, sampling, encoded=encoded, decode=decode, every=every
        )

    def hear(self, files: Sequence[str]) -> Sequence[np.ndarray] | np.ndarray:
        """Returns what the encoder of a speech model reads of WAV files: with silence up to its longest, or each in its own length, as it was trained.

        Raises:
            ConfigError: the model is not one of speech, or a file cannot be read or is too long.
        """
        shape = getattr(self.writer.program.run.model, "feature_shape", ())
        if len(shape) != 2:
            raise ConfigError("audio: this model does not listen; leave it out")
        frames = None if self.masks_sound else shape[0]
        heard = [
            log_mel(read_wav(file), num_mel_bins=shape[1], frames=frames)
            for file in files
        ]
        if frames is not None:
            return np.stack(heard)
        long = [
            file
            for file, rows in zip(files, heard, strict=True)
            if len(rows) > shape[0]
        ]
        if long:
            raise ConfigError(
                f"audio: {long[0]} is longer than {shape[0]} frames of 10 ms; cut it"
            )
        return heard

    def look(self, files: Sequence[str]) -> np.ndarray:
        """Returns what the encoder of a model of images reads of image files, each in the model's size.

        Raises:
            ConfigError: the model is not one of images, or a file cannot be read.
        """
        shape = getattr(self.writer.program.run.model, "feature_shape", ())
        if len(shape) != 3:
            raise ConfigError("image: this model does not see; leave it out")
        return np.stack([read_image(file, shape) for file in files])

    def conversation(self, messages: Sequence[Message]) -> np.ndarray:
        """Returns the ids of a conversation, up to where the assistant answers.

        Raises:
            ConfigError: there is no tokenizer, or the template refuses the messages.
        """
        if self.template is None:
            return self.ids_of(Template(PLAIN, {}).render(messages))
        return self.ids_of(self.template.render(messages), named=True)

    @property
    def answer_stop(self) -> tuple[str, ...]:
        """Strings at which an answer ends, for a model without a template."""
        return () if self.template else (PLAIN_STOP,)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(
                f"there is no {TOKENIZER_FILE} beside the model, so text means nothing to it; put one there, or give --prompt-ids"
            )
        return self.tokenizer


def open_writer(
    path: str | Path,
    *,
    compute: str = "float32",
    models: str = "models",
    mesh: MeshConfig | None = None,
    zero: ZeroConfig | None = None,
) -> TextModel:
    """Returns the model of a run directory or a Hugging Face folder, with its tokenizer.

    Args:
        path: either of them.
        compute: dtype of the products.
        models: package of the model families.
        mesh: the devices' arrangement; all on fsdp by default.
        zero: how the parameters are sharded over them.

    Raises:
        ConfigError: there is no model, it is damaged, no family is of its kind, or its tokenizer
            is another model's.
    """
    folder = Path(path).expanduser()
    program, params = open_model(
        folder, compute=compute, models=models, mesh=mesh, zero=zero
    )
    tokenizer = _tokenizer_in(folder)
    writer = Writer(program, params, end_ids=_end_ids(folder, tokenizer))
    vocab_size = program.run.model.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{folder / TOKENIZER_FILE}: has {tokenizer.vocab_size} ids, the model {vocab_size}: it is another model's; put the right one there"
        )
    lead: tuple[int, ...] = ()
    if tokenizer is not None:
        # A run's documents are led in by the end token (`jaxspeed.data.pack`), unless an encoder is read.
        framed = is_hugging_face(folder) or hasattr(program.run.model, "start_id")
        lead = tokenizer.frame(1).before if framed else (tokenizer.end_id,)
    task = read_settings(folder).get("task")
    masks_sound = isinstance(task, Mapping) and bool(task.get("buckets"))
    return TextModel(writer, tokenizer, load_template(folder), lead, masks_sound)


def _behind(first: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the decoder's ids with its first one, once."""
    return ids if ids[:1].tolist() == first.tolist() else np.concatenate([first, ids])


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    if (folder / TOKENIZER_FILE).is_file():
        return load_tokenizer(folder / TOKENIZER_FILE)
    data = read_settings(folder).get("data")
    named = data.get("tokenizer") if isinstance(data, Mapping) else None
    return ByteTokenizer() if named in ("byte", "auto") else None


def _end_ids(folder: Path, tokenizer: Tokenizer | None) -> list[int]:
    """Returns the tokens that end a text: those of the model's files, and those of the tokenizer."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        settings: Any = json.loads(file.read_text()) if file.is_file() else {}
        found = settings.get("eos_token_id")
        ends |= set(
            found if isinstance(found, list) else [] if found is None else [found]
        )
    if tokenizer is not None:
        named = map(tokenizer.token_id, TURN_ENDS)
        ends |= {tokenizer.end_id, *(i for i in named if i is not None)}
    return sorted(ends)


def _encoded(source: Sequence[np.ndarray] | np.ndarray) -> Encoded:
    """Returns the encoder's rows: an array as it is, ids and spectrograms padded on the right and masked there."""
    if isinstance(source, np.ndarray):
        return Encoded(source)
    # Of ids each is a position, of frames each two; a model of sound has a longest.
    each, unit = (1, 16) if source[0].ndim == 1 else (2, 1)
    length = -(-max(map(len, source)) // (each * unit)) * unit
    like = source[0]
    rows = np.zeros((len(source), each * length, *like.shape[1:]), like.dtype)
    segment_ids = np.zeros((len(source), length), np.int32)
    for i, row in enumerate(source):
        rows[i, : len(row)], segment_ids[i, : len(row) // each] = row, 1
    return Encoded(rows, segment_ids)
