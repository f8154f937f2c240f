"""The tasks of a config, by name."""

from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.data.source import Spec
from jax_ddpm.options import Table
from jax_ddpm.tasks.classification import CLASSIFICATION, NOISY_CLASSIFICATION
from jax_ddpm.tasks.diffusion import DIFFUSION
from jax_ddpm.tasks.objective import Measurable, Task

TASKS: dict[str, Task] = Table(
    {
        "diffusion": DIFFUSION,
        "classification": CLASSIFICATION,
        "noisy_classification": NOISY_CLASSIFICATION,
    }
)


def make_model(config: ConfigDict, spec: Spec) -> Any:
    """The model that ``config.task`` trains."""
    return TASKS[config.task].model(config, spec)


def make_objective(config: ConfigDict, model: Any) -> Measurable:
    """The objective that training that model minimises."""
    return TASKS[config.task].objective(config, model)
