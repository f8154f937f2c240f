"""The code of README.md and the guide runs, and every command of theirs is one that is taken.

Networks are small and runs short. CONTRIBUTING.md and docs/method.md have tests of their own.
"""

import pathlib
import re
import shlex

import numpy as np
import pytest
import tiny

import jax_ddpm
from jax_ddpm import factory
from jax_ddpm.cli.parsing import resolve
from jax_ddpm.config.reading import read_config

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

ROOT = pathlib.Path(__file__).parent.parent
SHORT = {
    "process.num_timesteps": 8,
    "training.num_steps": 2,
    "training.batch_size": 8,
    "training.heldout_examples": 20,
    "sampling.num_samples": 10,
    "sampling.batch_size": 64,
    "sampling.num_steps": 8,
}
TRAIN = jax_ddpm.train


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def commands(page):
    """The words after the program's name, with lines joined that end in a backslash."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(
        r"^ *(?:.*&& )?\S*python3? -m jax_ddpm\.main (.*)$", text, flags=re.MULTILINE
    )
    return [shlex.split(line) for line in lines]


CODE = {
    f"{page} {i}": code
    for page in ("README.md", "docs/guide.md")
    for i, code in enumerate(blocks(page))
}
COMMANDS = {
    f"{page} {i}": words
    for page in ("README.md", "docs/results.md", "docs/guide.md", "experiments/cluster/README.md")
    for i, words in enumerate(commands(page))
}


def train_shortly(config, workdir):
    config = read_config(config).config
    config.update_from_flattened_dict(SHORT)
    return TRAIN(config, workdir)


@pytest.mark.parametrize("name", CODE)
def test_code_runs_as_it_is_written(name, tmp_path, monkeypatch):
    def small(module, x, *_):
        return tiny.network(x.shape[-1], module.num_classes)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(factory, "make_network", small)
    monkeypatch.setattr(jax_ddpm, "train", train_shortly)
    names = {}
    exec(CODE[name], names)
    results = [names[key] for key in ("xt", "mean", "log_variance", "x0") if key in names]
    assert all(np.all(np.isfinite(result)) for result in results)
    if "sampler" in names:  # of N(0, 1)
        np.testing.assert_allclose([names["x0"].mean(), names["x0"].std()], [0, 1], atol=0.15)


def test_pages_have_code_and_commands():
    assert len(CODE) >= 4
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_taken(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    resolve(COMMANDS[name])
