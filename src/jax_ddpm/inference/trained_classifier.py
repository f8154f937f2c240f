"""A trained classifier, read from the folder of its run: features and classes of images."""

import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32, UInt8
from ml_collections import ConfigDict

from jax_ddpm import factory
from jax_ddpm.data.plan import padded_batches
from jax_ddpm.data.source import Source, Spec
from jax_ddpm.errors import UserError
from jax_ddpm.factory import ALONE, Companions
from jax_ddpm.runs.checkpoint import digest
from jax_ddpm.runs.frozen import FrozenReader
from jax_ddpm.runs.served import served
from jax_ddpm.tasks.classification import ImageClassifier

_BATCH_SIZE = 256


class TrainedClassifier:
    """A classifier with the averaged parameters of one checkpoint.

    Attributes:
      config, spec: those of the run and of its data.
      step: that of the checkpoint.
      model, params: the network's functions and its parameters as NumPy arrays.
      record: the classifier's identity, as JSON.
      accuracy: the share of the held-out images that it gets right, with their count, as JSON.
    """

    def __init__(
        self,
        config: ConfigDict,
        spec: Spec,
        step: int,
        params: Any,
        source: Source,
        companions: Companions = ALONE,
    ):
        self.config, self.spec, self.step, self.params = config, spec, step, params
        self.model = ImageClassifier(config, spec, companions)
        self.record = {
            "kind": "classifier",
            "checkpoint_step": step,
            "sha256": digest(params),
            "dtype": config.model.dtype,
            "data": spec.identity,
        }
        self.accuracy = {
            "data": spec.identity,
            "split": "heldout",
            "count": spec.split_sizes["heldout"],
            "accuracy": self._accuracy(source),
        }

    def apply(
        self, params: Any, images: UInt8[Array, "n h w c"]
    ) -> tuple[Float32[Array, "n features"], Float32[Array, "n classes"]]:
        """Features and logits of images at the data's own levels 0, …, num_levels-1.

        Pure: call it under ``jit``.
        """
        return self.model.network.apply(params, self.model.codec.encode({"image": images}))

    def _accuracy(self, source: Source) -> float:
        apply, count, right = jax.jit(self.apply), self.spec.split_sizes["heldout"], 0
        for index, mask in padded_batches(count, _BATCH_SIZE):
            batch = source.batch("heldout", index)
            _, logits = apply(self.params, batch["image"])
            if not np.isfinite(logits).all():
                raise UserError(
                    "the classifier's logits are not finite; train it anew, at a lower rate"
                )
            right += int(np.sum(mask & (np.argmax(logits, axis=1) == batch["label"])))
        return right / count


def load_classifier(workdir: str | pathlib.Path) -> TrainedClassifier:
    """Reads a run's newest checkpoint, and measures it on the held-out split of the run's data.

    The accuracy thus holds for these very parameters and this very computation.

    Raises:
      UserError: where there is no run of a classifier, no whole checkpoint, or data other than it
        was trained on.
    """
    workdir = pathlib.Path(workdir)
    config, spec, step, params = served(workdir)
    if config.task != "classification":
        raise UserError(f"--workdir={workdir} holds no classifier; train one with config.task")
    source = factory.make_source(config)
    if source.spec.as_noted(spec).meaning() != spec.meaning():
        raise UserError(
            f"--workdir={workdir}: its classifier is for {spec.identity}, but its config.data now "
            f"gives {source.spec.identity}; bring back the data it was trained on"
        )
    companions = Companions(FrozenReader(config, workdir))
    return TrainedClassifier(config, spec, step, params, source, companions)
