"""Checks of a config, made before any device work: a mistake is one line naming the field."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm import factory, options
from jax_ddpm.config import rules
from jax_ddpm.config.defaults import import_modules
from jax_ddpm.config.fields import fields
from jax_ddpm.data.table import SOURCES
from jax_ddpm.errors import UserError
from jax_ddpm.options import Option, is_a, kind_of, require, value_of, words_for
from jax_ddpm.tasks.table import TASKS, task_of


def validate(config: ConfigDict, num_devices: int) -> None:
    """Checks everything that needs no data.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    import_modules(config.modules)
    _check_ranges(config, "")
    _check_required(config, "data.source", SOURCES)
    _check_required(config, "task", TASKS)
    rules.check_source(config)
    rules.check_devices(config, num_devices)
    rules.check_task(config)
    rules.check_optimiser(config)
    factory.make_module(config, task_of(config).networks, out_channels=1, num_classes=1)
    rules.check_process(config)
    factory.make_parameterisation(config)
    rules.check_loss(config)
    rules.check_training_samples(config)
    validate_sampling(config)


def validate_sampling(config: ConfigDict) -> None:
    """Checks the section ``sampling`` against the model; raises like ``validate``."""
    _check_ranges(config, "sampling.")
    process = factory.make_process(config)
    rules.check_steps(config, process)
    rules.check_options(config)
    rules.check_guidance(config)
    factory.make_grid(config.sampling, factory.make_sampling_process(config, process))


def _check_ranges(config: ConfigDict, prefix: str) -> None:
    for name, option in fields(config.modules).items():
        if name.startswith(prefix):
            _check_field(config, name, option)


def _check_field(config: ConfigDict, name: str, option: Option) -> None:
    try:
        value = value_of(config, name)
    except KeyError:
        modules = ", ".join(map(repr, config.modules))
        must = f"make the config by default({modules})"
        raise UserError(f"config.{name} is missing; {must}") from None
    if option.default in (None, ()) and value in (None, ()):  # stands for something else
        return
    kind = kind_of(option)
    require(config, name, lambda value: is_a(value, kind), words_for(kind))
    require(config, name, option.range.holds, option.range.must_be)


def _check_required(config: ConfigDict, field: str, table: Mapping[str, Any]) -> None:
    """Checks that a choice has those of its options that have no default."""
    choice, section = value_of(config, field), field.rpartition(".")[0]
    for name, option in options.of(table[choice]).items():
        if option.required:
            meaning = f"{option.meaning[0].lower()}{option.meaning[1:]}"
            must_be = f"given for {field}={choice}: {meaning}"
            require(config, f"{section}.{name}".lstrip("."), bool, must_be)
