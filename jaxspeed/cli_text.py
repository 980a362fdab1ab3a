# SPDX-License-Identifier: Apache-2.0
"""The commands around text: `jaxspeed generate`, `jaxspeed chat`, `jaxspeed score`, `jaxspeed embed`.

They take a run directory or a Hugging Face folder. Here are their flags and what they print; what
a model with its tokenizer can do is in `jaxspeed.writing`. Layer 4.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxspeed.config import ConfigError, MeshConfig, RunConfig, ZeroConfig, config_error
from jaxspeed.sampling import SamplingConfig


if TYPE_CHECKING:
    from jaxspeed.generate import Text
    from jaxspeed.writing import TextModel

_DTYPES = ("float32", "bfloat16", "float16")
DTYPE_HELP = ", ".join(_DTYPES)

GENERATE_HELP = """\
Writes text after a prompt.

examples:
  jaxspeed generate runs/tiny --prompt "ROMEO." --temperature 0.8
  jaxspeed generate imported/model --prompt "The capital of France is" --temperature 0
  jaxspeed generate imported/model --prompt-ids 5,17,3 --max-new-tokens 16 --temperature 0 --json
  jaxspeed generate runs/tiny --prompt "To be" -n 4 --top-p 0.9 --stop "\\n\\n"
  jaxspeed generate imported/t5 --prompt "translate English to German: Good morning."
  jaxspeed generate imported/whisper --audio hello.wav --temperature 0
  jaxspeed generate runs/image_qa --image shape.png --prompt "What color is this shape?" --temperature 0
  jaxspeed generate runs/tiny --prompt - < prompt.txt
"""

CHAT_HELP = """\
Talks with a model, by its own chat template. /reset begins a new conversation, /quit leaves;
Ctrl-C stops an answer.

examples:
  jaxspeed chat imported/smollm2
  jaxspeed chat runs/sft --system "You answer briefly." --temperature 0
"""

CHAT_COMMANDS = "/reset begins anew, /quit leaves"
STREAM_EVERY = 4
"""Tokens between two looks at what is written, where it is shown as it comes."""


def check_dtype(name: str) -> str:
    """Returns the name of a precision.

    Raises:
        ConfigError: it is none.
    """
    if name not in _DTYPES:
        raise config_error(
            "dtype", name, "no such precision", f"give one of {DTYPE_HELP}"
        )
    return name


def add_text_commands(commands: Any) -> None:
    """Adds the commands to jaxspeed's parser."""
    raw = argparse.RawDescriptionHelpFormatter
    generate = commands.add_parser(
        "generate",
        help="write text after a prompt",
        description=GENERATE_HELP,
        formatter_class=raw,
    )
    generate.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="text; several times for a batch; - reads it from the standard input",
    )
    generate.add_argument(
        "--prompt-ids",
        action="append",
        default=[],
        help="token ids, as in 5,17,3; needs no tokenizer",
    )
    generate.add_argument(
        "--audio", action="append", default=[], help="a WAV file, for a speech model"
    )
    generate.add_argument(
        "--image",
        action="append",
        default=[],
        help="a PNG or JPEG file, for a model of images; prompts are questions about it",
    )
    generate.add_argument(
        "--json",
        action="store_true",
        help='{"ids": [[...]], "logprobs": [[...]], "texts": [...]}: the new tokens and log p of each, in nats',
    )
    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description=CHAT_HELP,
        formatter_class=raw,
    )
    chat.add_argument("--system", default="", help="what the model is told first")
    score = commands.add_parser(
        "score", help="log-probability of each token given those before it, in nats"
    )
    score.add_argument(
        "--ids",
        required=True,
        help="token ids, for example: jaxspeed score DIR --ids 5,17,3,8 --json",
    )
    score.add_argument(
        "--json", action="store_true", help='{"ids": [[...]], "logprobs": [[...]]}'
    )
    embed = commands.add_parser(
        "embed", help="sentence embeddings: a vector of length 1 for each text"
    )
    embed.add_argument(
        "--text",
        action="append",
        required=True,
        help='several times: jaxspeed embed DIR --text "A cat." --text "A dog."; without --json shows their cosines',
    )
    embed.add_argument("--json", action="store_true", help='{"embeddings": [[...]]}')
    for command in (generate, chat):
        _add_sampling(command, temperature=0.7 if command is chat else 1.0)
    for command in (generate, chat, score, embed):
        command.add_argument("model", help="a run directory or a Hugging Face folder")
        _add_devices(command)


def _add_sampling(command: Any, *, temperature: float) -> None:
    defaults = {"temperature": temperature, "max_new_tokens": None}
    for field in dataclasses.fields(SamplingConfig):
        if command.prog.endswith("chat") and field.name == "num_samples":
            continue
        name = "--" + field.name.replace("_", "-")
        names = ["-n", name] if field.name == "num_samples" else [name]
        if field.name == "stop":
            how: dict[str, Any] = {"action": "append", "default": []}
        else:
            default = defaults.get(field.name, field.default)
            how = {"type": type(field.default), "default": default}
        command.add_argument(*names, help=SAMPLING_HELP[field.name], **how)


SAMPLING_HELP = {
    "max_new_tokens": f"tokens to write, at most ({SamplingConfig.max_new_tokens} if not given, or what the model has room for)",
    "min_new_tokens": "tokens before the text may end",
    "temperature": "divides the logits; 0 takes the likeliest token (default %(default)s)",
    "top_k": "draw from so many likeliest tokens; 0: from all",
    "top_p": "draw from the likeliest tokens that together have this probability",
    "min_p": "draw from tokens at least this share as likely as the likeliest",
    "repetition_penalty": "above 1: tokens that occurred become less likely",
    "num_samples": "texts for each prompt",
    "stop": "a string at which a text ends; may be given several times",
    "seed": "of the draws",
}


def _add_devices(command: Any) -> None:
    command.add_argument(
        "--dtype", default="float32", help=f"of the products: {DTYPE_HELP}"
    )
    command.add_argument(
        "--models", default="models", help="package of the model families"
    )
    for axis in ("data", "fsdp", "tensor"):
        default = getattr(MeshConfig(), axis)
        command.add_argument(
            f"--mesh.{axis}", type=int, default=default, help="as in train.py"
        )
    command.add_argument(
        "--zero.stage", type=int, default=ZeroConfig().stage, help="as in train.py"
    )
    command.add_argument(
        "--virtual_devices", type=int, default=0, help="as in train.py"
    )
    command.add_argument(
        "--compile_cache", default=RunConfig.compile_cache, help="as in train.py"
    )


def _open(args: argparse.Namespace) -> dict[str, Any]:
    """Returns how to open the model; the devices and the compilation cache are set up."""
    from jaxspeed import launch

    launch.start_alone(args.virtual_devices, args.compile_cache)
    given = vars(args)
    axes = {axis: given[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")}
    return {
        "compute": args.dtype,
        "models": args.models,
        "mesh": MeshConfig(**axes),
        "zero": ZeroConfig(stage=given["zero.stage"]),
    }


def _sampling(args: argparse.Namespace, **changes: Any) -> SamplingConfig:
    given = vars(args) | changes
    if given["max_new_tokens"] is None:
        given["max_new_tokens"] = SamplingConfig.max_new_tokens
    names = [f.name for f in dataclasses.fields(SamplingConfig) if f.name in given]
    values = {name: given[name] for name in names}
    return SamplingConfig(**{**values, "stop": tuple(map(_unescaped, values["stop"]))})


def _unescaped(text: str) -> str:
    r"""Returns what was typed with \n and the like as the characters that they stand for."""
    try:
        # Letters that are not ASCII become escapes of their own first, so that they stay.
        return text.encode("ascii", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        why, change = "an escape in it is not whole", "write a backslash as two"
        raise config_error("stop", text, why, change) from None


def _generate(args: argparse.Namespace) -> int:
    _sampling(args)  # what cannot be is said before the model is read
    if not (args.prompt or args.prompt_ids or args.audio or args.image):
        raise ConfigError(
            "prompt: there is none; give --prompt TEXT, or --prompt-ids 5,17,3"
        )
    given = [_ids(text) for text in args.prompt_ids]
    prompts = [sys.stdin.read() if text == "-" else text for text in args.prompt]
    from jaxspeed.writing import open_writer

    model = open_writer(args.model, **_open(args))
    rows = [model.ids_of(prompt) for prompt in prompts] + given
    source = _source(args, model)
    if source is not None:
        rows, source = _paired(rows or [_ids("")] * len(source), source)
    sampling = _sampling(args, max_new_tokens=_room(args, model, rows))
    alone = len(rows) == 1 and sampling.num_samples == 1
    shown = alone and not args.json and model.tokenizer is not None
    texts: list[Text] = []
    begin = prompts[0] if prompts and not model.reads_source else ""
    with _Shown(model, begin, shown, sampling.stop) as show:
        every = STREAM_EVERY if shown else 0
        for texts in model.write(rows, sampling, every=every, source=source):
            show(texts[0])
    if args.json:
        found = {
            "ids": [text.ids.tolist() for text in texts],
            "logprobs": [text.logprobs.tolist() for text in texts],
        }
        if model.tokenizer is not None:
            found["texts"] = [_trimmed(model, text, sampling.stop) for text in texts]
        sys.stdout.write(json.dumps(found) + "\n")
    elif model.tokenizer is None:
        for text in texts:
            sys.stdout.write(",".join(map(str, text.ids.tolist())) + "\n")
    elif not shown:
        for number, text in enumerate(texts):
            prompt, sample = divmod(number, sampling.num_samples)
            words = _trimmed(model, text, sampling.stop)
            sys.stdout.write(f"--- prompt {prompt + 1}, text {sample + 1}\n{words}\n")
    return 0


def _source(args: argparse.Namespace, model: "TextModel") -> Any:
    """Returns what the encoder reads of the files given, or None."""
    if args.audio and args.image:
        raise ConfigError(
            "image: a model listens or sees; leave out --audio or --image"
        )
    if args.audio:
        return model.hear(args.audio)
    return model.look(args.image) if args.image else None


def _paired(rows: list[Any], source: Any) -> tuple[list[Any], Any]:
    """Returns as many prompts as files: one file is for all prompts, one prompt for all files."""
    import numpy as np

    if len(rows) > 1 and len(source) == 1:
        return rows, np.repeat(source, len(rows), 0)
    if len(rows) == 1:
        return rows * len(source), source
    if len(rows) != len(source):
        why = f"there are {len(source)} files"
        raise config_error("prompt", len(rows), why, "give one of them, or as many")
    return rows, source


def _room(args: argparse.Namespace, model: "TextModel", rows: Sequence[Any]) -> Any:
    """Returns the tokens to write: those asked for, else what there is room for, up to the usual."""
    if args.max_new_tokens is not None or not model.room or model.reads_source:
        return args.max_new_tokens
    left = model.room + 1 - max(map(len, rows)) - (model.start_id is not None)
    return max(args.min_new_tokens, 1, min(SamplingConfig.max_new_tokens, left))


def _ids(text: str) -> Any:
    import numpy as np

    try:
        return np.asarray([int(x) for x in text.split(",") if text], np.int64)
    except ValueError:
        raise config_error(
            "prompt-ids", text, "not token ids", "give numbers, as in 5,17,3"
        ) from None


def _trimmed(model: "TextModel", text: "Text", stop: Sequence[str]) -> str:
    """Returns a text without the stop string that ended it."""
    words = model.decode(text.ids)
    ends = [words.index(s) for s in stop if s in words]
    return words[: min(ends)] if ends else words


class _Shown:
    """Shows a text as it grows, a whole character at a time."""

    def __init__(
        self, model: "TextModel", prompt: str, on: bool, stop: Sequence[str] = ()
    ) -> None:
        self.model, self.prompt, self.on, self.stop = model, prompt, on, stop
        self.said = ""

    def __enter__(self) -> Callable[["Text"], None]:
        if self.on:
            sys.stdout.write(self.prompt)
            sys.stdout.flush()
        return self.show

    def show(self, text: "Text") -> None:
        """Shows what is new and will stay."""
        if not self.on:
            return
        words = _trimmed(self.model, text, self.stop)
        if words.startswith(self.said):
            whole = words if text.ended else self._settled(words)
            sys.stdout.write(whole[len(self.said) :])
            sys.stdout.flush()
            self.said = max(self.said, whole, key=len)

    def _settled(self, words: str) -> str:
        """Returns the words without what may yet become a character or a stop string."""
        words = words.rstrip("\ufffd")
        held = [
            size
            for stop in self.stop
            for size in range(1, len(stop))
            if words.endswith(stop[:size])
        ]
        return words[: len(words) - max(held, default=0)]

    def __exit__(self, *_: object) -> None:
        if self.on:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _chat(args: argparse.Namespace) -> int:
    _sampling(args)
    from jaxspeed.writing import open_writer

    model = open_writer(args.model, **_open(args))
    stop = [*args.stop, *model.answer_stop]
    usual = args.max_new_tokens
    if usual is None and model.room:
        usual = min(SamplingConfig.max_new_tokens, max(1, model.room // 2))
    sampling = _sampling(args, stop=stop, num_samples=1, max_new_tokens=usual)
    show = sys.stdout.write
    if model.template is None:
        show("the model has no chat template: it reads `User: ...` and `Assistant:`\n")
    show(f"{CHAT_COMMANDS}\n")
    first = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(first)
    for line in _lines():
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(first)
            continue
        if line.startswith("/"):
            show(f"no such command: {line}; {CHAT_COMMANDS}\n")
            continue
        messages.append({"role": "user", "content": line})
        answer = _answer(model, messages, sampling)
        messages.append({"role": "assistant", "content": answer})
    return 0


def _lines() -> Iterator[str]:
    """Yields what the user types, line by line, until the end of the input."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - it gives input() its history
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _answer(
    model: "TextModel", messages: list[dict[str, str]], sampling: SamplingConfig
) -> str:
    """Shows the assistant's answer as it comes, and returns it; Ctrl-C ends it early."""
    ids = model.conversation(messages)
    while model.room and len(ids) + sampling.max_new_tokens > model.room:
        # The oldest exchange goes, not what the model was told first.
        oldest = 1 if messages[0]["role"] == "system" else 0
        if len(messages) - oldest <= 2:
            raise config_error(
                "max_new_tokens",
                sampling.max_new_tokens,
                f"the message and an answer do not fit the model's {model.room} positions",
                "give fewer, or write a shorter message",
            )
        del messages[oldest : oldest + 2]
        sys.stdout.write("(the oldest exchange no longer fits and is forgotten)\n")
        ids = model.conversation(messages)
    begin, text = time.perf_counter(), None
    with _interruptible() as stopped, _Shown(model, "", True, sampling.stop) as show:
        for (text,) in model.write([ids], sampling, every=STREAM_EVERY):
            show(text)
            if stopped():
                break
    assert text is not None
    if sys.stdin.isatty():
        rate = len(text.ids) / (time.perf_counter() - begin)
        sys.stderr.write(f"({len(text.ids)} tokens, {rate:.1f} a second)\n")
    return _trimmed(model, text, sampling.stop).strip()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Takes Ctrl-C as a wish to end the answer, not the program."""
    asked: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, previous)


def _score(args: argparse.Namespace) -> int:
    try:
        ids = [int(x) for x in args.ids.split(",")]
    except ValueError:
        raise config_error(
            "ids", args.ids, "not token ids", "give numbers, as in 5,17,3,8"
        ) from None
    how = _open(args)
    import numpy as np

    from jaxspeed.generate import token_logprobs
    from jaxspeed.pretrained import open_model

    program, params = open_model(Path(args.model), **how)
    logprobs = token_logprobs(program, params, np.asarray(ids, np.int64)).tolist()
    if args.json:
        sys.stdout.write(json.dumps({"ids": [ids], "logprobs": [logprobs]}) + "\n")
        return 0
    for token, logprob in zip(ids[1:], logprobs, strict=True):
        sys.stdout.write(f"{token:>8} {logprob:>10.5f}\n")
    nats = -sum(logprobs) / len(logprobs)
    sys.stdout.write(f"mean {-nats:.5f}, perplexity {math.exp(min(nats, 700)):.4g}\n")
    return 0


def _embed(args: argparse.Namespace) -> int:
    how = _open(args)
    from jaxspeed.embedding import embed_texts

    vectors = embed_texts(args.model, args.text, **how)
    if args.json:
        sys.stdout.write(json.dumps({"embeddings": vectors.tolist()}) + "\n")
        return 0
    for text, row in zip(args.text, vectors @ vectors.T, strict=True):
        cosines = " ".join(f"{cosine:7.4f}" for cosine in row)
        sys.stdout.write(f"{cosines}  {text}\n")
    return 0


TEXT_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "generate": _generate,
    "chat": _chat,
    "score": _score,
    "embed": _embed,
}
"""By their names."""
