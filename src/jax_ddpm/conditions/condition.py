"""The contract of a condition, which a network is told besides x_t and t, and several as one."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from jax_ddpm.diffusion.denoiser import Conditioning
from jax_ddpm.errors import UserError
from jax_ddpm.keys import StepKeys

FLAGS = {"label": "class"}  # flags of conditions that are not called by their names
NO_REQUEST: Mapping[str, Any] = {}


class Condition(Protocol):
    """One thing that a network is told, in one array or a small tree of them.

    Attributes:
      name: its name in the conditioning and in requests.
      must_be: what a request may hold under this name, in words.
      guided: whether classifier-free guidance goes without it. Training must drop it at times.
      attributes: those that a network must be made with, such as ``num_classes``.
      heads: the names of all, in their order, where samples take turns; () where they do not.
    """

    @property
    def name(self) -> str: ...

    @property
    def must_be(self) -> str: ...

    @property
    def guided(self) -> bool: ...

    @property
    def attributes(self) -> Mapping[str, Any]: ...

    @property
    def heads(self) -> tuple[str, ...]: ...

    def training(self, batch: Mapping[str, Any], keys: StepKeys) -> Conditioning:
        """That of a training batch, with the mask ``<name>_drop`` if it is dropped at times."""
        ...

    def given(self, batch: Mapping[str, Any]) -> Conditioning:
        """That of a batch to be measured, with nothing random."""
        ...

    def asked(self, request: Mapping[str, Any], index: Int[np.ndarray, " n"]) -> Conditioning:
        """That of the samples ``index``, as host arrays.

        Raises:
          UserError: where there is none such.
        """
        ...

    def negative(self) -> Conditioning:
        """What guidance leads away from, for one example; {} where it does without."""
        ...

    def noted(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a record of samples says of the request, as JSON."""
        ...


class Conditions(NamedTuple):
    """All that a network is told; its methods are those of each condition, joined."""

    parts: tuple[Condition, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    @property
    def guided(self) -> tuple[str, ...]:
        """The names that classifier-free guidance goes without."""
        return tuple(part.name for part in self.parts if part.guided)

    @property
    def attributes(self) -> dict[str, Any]:
        return _joined(part.attributes for part in self.parts)

    def heads(self, request: Mapping[str, Any]) -> tuple[str, ...]:
        """The heads of the columns of a grid, where samples of this request take turns."""
        turns = (part.heads for part in self.parts if part.name not in request)
        return next(filter(None, turns), ())

    def training(self, batch: Mapping[str, Any], keys: StepKeys) -> Conditioning:
        return _joined(part.training(batch, keys) for part in self.parts)

    def given(self, batch: Mapping[str, Any]) -> Conditioning:
        return _joined(part.given(batch) for part in self.parts)

    def asked(self, request: Mapping[str, Any], index: Int[np.ndarray, " n"]) -> Conditioning:
        """The conditioning of the samples ``index``, as host arrays.

        Raises:
          UserError: where the model is not told such a thing.
        """
        for name in request.keys() - {*self.names}:
            flag = FLAGS.get(name, name)
            raise UserError(
                f"--{flag}={request[name]}: this model is told no {flag}; leave --{flag} out"
            )
        return _joined(part.asked(request, index) for part in self.parts)

    def require_all(self, request: Mapping[str, Any]) -> None:
        """Raises UserError where a condition is not in the request."""
        for part in self.parts:
            if part.name not in request:
                raise UserError(f"--{FLAGS.get(part.name, part.name)}: give {part.must_be}")

    def negative(self) -> Conditioning:
        return _joined(part.negative() for part in self.parts)

    def noted(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return _joined(part.noted(request) for part in self.parts)


UNCONDITIONAL = Conditions()


def _joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}
