# SPDX-License-Identifier: Apache-2.0
"""The files that start jobs on clusters: syntax, the fields that their readers want, and flags that train.py has."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxspeed import cli


FOLDER = Path(__file__).parents[1] / "docs" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
DESCRIPTIONS = sorted(FOLDER.glob("*.yaml"))

VALUES = {
    "SLURM_JOB_NUM_NODES": "4",
    "WORKDIR": "/runs/x",
    "SKYPILOT_NUM_NODES": "4",
    "SKYPILOT_NODE_RANK": "3",
    "HEAD": "10.0.0.1",
    "RUNS": "/runs",
    "JOB_COMPLETION_INDEX": "3",
}


def commands(path: Path) -> list[list[str]]:
    """Returns the arguments of each `train.py` in a file, variables replaced."""
    if path.name.startswith("jobset"):
        command = container(yaml.safe_load(path.read_text()))["command"]
        lines = [shlex.join(command)]
    else:
        text = re.sub(r"^\s*#.*$", "", path.read_text(), flags=re.MULTILINE)
        text = text.replace("\\\n", " ")
        lines = re.findall(r"python train\.py[^\n]*", text)
    found = []
    for line in lines:
        line = re.sub(r'"\$@"|\$\{\*:-\}|"$', "", line.replace("'$RUNS/", "'/runs/"))
        line = re.sub(r"\$[({]?(\w+)[)}]?", lambda m: VALUES[m[1]], line)
        words = shlex.split(line)
        found.append(words[words.index("train.py") + 1 :])
    return found


def run_script(name: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs a script with `--steps 10`, a bare PATH and these variables."""
    return subprocess.run(
        ["bash", FOLDER / name, "--steps", "10"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"} | environment,
    )


def container(job: Any) -> Any:
    (replicated,) = job["spec"]["replicatedJobs"]
    (one,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return one


@pytest.mark.parametrize("path", [*SCRIPTS, *DESCRIPTIONS], ids=lambda p: p.name)
def test_train_py_takes_the_flags(path: Path) -> None:
    found = commands(path)
    assert len(found) == 1
    recipe, *flags = found[0]
    run = cli.override(cli.load_recipe(recipe), flags, prog="train.py")
    assert run.workdir.startswith("/runs")
    if run.coordinator:
        assert (run.num_processes, run.process_id, run.mesh.data) == (4, 3, 4)
        assert run.coordinator.endswith(":9876")
    run.validate(64 if path.name in ("tpu_vm.sh", "jobset.yaml") else 32)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shell_takes_the_script(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -euo pipefail" in path.read_text()


def test_slurm_starts_a_process_a_gpu(tmp_path: Path) -> None:
    """The script run with an srun that prints what it is given."""
    text = (FOLDER / "slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = run_script(
        "slurm.sh",
        PATH=f"{tmp_path}:/usr/bin:/bin",
        SLURM_JOB_NUM_NODES="4",
        SLURM_SUBMIT_DIR="/home/me",
    )
    assert done.returncode == 0, done.stderr
    given = done.stdout.split()
    assert given[1:4] == ["python", "train.py", "configs/llama2_7b.py"]
    assert given[-4:] == ["--workdir", "/home/me/runs/llama2_7b", "--steps", "10"]


def test_tpu_script_says_what_it_needs() -> None:
    done = run_script("tpu_vm.sh")
    assert done.returncode != 0
    assert "the Google Cloud project" in done.stderr


def test_tpu_script_runs_on_all_workers(tmp_path: Path) -> None:
    """The script run with a gcloud that writes down what it is given."""
    log = tmp_path / "log"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/bash\nprintf "%s|" "$@" >> {log}\necho >> {log}\n')
    gcloud.chmod(0o755)
    done = run_script(
        "tpu_vm.sh", PATH=f"{tmp_path}:/usr/bin:/bin", PROJECT="p", ZONE="z",
        REPO="https://example.org/r", RUNS="/mnt/runs",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tpu-vm delete jaxspeed --project p --zone z" in done.stdout
    train = log.read_text().splitlines()[-1]
    assert "--worker=all" in train
    assert (
        "train.py configs/llama2_7b.py --workdir '/mnt/runs/llama2_7b' --steps 10"
        in train
    )


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset_gpu.yaml"])
def test_jobset_has_the_fields_of_its_schema(name: str) -> None:
    job = yaml.safe_load((FOLDER / name).read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(job["spec"]) <= {
        "network",
        "failurePolicy",
        "successPolicy",
        "replicatedJobs",
    }
    (replicated,) = job["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    spec = replicated["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a Job's pods may not be Always
    mounted = {mount["name"] for mount in container(job)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert "limits" in container(job)["resources"]
    if name == "jobset_gpu.yaml":
        flags = container(job)["command"]
        host = flags[flags.index("--coordinator") + 1].split(":")[0]
        made = f"{job['metadata']['name']}-{replicated['name']}-0-0.{job['metadata']['name']}"
        assert host == made
        assert spec["completionMode"] == "Indexed"


def test_skypilot_has_the_fields_of_its_schema() -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    known = {
        "name",
        "resources",
        "num_nodes",
        "workdir",
        "volumes",
        "setup",
        "run",
        "envs",
        "file_mounts",
    }
    assert set(task) <= known
    assert re.fullmatch(r"[A-Z0-9]+:\d+", task["resources"]["accelerators"])
    for text in (task["setup"], task["run"]):
        done = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, text=True
        )
        assert done.returncode == 0
