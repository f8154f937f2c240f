"""Reading the command line: whatever is wrong in it, or in a config file, is told in one line."""

import pathlib
import re
import sys
import traceback

from absl import flags

from jax_ddpm.cli.arguments import define_sampling


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; what it does not understand is one line and exit code 1."""
    config = ""
    for flag, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        name, equals, path = flag.partition("=")
        if name in ("-config", "--config"):
            config = path if equals else following
            if not pathlib.Path(config).is_file():
                sys.exit(f"error: --config: no file {config!r}; give the path of a config")
    section = "sampling"
    try:
        define_sampling(argv)
        section = "config"
        return flags.FLAGS(argv)
    except Exception as error:
        message = _in_config_file(error, config) or _in_flags(error, section)
        if message is None:
            raise
    sys.exit(f"error: {' '.join(message.split())}")


def _in_config_file(error: Exception, config: str) -> str | None:
    """Which line of the config file failed, and why."""
    if isinstance(error, flags.Error):  # absl keeps a TypeError's traceback as its text only
        told = str(error)
        reason = told.strip().splitlines()[-1]
    else:
        told = "".join(traceback.format_exception(error))
        reason = f"{type(error).__name__}: {_reason(error)}"
    lines = re.findall(rf'{re.escape(config)}", line (\d+)', told)
    if config and lines:
        return f"{config}, line {lines[-1]}: {reason}"
    if "has no attribute 'get_config'" in told:
        return f"{config}: has no function get_config(); see configs/digits.py"
    return None


def _in_flags(error: Exception, section: str) -> str | None:
    if isinstance(error, flags.Error):
        return f"{error}; --helpfull lists all flags"
    if isinstance(error, AttributeError | KeyError | ValueError):
        return f"--{section}: unknown field {_reason(error)}"
    return None


def _reason(error: BaseException) -> str:
    """What ml_collections says, unwrapped, without its list of all fields."""
    reason: object = error
    while isinstance(reason, BaseException) and reason.args:
        reason = reason.args[0]
    return re.sub(r"Other fields present: \"\{.*\}\"", "", str(reason))
