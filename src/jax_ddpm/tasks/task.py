"""The contract of a task: what a config trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jax_ddpm.data.source import Spec
from jax_ddpm.factory import Companions
from jax_ddpm.models.table import NETWORKS
from jax_ddpm.options import Table
from jax_ddpm.tasks.recipe import Recipe


class Task(NamedTuple):
    """A row of ``TASKS``.

    Attributes:
      model: ``(config, spec, companions) → model``, all that is made of the network that is served;
        raises UserError where config and data do not fit each other.
      recipe: ``(config, model, read, **options) → Recipe``. Its annotated parameters are fields of
        the config; ``read(field)`` is the frozen network of the run whose workdir that field holds.
      networks: the table of the served network; its first row is the default.
      serves: the name of the average that is sampled, measured and continued from; of the raw
        network too, where that is asked for.
    """

    model: Callable[[ConfigDict, Spec, Companions], Any]
    recipe: Callable[..., Recipe]
    networks: Table
    serves: str = "network"

    @property
    def make(self) -> Callable[..., Recipe]:
        """The function whose annotated parameters are the task's options."""
        return self.recipe

    @property
    def draws(self) -> bool:
        """Whether its models draw images."""
        return self.networks is NETWORKS
