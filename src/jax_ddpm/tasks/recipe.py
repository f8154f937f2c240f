"""How to train: networks, the phases of a step, the averages kept, and what is only read."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jax_ddpm.codecs.codec import Codec
from jax_ddpm.errors import UserError
from jax_ddpm.models.network import Frozen, Network
from jax_ddpm.options import is_a
from jax_ddpm.tasks.objective import Measurable, Objective
from jax_ddpm.tasks.optimisers import make_optimiser

Schedule = Callable[[Any], Any]
NONE: Mapping[str, Any] = MappingProxyType({})


class Phase(NamedTuple):
    """One objective and the networks that its gradients train.

    Attributes:
      objective: what is minimised.
      trains: the names of the networks that its optimiser updates; no other phase trains them.
      optimiser: its update takes the gradients' global ``norm``, and ``finite``; where that is
        false it must change nothing.
      learning_rate: its schedule, step → rate, for the log.
      reads: the names of all else that the objective takes: networks, which then are as the phases
        before have left them in this step, averages as "ema/<name>", and what is frozen.
      every: the phase runs at multiples of so many steps.
      project: applied to what it trains, ``{name: tree}``, after each update, such as a norm of
        weights that is enforced.
    """

    objective: Objective
    trains: tuple[str, ...]
    optimiser: optax.GradientTransformationExtraArgs
    learning_rate: Schedule
    reads: tuple[str, ...] = ()
    every: int = 1
    project: Callable[[dict[str, Any]], dict[str, Any]] = lambda trained: trained

    @property
    def name(self) -> str:
        """The prefix of its metrics where there are several phases."""
        return "+".join(self.trains)


class Average(NamedTuple):
    """An exponential moving average of the network ``source``, with decay(step).

    It is kept for good at multiples of ``snapshot_every`` steps; 0: never.
    """

    source: str
    decay: Schedule
    snapshot_every: int = 0


class Recipe(NamedTuple):
    """How to train.

    Attributes:
      networks: what is trained, by name.
      phases: they run in this order within each step.
      averages: by name; the one that has its network's name takes its place when measuring.
      frozen: what is only read: never in a checkpoint, its record is part of the run's identity.
      measured: the place of the phase whose objective is measured on held-out data.
      accumulate: micro-batches per step.
    """

    networks: dict[str, Network]
    phases: tuple[Phase, ...]
    averages: dict[str, Average]
    frozen: Mapping[str, Frozen] = NONE
    measured: int = 0
    accumulate: int = 1

    def held_out(self) -> Measurable:
        """The objective that is measured on held-out data."""
        objective = self.phases[self.measured].objective
        if not isinstance(objective, Measurable):
            raise UserError(
                f"recipe: the objective of phase {self.phases[self.measured].name} is measured on "
                "held-out data; give it a method measuring(), or choose another by measured"
            )
        return objective


def check_recipe(recipe: Recipe, serves: str) -> None:
    """Checks that its parts name each other, and that the average ``serves`` is among them.

    Raises:
      UserError: naming the first part that does not exist, is there twice or has a wrong number.
    """
    known = [*recipe.networks, *(f"ema/{name}" for name in recipe.averages), *recipe.frozen]
    for phase in recipe.phases:
        if not (isinstance(phase.trains, tuple) and phase.trains):
            raise UserError(f"recipe: a phase trains {phase.trains!r}; give names in a tuple")
        _require_count(f"phase {phase.name}: every", phase.every, 1)
    for name, average in recipe.averages.items():
        _require_count(f"average {name}: snapshot_every", average.snapshot_every, 0)
    if not 0 <= recipe.measured < len(recipe.phases):
        raise UserError(f"recipe: measured is {recipe.measured} of {len(recipe.phases)} phases")
    recipe.held_out()
    trained = [name for phase in recipe.phases for name in phase.trains]
    _require_once("names", known, "rename one")
    _require_once("trained networks", trained, "one phase trains it, with all that it minimises")
    for place, names, allowed in (
        *(("a phase trains", phase.trains, [*recipe.networks]) for phase in recipe.phases),
        *((f"phase {phase.name} reads", phase.reads, known) for phase in recipe.phases),
        ("the recipe averages", [a.source for a in recipe.averages.values()], [*recipe.networks]),
        ("no phase trains", [*recipe.networks], trained),
        ("the task serves the average", [serves], [*recipe.averages]),
    ):
        for name in names:
            if name not in allowed:
                raise UserError(f"recipe: {place} {name!r}; there are {', '.join(allowed)}")


def _require_once(kind: str, names: list[str], remedy: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"recipe: {name!r} is twice among its {kind}; {remedy}")


def _require_count(what: str, value: Any, low: int) -> None:
    if not (is_a(value, int) and value >= low):
        raise UserError(f"recipe: {what} is {value!r}; it must be a whole number, at least {low}")


def one_network(
    config: ConfigDict, network: Network, codec: Codec, objective: Measurable
) -> Recipe:
    """One phase that trains "network" and reads "codec"; the average is of the same name."""
    return Recipe(
        networks={"network": network},
        phases=(make_phase(config, objective, trains=("network",), reads=("codec",)),),
        averages={"network": Average("network", ema_decay(config))},
        frozen={"codec": frozen_codec(codec)},
        accumulate=config.training.accumulate,
    )


def frozen_codec(codec: Codec) -> Frozen:
    """A codec as objectives read it: the tree itself, which may hold parameters of another run."""
    return Frozen(codec, None, dict(codec.record))


def make_phase(
    config: ConfigDict,
    objective: Objective,
    trains: tuple[str, ...],
    *,
    learning_rate: float | None = None,
    every: int = 1,
    **parts: Any,
) -> Phase:
    """A phase with the optimiser of ``config.training``.

    ``learning_rate`` is the phase's own in place of ``config.training.learning_rate``; ``parts``
    are the other attributes of ``Phase``. Schedules count training steps, also where a phase runs
    only at some of them.
    """
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UserError(f"recipe: learning_rate={learning_rate}; it must be positive and finite")
    rate = make_learning_rate(config, learning_rate)

    def at_update(count):
        return rate(every * count)

    optimiser = make_optimiser(config, rate if every == 1 else at_update)
    return Phase(objective, trains, optimiser, rate, every=every, **parts)


def make_learning_rate(config: ConfigDict, peak: float | None = None) -> optax.Schedule:
    """Linear warm-up from 0, then constant or along a cosine to 0 at the last step."""
    training = config.training
    peak, warmup = training.learning_rate if peak is None else peak, training.warmup_steps
    rest = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, max(1, training.num_steps - warmup)),
    }[training.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])


def never_warm(config: ConfigDict) -> str:
    """What it means that a warm-up outlasts the run, as a line; "" where it does not."""
    training = config.training
    if training.warmup_steps < training.num_steps:
        return ""
    share = training.num_steps / training.warmup_steps
    return (
        f"warm-up of training.warmup_steps={training.warmup_steps} in {training.num_steps} steps: "
        f"the learning rate reaches {share:.0%} of {training.learning_rate:g}"
    )


def ema_decay(config: ConfigDict) -> Schedule:
    """``training.ema_decay``, reached by (1 + step)/(10 + step).

    Early on the average then reaches over about the last tenth of the run, not to the random start.
    """
    limit = config.training.ema_decay
    return lambda step: jnp.minimum(limit, (1 + step) / (10 + step))
