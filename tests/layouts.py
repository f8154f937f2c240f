"""Twenty steps of a small U-Net over eight devices laid out in several ways; run as a program.

Prints for each way the parameters' file, the losses and the compiled program's memory, as JSON.
"""

import json
import pathlib
import sys

import compiled  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jax_ddpm import factory
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.tasks.table import make_recipe
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.layout import spread
from jax_ddpm.training.state import init_state

NUM_STEPS = 20
# name → devices, how many of them share the state, micro-batches, steps per dispatch
LAYOUTS = {
    "single": (1, 1, 1, 1),
    "data": (8, 1, 1, 1),
    "fsdp": (8, 8, 1, 1),
    "all": (8, 4, 2, 5),
}


def setting():
    config = tiny.config(
        model__class_conditional=True,
        data__flip=True,
        training__learning_rate=1e-3,
        training__batch_size=16,
        model__base_channels=32,
        model__channel_multipliers=(1,),
    )
    config.model.dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    model = factory.Model(config, tiny.spec())
    return config, model


def run(layout, folder):
    num_devices, fsdp, accumulate, stride = LAYOUTS[layout]
    config, model = setting()
    mesh = make_mesh(fsdp, jax.devices()[:num_devices])
    recipe = make_recipe(config, model)._replace(accumulate=accumulate)
    params = {"network": model.network.init(jax.random.key(0))}
    params = jax.tree.map(lambda x: x.astype(jnp.result_type(float)), params)
    state = spread(init_state(recipe, params), mesh)
    step = compile_step(recipe, state, mesh)
    batches = [tiny.batch(model.spec, 16, seed=i) for i in range(NUM_STEPS)]
    losses, key = [], jax.random.key(1)
    for i in range(0, NUM_STEPS, stride):
        in_a_row = jax.tree.map(lambda *arrays: np.stack(arrays), *batches[i : i + stride])
        if i == 0:
            memory = step.lower(state, in_a_row, key).compile().memory_analysis()
        state, metrics = step(state, in_a_row, key)
        losses += np.divide(*metrics["loss"]).tolist()
    sizes = [leaf.size for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state))]
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])
    np.save(folder / f"{layout}.npy", flat)
    return {
        "losses": losses,
        "state_sizes": sizes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    print(json.dumps({layout: run(layout, folder) for layout in LAYOUTS}))
