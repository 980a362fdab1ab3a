# SPDX-License-Identifier: Apache-2.0
"""Tiny packages of each kind that data is fetched in."""

import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest


needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb here")


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


def write_whl(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as package:
        for name, content in files.items():
            package.writestr(name, content)
    return path


def write_deb(path: Path, files: dict[str, bytes]) -> Path:
    root = path.with_suffix("")
    control = (
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: a\n"
    )
    files = files | {"DEBIAN/control": control.encode()}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    subprocess.run(["dpkg-deb", "-b", root, path], check=True, capture_output=True)
    return path
