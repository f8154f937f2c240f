"""From the words of the command line to a command; a mistake in them is one line."""

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from jax_ddpm.api.arguments import check, python_name
from jax_ddpm.cli.flags import FLAGS, MODES, OF_A_JOB, define
from jax_ddpm.errors import UserError
from jax_ddpm.options import NAME_OR_NUMBER, did_you_mean, kind_of, words_for

# Any text: numbers among it are told apart once the names are known.
config_flags.register_flag_parser_for_type(NAME_OR_NUMBER, flags.ArgumentParser())

_HELP = {"--help", "-help", "--helpfull", "--helpshort", "-h", "-?"}
_OVERRIDE = re.compile(r"--?(?:no)?(config|sampling)(?:\.([^=]*))?(?:=|$)")


class Command(NamedTuple):
    """One command.

    Attributes:
      mode: a name in ``MODES``.
      given: the arguments given, by their names in Python.
      job: the flags that say which process of a job this is.
    """

    mode: str
    given: Mapping[str, Any]
    job: Mapping[str, Any] = {}


def resolve(words: Sequence[str]) -> Command:
    """The command that these words ask for, without the program's name.

    Raises:
      UserError: where they ask for nothing that can be done.
    """
    chosen, words = _config_of(words)
    helps = bool(_HELP.intersection(words))
    if helps:
        words = [word for word in words if _OVERRIDE.match(word)]
    sections, name = _sections(chosen, words)
    values, positional = _parse(words, sections)
    given: dict[str, Any] = {
        flag: values[flag].value for flag in FLAGS if flag in values and values[flag].present
    }
    for flag, value in given.items():
        check(flag, value, FLAGS[flag])
    if "config" in sections:
        from jax_ddpm.config.reading import Named

        given["config"] = Named(values["config"].value, name)
    if "sampling" in sections:
        given["sampling"] = config_flags.get_override_values(values["sampling"])
    if helps:
        return Command("help", given)

    mode = given.pop("mode", "train")
    for name in given:
        if name not in MODES[mode].takes:
            fits = [other for other, row in MODES.items() if name in row.takes]
            raise UserError(
                f"--{name} does nothing with --mode={mode}: it is for --mode={' or '.join(fits)}"
            )
    job = {name: given.pop(name) for name in OF_A_JOB if name in given}
    if mode == "compare":
        given["records"] = positional
    elif positional:
        raise UserError(f"unexpected argument {positional[0]!r}; flags are written --name=value")
    return Command(mode, {python_name(name): value for name, value in given.items()}, job)


def _config_of(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of ``--config``, and the other words."""
    chosen, rest, left = None, [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name not in ("--config", "-config"):
            rest.append(word)
            continue
        chosen = value if equals else next(left, None)
        if not chosen:
            raise UserError("--config: its value is missing; for example --config=digits")
    return chosen, rest


def _sections(chosen: str | None, words: Sequence[str]) -> tuple[dict[str, ConfigDict], str]:
    """The sections whose fields the words may set, and the name of the config.

    Reading a config imports every choice, so it is skipped where there is nothing to read.
    """
    sections, name = {}, ""
    if chosen is not None:
        from jax_ddpm.config.reading import read_config

        sections["config"], name = read_config(chosen)
    if any(re.match(r"--?(no)?sampling\b", word) for word in words):
        sections["sampling"] = _sampling(words)
    return sections, name


def _sampling(words: Sequence[str]) -> ConfigDict:
    """The section of the run in ``--workdir``, whose modules may add fields, or the default one."""
    from jax_ddpm.config import default
    from jax_ddpm.config.reading import read_config

    workdir = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--workdir", "-workdir"):
            workdir = value if equals else following
    noted = pathlib.Path(workdir or "") / "config.json"
    if not workdir or not noted.is_file():  # whoever loads the run says what is wrong
        return default().sampling
    return read_config(noted).config.sampling


def _parse(
    words: Sequence[str], sections: Mapping[str, ConfigDict]
) -> tuple[flags.FlagValues, list[str]]:
    values, argv = define(), ["jax_ddpm", *words]
    _require_fields(words, sections)
    try:
        for name, section in sections.items():
            config_flags.DEFINE_config_dict(name, section, "", values, sys_argv=argv)
        return values, values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        near = did_you_mean(f"--{error.flagname}", [f"--{name}" for name in FLAGS])
        raise UserError(f"--{error.flagname}: unknown flag{near}; --help lists all") from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_illegal(str(error), sections)) from error
    except flags.Error as error:
        flag = re.fullmatch(r"Missing value for flag (\S+)", str(error))
        told = f"{flag[1]}: its value is missing; flags are written --name=value" if flag else error
        raise UserError(str(told)) from error


def _require_fields(words: Sequence[str], sections: Mapping[str, ConfigDict]) -> None:
    """Raises UserError for a field that its section does not have, that is a section, or a list
    that is given twice, of which absl would make one."""
    seen = set()
    for word in words:
        found = _OVERRIDE.match(word)
        if not found:
            continue
        name, field = found.groups()
        if name not in sections:
            raise UserError(f"--config is missing; for example --config=digits {word}")
        known, parts = sections[name], [] if field is None else field.split(".")
        for depth, part in enumerate(parts, 1):
            if not isinstance(known, ConfigDict) or part not in known:
                near = did_you_mean(part, known) if isinstance(known, ConfigDict) else ""
                unknown = ".".join(parts[:depth])
                raise UserError(f"--{name}: unknown field {unknown!r}{near}")
            known = known[part]
        if isinstance(known, tuple) and (name, field) in seen:
            raise UserError(f"--{name}.{field}: it is given twice; give one list, such as (1, 2)")
        seen.add((name, field))
        if isinstance(known, ConfigDict):
            inner = ".".join([name, *parts, next(iter(known))])
            raise UserError(f"{word}: it is a section; set its fields, such as --{inner}")


def _illegal(told: str, sections: Mapping[str, ConfigDict]) -> str:
    """A message that says what a flag must be, from absl's ``flag --name=value: reason``."""
    found = re.fullmatch(r"flag --([\w.]+)=(.*?): .*", told, re.DOTALL)
    assert found is not None
    name, value = found.groups()
    *place, field = name.split(".")
    section: Any = functools.reduce(getitem, place, sections)
    kind = section.get_type(field) if place else kind_of(FLAGS[field])
    return f"--{name}={value}: it must be {words_for(kind)}"
