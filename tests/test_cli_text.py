# SPDX-License-Identifier: Apache-2.0
"""`jaxspeed generate` and `chat`: text in, text out; what cannot be is one line and exit code 2."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers

from jaxspeed import cli
from jaxspeed.cli_text import _unescaped
from jaxspeed.config import ConfigError, RunConfig
from jaxspeed.hf import export_params
from jaxspeed.program import build_program
from models import gpt2, image_text, vit


WORDS = ["a", "b", "c", "d", "User", "Assistant", ":", "hello", "<unk>"]
NAMED = ["<|im_start|>", "<|im_end|>"]
CONFIG = gpt2.Config(
    vocab_size=len(WORDS + NAMED), max_seq_len=64, num_layers=2, num_heads=2, d_model=16
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
FLAGS = ["--temperature", "0", "--max-new-tokens", "8", "--compile_cache", ""]


def export(cfg: Any, folder: Path) -> None:
    run = RunConfig(model=cfg, steps=1, seq_len=8, micro_batch_size=1, seed=3)
    params = build_program(run, devices=jax.devices()[:1]).init_state()["params"]
    export_params(jax.tree.map(lambda x: 5 * x, params), cfg, folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    export(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def folder(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the same model with a tokenizer of words, and a chat template."""
    folder = tmp_path_factory.mktemp("whole")
    for file in bare.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(NAMED)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def run(capsys: Any, *args: object, code: int = 0) -> str:
    assert cli.main([*map(str, args), *FLAGS]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def refusal(capsys: Any, *args: object) -> str:
    said = run(capsys, *args, code=2)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_generate_by_ids_needs_no_tokenizer_and_scores_as_score_does(
    bare: Path, capsys: Any
) -> None:
    said = run(capsys, "generate", bare, "--prompt-ids", "5,1,3", "--json")
    found = json.loads(said)
    assert set(found) == {"ids", "logprobs"}
    (ids,), (logprobs,) = found["ids"], found["logprobs"]
    assert len(ids) == len(logprobs) == 8
    whole = ",".join(map(str, [5, 1, 3, *ids]))
    score = ["score", str(bare), "--ids", whole, "--json", "--compile_cache", ""]
    assert cli.main(score) == 0
    scored = json.loads(capsys.readouterr().out)["logprobs"][0]
    assert scored[-8:] == pytest.approx(logprobs, abs=1e-5)
    assert run(capsys, "generate", bare, "--prompt-ids", "5,1,3") == (
        ",".join(map(str, ids)) + "\n"
    )


def test_shown_text_is_the_prompt_and_what_follows(folder: Path, capsys: Any) -> None:
    said = run(capsys, "generate", folder, "--prompt", "a b", "--json")
    (text,) = json.loads(said)["texts"]
    assert text
    assert run(capsys, "generate", folder, "--prompt", "a b") == f"a b{text}\n"


def test_batch_and_samples_are_told_apart(folder: Path, capsys: Any) -> None:
    many = ["--prompt", "a b", "--prompt", "c", "-n", "2"]
    said = run(capsys, "generate", folder, *many)
    heads = [line for line in said.splitlines() if line.startswith("---")]
    assert heads == [f"--- prompt {p}, text {t}" for p in (1, 2) for t in (1, 2)]


def test_stop_string_is_not_part_of_the_text(folder: Path, capsys: Any) -> None:
    whole = json.loads(run(capsys, "generate", folder, "--prompt", "a b", "--json"))
    stop = whole["texts"][0].split()[2]
    short = run(capsys, "generate", folder, "--prompt", "a b", "--json", "--stop", stop)
    (text,) = json.loads(short)["texts"]
    assert text == whole["texts"][0].partition(stop)[0]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n\n", "\n\n"),
        ("Gr\u00fc\u00dfe \u20ac", "Gr\u00fc\u00dfe \u20ac"),
        (r"a\\b", r"a\b"),
    ],
)
def test_stop_strings_are_typed_with_escapes(typed: str, meant: str) -> None:
    assert _unescaped(typed) == meant
    with pytest.raises(ConfigError, match="stop=.*: an escape in it is not whole"):
        _unescaped(typed + "\\")


def test_chat_answers_each_line_by_the_template(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxspeed.writing import TextModel

    asked: list[list[int]] = []
    told = TextModel.conversation

    def conversation(self: TextModel, messages: Any) -> Any:
        ids = told(self, messages)
        asked.append(ids.tolist())
        return ids

    monkeypatch.setattr(TextModel, "conversation", conversation)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n/what\nb\n/reset\na\n/quit\nc\n"))
    said = run(capsys, "chat", folder, "--system", "d")
    begin, end = len(WORDS), len(WORDS) + 1
    assert asked[0] == [begin, 3, end, begin, 0, end, begin]
    assert asked[1][: len(asked[0])] == asked[0]
    assert asked[1][-4:] == [begin, 1, end, begin]
    assert asked[2] == asked[0]
    assert len(asked) == 3
    assert "no such command: /what" in said


def test_chat_without_a_template_says_so(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert "no chat template" in run(capsys, "chat", tmp_path)


def test_what_cannot_be_is_one_line(
    bare: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    generate = lambda *args: refusal(capsys, "generate", *args)
    assert "prompt: there is none" in generate(bare)
    assert "there is no tokenizer.json" in generate(bare, "--prompt", "a")
    assert "prompt-ids='x': not token ids" in generate(bare, "--prompt-ids", "x")
    assert "prompt=99: the model has no such token" in generate(
        bare, "--prompt-ids", "99"
    )
    assert "this model does not listen" in generate(bare, "--audio", "a.wav")
    assert "this model does not see" in generate(bare, "--image", "a.png")
    assert "top_p=2.0: out of range" in generate(
        bare, "--prompt-ids", "1", "--top-p", "2"
    )
    for file in bare.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    larger = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, "w0")
    )
    larger.add_special_tokens(["<eos>"])
    larger.save(str(tmp_path / "tokenizer.json"))
    assert "has 51 ids, the model 11: it is another model's" in generate(
        tmp_path, "--prompt", "w1"
    )


def test_questions_about_images(tmp_path: Path, capsys: Any) -> None:
    from PIL import Image

    cfg = image_text.Config(
        image_size=8, patch_size=4, num_image_layers=1, num_image_heads=2, d_image=16,
        d_image_ff=32, vocab_size=11, max_seq_len=32, num_layers=1, num_heads=2,
        d_model=16, pad_id=0, end_id=0, start_id=0,
    )  # fmt: skip
    model, black, white = (tmp_path / x for x in ("model", "black.png", "white.png"))
    export(cfg, model)
    Image.new("RGB", (9, 5)).save(black)
    Image.new("RGB", (8, 8), "white").save(white)
    ask = lambda *args: json.loads(run(capsys, "generate", model, "--json", *args))
    alone = [
        ask("--image", image, "--prompt-ids", "5,6")["logprobs"][0]
        for image in (black, white)
    ]
    assert alone[0] != alone[1]
    both = ask("--image", black, "--image", white, "--prompt-ids", "5,6")
    for found, wanted in zip(both["logprobs"], alone, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)
    asked = ("--prompt-ids", "5,6", "--prompt-ids", "0,5,6")  # led in by the first id
    twice = ask("--image", white, *asked)["logprobs"]
    assert twice[0] == pytest.approx(alone[1], abs=1e-4)
    assert twice[1] == pytest.approx(alone[1], abs=1e-4)
    captions = ask("--image", black, "--image", white)["ids"]
    assert len(captions) == 2

    refused = lambda *args: refusal(capsys, "generate", model, *args)
    three = ("--prompt-ids", "5") * 3
    assert "prompt=3: there are 2 files; give one of them, or as many" in refused(
        "--image", black, "--image", white, *three
    )
    (tmp_path / "half.png").write_bytes(white.read_bytes()[:40])
    assert "half.png: " in refused("--image", tmp_path / "half.png")
    assert "none.png: No such file" in refused("--image", tmp_path / "none.png")
    assert "leave out --audio or --image" in refused("--image", black, "--audio", "a")


def test_model_that_does_not_write_is_refused(tmp_path: Path, capsys: Any) -> None:
    cfg = vit.Config(
        image_size=4, patch_size=2, num_layers=1, num_heads=2, d_model=8, d_ff=16
    )
    export(cfg, tmp_path)
    said = refusal(capsys, "generate", tmp_path, "--prompt-ids", "1")
    assert "does not write text; give a decoder" in said
