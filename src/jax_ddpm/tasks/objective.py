"""The contracts of training: an objective, and a task, which makes a recipe from a config."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jax_ddpm.keys import StepKeys

# A metric is a weighted sum and its weight, so that means over examples, micro-batches, devices
# and steps are exact, even where a batch has no example of a kind.
Metrics = dict[str, tuple[Array, Array]]


@runtime_checkable
class Objective(Protocol):
    """The function that a phase minimises: the mean of the losses over the global batch."""

    def init(self) -> Any:
        """Its extra state before the first step."""
        ...

    def __call__(
        self,
        params: dict[str, Any],
        extra: Any,
        batch: dict[str, Array],
        keys: StepKeys,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, " batch"], Metrics, Any]:
        """Loss per example; metrics, each as values and weights ``[batch]``; the new extra.

        ``params`` holds what the phase trains and reads, by name.
        """
        ...


@runtime_checkable
class Measurable(Objective, Protocol):
    """An objective that can do without the randomness of training."""

    def measuring(self) -> "Measurable":
        """The same without augmentation and dropout."""
        ...
