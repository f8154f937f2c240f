"""A trace of a few training steps, for TensorBoard, XProf or Perfetto."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

# Dispatches skipped first, including those that compile; and dispatches traced.
_SKIPPED, _TRACED = 3, 5


class Profiler:
    """Traces five dispatches of steps, after the first three, into ``folder`` if there is one.

    The phases of a step are named ``gradients``, ``optimiser`` and ``averages`` on the device.
    ``step`` on the host holds ``feed`` and ``metrics``, which waits for the steps before.
    """

    def __init__(self, folder: pathlib.Path | None):
        self._folder, self._dispatched = folder, 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps the dispatch of the steps from ``number`` on."""
        if self._folder and self._dispatched == _SKIPPED:
            jax.profiler.start_trace(self._folder)
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        self._dispatched += 1
        if self._folder and self._dispatched == _SKIPPED + _TRACED:
            jax.profiler.stop_trace()
