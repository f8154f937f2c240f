"""The code of CONTRIBUTING.md works, as parts of one's own; and how such modules fail."""

import importlib
import pathlib
import re
import sys

import numpy as np
import pytest
import tiny

import jax_ddpm
from jax_ddpm.conditions.table import CONDITIONS
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


OWN = ("my_sampler", "my_network", "my_condition", "my_source", "my_task")


def forget():
    """Forgets the imported modules, as a new process would."""
    for name in CODE:
        sys.modules.pop(name, None)
    for table, name in (*ADDED.values(), (CONDITIONS, "brightness")):
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
    assert CODE.keys() == {*OWN, "my_config"}


def test_rows_bring_their_options_into_the_config(workdir):
    config, known = default(*OWN), fields(OWN)
    assert (config.model.width, config.data.count, config.sampling.memory) == (32, 200, None)
    assert known["model.width"].meaning == "Channels of every layer."
    for field, (_, name) in ADDED.items():
        assert name in tables(OWN)[field]


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
    assert again.config.modules == OWN
    np.testing.assert_array_equal(again.sample(3), before)
    other = jax_ddpm.load(workdir, memory=1.0)
    assert np.any(other.sample(3) != before)
    assert other.record["memory"] == 1.0


def test_a_condition_is_told_and_asked_for_by_its_name(workdir):
    run = jax_ddpm.load(workdir)
    assert run.model.conditions.names == ("brightness",)
    dark, usual = run.sample(3, brightness=-1.0), run.sample(3)
    np.testing.assert_array_equal(run.sample(3, brightness=0.0), usual)
    assert np.any(dark != usual)
    with pytest.raises(UserError, match=r"^brightness=2: it must be a number from -1 to 1$"):
        run.sample(3, brightness=2)
    with pytest.raises(UserError, match=r"^colour=red: this model is told no colour"):
        run.sample(3, colour="red")


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


def test_a_config_that_names_no_module_knows_nothing_of_theirs(workdir):
    """It must mean the same in a process that never saw them."""
    assert "width" not in default().model
    assert "convnet" not in tables()["model.name"]
    with pytest.raises(UserError, match=r"config\.sampling\.sampler is 'adams_bashforth'; "):
        validate(tiny.config(sampling__sampler="adams_bashforth"), num_devices=1)


def test_fields_that_a_module_brings_too_late_are_one_line(workdir):
    config = tiny.config(modules=OWN)
    with pytest.raises(UserError, match=r"config\.\S+ is missing; make the config by default"):
        validate(config, num_devices=1)


def test_another_sampler_than_the_runs_has_options_of_its_own(workdir):
    run = jax_ddpm.load(workdir, sampler="ddim")
    assert "memory" not in run.record
    with pytest.raises(UserError, match=r"memory is 1\.0; it must be left out"):
        jax_ddpm.load(workdir, sampler="ddim", memory=1.0)


def test_a_module_that_fails_takes_its_rows_back(folder):
    head = "from jax_ddpm.models.table import NETWORKS\nNETWORKS['repaired'] = print\n"
    (folder / "repaired.py").write_text(head + "1 / 0")
    with pytest.raises(UserError, match="division by zero"):
        default("repaired")
    (folder / "repaired.py").write_text(head)
    importlib.invalidate_caches()
    default("repaired")
    NETWORKS.pop("repaired")


@pytest.mark.parametrize(
    ("annotation", "told"),
    [
        ("Annotated[float, Option('Of its own.')]", "config.sampling.num_steps is something else"),
        ("Annotated[str, Option('Words.')]", "the option eta of twisted is float, not str"),
    ],
)
def test_options_that_collide_are_one_line(folder, annotation, told):
    """Also where annotations are kept as strings."""
    name = "num_steps" if "float" in annotation else "eta"
    code = f"""
from __future__ import annotations
from typing import Annotated
from jax_ddpm.diffusion.samplers.table import SAMPLERS, Method
from jax_ddpm.options import Option
def twisted(grid, {name}: {annotation} = None): ...
SAMPLERS["twisted"] = Method(twisted)
"""
    (folder / f"twisted_{name}.py").write_text(code)
    try:
        with pytest.raises(UserError, match=told):
            default(f"twisted_{name}")
    finally:
        SAMPLERS.pop("twisted")
