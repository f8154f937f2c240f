"""What training starts from: model, recipe and state, for the loop, the preflight and others."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_ddpm.data.source import Spec
from jax_ddpm.errors import UserError
from jax_ddpm.factory import Companions
from jax_ddpm.keys import Stream, numbered_key, seed_key, stream_key
from jax_ddpm.models.network import Network
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.frozen import FrozenReader
from jax_ddpm.runtime.distributed import from_first
from jax_ddpm.tasks.recipe import Recipe
from jax_ddpm.tasks.table import make_model, make_recipe, task_of
from jax_ddpm.training.layout import spread
from jax_ddpm.training.state import TrainState, init_state


class Prepared(NamedTuple):
    """The state before the first step, laid out over the devices, and what it is the state of.

    ``origin`` says in a line which run the parameters come from; "" where they are drawn.
    ``frozen`` identifies the frozen networks, by the field that holds their run.
    """

    model: Any
    recipe: Recipe
    state: TrainState
    origin: str
    frozen: dict[str, Any]


def prepare(
    config: ConfigDict,
    spec: Spec,
    mesh: Mesh,
    workdir: pathlib.Path,
    accept_changes: bool = False,
) -> Prepared:
    """Makes model, recipe and state of a run in ``workdir``, which may not have begun.

    Raises:
      UserError: where config and data do not fit, or another run is missing, does not fit, or has
        changed since this one began.
    """
    read = FrozenReader(config, workdir, accept_changes)
    model = make_model(config, spec, Companions(read))
    recipe = make_recipe(config, model, read)
    seed = seed_key(config.seed)
    params, origin = initial_parameters(config, recipe.networks, seed, workdir)
    state = spread(init_state(recipe, params), mesh)
    return Prepared(model, recipe, state, origin, read.records)


def initial_parameters(
    config: ConfigDict, networks: dict[str, Network], seed: Any, workdir: pathlib.Path
) -> tuple[dict[str, Any], str]:
    """Parameters drawn from the run's seed key, or the averages of the run ``config.init_from``.

    A network takes the average of its name; the one that the task serves takes any, if there is
    only one. Other networks are drawn, and what a network has beyond that run's starts at zero; the
    line that comes with the parameters names both. That run is no longer needed once this one has a
    checkpoint in ``workdir``.

    Raises:
      UserError: where there is no such run, or it has another network.
    """
    params = {
        name: network.init(stream_key(numbered_key(seed, Stream.NETWORK, i), Stream.PARAMETERS))
        for i, (name, network) in enumerate(networks.items())
    }
    if not config.init_from or from_first(lambda: checkpoint.steps(workdir)):
        return params, ""
    donor, where = pathlib.Path(config.init_from), f"config.init_from={config.init_from}"
    try:
        step = checkpoint.newest(donor, ["ema"])
    except UserError as error:
        raise UserError(f"{where}: every checkpoint is damaged") from error
    if step is None:
        raise UserError(f"{where}: no checkpoint there; give the folder of a run")
    held = checkpoint.restore_item(donor, step, "ema")
    taken = {name: held[name] for name in networks if name in held}
    if not taken and len(held) == 1:
        taken = dict(zip([task_of(config).serves], held.values(), strict=True))
    if not taken:
        raise UserError(f"{where}: it has {', '.join(held)}; needed are {', '.join(networks)}")
    new = []
    for name, tree in taken.items():
        params[name], added = _with_additions(params[name], tree, where)
        new += added
    drawn = [name for name in networks if name not in taken]
    origin = f"parameters of {donor}, step {step:,}"
    for told, names in (("new, at zero", new), ("drawn", drawn)):
        origin += f"; {told}: {', '.join(names)}" if names else ""
    return params, origin


def _with_additions(params: Any, found: Any, where: str) -> tuple[Any, list[str]]:
    """``found`` in the structure of ``params``, with zeros for what it lacks, and their names."""

    def named(tree: Any) -> dict[str, Any]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}

    wanted, held = named(params), named(found)
    new = [name for name in wanted if name not in held]
    shared = {name: leaf for name, leaf in wanted.items() if name in held}
    checkpoint.require_same_structure(shared, held, where)
    leaves = [
        jnp.asarray(held[name]) if name in held else jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves), new
