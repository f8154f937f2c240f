"""The contracts of training: an objective, and a task, which makes it from a config."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from jax_ddpm.data.source import Spec
from jax_ddpm.keys import StepKeys
from jax_ddpm.models.table import NETWORKS
from jax_ddpm.options import Table

# A metric is a weighted sum and its weight, so that means over examples, micro-batches, devices
# and steps are exact, even where a batch has no example of a kind.
Metrics = dict[str, tuple[Array, Array]]


@runtime_checkable
class Objective(Protocol):
    """The function that a phase minimises: the mean of the losses over the global batch."""

    def __call__(
        self,
        params: dict[str, Any],
        extra: Any,
        batch: dict[str, Array],
        keys: StepKeys,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, " batch"], Metrics, Any]:
        """Loss per example; metrics, each as values and weights ``[batch]``; the new extra."""
        ...


@runtime_checkable
class Measurable(Objective, Protocol):
    """An objective that can do without the randomness of training."""

    def init(self) -> Any:
        """Its extra state before the first step."""
        ...

    def measuring(self) -> "Measurable":
        """The same without augmentation and dropout."""
        ...


class Task(NamedTuple):
    """What ``config.task`` trains.

    Attributes:
      model: ``(config, spec) → model``, whose ``network`` has the parameters "network"; raises
        UserError where config and data do not fit each other.
      objective: ``(config, model) → objective``.
      networks: its table of networks; the first is the default.
    """

    model: Callable[[ConfigDict, Spec], Any]
    objective: Callable[[ConfigDict, Any], Measurable]
    networks: Table

    @property
    def draws(self) -> bool:
        """Whether its models draw images."""
        return self.networks is NETWORKS
