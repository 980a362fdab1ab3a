# SPDX-License-Identifier: Apache-2.0
"""Who of a job is there, before jax starts: so that a time-out can say who did not come.

jax's own service ends every process with a stack trace that names no one. So process 0 first
listens at the coordinator's address itself; the others tell it their numbers and wait for its word;
then jax takes the address over. Layer 1: standard library only.
"""

import contextlib
import json
import socket
import time

from jaxspeed.checks import ConfigError


PAUSE_S = 0.2
"""Between two tries to reach process 0."""


def call_roll(coordinator: str, count: int, number: int, timeout_s: float) -> None:
    """Returns once all processes of a job are there.

    Args:
        coordinator: host:port of process 0.
        count: processes of the job.
        number: of this one.
        timeout_s: seconds to wait.

    Raises:
        ConfigError: some did not come, or came as what they are not; the message names them.
    """
    if count < 2:
        return
    deadline = time.monotonic() + timeout_s
    host, _, port = coordinator.rpartition(":")
    where = f"coordinator={coordinator!r}: process {number} of {count}"
    if number:
        word = _answer(host, int(port), count, number, deadline)
        if word is None:
            why = f"process 0 did not come within {timeout_s:g} s"
            raise ConfigError(
                f"{where}: {why}, or is not reached at that address; start it there, or set JAXSPEED_JOIN_TIMEOUT_S"
            )
    else:
        word = _preside(host, int(port), count, deadline, timeout_s)
    if word:
        raise ConfigError(f"{where}: {word}")


def _preside(
    host: str, port: int, count: int, deadline: float, timeout_s: float
) -> str:
    """Collects all numbers and tells everyone the outcome: "" or what is wrong."""
    there: set[int] = set()
    guests: list[socket.socket] = []
    word = ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(host, port))
        while len(there) < count - 1 and not word:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                guest = stack.enter_context(server.accept()[0])
                guest.settimeout(2.0)
                number, of = json.loads(_line(guest))
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # a guest that says nothing is none of ours
                missing = [n for n in range(1, count) if n not in there]
                word = f"{_named(missing)} did not come within {timeout_s:g} s; see that every process was started and reaches the coordinator's address, or set JAXSPEED_JOIN_TIMEOUT_S"
                break
            except (OSError, ValueError, TypeError):
                continue
            if of != count:
                word = f"process {number} was started with num_processes={of}; give all the same"
            elif number in there or not 0 < number < count:
                word = f"process {number} came twice; give each its own --process_id, from 0 to {count - 1}"
            there.add(number)
            guests.append(guest)
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.sendall(json.dumps(word).encode() + b"\n")
                guest.recv(1)  # that it closes first leaves the port free
    return word


def _answer(
    host: str, port: int, count: int, number: int, deadline: float
) -> str | None:
    """Returns what process 0 says; None: it was not there."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as server:
                server.sendall(json.dumps([number, count]).encode() + b"\n")
                server.settimeout(left + 5.0)  # it is process 0 that counts the time
                return json.loads(_line(server))
        except (OSError, ValueError):
            time.sleep(PAUSE_S)
    return None


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at this address, or at the port of all of this machine's."""
    try:
        return socket.create_server((host, port))
    except OSError:
        pass
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(
            f"coordinator: port {port} cannot be listened at ({error.strerror}); give another"
        ) from None


def _line(connection: socket.socket) -> bytes:
    """Returns what comes up to the end of the line."""
    text = b""
    while not text.endswith(b"\n"):
        part = connection.recv(4096)
        if not part:
            raise ValueError("it hung up")
        text += part
    return text


def _named(numbers: list[int]) -> str:
    some = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {some}"
