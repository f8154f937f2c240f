"""The train step: a pure function of (state, batch).

Each phase of the recipe follows its mean gradient. The update works on whole arrays element by
element, so XLA does it wherever an element lies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jax_ddpm.keys import Stream, numbered_key
from jax_ddpm.tasks.objective import Metrics
from jax_ddpm.tasks.recipe import Phase, Recipe
from jax_ddpm.training.gradients import mean_gradients, require_alike
from jax_ddpm.training.layout import SMALL
from jax_ddpm.training.state import TrainState, readable


class Held(NamedTuple):
    """What lies on the devices from step to step and never changes.

    Attributes:
      data: whole sets, from which ``batch["index"]`` picks the examples; {} where the batch holds
        them itself.
      frozen: the parameters of frozen networks by name.
    """

    data: dict[str, Any]
    frozen: dict[str, Any]


def train_step(
    recipe: Recipe,
    state: TrainState,
    held: Held,
    batch: dict[str, Array],
    seed: Any,
    gradients_of: Callable[..., tuple[Any, Metrics, Any]] = mean_gradients,
) -> tuple[TrainState, Metrics]:
    """One update from a global batch, as ``mean_gradients`` takes it, under the run's seed key.

    A loss or gradient that is not finite stops all updates from its phase on, except the step
    count, and puts the metric ``finite`` below 1.
    """
    params, opt_state, extra = dict(state.params), list(state.opt_state), list(state.extra)
    metrics: Metrics = {}
    finite = jnp.array(True)

    for i, phase in enumerate(recipe.phases):
        known = readable(params, state.ema, held.frozen)
        read = {name: known[name] for name in phase.reads}
        keys = numbered_key(seed, Stream.PHASE, i)

        def update(before: PhaseState, phase=phase, read=read, keys=keys) -> _Updated:
            gradients, metrics, extra = gradients_of(
                phase,
                recipe.accumulate,
                before.params,
                read,
                before.extra,
                held.data,
                batch,
                keys,
                state.step,
            )
            return _update(phase, before, gradients, extra, metrics, state.step)

        before = PhaseState({n: params[n] for n in phase.trains}, opt_state[i], extra[i], finite)
        after, phase_metrics = _at_multiples_of(phase.every, state.step, update, before)
        params |= after.params
        opt_state[i], extra[i], finite = after.opt_state, after.extra, after.finite
        prefix = "" if len(recipe.phases) == 1 else f"{phase.name}/"
        metrics |= {prefix + name: metric for name, metric in phase_metrics.items()}

    with jax.named_scope("averages"):
        ema = {
            name: _moving_average(
                state.ema[name], params[average.source], average.decay(state.step), finite
            )
            for name, average in recipe.averages.items()
        }
    metrics["parameter_norm"] = _single(_norm(params))
    metrics["finite"] = _single(finite.astype(jnp.float32))
    return TrainState(state.step + 1, params, ema, tuple(opt_state), tuple(extra)), metrics


class PhaseState(NamedTuple):
    """What a phase changes: what it trains, its optimiser, its memory; whether all was finite."""

    params: dict[str, Any]
    opt_state: Any
    extra: Any
    finite: Array


_Updated = tuple[PhaseState, Metrics]


def _update(
    phase: Phase, before: PhaseState, gradients: Any, extra: Any, metrics: Metrics, step: Array
) -> _Updated:
    """The phase after one step along its gradients, unless something is not finite."""
    norm, (loss, _) = _norm(gradients), metrics["loss"]
    finite = before.finite & jnp.isfinite(norm) & jnp.isfinite(loss)
    with jax.named_scope("optimiser"):
        updates, opt_state = phase.optimiser.update(
            gradients, before.opt_state, before.params, norm=norm, finite=finite
        )
        params = phase.project(optax.apply_updates(before.params, updates))
        require_alike(f"phase {phase.name}: what project returns", params, before.params, "it gets")
    extra = jax.tree.map(lambda new, old: jnp.where(finite, new, old), extra, before.extra)
    metrics |= {"gradient_norm": _single(norm), "learning_rate": _single(phase.learning_rate(step))}
    return PhaseState(params, opt_state, extra, finite), metrics


def _at_multiples_of(
    every: int, step: Array, update: Callable[[PhaseState], _Updated], before: PhaseState
) -> _Updated:
    """The update at every ``every``-th step; at others nothing changes and no metric has weight."""
    if every == 1:
        return update(before)

    def skip(before: PhaseState) -> _Updated:
        _, metrics = jax.eval_shape(update, before)
        return before, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)

    return jax.lax.cond(step % every == 0, update, skip, before)


def _single(value: Any) -> tuple[Array, Array]:
    return jnp.asarray(value, jnp.float32), jnp.ones(())


def _norm(tree: Any) -> Array:
    """The norm of all arrays as one vector, with the many small ones joined first."""
    arrays = jax.tree.leaves(tree)
    large = [array for array in arrays if array.size >= SMALL]
    small = [jnp.ravel(array) for array in arrays if array.size < SMALL]
    joined = jnp.concatenate([jnp.zeros(0), *small])
    return jnp.sqrt(sum(jnp.sum(array**2) for array in [joined, *large]))


def _moving_average(average: Any, params: Any, decay: Any, finite: Array) -> Any:
    @jax.jit  # traced only once for all arrays of a shape
    def one(a: Array, p: Array) -> Array:
        return jnp.where(finite, a + (1 - decay) * (p - a), a)

    return jax.tree.map(one, average, params)
