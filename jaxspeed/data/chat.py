# SPDX-License-Identifier: Apache-2.0
"""Conversations as the text that a model was trained on: its chat template, filled in.

A template is a program in Jinja (tokenizer_config.json, `chat_template`), so it runs in Jinja's
sandbox, in which it can compute text and nothing else.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspeed.config import ConfigError


Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

PLAIN = (
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a template: `User: ...`, a blank line, `Assistant: ...`."""

PLAIN_STOP = "\n\nUser:"
"""Where an answer ends whose model knows no end of one."""


class Template(NamedTuple):
    """A chat template and the names of special tokens that it may use."""

    source: str
    tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """Returns the conversation as text.

        Args:
            messages: oldest first.
            answer: end where the assistant's answer begins.

        Raises:
            ConfigError: the template is broken, or refuses these messages.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        world.filters["tojson"] = lambda x, **how: json.dumps(
            x, ensure_ascii=False, **how
        )
        world.globals |= {"raise_exception": refuse, "strftime_now": _now}
        try:
            return world.from_string(self.source).render(
                messages=list(messages), add_generation_prompt=answer, **self.tokens
            )
        except TemplateError as error:
            raise ConfigError(
                f"chat template: {error}; use another order of messages, or mend chat_template in tokenizer_config.json"
            ) from None


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def load_template(folder: Path) -> Template | None:
    """Returns the chat template of a folder, or None if it has none.

    Reads `chat_template.jinja`, else `chat_template` in tokenizer_config.json; of several there,
    the one named default.

    Raises:
        ConfigError: the file is not JSON.
    """
    file = folder / "tokenizer_config.json"
    try:
        settings: dict[str, Any] = (
            json.loads(file.read_text()) if file.is_file() else {}
        )
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from None
    source = settings.get("chat_template")
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        source = alone.read_text()
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if not source:
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: settings[name] for name in names if settings.get(name)}
    text = lambda x: x["content"] if isinstance(x, dict) else x
    return Template(source, {name: text(token) for name, token in tokens.items()})
