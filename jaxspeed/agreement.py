# SPDX-License-Identifier: Apache-2.0
"""Whether all processes of a job run the same program on the same data, before they wait for each other in it.

Processes whose programs differ do not fail: they hang in a collective that the others never enter.
So each tells jax's key-value service what it is about to do, process 0 compares, and all end with
the difference, if there is one. Layer 2.
"""

import functools
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspeed.config import ConfigError


PATIENCE_S = 600.0
"""How long the others are waited for; one may train a tokenizer meanwhile."""

LAST_S = 10.0
"""That process 0 stays at most for another one to leave or to have read the verdict."""

CLOSING_S = 5.0
"""How long the door of a process that ends may stay open after its links are cut."""

WATCH_S = 5.0
"""Between two looks at the next process's door."""

OWN = frozenset({"process_id", "coordinator", "compile_cache"})
"""Settings that may differ between processes."""


class Disagreement(ConfigError):
    """Processes of a job differ; raised in all of them."""


_rounds: dict[str, int] = {}


def agree(topic: str, mine: Mapping[str, Any]) -> None:
    """Returns if no two processes have another value for the same name.

    Args:
        topic: what is compared, for messages.
        mine: values by name, for JSON.

    Raises:
        Disagreement: in every process, with the first name that differs, whose values they are, or
            which process did not come as far.
    """
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return
    client = _service().client
    _rounds[topic] = _rounds.get(topic, 0) + 1
    key = f"jaxspeed/agree/{topic}/{_rounds[topic]}"
    client.key_value_set(f"{key}/{me}", json.dumps(dict(mine), default=str))
    if me == 0:
        client.key_value_set(f"{key}/verdict", _verdict(client, key, topic, count))
    verdict = _get(client, f"{key}/verdict", PATIENCE_S + 30)
    if verdict is None:
        verdict = f"{topic}: process 0 did not come as far within {PATIENCE_S:g} s"
    if verdict != "agreed":
        # The service is in process 0, and ends with it.
        client.key_value_set(f"{key}/{me}/read", "")
        for number in range(count if me == 0 else 0):
            _get(client, f"{key}/{number}/read", LAST_S)
        raise Disagreement(verdict)


def _verdict(client: Any, key: str, topic: str, count: int) -> str:
    seen: dict[str, tuple[Any, int]] = {}
    for number in range(count):
        text = _get(client, f"{key}/{number}", PATIENCE_S)
        if text is None:
            return f"{topic}: process {number} did not come as far within {PATIENCE_S:g} s; see its own output"
        for name, value in json.loads(text).items():
            first, whose = seen.setdefault(name, (value, number))
            if value != first:
                return (
                    f"{topic}: the processes of this job differ: {name} is {first} in process {whose}, {value} in process {number}; "
                    "start the same command from the same files everywhere"
                )
    return "agreed"


def _get(client: Any, key: str, seconds: float) -> str | None:
    try:
        return client.blocking_key_value_get(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError:
        return None


def _service() -> Any:
    """Returns what `jax.distributed.initialize` started, with its client; jax has no public name for it."""
    from jax._src import distributed

    return distributed.global_state


class Neighbours:
    """The other processes of the job: whether they are still there, and word of it if one is not.

    Each has a door, a port that is open for as long as it lives. Who finds that a collective failed
    sees whose doors are closed and tells the others, which may be waiting for what never comes.
    """

    def __init__(self) -> None:
        """Opens this process's door, and learns those of the others."""
        self._doors: list[Any] = []
        self._token, self._noticed = "", False
        count, self._me = jax.process_count(), jax.process_index()
        if count == 1:
            return
        client, key = _service().client, "jaxspeed/neighbours"
        host = _own_address()
        self._door = socket.create_server((host, 0), backlog=128)
        mine = json.dumps([host, self._door.getsockname()[1]])
        client.key_value_set(f"{key}/{self._me}", mine)
        if self._me == 0:
            each = (_get(client, f"{key}/{n}", PATIENCE_S) for n in range(count))
            doors = [None if text is None else json.loads(text) for text in each]
            known = json.dumps([secrets.token_hex(16), doors])
            client.key_value_set(f"{key}/all", known)
        known = _get(client, f"{key}/all", PATIENCE_S) or '["", []]'
        self._token, self._doors = json.loads(known)
        threading.Thread(target=self._attend, daemon=True).start()

    def gone(self) -> list[int]:
        """Returns the processes whose doors are closed, and tells the others of them.

        Process 0 is the last to leave: jax's service is in it, without which jax ends the others
        with a stack trace.
        """
        first, self._noticed = not self._noticed, True
        deadline = time.monotonic() + CLOSING_S
        while not (gone := self._closed()) and self._doors:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if gone and first:
            word = f"{self._token} {json.dumps(gone)}".encode()
            for n, door in enumerate(self._doors):
                if n not in (*gone, self._me):
                    _knock(door, word)
        self._let_others_leave()
        return gone

    def _closed(self) -> list[int]:
        return [n for n, door in enumerate(self._doors) if not _knock(door)]

    def leave(self) -> None:
        """Closes this process's door, and says so to the one that watches it: all goes on in order."""
        if self._doors and not self._noticed:
            self._noticed = True
            watcher = self._doors[self._me - 1]
            _knock(watcher, f"{self._token} []".encode())
            self._door.close()

    def _let_others_leave(self) -> None:
        deadline = time.monotonic() + LAST_S
        others = [door for n, door in enumerate(self._doors) if n != self._me]
        while self._me == 0 and others and time.monotonic() < deadline:
            others = list(filter(_knock, others))
            time.sleep(0.1)

    def _attend(self) -> None:
        """Answers the door and watches the next process's; ends this process once one is gone. Runs in a thread of its own."""
        next_one = (self._me + 1) % len(self._doors)
        watching = True
        self._door.settimeout(WATCH_S)
        while not self._noticed:
            gone: list[int] = []
            try:
                with self._door.accept()[0] as guest:
                    guest.settimeout(2.0)
                    token, _, word = guest.recv(4096).decode().partition(" ")
                if token == self._token and word:
                    gone = json.loads(word)
                    # None gone: the next process leaves in order.
                    watching = watching and bool(gone)
            except TimeoutError:
                if watching and _knock(self._doors[next_one]) is False:
                    gone = self.gone()
            except (OSError, ValueError):
                continue  # our own door is closed, or it was no one of ours
            if gone:
                self._let_others_leave()
                sys.stderr.write(f"error: {told_of(gone)}\n")
                sys.stderr.flush()
                os._exit(2)


def told_of(gone: Sequence[int], said: str = "") -> str:
    """Returns what a user is told when processes of a job are gone, with what the runtime said of it."""
    who = f"process {', '.join(map(str, gone))}" if gone else "another process"
    link = f", or the link to it ({said})" if said else ""
    return f"{who} of the job is gone{link}; start all of them again: the run goes on from its newest checkpoint"


def _own_address() -> str:
    """Returns the address by which the coordinator sees this process."""
    host, _, port = _service().coordinator_address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host.strip("[]"), int(port)))  # nothing is sent
        return probe.getsockname()[0]


def _knock(door: Any, word: bytes = b"") -> bool | None:
    """Whether a process is behind its door, to which a word is left; None: its machine says nothing, and may be busy."""
    if door is None:
        return False
    try:
        with socket.create_connection(tuple(door), timeout=2.0) as connection:
            connection.sendall(word)
            return True
    except ConnectionRefusedError:
        return False
    except OSError:
        return None


def what_runs(config: Mapping[str, Any], mesh: Any, *modules: str) -> dict[str, Any]:
    """Returns what must be the same everywhere for the programs to be: settings, versions, sources, devices.

    Args:
        config: the resolved configuration, nested.
        mesh: of the run.
        modules: names of those that the program is made of, beside this library.
    """
    devices = jax.local_devices()
    return {
        **_flat(config),
        "the version of jax": jax.__version__,
        "the source of jaxspeed (its hash)": _hash_of(Path(__file__).parent),
        **{
            f"the source of {name} (its hash)": _hash_of(_file(name))
            for name in modules
        },
        "the mesh": str(dict(mesh.shape)),
        "a process's devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def what_is_read(rows: Mapping[str, np.ndarray], share: int) -> dict[str, str]:
    """Returns what must be the same of a first batch: its shapes, and the rows where processes read the same.

    Args:
        rows: this process's.
        share: which share of the batch they are.
    """
    shapes = {name: f"{x.shape} {x.dtype}" for name, x in sorted(rows.items())}
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(np.ascontiguousarray(rows[name]).tobytes())
    return {
        "the batch's form": str(shapes),
        f"the hash of its rows (share {share})": digest.hexdigest()[:12],
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in OWN:
            flat[f"{prefix}{name}"] = repr(value)
    return flat


def _file(module: str) -> Path:
    return Path(getattr(sys.modules[module], "__file__", None) or module)


@functools.cache
def _hash_of(path: Path) -> str:
    """Returns a hash of a source file, or of all in a folder."""
    folder = path if path.is_dir() else path.parent
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(str(file.relative_to(folder)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
