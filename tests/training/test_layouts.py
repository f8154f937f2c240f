"""Training over eight devices, in whatever way they share it, is training on one."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from layouts import LAYOUTS

pytestmark = pytest.mark.slow

TESTS = pathlib.Path(__file__).parents[1]
SHARED = [layout for layout in LAYOUTS if layout != "single"]


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "float64"])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_ENABLE_X64": str(int(request.param)),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    command = [sys.executable, TESTS / "layouts.py", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for layout, result in found.items():
        result["params"] = np.load(folder / f"{layout}.npy")
    return found


@pytest.mark.parametrize("layout", SHARED)
def test_twenty_steps_end_the_same(results, layout):
    """Within round-off, which Adam magnifies where a gradient is near 0."""
    single, shared = results["single"], results[layout]
    double = single["params"].dtype == np.float64
    tolerance = 1e-10 if double else 1e-4
    np.testing.assert_allclose(shared["losses"], single["losses"], rtol=1e-6)
    assert np.abs(shared["params"] - single["params"]).max() < tolerance
    assert np.abs(single["params"]).max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state_takes_its_share_of_memory(results, layout):
    """The program's arguments: each large array is spread over the devices that share it.

    Beside the state there are the images of at most five steps, and the counters and keys.
    """
    _, fsdp, _, _ = LAYOUTS[layout]
    found = results[layout]
    width = 8 if found["params"].dtype == np.float64 else 4
    state = sum(width * size // (fsdp if size >= 4096 else 1) for size in found["state_sizes"])
    assert 0 <= found["argument_bytes"] - state < 3000
