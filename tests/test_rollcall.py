# SPDX-License-Identifier: Apache-2.0
"""Who did not come to a job is named, to everyone who did."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxspeed.checks import ConfigError
from jaxspeed.rollcall import call_roll


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def outcomes(
    address: str, calls: list[tuple[int, int]], timeout_s: float = 20.0
) -> list[str]:
    """Returns, of each process (number, processes that it believes in), "" or its error."""

    def one(call: tuple[int, int]) -> str:
        try:
            call_roll(address, call[1], call[0], timeout_s)
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_all_go_on_once_all_are_there_and_the_port_is_free_again(address: str) -> None:
    assert outcomes(address, [(2, 3), (0, 3), (1, 3)]) == ["", "", ""]
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))):
        pass
    assert outcomes(address, [(0, 2), (1, 2)]) == ["", ""]


def test_process_zero_may_be_late(address: str) -> None:
    late = threading.Timer(1.0, call_roll, (address, 2, 0, 20.0))
    late.start()
    assert outcomes(address, [(1, 2)]) == [""]
    late.join()


def test_who_did_not_come_is_named_to_all(address: str) -> None:
    said = outcomes(address, [(0, 5), (3, 5), (1, 5)], 1.5)
    for number, text in zip((0, 3, 1), said, strict=True):
        assert (
            f"process {number} of 5: processes 2, 4 did not come within 1.5 s" in text
        )


def test_missing_process_zero_is_named(address: str) -> None:
    (said,) = outcomes(address, [(1, 2)], 0.6)
    assert "process 1 of 2: process 0 did not come within 0.6 s" in said


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(0, 3), (1, 3), (1, 3)], "process 1 came twice; give each its own --process_id, from 0 to 2"),
        ([(0, 2), (1, 3)], "process 1 was started with num_processes=3"),
    ],
)  # fmt: skip
def test_processes_that_contradict_each_other_are_told(
    address: str, calls: list[tuple[int, int]], message: str
) -> None:
    assert all(message in said for said in outcomes(address, calls, 5.0))


def test_a_stranger_at_the_port_does_no_harm(address: str) -> None:
    host, _, port = address.rpartition(":")

    def strange() -> None:
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port)), timeout=1) as guest:
                    guest.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except OSError:
                threading.Event().wait(0.02)

    stranger = threading.Thread(target=strange)
    stranger.start()
    caller = threading.Timer(0.8, call_roll, (address, 2, 1, 20.0))
    caller.start()
    assert outcomes(address, [(0, 2)]) == [""]
    stranger.join()
    caller.join()


def test_a_port_in_use_is_one_line(address: str) -> None:
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))):
        (said,) = outcomes(address, [(0, 2)], 1.0)
    assert "cannot be listened at" in said


def test_a_single_process_needs_no_roll() -> None:
    call_roll("nowhere:1", 1, 0, 0.0)
