"""A trace of a few training steps, for TensorBoard or Perfetto."""

import pathlib
from typing import Any

import jax

# Dispatches that pass first, among them those that compile; and dispatches traced.
_SKIPPED, _TRACED = 3, 5


class Profiler:
    """Traces the dispatches after the first three into ``folder``; does nothing without one.

    The step's phases are named ``gradients``, ``optimiser`` and ``averages`` on the device, and
    ``feed``, ``step`` and ``metrics`` on the host.
    """

    def __init__(self, folder: pathlib.Path | None):
        self._folder, self._dispatched = folder, 0

    def before(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """To be entered around the dispatch of the steps from ``step`` on."""
        if self._folder and self._dispatched == _SKIPPED:
            jax.profiler.start_trace(self._folder)
        return jax.profiler.StepTraceAnnotation("step", step_num=step)

    def after(self, metrics: Any) -> None:
        """Once ``metrics`` are to come of a dispatch; waits for the last that is traced."""
        self._dispatched += 1
        if self._folder and self._dispatched == _SKIPPED + _TRACED:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
