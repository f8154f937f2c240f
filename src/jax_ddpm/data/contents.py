"""What files hold, told by the SHA-256 of their bytes.

Those of large sets are kept in ``~/.cache/jax_ddpm/contents`` (or in ``XDG_CACHE_HOME``), so that
only files whose size or times have changed are read again. Without such a folder all are.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax_ddpm.data.threads import over_files
from jax_ddpm.errors import UserError

_WORTH_KEEPING = 2**26  # bytes; fewer are read within a moment
_SETTLED = 2 * 10**9  # ns; a file may change again within one tick of its times


class _Known(NamedTuple):
    """A file as it was when it was read: it is the same while all but the last agree."""

    size: int
    modified: int
    changed: int  # also where a tool sets the time of modification back
    sha256: str


def file_hashes(root: pathlib.Path, files: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of each file, in hexadecimal; the paths are relative to ``root``.

    Raises:
      UserError: naming a file that cannot be read.
    """
    from tqdm import tqdm

    from jax_ddpm.runtime.distributed import is_first  # only here: it loads JAX

    now = time.time_ns()
    stats = over_files(lambda file: _readable(os.stat, root / file), files)
    sizes = {file: stat.st_size for file, stat in stats.items()}
    place = _place(root) if sum(sizes.values()) >= _WORTH_KEEPING else None
    known = _load(place) if place else {}
    fresh = {
        file: _Known(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, "")
        for file, stat in stats.items()
    }
    changed = [file for file in files if file not in known or known[file][:3] != fresh[file][:3]]
    total = sum(sizes[file] for file in changed)
    shown = {"desc": "hashing", "unit": "B", "unit_scale": True, "delay": 5}
    with tqdm(total=total, disable=None if is_first() else True, **shown) as bar:

        def sha256(file: str) -> str:
            digest = _readable(_sha256, root / file)
            bar.update(sizes[file])
            return digest

        for file, digest in over_files(sha256, changed).items():
            known[file] = fresh[file]._replace(sha256=digest)
    if place and changed:
        settled = [file for file in files if max(known[file][1:3]) < now - _SETTLED]
        _save(place, {file: known[file] for file in settled})
    return {file: known[file].sha256 for file in files}


def _readable(read: Any, path: pathlib.Path) -> Any:
    try:
        return read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from error


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(root: pathlib.Path) -> pathlib.Path | None:
    from jax_ddpm.runtime.backend import private_cache

    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    try:
        return private_cache("contents") / f"{name}.json"
    except (OSError, RuntimeError):  # without a home, all is read again
        return None


def _load(place: pathlib.Path) -> dict[str, _Known]:
    try:
        return {file: _Known(*known) for file, known in json.loads(place.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        return {}


def _save(place: pathlib.Path, known: dict[str, _Known]) -> None:
    from jax_ddpm.runtime.files import replacing

    with contextlib.suppress(OSError), replacing(place) as file:
        file.write(json.dumps(known).encode())
