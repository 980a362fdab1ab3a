# SPDX-License-Identifier: Apache-2.0
"""`jaxspeed doctor` runs what it reports on."""

import json
from typing import Any

import jax
import pytest

from jaxspeed import doctor
from jaxspeed.cli import main


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    return doctor.examine()


def test_every_check_works_here(findings: dict[str, Any]) -> None:
    assert [check["name"] for check in findings["checks"]] == list(doctor.CHECKS)
    assert not [check for check in findings["checks"] if not check["works"]]


def test_machine_and_devices_are_this_machines(findings: dict[str, Any]) -> None:
    assert findings["machine"]["cpus"] >= 1
    assert findings["machine"]["memory_gib"] > 0.5
    assert [d["id"] for d in findings["devices"]] == [d.id for d in jax.devices()]
    assert findings["versions"]["jax"] == jax.__version__
    assert findings["process"] == {"index": 0, "count": 1}


def test_attention_names_its_kernel_and_why(findings: dict[str, Any]) -> None:
    notes = {check["name"]: check["note"] for check in findings["checks"]}
    for dtype in ("float32", "bfloat16", "float16"):
        assert "kernel (" in notes[f"attention in {dtype}"]


def test_failing_check_is_a_finding_not_an_end() -> None:
    def fail() -> str:
        raise OSError(28, "No space left on device")

    check = doctor._check("disk", fail)
    assert (check["works"], check["note"]) == (
        False,
        "[Errno 28] No space left on device",
    )


def test_wrong_result_is_a_failing_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "attention", lambda q, k, v, documents: q * q.mean())
    monkeypatch.setattr(doctor.np, "abs", lambda x: x * 0 + 1)
    check = doctor._check("attention", doctor.CHECKS["attention in float32"])
    assert not check["works"]
    assert "differs from plain attention by 1" in check["note"]


def test_show_names_every_check_and_how_to_get_what_is_missing(
    findings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {"extra": "tpu", "for": "TPUs", "installed": False}
    doctor.show({**findings, "extras": [{**missing, "get": "pip install X[tpu]"}]})
    out = " ".join(capsys.readouterr().out.split())
    assert "not installed: TPUs: pip install X[tpu]" in out
    for name in ("bfloat16 products", "collectives", "checkpoints"):
        assert name in out
    assert "FAILS" not in out


def test_json_is_the_findings(
    findings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == findings
