"""Checks of a config, made before any device work: a mistake is one line naming the field."""

from ml_collections import ConfigDict

from jax_ddpm import factory, options
from jax_ddpm.config import rules
from jax_ddpm.config.defaults import import_modules
from jax_ddpm.config.fields import fields
from jax_ddpm.data.table import SOURCES
from jax_ddpm.options import Option, require, value_of
from jax_ddpm.tasks.table import TASKS


def validate(config: ConfigDict, num_devices: int) -> None:
    """Checks everything that needs no data.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    import_modules(config.modules)
    _check_ranges(config, "")
    _check_source(config)
    rules.check_devices(config, num_devices)
    rules.check_task(config)
    factory.make_module(config, TASKS[config.task].networks, out_channels=1, num_classes=1)
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
    for name, option in fields().items():
        if name.startswith(prefix) and not _left_out(config, name, option):
            require(config, name, option.range.holds, option.range.must_be)


def _left_out(config: ConfigDict, name: str, option: Option) -> bool:
    """Whether the field is None or (), where that stands for something else."""
    return option.default in (None, ()) and value_of(config, name) in (None, ())


def _check_source(config: ConfigDict) -> None:
    source = config.data.source
    for name, option in options.of(SOURCES[source]).items():
        if option.required:
            require(
                config,
                f"data.{name}",
                bool,
                f"given for data.source={source}: {option.meaning[0].lower()}{option.meaning[1:]}",
            )
    rules.check_images(config)
