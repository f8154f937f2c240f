"""A config with all fields at their defaults, to be changed where an experiment differs."""

import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jax_ddpm.config.fields import fields
from jax_ddpm.errors import UserError
from jax_ddpm.options import adding, did_you_mean, is_a


def default(*modules: str) -> ConfigDict:
    """All fields; a config in ``configs/`` changes those that make its experiment.

    ``modules`` are the import names of your own modules: they add rows to the project's tables, and
    their options to the fields.

    Raises:
      UserError: where there is no such module, or it fails.
    """
    import_modules(modules)
    config = ConfigDict()
    for name, option in fields(modules).items():
        *section, field = name.split(".")
        place = config
        for part in section:
            if part not in place:
                place[part] = ConfigDict()
            place = place[part]
        place[field] = placeholder(option.kind) if option.default is None else option.default
    config.modules = tuple(modules)
    return config.lock()  # a mistyped field in a config file is an error, not a new field


def restored(stored: dict[str, Any], where: str) -> ConfigDict:
    """A config as JSON has kept it, with the defaults of newer fields.

    Raises:
      UserError: where it has a field that is unknown here, or one of its modules cannot be had.
    """
    config = default(*modules_of(stored))
    for section, value in stored.items():
        names = [f"{section}.{name}" for name in value] if isinstance(value, dict) else [section]
        for name in names:
            parent, _, field = name.rpartition(".")
            known = config.get(parent, {}) if parent else config
            if field not in known:
                near = did_you_mean(field, known)
                raise UserError(
                    f"{where} has {name}, which is unknown here: it is from another version, or "
                    f"of a module that has changed{near}"
                )
    config.update(stored)
    return config


def modules_of(config: Mapping[str, Any] | ConfigDict) -> tuple[str, ...]:
    """The user's modules that a config names.

    Raises:
      UserError: where they are no names in a list.
    """
    modules = config.get("modules", ())
    if not (is_a(modules, tuple) and all(is_a(name, str) for name in modules)):
        raise UserError(f"config.modules is {modules!r}; it must be a list of names")
    return tuple(modules)


def import_modules(names: Iterable[str]) -> None:
    """Imports modules from Python's path or the working directory.

    Raises:
      UserError: where there is no such module, or it fails.
    """
    for name in names:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            with adding(name):
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise UserError(f"config.modules: {name} needs {error.name}; install it") from error
            raise UserError(
                f"config.modules: no module {name!r}; start where it lies, or put its folder on "
                "PYTHONPATH"
            ) from error
        except UserError as error:
            raise UserError(f"config.modules: {name}: {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"config.modules: {name} fails ({' '.join(reason.split())})") from error
