"""The parameters that training starts from."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_ddpm.errors import UserError
from jax_ddpm.keys import Stream, stream_key
from jax_ddpm.models.network import Network
from jax_ddpm.runs import checkpoint
from jax_ddpm.runtime.distributed import from_first


def initial_parameters(
    config: ConfigDict, network: Network, seed: Any, workdir: pathlib.Path
) -> Any:
    """Parameters drawn from the run's seed key, or the averages of the run ``config.init_from``.

    That run is no longer needed once this one has a checkpoint in ``workdir``.

    Raises:
      UserError: where there is no such run, or it has another network.
    """
    params = network.init(stream_key(seed, Stream.PARAMETERS))
    if not config.init_from or from_first(lambda: checkpoint.steps(workdir)):
        return params
    donor = pathlib.Path(config.init_from)
    try:
        step = checkpoint.newest(donor, ["ema"])
    except UserError as error:
        raise UserError(f"config.init_from={donor}: every checkpoint is damaged") from error
    if step is None:
        raise UserError(f"config.init_from={donor}: no checkpoint there; give the folder of a run")
    found = checkpoint.restore_item(donor, step, "ema")["network"]
    checkpoint.require_same_structure(params, found, f"config.init_from={donor}")
    return jax.tree.map(jnp.asarray, found)
