"""Options: the settings of a choice, declared once, in the signature that takes them.

    def ddim(grid, eta: Annotated[float, Option("Fresh noise.", between(0, 1))] = 0.0): …

declares an option ``eta`` with its meaning, its range and its default. The config's fields, their
checks and their help are read off such signatures (``of``), and so are the refusals of a direct
call (``checked``). Choices of one kind stand in a ``Table``.
"""

import contextlib
import difflib
import functools
import inspect
import math
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol, TypeVar, get_origin, get_type_hints

from jax_ddpm.errors import UserError


class Unfit(ValueError):
    """An option that is not what it must be; the message is ``name is value; it must be …``."""

    def __init__(self, name: str, value: Any, must_be: str):
        super().__init__(f"{name} is {value!r}; it must be {must_be}")


class Range(Protocol):
    """The values that an option can have."""

    @property
    def must_be(self) -> str:
        """The words after "it must be"."""
        ...

    def holds(self, value: Any) -> bool:
        """Whether the value is one of them."""
        ...


class Where(NamedTuple):
    """The values where ``test`` holds."""

    test: Callable[[Any], bool]
    must_be: str

    def holds(self, value: Any) -> bool:
        try:
            return bool(self.test(value))
        except TypeError:  # a value of another kind
            return False


class OneOf(NamedTuple):
    """Names that are always there, then those of a table, which may grow."""

    known: Mapping[str, Any] | tuple[str, ...]
    also: tuple[str, ...] = ()

    @property
    def must_be(self) -> str:
        return "one of " + ", ".join(name or "''" for name in (*self.also, *self.known))

    def holds(self, value: Any) -> bool:
        return value in self.also or value in self.known


anything = Where(lambda value: True, "anything")
positive = Where(lambda value: value > 0, "positive")
finite = Where(math.isfinite, "finite")
positive_and_finite = Where(lambda value: 0 < value < math.inf, "positive and finite")
not_negative = Where(lambda value: value >= 0, "0 or more")
not_negative_and_finite = Where(lambda value: 0 <= value < math.inf, "0 or more, and finite")
fraction = Where(lambda value: 0 <= value < 1, "in [0, 1)")


def at_least(low: int) -> Where:
    """low or more."""
    return Where(lambda value: value >= low, f"at least {low}")


def at_most(high: int) -> Where:
    """high or less."""
    return Where(lambda value: value <= high, f"at most {high}")


def between(low: int, high: int) -> Where:
    """From low to high, both included."""
    return Where(lambda value: low <= value <= high, f"in [{low}, {high}]")


noise_levels = Where(
    lambda value: _numbers(value) and len(value) == 2 and 0 <= value[0] < value[1],
    "two noise levels σ/α, the lower first, or ()",
)


def _numbers(values: Any) -> bool:
    return all(is_a(x, float) for x in values)


numbers = Where(_numbers, "numbers, or ()")


# A type, or several of which any will do.
Kind = type | types.UnionType


class Option(NamedTuple):
    """One option.

    Attributes:
      meaning: one line, for help.
      range: the values that it can have.
      default: that of the config's field; for a signature's option, that of the parameter, if any.
      free: whether it may differ when a run resumes, because it does not decide what is trained.
      kind: its type.
      required: whether it must be given: a signature's option without a default.
    """

    meaning: str
    range: Range = anything
    default: Any = None
    free: bool = False
    kind: Kind = object
    required: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises Unfit where the value is out of range."""
        if not self.range.holds(value):
            raise Unfit(name, value, self.range.must_be)


NAME_OR_NUMBER = int | float | str
_KINDS: dict[Kind, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a name"),
    pathlib.Path: (str | os.PathLike, "a path"),
    tuple: (tuple | list, "a list"),
    list: (tuple | list | str, "names, in a list or a line"),
    NAME_OR_NUMBER: (Real | str, "a name or a number"),
}


def kind_of(option: Option) -> Kind:
    """The type of its values."""
    return type(option.default) if option.kind is object else option.kind


def words_for(kind: Kind) -> str:
    """A kind of value in words."""
    return _KINDS[kind][1]


def is_a(value: Any, kind: Kind) -> bool:
    """Whether the value is of the kind; True and False are no numbers, an int is a float.

    No name or path holds the character 0, at which the system would cut it off.
    """
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, str | os.PathLike) and "\0" in os.fspath(value):
        return False
    return isinstance(value, _KINDS[kind][0])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, if one is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def of(choice: Any) -> dict[str, Option]:
    """The options that a function, a class, or a row's ``make`` declares, by name."""
    make = getattr(choice, "make", choice)
    return dict(_declared(make)) if callable(make) else {}


@functools.cache
def _declared(make: Callable) -> dict[str, Option]:
    options, hints = {}, _hints(make)
    for name, parameter in inspect.signature(make).parameters.items():
        annotation = hints.get(name, parameter.annotation)
        for note in getattr(annotation, "__metadata__", ()):
            if isinstance(note, Option):
                given = parameter.default is not inspect.Parameter.empty
                options[name] = note._replace(
                    default=parameter.default if given else note.default,
                    kind=_kind(annotation.__origin__) if note.kind is object else note.kind,
                    required=not given,
                )
    return options


def _hints(make: Callable) -> dict[str, Any]:
    """Annotations, also where ``from __future__ import annotations`` keeps them as strings."""
    try:
        return get_type_hints(getattr(make, "func", make), include_extras=True)
    except (NameError, TypeError):  # something that only a type checker knows
        return {}


def _kind(annotation: Any) -> type:
    kind = annotation if isinstance(annotation, type) else get_origin(annotation)
    return kind if kind in _KINDS else object


def check_options(made: Any) -> None:
    """Raises Unfit where an option of a dataclass is out of its range; for ``__post_init__``."""
    for name, option in of(type(made)).items():
        option.check(name, getattr(made, name))


Call = TypeVar("Call", bound=Callable)


def checked(make: Call) -> Call:
    """The function, which raises Unfit for options out of their range."""
    options, signature = of(make), inspect.signature(make)

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name in options.keys() & given.keys():
            options[name].check(name, given[name])
        return make(*args, **kwargs)

    return call  # type: ignore[return-value]


class Table(dict[str, Any]):
    """Choices of one kind by name, to which a user's own modules add; no name is given twice."""

    def __init__(self, *rows: Mapping[str, Any], **named: Any):
        super().__init__(*rows, **named)
        self._owner: dict[str, str] = {}

    def __setitem__(self, name: str, row: Any) -> None:
        if name in self:
            raise UserError(f"{name!r} is in the table already; give your own choice another name")
        super().__setitem__(name, row)
        owner = _importing[-1] if _importing else sys._getframe(1).f_globals["__name__"]
        self._owner[name] = owner
        _added.append((self, name))

    def of(self, modules: Iterable[str]) -> dict[str, Any]:
        """The rows of the project and of these modules, not those that others have added."""
        named = tuple(f"{module}." for module in modules)
        return {
            name: row
            for name, row in self.items()
            if name not in self._owner or f"{self._owner[name]}.".startswith(named)
        }


# The modules under import, the innermost last, and every row that was ever added.
_importing: list[str] = []
_added: list[tuple[Table, str]] = []


@contextlib.contextmanager
def adding(module: str) -> Iterator[None]:
    """Rows that are added meanwhile belong to the module; if it fails, they are taken back."""
    before = len(_added)
    _importing.append(module)
    try:
        yield
    except BaseException:
        for table, name in _added[before:]:
            table.pop(name, None)
        del _added[before:]
        raise
    finally:
        _importing.pop()


def taken(choice: Any, options: Any) -> dict[str, Any]:
    """The options, from a mapping or a section of a config, that the choice takes."""
    names = of(choice)
    return {name: value for name, value in options.items() if name in names}


def value_of(config: Any, field: str) -> Any:
    """The value of ``section.field``."""
    return functools.reduce(lambda section, name: section[name], field.split("."), config)


def require(config: Any, field: str, holds: Callable[[Any], bool], must_be: str) -> None:
    """Raises UserError where the value of ``section.field`` in a config does not hold."""
    value = value_of(config, field)
    if not holds(value):
        raise UserError(f"config.{Unfit(field, value, must_be)}")


@contextlib.contextmanager
def naming(section: str, under: str = "") -> Iterator[None]:
    """Turns what cannot be built from a section of a config into a UserError naming the field.

    ``under`` is the choice that the field depends on.
    """
    try:
        yield
    except ValueError as error:
        dot = "." if isinstance(error, Unfit) else ": "
        depends = f" ({under})" if under else ""
        raise UserError(f"config.{section}{dot}{error}{depends}") from error
