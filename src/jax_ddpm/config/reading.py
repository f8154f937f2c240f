"""A config from the name of a shipped one, from its file, or from a run."""

import os
import pathlib
import re
import traceback
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jax_ddpm.config.defaults import default, modules_of, restored
from jax_ddpm.errors import UserError
from jax_ddpm.options import did_you_mean
from jax_ddpm.runtime.files import read_json

FOLDER = pathlib.Path(__file__).parents[1] / "configs"


class Named(NamedTuple):
    """A config, and the name of its file, the default name of its run."""

    config: ConfigDict
    name: str


def shipped() -> list[str]:
    """The names of the configs that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def read_config(given: ConfigDict | Named | str | os.PathLike[str]) -> Named:
    """A new config, complete and locked.

    Args:
      given: a config, which is named ""; a name such as "digits"; the path of a file with a
        function ``get_config()``; or the ``config.json`` of a run.

    Raises:
      UserError: naming the line of the file that fails, or the known names.
    """
    if isinstance(given, Named):
        return given
    if isinstance(given, ConfigDict):
        return Named(_complete(given, "config"), "")
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"--config={given}: it must be a config, its name or its path")
    path = pathlib.Path(given)
    if not path.is_file():
        known = shipped()
        if str(given) not in known:
            near = did_you_mean(path.stem, known)
            raise UserError(f"--config={given}: no such file, nor one of {', '.join(known)}{near}")
        path = FOLDER / f"{given}.py"
    if path.suffix == ".json":
        name = path.absolute().parent.name if path.name == "config.json" else path.stem
        return Named(_from_json(path), name)
    return Named(_from_file(path), path.stem)


def _from_json(path: pathlib.Path) -> ConfigDict:
    try:
        stored = read_json(path)
        config = restored(stored, f"--config={path}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--config={path}: damaged, or from another version") from error
    return config


def _from_file(path: pathlib.Path) -> ConfigDict:
    module: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module)
        config = module["get_config"]() if "get_config" in module else None
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {_reason(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: has no function get_config() that returns a ConfigDict; see "
            f"{FOLDER / 'digits.py'}"
        )
    return _complete(config, str(path))


def _complete(config: ConfigDict, where: str) -> ConfigDict:
    complete = default(*modules_of(config))
    try:
        complete.update(config.to_dict())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: {_reason(error)}") from error
    return complete


def _reason(error: BaseException) -> str:
    """The message of ml_collections, unwrapped, in one line and without its list of all fields."""
    reason: object = error
    while isinstance(reason, BaseException) and not isinstance(reason, SyntaxError) and reason.args:
        reason = reason.args[0]
    text = re.sub(r"Other fields present: \"\{.*\}\"", "", str(reason), flags=re.DOTALL)
    return " ".join(text.split())
