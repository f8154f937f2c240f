"""What a field of a config must be, told in one line where it is not."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.processes import make_process
from jax_ddpm.errors import UserError


def require(config: ConfigDict, field: str, holds: Callable[[Any], bool], must_be: str) -> None:
    """Raises UserError, saying what the field must be, where its value does not hold."""
    value = config
    for name in field.split("."):
        value = value[name]
    if not holds(value):
        raise UserError(f"config.{field} is {value!r}; it must be {must_be}")


def require_choice(config: ConfigDict, field: str, known: tuple[str, ...], where: str = "") -> None:
    """Raises UserError, listing what is known, where the field is none of it."""
    named = ", ".join(name or "''" for name in known)
    require(config, field, known.__contains__, f"one of {named}{where}")


def process_of(config: ConfigDict) -> Process:
    """The noise process, or a UserError that says why there is none."""
    try:
        return make_process(**config.process)
    except ValueError as error:
        raise UserError(f"config.process: {error}") from error
