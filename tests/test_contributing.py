"""The code of CONTRIBUTING.md works, as parts of one's own; and how such modules fail."""

import importlib
import pathlib
import re
import sys

import numpy as np
import pytest
import tiny

import jax_ddpm
from jax_ddpm.config import default
from jax_ddpm.config.fields import fields, tables
from jax_ddpm.config.validation import validate
from jax_ddpm.data.table import SOURCES
from jax_ddpm.diffusion.samplers.table import SAMPLERS
from jax_ddpm.errors import UserError
from jax_ddpm.models.table import NETWORKS
from jax_ddpm.runs.identity import load_identity
from jax_ddpm.tasks.table import TASKS
from jax_ddpm.training.loop import train

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

PAGES = (pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
CODE = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGES, flags=re.DOTALL))
ADDED = {
    "sampling.sampler": (SAMPLERS, "adams_bashforth"),
    "model.name": (NETWORKS, "convnet"),
    "data.source": (SOURCES, "stripes"),
    "task": (TASKS, "pseudo_huber"),
}


def forget():
    """Forgets the imported modules, as a new process would."""
    for name in CODE:
        sys.modules.pop(name, None)
    for table, name in ADDED.values():
        table.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The code of CONTRIBUTING.md, in files that Python finds."""
    folder = tmp_path_factory.mktemp("own")
    for name, code in CODE.items():
        (folder / f"{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    forget()


@pytest.fixture(scope="module")
def workdir(folder):
    config = importlib.import_module("my_config").get_config()
    validate(config, num_devices=1)
    train(config, folder / "run")
    return folder / "run"


def test_there_is_a_page_for_each_kind_of_part():
    assert CODE.keys() == {"my_sampler", "my_network", "my_source", "my_task", "my_config"}


def test_rows_bring_their_options_into_the_config(workdir):
    config, known = default("my_sampler", "my_network", "my_source"), fields()
    assert (config.model.width, config.data.count, config.sampling.memory) == (32, 200, None)
    assert known["model.width"].meaning == "Channels of every layer."
    for field, (_, name) in ADDED.items():
        assert name in tables()[field]


@pytest.mark.parametrize(
    ("field", "value"), [("model.width", 0), ("data.count", -1), ("sampling.memory", 2.0)]
)
def test_their_ranges_are_checked_like_ours(workdir, field, value):
    config, _ = load_identity(workdir)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config.{field} is {value}; it must be "):
        validate(config, num_devices=1)


def test_a_run_alone_imports_them_again(workdir):
    before = jax_ddpm.load(workdir).sample(3)
    forget()
    again = jax_ddpm.load(workdir)
    assert again.config.modules == ("my_sampler", "my_network", "my_source", "my_task")
    np.testing.assert_array_equal(again.sample(3), before)
    other = jax_ddpm.load(workdir, memory=1.0)
    assert np.any(other.sample(3) != before)
    assert other.record["memory"] == 1.0


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("not_there", None, "no module 'not_there'; start where it lies, or put its folder on"),
        ("needs", "import not_installed", "needs needs not_installed; install it"),
        ("fails", "1 / 0", "fails fails (ZeroDivisionError: division by zero)"),
        (
            "again",
            "from jax_ddpm.models.table import NETWORKS; NETWORKS['unet'] = None",
            "again: 'unet' is in the table already",
        ),
    ],
)
def test_a_module_that_cannot_be_had_is_one_line(folder, name, code, told):
    if code:
        (folder / f"{name}.py").write_text(code)
    with pytest.raises(UserError) as caught:
        default(name)
    message = str(caught.value)
    assert message.startswith("config.modules: ")
    assert told in message
    assert "\n" not in message
