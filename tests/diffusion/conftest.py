"""The mathematics is tested under strict dtype promotion: no silent float64 or int mixing."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield
