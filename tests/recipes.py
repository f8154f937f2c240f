"""The recipe of DDPM training around a "network" of a few parameters."""

from typing import NamedTuple

import jax
import pytest
import tiny
from ml_collections import ConfigDict

from jax_ddpm.data.source import Spec
from jax_ddpm.factory import Model
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.tasks.diffusion import DiffusionObjective
from jax_ddpm.tasks.recipe import Recipe
from jax_ddpm.tasks.table import make_recipe

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


class Setting(NamedTuple):
    config: ConfigDict
    spec: Spec
    model: Model
    objective: DiffusionObjective
    recipe: Recipe


@pytest.fixture(scope="session")
def make_setting():
    """``make_setting(section__field=value, …)``: all that is random in training is switched on."""

    def make(spec=None, **fields) -> Setting:
        spec = spec or tiny.spec()
        fields = {"model__class_conditional": True, "data__flip": True} | fields
        config = tiny.config(**fields)
        model = tiny.model(config, spec)
        recipe = make_recipe(config, model)
        return Setting(config, spec, model, recipe.phases[0].objective, recipe)

    return make


@pytest.fixture(scope="session")
def mesh_of():
    """A mesh of the first n devices, of which ``fsdp`` share the state."""
    return lambda n, fsdp=1: make_mesh(fsdp, jax.devices()[:n])
