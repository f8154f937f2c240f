"""How launchers start processes, and how these find each other."""

import functools
import os
import random
import socket
import sys

import jax
import pytest
from jobs import Job, free_port

from jax_ddpm.errors import UserError
from jax_ddpm.runtime import launch
from jax_ddpm.runtime.distributed import ending
from jax_ddpm.runtime.launch import Launch, join, launched, one_gpu_each

SLURM_STEP = {"SLURM_NTASKS": "9", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)


class TestLaunched:
    @pytest.mark.parametrize(("node", "here"), [("0", 4), ("1", 4), ("2", 1)])
    def test_by_srun(self, node, here):
        assert launched(SLURM_STEP | {"SLURM_NODEID": node}) == Launch("SLURM", 9, here)

    def test_by_mpirun_also_in_an_allocation_of_slurm(self):
        assert launched(SLURM_STEP | {"SLURM_NODEID": "2"} | MPI) == Launch("Open MPI", 8, 4)

    def test_by_hand_or_in_the_batch_script_of_slurm(self):
        assert launched({}) is None
        assert launched({"SLURM_NTASKS": "9", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}) is None


@pytest.mark.parametrize("tasks", [1, 2, 4, 8])
@pytest.mark.parametrize("on_host", [1, 2, 4, 8])
@pytest.mark.parametrize("bound", [False, True], ids=["all_see_all", "each_sees_its_own"])
def test_every_gpu_is_used_by_exactly_one_task_or_it_is_an_error(bound, on_host, tasks):
    seen = [list(range(on_host))] * tasks
    if bound:
        share = max(1, on_host // tasks)
        on_host = share * tasks
        seen = [list(range(rank * share, rank * share + share)) for rank in range(tasks)]
    # Where devices are constrained each task counts those it sees from 0 on.
    environ = {
        "SLURM_GPUS_ON_NODE": str(on_host),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(seen[0])))),
    }
    if not bound and tasks not in (1, on_host):
        with pytest.raises(UserError, match=f"start 1 task .*, which takes all, or {on_host}$"):
            one_gpu_each(environ, tasks)
        return
    each = one_gpu_each(environ, tasks)
    used = [gpu for rank in range(tasks) for gpu in ([seen[rank][rank]] if each else seen[rank])]
    assert sorted(used) == list(range(on_host))


@pytest.mark.parametrize(("visible", "taken"), [("0,1", "1"), ("1", "all")])
def test_the_gpu_of_the_local_rank_or_all_that_are_seen(monkeypatch, visible, taken):
    def initialize(patience):
        jax.config.update("jax_cuda_visible_devices", "1")  # as JAX does for this local rank

    monkeypatch.setattr(launch, "_initialize", initialize)
    gpus = {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": visible}
    for name, value in (slurm("1", 1) | gpus).items():
        monkeypatch.setenv(name, value)
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "")
    try:
        join("auto")
        assert jax.config.read("jax_cuda_visible_devices") == taken
    finally:
        jax.config.update("jax_platforms", platforms)
        jax.config.update("jax_cuda_visible_devices", "all")


def test_a_single_visible_gpu_of_many_is_an_error():
    with pytest.raises(UserError, match="has 8 GPUs and 1 tasks, each of which sees 1"):
        one_gpu_each({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, 1)


def test_a_host_without_gpus_needs_no_choice():
    assert not one_gpu_each({"SLURM_GPUS_ON_NODE": "0"}, 4)


MISTAKES = {
    "manual": (("manual", "host:1", 2), {}, "takes an address"),
    "half an address": (("manual", "host", 2, 0), {}, "--coordinator=host: give host:port"),
    "a number too high": (("manual", "host:1", 2, 2), {}, "those of 2 processes are 0 to 1"),
    "an address for nobody": (("auto", "host:1", 2, 0), {}, "takes no address"),
    "off in a step": (("off",), MPI, "Open MPI has started 8 tasks"),
    "no step": (("auto",), {"SLURM_NTASKS": "9"}, "room for 9 tasks, .* start it by srun"),
}


@pytest.mark.parametrize(("arguments", "environ", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_job_that_cannot_come_together_is_one_line(monkeypatch, arguments, environ, message):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        join(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [{}, {"SLURM_NTASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"}],
    ids=["alone", "the only task"],
)
def test_a_process_on_its_own_joins_nobody(monkeypatch, environ):
    monkeypatch.setattr(launch, "_initialize", None)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    join("auto")
    join("off")
    monkeypatch.setenv("SLURM_NTASKS", "9")
    join("off")


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [
        ("127.0.0.1:1234", "127.0.0.1:1234"),
        ("localhost:1234", "127.0.0.1:1234"),
        ("node1:1234", None),  # as many systems call themselves
        ("192.0.2.1:1234", None),  # of nobody (RFC 5737)
        ("nowhere.invalid:1234", None),
    ],
)
def test_it_listens_where_the_others_look_for_it_alone(monkeypatch, coordinator, address):
    hosts = {"localhost": "127.0.0.1", "node1": "127.0.1.1"}

    def resolved(name, port, **_):
        if name.endswith(".invalid"):
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (hosts.get(name, name), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    assert launch._own_address(coordinator) == address


def meet(environ, *address, patience=60, notice=15):
    """Joins in a new process, and says who it is, of how many devices; or why not."""
    launch._NOTICE_SECONDS = notice
    os.environ.update(environ)
    jax.config.update("jax_platforms", "cpu")
    with ending():
        try:
            join("manual" if address else "auto", *address, patience=patience)
        except UserError as error:
            sys.exit(f"error: {error}")
        counts = jax.process_count(), jax.local_device_count(), jax.device_count()
        print(jax.process_index(), *counts)


def slurm(job, rank):
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def open_mpi(job, rank):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{int(job) * 2**12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_tasks_find_each_other(tmp_path, launcher):
    job = str(random.randrange(10**6))  # of which the port is made
    works = [functools.partial(meet, launcher(job, rank)) for rank in range(2)]
    results = Job(tmp_path, works, devices=3).results()
    assert [result.returncode for result in results] == [0, 0], results
    assert [result.stdout for result in results] == ["0 2 3 6\n", "1 2 3 6\n"]
    assert results[0].stderr == "2 processes on 1 host, each with 3 of 6 × cpu\n"
    assert results[1].stderr == ""


def told(result):
    """The one line on stderr."""
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.slow
def test_without_the_others_it_gives_up(tmp_path):
    address = (f"localhost:{free_port()}", 2)
    works = [functools.partial(meet, {}, *address, 0, patience=2)]
    (result,) = Job(tmp_path, works).results()
    assert told(result).startswith("error: after 2 s some processes of this job have not come")


@pytest.mark.slow
def test_who_waits_says_where(tmp_path):
    """A wrong port shows before all patience is spent."""
    place = f"localhost:{free_port()}"
    works = [functools.partial(meet, {}, place, 2, 1, patience=2, notice=1)]
    (result,) = Job(tmp_path, works).results()
    waiting, *_ = result.stderr.splitlines()
    assert waiting == f"waiting for the other processes of this job at {place}, up to 2 s in all"


@pytest.mark.slow
def test_a_launcher_that_jax_does_not_know_is_told_how_to_go_on(tmp_path):
    """Newer versions of Open MPI do not say where the coordinator is."""
    environ = open_mpi("1", 0)
    del environ["OMPI_MCA_orte_hnp_uri"]
    (result,) = Job(tmp_path, [functools.partial(meet, environ)]).results()
    assert "cannot find each other" in told(result)
    assert "--distributed=manual --coordinator=host:port" in told(result)


@pytest.mark.slow
def test_processes_with_unequal_shares_are_an_error(tmp_path):
    address = (f"localhost:{free_port()}", 2)
    works = [functools.partial(meet, {}, *address, index) for index in range(2)]
    results = Job(tmp_path, works, devices=[1, 2]).results()
    for result in results:
        assert told(result).startswith("error: process 0 has 1 devices, but process 1 2")
