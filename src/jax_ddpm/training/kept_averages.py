"""Averages kept for good at many steps of a run, in a folder of their own."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.runtime.distributed import from_first
from jax_ddpm.tasks.recipe import Recipe


def kept_averages(workdir: pathlib.Path) -> pathlib.Path:
    """The folder, laid out as a run's: ``checkpoint.restore_item`` reads the item "ema" there."""
    return workdir / "averages"


class KeptAverages:
    """Keeps the averages that a recipe wants kept; closing it waits for the last of them.

    Attributes:
      intervals: the steps between two copies of each average that is kept.
    """

    def __init__(self, workdir: pathlib.Path, recipe: Recipe, config: ConfigDict):
        self.intervals = {
            name: average.snapshot_every
            for name, average in recipe.averages.items()
            if average.snapshot_every
        }
        self._folder, self._config = kept_averages(workdir), config
        self._files = Checkpoints(self._folder, 1, keep_every=1) if self.intervals else None

    def __enter__(self) -> "KeptAverages":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._files:
            self._files.__exit__(*error)

    def forget_after(self, step: int) -> None:
        """Sets aside those of later steps, which another way may have led to."""
        if self._files:
            from_first(lambda: checkpoint.set_aside(self._folder, step + 1))

    def keep(self, step: int, averages: dict[str, Any]) -> None:
        """Writes those that are due in the background; one that is there already stays."""
        due = {name: averages[name] for name, n in self.intervals.items() if step % n == 0}
        if self._files and due and step not in checkpoint.steps(self._folder):
            self._files.save(step, {"ema": due}, self._config, {})
