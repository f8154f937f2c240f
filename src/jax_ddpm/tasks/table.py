"""The tasks of a config, by name."""

from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.data.source import Spec
from jax_ddpm.factory import ALONE, Companions
from jax_ddpm.models.network import Read, reads_nothing
from jax_ddpm.options import OneOf, Table, require, taken
from jax_ddpm.tasks.classification import CLASSIFICATION, NOISY_CLASSIFICATION
from jax_ddpm.tasks.diffusion import DIFFUSION
from jax_ddpm.tasks.recipe import Recipe, check_recipe
from jax_ddpm.tasks.task import Task

TASKS = Table(
    {
        "diffusion": DIFFUSION,
        "classification": CLASSIFICATION,
        "noisy_classification": NOISY_CLASSIFICATION,
    }
)


def task_of(config: ConfigDict) -> Task:
    """The row of ``config.task``; raises UserError where there is none."""
    known = OneOf(TASKS.of(config.modules))
    require(config, "task", known.holds, known.must_be)
    return TASKS[config.task]


def make_model(config: ConfigDict, spec: Spec, companions: Companions = ALONE) -> Any:
    """The model that ``config.task`` trains, with what it needs of other runs."""
    return task_of(config).model(config, spec, companions)


def make_recipe(config: ConfigDict, model: Any, read: Read = reads_nothing) -> Recipe:
    """How ``config.task`` trains that model; ``read`` gives the frozen networks of other runs.

    Raises:
      UserError: where the recipe's parts do not fit each other.
    """
    task = task_of(config)
    recipe = task.recipe(config, model, read, **taken(task, config))
    check_recipe(recipe, task.serves)
    return recipe
