# SPDX-License-Identifier: Apache-2.0
"""What sources share: joining, and files that appear whole or not at all."""

from pathlib import Path

import pytest

from jaxspeed.data.documents import Joined, atomic


class Letters:
    """Documents of one letter each."""

    name = "letters"

    def __init__(self, letters: str):
        self.letters = letters
        self.num_bytes = len(letters)
        self.fingerprint = hash(letters)

    def __len__(self) -> int:
        return len(self.letters)

    def __getitem__(self, index: int) -> str:
        assert 0 <= index < len(self.letters)
        return self.letters[index]


def test_joined_sources_keep_their_order() -> None:
    joined = Joined("all", [Letters(part) for part in ("ab", "", "c", "", "def", "")])
    assert [joined[index] for index in range(len(joined))] == list("abcdef")
    assert joined.num_bytes == 6


def test_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with atomic(target) as file:
        file.write(b"whole")
        file.flush()
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


def test_interrupted_writing_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")

    def write_half() -> None:
        with atomic(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]
