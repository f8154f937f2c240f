"""A run of before the package's layout changed lives on: sampled, measured and trained further.

``old_run.tar.xz`` holds what commit 3481263 made, the last of the layout before, on a CPU of one
device: ``run``, two steps of ``configs/digits_conditional.py`` with the network and fields of its
``config.json``, and, of the same code,

- ``expected/samples.npz``: ``--mode=sample --num_samples=4 --sampler=ddim --guidance_scale=1.5
  --num_steps=4`` of it,
- ``expected/bpd.json``: ``--mode=eval --metrics=bpd --num_examples=10`` of it,
- ``expected/step_4.npz``, ``expected/metrics.jsonl``: its parameters and averages, and its log,
  after ``--accept_changes`` with ``training.num_steps=4``: the learning rate decays towards it.
"""

import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest
import tiny

import jax_ddpm
from jax_ddpm import factory
from jax_ddpm.evaluation.bound import measure_bound
from jax_ddpm.runs.checkpoint import restore_item
from jax_ddpm.runs.identity import load_identity
from jax_ddpm.training.loop import train

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(pathlib.Path(__file__).with_name("old_run.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_is_sampled(old):
    trained = jax_ddpm.load(old / "run", sampler="ddim", guidance_scale=1.5, num_steps=4)
    with np.load(old / "expected" / "samples.npz") as expected:
        found = trained.sample(len(expected["images"])).astype(int)
        np.testing.assert_allclose(found, expected["images"].astype(int), atol=1)


def test_is_measured(old, tmp_path):
    trained = jax_ddpm.load(old / "run")
    source = factory.make_source(trained.config)
    assert source.spec == trained.spec
    found = measure_bound(trained, source, "heldout", 10, 12, tmp_path).total
    stored = json.loads((old / "expected" / "bpd.json").read_text())["measured"]["bpd"]["result"]
    assert found.value == pytest.approx(stored["value"], abs=1e-4)
    assert found.standard_error == pytest.approx(stored["standard_error"], abs=1e-4)


@pytest.mark.slow
def test_goes_on(old, tmp_path):
    workdir = shutil.copytree(old / "run", tmp_path / "run")
    config, _ = load_identity(workdir)
    config.training.num_steps, config.sampling.num_samples = 4, 4
    with pytest.warns(UserWarning, match=r"^going on with changes: training.num_steps 2 → 4$"):
        train(config, workdir, accept_changes=True)
    found = {
        f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for item in ("params", "ema")
        for path, leaf in jax.tree_util.tree_leaves_with_path(restore_item(workdir, 4, item))
    }
    with np.load(old / "expected" / "step_4.npz") as expected:
        assert found.keys() == set(expected.files)
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, expected[name], atol=1e-5, err_msg=name)
    logs = [folder / "metrics.jsonl" for folder in (workdir, old / "expected")]
    lines, expected_lines = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in logs
    )
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        for log in (line, expected_line):
            log.pop("images_per_second", None)
        assert line == pytest.approx(expected_line, rel=1e-5)
