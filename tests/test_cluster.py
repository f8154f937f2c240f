"""The launch files for clusters, run with stand-ins for the cluster's own commands."""

import os
import shlex
import subprocess

import pytest
from command import ROOT

from jax_ddpm.config import default
from jax_ddpm.runtime.stopping import EXIT_CODE

CLUSTER = ROOT / "experiments" / "cluster"


@pytest.fixture
def run(tmp_path):
    """``run(script, *arguments, status=…, VARIABLE=…)``: the exit code and the commands called.

    The script is run from a copy, as SLURM does. ``status`` is what srun and gcloud return.
    """
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("srun", "scontrol", "gcloud"):
        stub = commands / name
        code = "$STATUS" if name != "scontrol" else "0"
        stub.write_text(f'#!/bin/bash\necho {name} "${{@@Q}}" >> "$CALLS"\nexit {code}\n')
        stub.chmod(0o755)

    def run(script, *arguments, status=0, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        copy = tmp_path / "slurm_script"
        copy.write_text((CLUSTER / script).read_text())
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        result = subprocess.run(
            ["bash", copy, *arguments],
            cwd=ROOT,
            env=clean
            | {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": calls, "STATUS": str(status)}
            | variables,
            capture_output=True,
            text=True,
        )
        return result.returncode, [shlex.split(call) for call in calls.read_text().splitlines()]

    return run


PYTHON = ["srun", "--kill-on-bad-exit=0", "python", "-m", "jax_ddpm.main"]
JOB = {"SLURM_JOB_ID": "7"}
REQUEUE = ["scontrol", "requeue", "7"]


def test_slurm_passes_the_flags_on(run):
    flags = ["--config=configs/digits.py", "--config.model.channel_multipliers=(1, 2)"]
    assert run("slurm.sbatch", *flags, **JOB) == (0, [PYTHON + flags])


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [
        (0, 0, False),
        (1, 0, False),
        (EXIT_CODE, 0, True),
        (EXIT_CODE, 1000, True),
        (134, 0, True),
        (137, 9, True),
        (137, 10, False),
    ],
)
def test_slurm_requeues_what_can_go_on(run, status, restarts, again):
    variables = JOB | {"SLURM_RESTART_COUNT": str(restarts)}
    code, calls = run("slurm.sbatch", "--config=x", status=status, **variables)
    assert code == status
    assert calls == [[*PYTHON, "--config=x"]] + [REQUEUE] * again


def test_a_task_of_an_array_takes_its_line(run):
    lines = (CLUSTER / "seeds.txt").read_text().splitlines()
    for number, line in enumerate(lines, 1):
        task = JOB | {"SLURM_ARRAY_TASK_ID": str(number)}
        flags = ["experiments/cluster/seeds.txt", "--config.fsdp=2"]
        _, calls = run("slurm.sbatch", *flags, **task)
        assert calls == [[*PYTHON, *line.split(), "--config.fsdp=2"]]


def test_the_runs_of_the_array_are_different_ones():
    runs = [
        dict(flag.removeprefix("--").split("=") for flag in line.split())
        for line in (CLUSTER / "seeds.txt").read_text().splitlines()
    ]
    for name in ("workdir", "config.seed"):
        assert len({run[name] for run in runs}) == len(runs)
    for run in runs:
        assert (ROOT / run["config"]).exists()
        fields = {name.removeprefix("config.") for name in run if name.startswith("config.")}
        assert fields <= {*default().to_dict()}


def test_the_batch_script_is_told_in_time_and_keeps_its_log():
    text = (CLUSTER / "slurm.sbatch").read_text()
    given = {line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= given
    assert text.index("#SBATCH") < text.index("set -u"), "SLURM reads no further than a command"


def test_all_hosts_of_a_slice_run_the_same_command(run):
    flags = ["--config=configs/digits.py", "--config.model.channel_multipliers=(1, 2)"]
    code, (call,) = run("tpu_pod.sh", *flags, status=75, TPU="slice", ZONE="here")
    assert code == 75
    *gcloud, command = call
    assert gcloud == [
        *["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=here", "--worker=all"]
    ]
    *before, program = command.removeprefix("--command=").split(" && ")
    assert before == ["cd ~/jax_ddpm", "pip install --quiet --editable '.[tpu]'"]
    assert shlex.split(program) == ["exec", "python3", "-m", "jax_ddpm.main", *flags]


def test_a_slice_must_be_named(run):
    code, calls = run("tpu_pod.sh", "--config=x", ZONE="here")
    assert code != 0
    assert calls == []
