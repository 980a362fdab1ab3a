# SPDX-License-Identifier: Apache-2.0
"""A program that saves one file of a package index: pip's client, index and settings.

    python -P _pip_client.py NAME FILE OUT      first prints the file's size in bytes

`pip download` would do for wheels, but it runs the setup.py of a source distribution to
read its metadata. This asks the same index for the same file and only writes it. pip has
no public interface; pip 23 to 26 have these names.
"""

import os
import sys

from pip._internal.commands import create_command
from pip._internal.models.target_python import TargetPython


def main(name: str, file: str, out: str) -> str | None:
    """Saves the file; returns what is wrong, or None."""
    parent = os.getppid()
    command = create_command("download")
    options, _ = command.parse_args(["--no-deps", "--quiet", name])
    with command.main_context():
        session = command._build_session(options)  # pyright: ignore[reportAttributeAccessIssue]
        finder = command._build_package_finder(  # pyright: ignore[reportAttributeAccessIssue]
            options, session, target_python=TargetPython(), ignore_requires_python=True
        )
        found = {c.link.filename: c.link for c in finder.find_all_candidates(name)}
        if file not in found:
            if not found:
                return f"the index has no {name}, or cannot be reached"
            return f"the index has no {file}, only {sorted(found)}"
        # What is hashed is the file itself, so that no encoding may be undone.
        identity = {"Accept-Encoding": "identity"}
        url = found[file].url_without_fragment
        answer = session.get(url, headers=identity, stream=True)
        answer.raise_for_status()
        sys.stdout.write(f"{answer.headers.get('Content-Length', 0)}\n")
        sys.stdout.flush()
        with open(out, "wb") as target:
            while chunk := answer.raw.read(1 << 20):
                target.write(chunk)
                if os.getppid() != parent:
                    return "whoever asked for the file is gone"
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
