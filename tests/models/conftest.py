"""Networks are compiled without optimisation: their structure and arithmetic stay the same."""

import pytest
import tiny

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)
