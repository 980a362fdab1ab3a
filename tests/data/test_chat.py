# SPDX-License-Identifier: Apache-2.0
"""Chat templates fill in as in transformers, in a sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxspeed.config import ConfigError
from jaxspeed.data.chat import PLAIN, Template, load_template


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for message in messages %}\n"
    "    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\n"
    "        {{ raise_exception('roles must alternate') }}\n"
    "    {% endif %}\n"
    "{{ bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}{{ message | tojson }}\n"
    "{% endfor %}"
)
TALK = [
    {"role": "user", "content": " Hello 'you' "},
    {"role": "assistant", "content": "Gruesse <b>"},
    {"role": "user", "content": "x"},
]


@pytest.mark.hf
@pytest.mark.parametrize("source", [CHATML, LLAMA])
@pytest.mark.parametrize("answer", [True, False])
def test_template_renders_as_in_transformers(source: str, answer: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = Template(source, {"bos_token": "<s>"}).render(TALK, answer=answer)
    theirs: Any = render_jinja_template(
        [TALK], chat_template=source, add_generation_prompt=answer, bos_token="<s>"
    )
    assert ours == theirs[0][0]


def test_template_that_refuses_or_is_broken_is_one_line() -> None:
    with pytest.raises(ConfigError, match="chat template: roles must alternate"):
        Template(LLAMA, {"bos_token": ""}).render(TALK[1:])
    with pytest.raises(ConfigError, match="chat template: Expected an expression"):
        Template("{% for %}", {}).render(TALK)


def test_template_cannot_reach_the_program() -> None:
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(ConfigError, match="chat template"):
            Template(source, {}).render(TALK)


def test_plain_template_alternates_names() -> None:
    assert (
        Template(PLAIN, {})
        .render(TALK[:2] + TALK[2:])
        .endswith("Assistant: Gruesse <b>\n\nUser: x\n\nAssistant:")
    )


def test_template_is_found_in_its_places(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    file = tmp_path / "tokenizer_config.json"
    several = [{"name": "default", "template": "D"}, {"name": "tool", "template": "T"}]
    tokens = {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    file.write_text(json.dumps({"chat_template": several, **tokens}))
    assert load_template(tmp_path) == Template(
        "D", {"bos_token": "<s>", "eos_token": "</s>"}
    )
    (tmp_path / "chat_template.jinja").write_text("J")
    found = load_template(tmp_path)
    assert found is not None
    assert found.source == "J"
    file.write_text("{")
    with pytest.raises(ConfigError, match="tokenizer_config.json: not JSON"):
        load_template(tmp_path)
