"""The launcher of this process, and joining the others of its job by ``jax.distributed``."""

import collections
import contextlib
import ipaddress
import os
import pathlib
import re
import socket
import sys
import threading
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_ddpm.errors import UserError
from jax_ddpm.runtime.distributed import is_first, several

# A process that hangs, or whose host is gone, is missed after this time; JAX ends the others.
_HEARTBEAT_SECONDS = 60
_NOTICE_SECONDS = 15
_MANUAL = "--distributed=manual --coordinator=host:port --num_processes=n --process_id=i"


class Launch(NamedTuple):
    """The launcher of this process, which is one of ``tasks``, ``here`` of them on its host."""

    launcher: str
    tasks: int
    here: int


def launched(environ: Mapping[str, str]) -> Launch | None:
    """The launch that ``mpirun`` or ``srun`` puts in the environment; None without either."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        tasks, here = (environ[f"OMPI_COMM_WORLD_{name}"] for name in ("SIZE", "LOCAL_SIZE"))
        return Launch("Open MPI", int(tasks), int(here))
    if "SLURM_STEP_TASKS_PER_NODE" in environ:  # such as "4(x2),1": 4, 4 and 1
        groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
        counts = [int(count) for count, times in groups for _ in range(int(times or 1))]
        return Launch("SLURM", sum(counts), counts[int(environ["SLURM_NODEID"])])
    return None


def one_gpu_each(environ: Mapping[str, str], tasks_here: int) -> bool:
    """Whether a task takes only the GPU of its local rank, and not all that it sees.

    Raises:
      UserError: where a GPU would idle, or serve two tasks, either way.
    """
    files = list(pathlib.Path("/dev").glob("nvidia[0-9]*"))
    on_host = int(environ.get("SLURM_GPUS_ON_NODE") or len(files))
    seen = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES")
    visible = len(seen.split(",")) if seen else on_host
    if visible * tasks_here == on_host:
        return False
    if visible == tasks_here == on_host:
        return True
    raise UserError(
        f"this host has {on_host} GPUs and {tasks_here} tasks, each of which sees {visible}: some "
        f"would idle or be shared; start 1 task on each host, which takes all, or {on_host}"
    )


def join(
    distributed: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    patience: int = 300,
) -> None:
    """Makes this process one of its job's; call it before anything touches a device.

    Args:
      distributed: "auto" asks SLURM, Open MPI or the TPU runtime for the processes, "manual" takes
        the next three arguments, "off" is for a process on its own.
      coordinator: host:port at which the first process listens.
      patience: seconds that all have to find each other.

    Raises:
      UserError: where they would not find each other, or a device would idle.
    """
    if distributed == "manual":
        _join_manually(coordinator, num_processes, process_id, patience)
    elif (coordinator, num_processes, process_id) != (None, None, None):
        raise UserError(f"--distributed={distributed} takes no address; to give one: {_MANUAL}")
    else:
        _join_as_launched(distributed, patience)
    if several():
        _require_equal_shares()
        line = topology()
        if is_first():
            print(line, file=sys.stderr, flush=True)
        else:
            warnings.simplefilter("ignore")  # the first process gives the same warnings


def _join_manually(
    coordinator: str | None, num_processes: int | None, process_id: int | None, patience: int
) -> None:
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(f"--distributed=manual takes an address: {_MANUAL}")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator}: give host:port, such as node1:1234")
    if process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id}: those of {num_processes} processes are 0 to "
            f"{num_processes - 1}"
        )
    _initialize(
        patience,
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        coordinator_bind_address=_own_address(coordinator) if process_id == 0 else None,
        cluster_detection_method="deactivate",
    )


def _own_address(coordinator: str) -> str | None:
    """The address of this host that the others know, at which alone it listens.

    None, which stands for all of its addresses, where the name is another host's here, as behind a
    gateway, or means this host itself only here.
    """
    name, _, port = coordinator.rpartition(":")
    name = name.strip("[]")
    try:
        found = socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)
    except (OSError, OverflowError):
        return None
    for family, *_, (address, *_) in found:
        loops = ipaddress.ip_address(address).is_loopback
        if loops and name not in ("localhost", address):
            continue
        with contextlib.suppress(OSError), socket.socket(family) as trial:
            trial.bind((address, 0))
            return f"[{address}]:{port}" if family == socket.AF_INET6 else f"{address}:{port}"
    return None


def _join_as_launched(mode: str, patience: int) -> None:
    launch = launched(os.environ)
    platforms = str(jax.config.jax_platforms)  # type: ignore[attr-defined]
    allocated = int(os.environ.get("SLURM_NTASKS", 1))
    if mode == "off":
        if launch and launch.tasks > 1:
            raise UserError(
                f"--distributed=off, but {launch.launcher} has started {launch.tasks} tasks, which "
                "would all do the same; leave it out"
            )
    elif launch and launch.tasks > 1:
        alone = platforms != "cpu" and one_gpu_each(os.environ, launch.here)
        _initialize(patience)
        if not alone:  # JAX has chosen the GPU of the local rank
            jax.config.update("jax_cuda_visible_devices", "all")
            jax.config.update("jax_rocm_visible_devices", "all")
    elif allocated > 1:
        raise UserError(
            f"SLURM has room for {allocated} tasks, but only this one was started: start it by "
            "srun, or with --distributed=off where one is meant"
        )
    elif platforms.startswith("tpu"):  # JAX sets it on a host of TPUs
        _initialize(patience)


def _initialize(patience: int, **address: Any) -> None:
    """``jax.distributed.initialize``; ends the process if the others do not come."""
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is StopRequest's
    place = address.get("coordinator_address", "the place that the launcher says")
    watches = (
        threading.Timer(_NOTICE_SECONDS, _tell_waiting, [place, patience]),
        threading.Timer(patience, _give_up, [patience]),
    )
    for watch in watches:
        watch.daemon = True
        watch.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=2 * patience,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            **address,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the processes of this job cannot find each other ({reason}); is the port free? "
            f"To say who is who: {_MANUAL}"
        ) from error
    finally:
        for watch in watches:
            watch.cancel()


def _tell_waiting(place: str, patience: int) -> None:
    print(
        f"waiting for the other processes of this job at {place}, up to {patience} s in all",
        file=sys.stderr,
        flush=True,
    )


def _give_up(patience: int) -> None:
    print(
        f"error: after {patience} s some processes of this job have not come; start all of them, "
        "each of which must reach the first one's host and port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _require_equal_shares() -> None:
    held = collections.Counter(device.process_index for device in jax.devices())
    if len(set(held.values())) > 1:
        raise UserError(
            f"process {min(held, key=held.__getitem__)} has {min(held.values())} devices, but "
            f"process {max(held, key=held.__getitem__)} {max(held.values())}: give each the same "
            "number"
        )


def topology() -> str:
    """Processes, hosts and devices in a line; all processes must call this."""
    host = np.uint32(zlib.crc32(socket.gethostname().encode()))
    hosts = len(np.unique(multihost_utils.process_allgather(host)))
    kind = jax.devices()[0].device_kind
    return (
        f"{jax.process_count()} processes on {hosts} host{'s' * (hosts > 1)}, each with "
        f"{jax.local_device_count()} of {jax.device_count()} × {kind}"
    )
