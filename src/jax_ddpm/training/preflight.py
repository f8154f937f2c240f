"""Tries out everything that a training run needs, before it is submitted; trains nothing."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_ddpm import factory
from jax_ddpm.config.validation import validate
from jax_ddpm.errors import UserError
from jax_ddpm.keys import seed_key
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.runs.identity import require_same_run
from jax_ddpm.runs.workdir import require_ours
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.distributed import from_first, is_first
from jax_ddpm.runtime.stopping import Poll, never
from jax_ddpm.tasks.recipe import never_warm
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.feed import Feed
from jax_ddpm.training.prepare import prepare
from jax_ddpm.training.state import from_items, to_items

_TRIAL = ".check-"


class Preflight:
    """The checks, ordered so that each finds what it needs."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir

    def run(self, poll: Poll = never) -> None:
        """Prints a row for each check; calls ``poll`` before each.

        Raises:
          UserError: at the first check that fails, with what to mend.
        """
        for check in (
            self.devices,
            self.settings,
            self.write_access,
            self.data,
            self.parameters,
            self.checkpoints,
            self.train_step,
        ):
            poll()
            name = check.__name__.replace("_", " ")
            _say(f"{name:<14}", end="")
            try:
                _say(check())
            except Exception:
                _say("FAILED")
                raise

    def devices(self) -> str:
        """What JAX found."""
        self.mesh = make_mesh()
        return f"{self.mesh.size} × {self.mesh.devices.flat[0].device_kind}"

    def settings(self) -> str:
        """No field contradicts another or these devices."""
        validate(self.config, self.mesh.size)
        self.mesh = make_mesh(self.config.fsdp)
        training = self.config.training
        text = f"{training.num_steps:,} steps of {training.batch_size} images"
        return "; ".join(filter(None, (text, never_warm(self.config))))

    def write_access(self) -> str:
        """A folder can be made in the workdir, which is a run's or holds nothing of one."""
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_TRIAL, dir=self.workdir):
                pass
        except OSError as error:
            raise UserError(
                f"--workdir={self.workdir}: cannot be written ({error.strerror})"
            ) from error
        require_ours(self.workdir)
        return f"{self.workdir}, {_bytes(shutil.disk_usage(self.workdir).free)} free"

    def data(self) -> str:
        """The source can be read, and is that of the run in the workdir."""
        start = time.perf_counter()
        self.source = factory.make_source(self.config)
        spec = self.source.spec
        require_same_run(self.workdir, self.config, spec)
        with Feed(self.config, self.source, self.mesh, start=0) as feed:
            self.resident, self.batches = feed.data, feed.take(1)
        sizes = " + ".join(f"{size:,} {name}" for name, size in spec.split_sizes.items())
        seconds = time.perf_counter() - start
        return (
            f"{spec.identity}: {sizes}, {'×'.join(map(str, spec.image_shape))}, "
            f"{spec.classes()}; opened, and a batch read, in {seconds:.1f} s"
        )

    def parameters(self) -> str:
        """The state before the first step, and the frozen networks beside it."""
        prepared = prepare(self.config, self.source.spec, self.mesh, self.workdir)
        self.recipe, self.state = prepared.recipe, prepared.state
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        text = f"{count:,}; with averages and optimiser {_bytes(self.state_bytes)}"
        for name, network in self.recipe.frozen.items():
            if size := sum(leaf.nbytes for leaf in jax.tree.leaves(network.params)):
                text += f"; frozen {name} {_bytes(size)}"
        return f"{text}; {prepared.origin}" if prepared.origin else text

    def checkpoints(self) -> str:
        """A checkpoint can be written, verified and read back, with room for all."""
        training, done = self.config.training, checkpoint.newest(self.workdir)
        if done is not None and done > training.num_steps:
            raise UserError(
                f"--workdir={self.workdir}: {done} steps are done; raise training.num_steps"
            )
        for_good = training.num_steps // training.keep_every if training.keep_every else 0
        held = len(checkpoint.steps(self.workdir))  # they take their room already
        count = max(1, training.keep_last + for_good + 1 - held)
        room, needed = shutil.disk_usage(self.workdir).free, self.state_bytes * count
        if room < needed:
            raise UserError(
                f"--workdir={self.workdir}: {_bytes(room)} free, but {count} checkpoints take "
                f"{_bytes(needed)}; lower training.keep_last, raise training.keep_every, or make "
                "room"
            )
        with contextlib.ExitStack() as stack:
            folder = from_first(lambda: str(stack.enter_context(_trial(self.workdir))))
            trial, start = pathlib.Path(folder), time.perf_counter()
            with Checkpoints(trial, keep_last=1, keep_every=0) as checkpoints:
                checkpoints.save(0, to_items(self.state), self.config, {})
                checkpoints.wait()
                written = time.perf_counter()
                step, items, _ = checkpoints.restore(to_items(self.state))
                read = time.perf_counter()
        if not _equal(from_items(step, items, self.state), self.state):
            raise UserError(f"--workdir={self.workdir}: a checkpoint read back differently")
        resumes = "" if done is None else f"; training goes on after step {done:,}"
        return f"written in {written - start:.1f} s, read in {read - written:.1f} s{resumes}"

    def train_step(self) -> str:
        """One step compiles; the row says what it will hold in memory."""
        start = time.perf_counter()
        step_fn = compile_step(
            self.recipe, self.state, self.mesh, self.config.parallel, self.resident
        )
        seed = seed_key(self.config.seed)
        compiled = step_fn.lower(self.state, self.batches, seed).compile()
        memory: Any = compiled.memory_analysis()
        seconds = time.perf_counter() - start
        needed = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
        stats: dict[str, Any] = self.mesh.local_devices[0].memory_stats() or {}
        limit = stats.get("bytes_limit")
        text = f"compiled in {seconds:.1f} s; {_bytes(needed)} a device"
        if limit and needed > limit:
            raise UserError(
                f"a train step takes {_bytes(needed)} a device, which has {_bytes(limit)}; "
                "raise training.accumulate, set model.remat, or lower training.batch_size"
            )
        return text + (f" of {_bytes(limit)}" if limit else "")


@contextlib.contextmanager
def _trial(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder in the workdir for as long as it is needed; those of killed checks are removed."""
    import fcntl

    with contextlib.ExitStack() as held:

        def lock(folder: pathlib.Path) -> None:
            number = os.open(folder, os.O_RDONLY)
            held.callback(os.close, number)
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)

        for left in workdir.glob(f"{_TRIAL}*"):
            with contextlib.suppress(OSError):  # another check is at work there
                lock(left)
                shutil.rmtree(left)
        found = tempfile.TemporaryDirectory(prefix=_TRIAL, dir=workdir)
        folder = pathlib.Path(held.enter_context(found))
        with contextlib.suppress(OSError):  # some network file systems have no locks
            lock(folder)
        yield folder


@jax.jit
def _equal(one: Any, other: Any) -> jax.Array:
    return jnp.stack(jax.tree.leaves(jax.tree.map(jnp.array_equal, one, other))).all()


def _say(text: str, end: str = "\n") -> None:
    if is_first():
        print(text, end=end, flush=True)


def _bytes(count: int | float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
