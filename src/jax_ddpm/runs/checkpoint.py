"""Checkpoints: ``<workdir>/checkpoints/<step>/`` with named items, each a tree of arrays.

A checkpoint appears whole or not at all: Orbax writes it in the background beside its place, and
renames it once its manifest is in it. Each of several processes writes the parts on its devices,
into a folder that all can reach; only the first chooses, signs and deletes.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_ddpm.errors import UserError
from jax_ddpm.runs.manifest import Damaged, sign, verify
from jax_ddpm.runtime.distributed import from_first, is_first, lost
from jax_ddpm.runtime.files import read_json

_UNFINISHED = ".orbax-checkpoint-tmp"
_DELETED = ".deleted"


def folder(workdir: pathlib.Path) -> pathlib.Path:
    """Where the checkpoints of a run lie."""
    return (workdir / "checkpoints").absolute()


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps with a finished checkpoint, in order.

    Raises:
      UserError: where their folder is there and cannot be read.
    """
    try:
        found = os.listdir(folder(workdir))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: its checkpoints cannot be read ({error.strerror}); mend this, "
            "or use another --workdir"
        ) from error
    return sorted(int(name) for name in found if name.isdecimal())


def newest(workdir: pathlib.Path, items: Iterable[str] | None = None) -> int | None:
    """Step of the newest whole checkpoint, with a warning of damaged newer ones.

    None where there is no checkpoint. The first process looks, for all processes.

    Raises:
      UserError: where there are checkpoints, but all are damaged.
    """
    return from_first(lambda: _newest(workdir, items))


def _newest(workdir: pathlib.Path, items: Iterable[str] | None) -> int | None:
    while known := steps(workdir):
        for step in reversed(known):
            path = folder(workdir) / str(step)
            try:
                verify(path, items)
            except Damaged as damage:
                if path.exists():
                    warnings.warn(f"checkpoint {step} is damaged: {damage}", stacklevel=2)
            else:
                return step
        if steps(workdir) == known:  # else a run that trains there has newer ones by now
            raise UserError(
                f"--workdir={workdir}: every checkpoint is damaged; to start over use another "
                "--workdir"
            )
    return None


def choose_step(workdir: pathlib.Path, step: int | None, item: str) -> int:
    """The step asked for, or that of the newest checkpoint whose ``item`` and config are whole.

    Raises:
      UserError: where there is no such checkpoint.
    """
    if step is None:
        step = newest(workdir, [item, "config"])
    known = steps(workdir)
    if step is None or not known:
        begun = (workdir / "config.json").exists()
        reason = (
            "no checkpoint there yet; train on" if begun else "no run there; train into it first"
        )
        raise UserError(f"--workdir={workdir}: {reason}")
    if step not in known:
        raise UserError(
            f"--checkpoint_step={step}: {workdir} has checkpoints at {', '.join(map(str, known))}"
        )
    return step


def restore_item(workdir: pathlib.Path, step: int, item: str) -> Any:
    """One item of a checkpoint, such as "ema" or "params", as a tree of NumPy arrays.

    Raises:
      UserError: where the item is damaged, or Orbax cannot read it.
    """
    ocp = _orbax()
    path = folder(workdir) / str(step)
    try:
        verify(path, [item])
        # Not a Checkpointer: it warns that a single item lacks the metadata of a checkpoint.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            stored = handler.metadata(path / item).tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
            return handler.restore(path / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except (Damaged, OSError, ValueError) as error:
        raise UserError(f"checkpoint {step} in {workdir}: {_one_line(error)}") from error


def restore_note(workdir: pathlib.Path, step: int, name: str) -> Any:
    """JSON that was saved with a checkpoint, such as "config".

    Raises:
      UserError: where it is damaged.
    """
    path = folder(workdir) / str(step)
    try:
        verify(path, [name])
        return read_json(path / name / "metadata")
    except (Damaged, OSError, ValueError) as error:
        raise UserError(f"checkpoint {step} in {workdir}: {_one_line(error)}") from error


def set_aside(workdir: pathlib.Path, since: int) -> list[int]:
    """Moves the checkpoints from step ``since`` on into ``damaged/``, and returns their steps."""
    aside, moved = workdir / "damaged", [step for step in steps(workdir) if step >= since]
    for step in moved:
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (folder(workdir) / str(step)).rename(aside / str(step))
    return moved


def digest(params: Any) -> str:
    """A hash that identifies parameters, wherever their run lies."""
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        sha256.update(np.ascontiguousarray(leaf).tobytes())
    return sha256.hexdigest()


class Checkpoints:
    """Saves and restores what a run goes on from; closing it waits for the last save.

    It keeps the last ``keep_last`` checkpoints and those at multiples of ``keep_every`` (0: none).
    Older ones are deleted only when the run has gone on from the last, to the next save or to its
    end: until then the last may be spoilt.
    """

    def __init__(self, workdir: pathlib.Path, keep_last: int, keep_every: int):
        ocp = _orbax()
        self._workdir, self._folder = workdir, folder(workdir)
        self._keep_last, self._keep_every = keep_last, keep_every
        from_first(self._clear_up)
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._sign,
                # Else threads wait for a folder that cannot be made, and keep the process alive.
                create_directories_asynchronously=False,
            ),
        )
        self.last: int | None = None  # step saved or restored last

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if lost(error):
            return  # a save under way will never be whole
        failure = contextlib.suppress(UserError) if error else contextlib.nullcontext()
        with contextlib.closing(self._saver), failure:
            self.wait()
            if not error:
                self._delete_superseded()

    def _clear_up(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob("*"):
            if _UNFINISHED in path.name:
                step, _, _ = path.name.partition(".")
                warnings.warn(f"checkpoint {step} was not finished; it is removed", stacklevel=2)
            if _UNFINISHED in path.name or path.name.endswith(_DELETED):
                shutil.rmtree(path)

    def save(
        self,
        step: int,
        items: dict[str, Any],
        config: ConfigDict,
        progress: dict[str, Any],
        **notes: Any,
    ) -> None:
        """Saves in the background, after copying the items, trees of arrays by name, to the host.

        ``progress`` is the rest of what the loop needs, ``notes`` what others do, all of it JSON.

        Raises:
          UserError: where this or the previous save failed; earlier checkpoints stay as they are.
        """
        ocp = _orbax()
        self.wait()
        self._delete_superseded()
        self.last = step
        args = {name: ocp.args.StandardSave(item) for name, item in _not_empty(items).items()}
        notes |= {"progress": progress | {"step": step}, "config": json.loads(config.to_json())}
        args |= {name: ocp.args.JsonSave(note) for name, note in notes.items()}
        try:
            self._saver.save(self._folder / str(step), args=ocp.args.Composite(**args))
        except Exception as error:
            raise self._failure(error) from error

    def _sign(self) -> None:
        """Puts the manifest into a checkpoint that is complete but not yet renamed.

        Orbax calls this on the first process only, when all have written their parts.
        """
        (path,) = self._folder.glob(f"{self.last}{_UNFINISHED}*")
        sign(path)

    def check(self) -> None:
        """Raises UserError as soon as a save in the background has failed."""
        try:
            self._saver.check_for_errors()
        except Exception as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        try:
            self._saver.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def _delete_superseded(self) -> None:
        if not is_first():
            return
        for step in steps(self._workdir)[: -self._keep_last]:
            if not self._keep_every or step % self._keep_every:
                # Renamed first: a half-deleted folder must not look like a checkpoint.
                path = self._folder / str(step)
                shutil.rmtree(path.rename(path.with_name(path.name + _DELETED)))

    def _failure(self, error: Exception) -> UserError:
        kept = steps(self._workdir)
        return UserError(
            f"checkpoint {self.last} could not be written ({_one_line(error)}); "
            + (f"checkpoint {kept[-1]} is the last one" if kept else "there is none before it")
        )

    def restore(self, items: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Step, items and progress of the newest whole checkpoint.

        ``items`` give the structure and the layout over the devices; which devices, and how many,
        may have changed. Damaged newer checkpoints are set aside in ``damaged/``. Without a
        checkpoint the result is step 0, ``items`` themselves, and {}.

        Raises:
          UserError: where all are damaged, or the checkpoint has another structure.
        """
        ocp = _orbax()
        step = newest(self._workdir)
        if step is None:
            return 0, items, {}
        from_first(lambda: set_aside(self._workdir, step + 1))
        path, wanted = self._folder / str(step), _not_empty(items)
        where = f"checkpoint {step} in {self._workdir}"
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            for name, item in wanted.items():
                held = (path / name).is_dir()
                stored = handler.metadata(path / name).tree if held else {}
                require_same_structure({name: item}, {name: stored}, where)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            wanted,
        )
        args: dict[str, Any] = {"progress": ocp.args.JsonRestore()}
        for name, item in abstract.items():
            args[name] = ocp.args.StandardRestore(item)
        try:
            restored = self._saver.restore(path, args=ocp.args.Composite(**args))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{where} does not fit this config: {_one_line(error)}") from error
        progress = restored["progress"]
        self.last = done = progress.pop("step")
        return done, items | {name: restored[name] for name in wanted}, progress


def _orbax() -> Any:
    """Orbax, without its tracebacks of what it raises too, and of all that a failed save drops."""
    import orbax.checkpoint as ocp

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_of_orbax)
    if not isinstance(sys.unraisablehook, _WithoutDroppedWork):
        sys.unraisablehook = _WithoutDroppedWork(sys.unraisablehook)  # type: ignore[assignment]
    return ocp


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname + logging.Formatter().format(record)


class _WithoutDroppedWork(NamedTuple):
    """The hook of errors in threads of others, without those of TensorStore after a failed save:
    it tells an event loop, which the failure has closed, of each part that it still had to write.
    """

    hook: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.hook(unraisable)


def _not_empty(items: dict[str, Any]) -> dict[str, Any]:
    """The items with leaves: Orbax refuses trees without."""
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def require_same_structure(wanted: Any, found: Any, where: str) -> None:
    """Raises UserError naming the first parameter that differs."""
    shapes = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in leaves
        }
        for leaves in map(jax.tree_util.tree_leaves_with_path, (wanted, found))
    ]
    for name in shapes[0] | shapes[1]:
        needed, held = (tree.get(name, "absent") for tree in shapes)
        if needed != held:
            raise UserError(f"{where} does not fit: {name} is {held}, needed is {needed}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
