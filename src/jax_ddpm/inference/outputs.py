"""The places of results: nothing is written over but what the same request has made."""

import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from jax_ddpm import images
from jax_ddpm.errors import UserError
from jax_ddpm.runtime.distributed import from_first


def require_place(out: pathlib.Path, request: dict[str, Any]) -> None:
    """Checks, before all work, that ``out`` can be written and holds no result of another request.

    A request is JSON, and says all that decides the result. Files keep it: a picture as its note,
    an ``.npz`` as its array ``record``, a ``.json`` as its ``request``.

    Raises:
      UserError: naming what is there instead.
    """
    require_writable(out, f"--out={out}")
    from_first(lambda: os.path.lexists(out) and require_same(out, _held(out), request))


def require_writable(out: pathlib.Path, name: str) -> None:
    """Checks, before all work, that a file ``out`` can be put in its place.

    Raises:
      UserError: where it cannot, or is a folder; ``name`` is what the user has given.
    """
    from_first(lambda: _try_writing(out, name))


def _try_writing(out: pathlib.Path, name: str) -> None:
    if out.is_dir():
        raise UserError(f"{name}: {out} is a folder; give the name of a file")
    place = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{name}: {out} cannot be written ({error.strerror})") from error


def require_same(out: pathlib.Path, held: Any, request: dict[str, Any]) -> bool:
    """True; raises UserError naming the field in which ``held``, what a file says, differs."""
    if not isinstance(held, dict):
        raise UserError(f"--out={out} exists already; remove it, or give another name")
    wanted = json.loads(json.dumps(request))  # which has no tuples
    for field in wanted | held:
        if held.get(field) != wanted.get(field):
            raise UserError(
                f"--out={out} was made with {field} {held.get(field)!r}, not "
                f"{wanted.get(field)!r}; give another name"
            )
    return True


def _held(out: pathlib.Path) -> Any:
    """The request that a file says it was made by; None where it says none."""
    try:
        if out.suffix == ".json":
            return json.loads(out.read_bytes())["request"]
        if out.suffix == ".npz":
            with out.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return json.loads(str(stored["record"]))
    except Exception:  # zipfile can raise anything on damaged bytes
        return None
    return images.note_of(out)


def beside(stem: pathlib.Path) -> dict[str, str]:
    """The note of a picture that lies beside the record ``<stem>.json``."""
    return {"beside": f"{stem.name}.json"}
