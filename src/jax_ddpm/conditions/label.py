"""The class of an image."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from jax_ddpm.data.source import Spec
from jax_ddpm.diffusion.denoiser import Conditioning
from jax_ddpm.errors import UserError
from jax_ddpm.keys import StepKeys, Stream
from jax_ddpm.options import did_you_mean, require

_MOST_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Label:
    """``label``, int32 ``[batch]``.

    Attributes:
      class_names: of the classes 0, 1, ….
      drop: share of the labels that training replaces by the null label.
      negative_class: the class that guidance leads away from; None for none.
    """

    class_names: tuple[str, ...]
    drop: float = 0.0
    negative_class: int | None = None

    name: ClassVar[str] = "label"

    @property
    def guided(self) -> bool:
        return self.drop > 0

    @property
    def must_be(self) -> str:
        return f"one of this model's classes, {known_classes(self.class_names)}"

    @property
    def attributes(self) -> dict[str, Any]:
        return {"num_classes": len(self.class_names)}

    @property
    def heads(self) -> tuple[str, ...]:
        return self.class_names

    def training(self, batch: Mapping[str, Any], keys: StepKeys) -> Conditioning:
        """The labels of a training batch and which of them to drop."""
        coin = partial(jax.random.bernoulli, p=self.drop)
        dropped = jax.vmap(coin)(keys.per_example(Stream.LABEL_DROP))
        return self.given(batch) | {"label_drop": dropped}

    def given(self, batch: Mapping[str, Any]) -> Conditioning:
        """The labels of a batch."""
        return {"label": batch["label"]}

    def asked(self, request: Mapping[str, Any], index: Int[np.ndarray, " n"]) -> Conditioning:
        """The class in the request; without one, sample i is of class i mod the number of classes.

        Raises:
          UserError: where there is no such class.
        """
        number = self._number(request)
        in_turn = index % len(self.class_names)
        return {"label": in_turn if number is None else np.full_like(index, number)}

    def negative(self) -> Conditioning:
        """The negative class, if there is one."""
        number = self.negative_class
        return {} if number is None else {"label": np.array([number], np.int32)}

    def noted(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The number of the class; None where all take turns."""
        return {"class": self._number(request)}

    def _number(self, request: Mapping[str, Any]) -> int | None:
        if "label" not in request:
            return None
        number = class_number(self.class_names, request["label"])
        if number is None:
            known = known_classes(self.class_names, request["label"])
            raise UserError(
                f"--class={request['label']}: it must be one of this model's classes, {known}"
            )
        return number


def label(config: ConfigDict, spec: Spec) -> Label | None:
    """The class, for ``model.class_conditional``.

    Raises:
      UserError: where the data has no labels, or no such class as ``sampling.negative_class``.
    """
    require(
        config,
        "model.class_conditional",
        lambda value: not value or spec.num_classes > 0,
        "False: this data has no labels",
    )
    negative = class_number(spec.class_names, config.sampling.negative_class)
    known = known_classes(spec.class_names, config.sampling.negative_class)
    require(
        config,
        "sampling.negative_class",
        lambda value: value is None or negative is not None,
        f"one of this data's classes, {known}",
    )
    if not config.model.class_conditional:
        return None
    return Label(spec.class_names, config.training.label_drop, negative)


def with_label(label: int | float | str | None) -> dict[str, Any]:
    """The request for a class, or for none in particular."""
    return {} if label is None else {"label": label}


def class_number(names: Sequence[str], value: Any) -> int | None:
    """The number of a class by its name, or by its number; None where there is no such class.

    Text that is a name is that name, even where it looks like the number of another class.
    """
    if value in names:
        return names.index(value)
    return int(value) if str(value).isdecimal() and int(value) < len(names) else None


def known_classes(names: Sequence[str], value: Any = None) -> str:
    """All classes in words, and the name that is nearest to ``value``."""
    numbers = f"0 to {len(names) - 1}"
    if all(name == str(number) for number, name in enumerate(names)):
        return numbers
    shown = ", ".join([*names[:_MOST_SHOWN], *["…"] * (len(names) > _MOST_SHOWN)])
    return f"{shown}, or {numbers}{did_you_mean(str(value), names)}"
