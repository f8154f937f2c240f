"""Help in words: the flags, the fields of a config, the choices."""

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jax_ddpm.cli.flags import FLAGS, MODES, OF_A_JOB, OF_A_RUN

if TYPE_CHECKING:
    from jax_ddpm.config.reading import Named

_WIDTH, _INDENT = 100, 24
_GROUPS = {"of a run": OF_A_RUN, "of a job of several processes": OF_A_JOB}
_USE = """\
python -m jax_ddpm.main --config=digits
python -m jax_ddpm.main --mode=sample --workdir=runs/digits --out=digits.png

--help --config=digits lists the fields of a config, --mode=choices what they may be."""


def of_flags() -> str:
    """Every flag, by mode; groups of flags that several modes take follow."""
    lines = [_USE]
    for mode, row in MODES.items():
        groups = {group: names for group, names in _GROUPS.items() if {*names} <= {*row.takes}}
        grouped = {name for names in groups.values() for name in names}
        lines += ["", f"--mode={mode}  {row.does}"]
        lines += [_flag(name) for name in row.takes if name not in grouped]
        if groups:
            lines.append(f"  and the flags {' and '.join(groups)}")
    for group, names in _GROUPS.items():
        lines += ["", f"Flags {group}", *map(_flag, names)]
    return "\n".join(lines)


def _flag(name: str) -> str:
    option = FLAGS[name]
    usual = f" ({option.default} by default)" if option.default else ""
    return "\n".join(_columns(f"--{name}", option.meaning + usual))


def of_fields(named: "Named") -> str:
    """Every field of the config with its value, its default where it differs, and its meaning."""
    from jax_ddpm.config.fields import fields
    from jax_ddpm.options import value_of

    lines = [f"The fields of {named.name}"]
    for name, option in fields(named.config.modules).items():
        value = value_of(named.config, name)
        usual = "" if value == option.default else f" (default {option.default!r})"
        lines += _columns(f"--config.{name}={value!r}{usual}", option.meaning)
    return "\n".join(lines)


def of_choices(modules: Iterable[str] = ()) -> str:
    """All choices by name: rows of the config's tables with their options, and the rest."""
    from jax_ddpm import options
    from jax_ddpm.config.fields import tables
    from jax_ddpm.config.reading import shipped
    from jax_ddpm.evaluation.evaluate import KNOWN
    from jax_ddpm.evaluation.extractors import KINDS
    from jax_ddpm.inference.edits import EDITS

    lines = []
    for field, table in tables(modules).items():
        lines.append(f"--config.{field}")
        for name, row in table.items():
            lines.append(f"  {name}")
            for option, declared in options.of(row).items():
                usual = "" if declared.required else f"={declared.default!r}"
                lines += _columns(f"  {option}{usual}", declared.meaning)
    for flag, names in (("metrics", KNOWN), ("edit", EDITS), ("config", shipped())):
        lines += [f"--{flag}", *_columns("", ", ".join(names))]
    lines.append("--extractor")
    for name, meaning in KINDS.items():
        lines += _columns(name, meaning)
    return "\n".join(lines)


def _columns(name: str, meaning: str) -> list[str]:
    """A name with its meaning in a column beside it, or below it where the name is long."""
    told = textwrap.wrap(meaning, _WIDTH - _INDENT)
    indented = [" " * _INDENT + line for line in told]
    if len(name) + 2 >= _INDENT or not told:
        return [f"  {name}".rstrip(), *indented]
    return [f"  {name}".ljust(_INDENT) + told[0], *indented[1:]]
