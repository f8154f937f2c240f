"""Result records: what was measured, of what, how and where; and their comparison."""

import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import jax

from jax_ddpm import __version__
from jax_ddpm.errors import UserError
from jax_ddpm.runtime.files import read_json, replacing

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "pillow")


def provenance(seconds: float) -> dict[str, Any]:
    """The origin of a result: command, code, packages, device.

    ``seconds`` are those of this command; cached results took time before.
    """
    device = jax.devices()[0]
    return {
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES}
        | {"jax-ddpm": __version__},
        "random_numbers": str(jax.random.key_impl(jax.random.key(0))),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device": f"{jax.device_count()} × {device.device_kind}",
        "processor": _processor(),
    }


def _command() -> str:
    program = pathlib.Path(sys.argv[0])
    ours = program.name == "jax_ddpm" or program.parts[-2:] == ("jax_ddpm", "main.py")
    started = ["-m", "jax_ddpm.main"] if ours else sys.argv[:1]
    return shlex.join(["python", *started, *sys.argv[1:]])


def save_record(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes one result as JSON.

    Raises:
      UserError: naming the results that are not finite.
    """
    results = {"measured": record["measured"], "calibration": record["calibration"]}
    bad = [
        name
        for name, value in _fields(results)
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if bad:
        raise UserError(f"{path}: not written, for {', '.join(bad)} would not be finite")
    with replacing(path) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def load_record(path: pathlib.Path) -> dict[str, Any]:
    """Reads what ``save_record`` wrote.

    Raises:
      UserError: where there is none.
    """
    try:
        record = dict(read_json(path))
        dict(_fields(record["subject"]))
        for measured in record["measured"].values():
            dict(_fields(measured["protocol"])), _shown(measured["result"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a result record; give the .json of an evaluation") from error
    return record


def compare(first: pathlib.Path, second: pathlib.Path) -> str:
    """The results of two records side by side, and the differences between their subjects.

    Raises:
      UserError: naming the field, where the two measured something differently.
    """
    records = load_record(first), load_record(second)
    shared = [name for name in records[0]["measured"] if name in records[1]["measured"]]
    if not shared:
        held = " and ".join(", ".join(record["measured"]) for record in records)
        raise UserError(f"{first} and {second} measure different things: {held}")
    for name in shared:
        old, new = (dict(_fields(record["measured"][name]["protocol"])) for record in records)
        for field in old | new:
            one, other = (fields.get(field, "absent") for fields in (old, new))
            if one != other:
                raise UserError(
                    f"{name} was measured differently: {field} is {one!r} in {first} and "
                    f"{other!r} in {second}; measure both the same way"
                )
    rows = [["", first.stem, second.stem]]
    for name in shared:
        rows.append([name, *(_shown(record["measured"][name]["result"]) for record in records)])
    old, new = (dict(_fields(record["subject"])) for record in records)
    for field in old | new:
        if old.get(field) != new.get(field):
            rows.append([field, *(str(fields.get(field, "–")) for fields in (old, new))])
    return _table(rows)


def show(record: dict[str, Any]) -> str:
    """The results as a table, real images beside the samples."""
    calibration = record["calibration"]
    rows = [["", "result", *calibration]]
    for name, measured in record["measured"].items():
        others = (results.get(name) for results in calibration.values())
        cells = [_shown(result) if result else "" for result in (measured["result"], *others)]
        rows.append([name, *cells])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _shown(result: dict[str, Any]) -> str:
    """A value ± the known part of its error."""
    text = f"{result['value']:.5g}"
    if "low" in result:
        return f"{text} ({result['low']:.4f} to {result['high']:.4f})"
    for name, label in (("std", "over seeds"), ("standard_error", "standard error")):
        if name in result:
            return f"{text} ± {result[name]:.2g} {label}"
    return text


def _fields(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _git() -> dict[str, Any] | None:
    """The commit of the code and whether it has changed since; None outside a checkout."""

    here = pathlib.Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not any checkout around a venv
        # New files, such as results, do not count, as in ``git describe --dirty``.
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """The model of the CPU, where Linux names it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
