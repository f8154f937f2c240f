"""A trained model as notebooks use it: load, sample."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

import jax_ddpm
from jax_ddpm import factory, images
from jax_ddpm.api.run import Run
from jax_ddpm.errors import UserError
from jax_ddpm.inference.sampling import write_samples
from jax_ddpm.inference.trained import Trained
from jax_ddpm.models.network import Network
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.runs.identity import save_identity
from jax_ddpm.training.state import TrainState, to_items

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


@pytest.fixture(scope="module", autouse=True)
def traces():
    """Puts a network of a few parameters in place; a list that grows whenever it is traced."""
    traces = []

    def apply(*arguments):
        traces.append(arguments)
        return tiny.apply(*arguments)

    def make_network(module, x, *_):
        return Network(tiny.network(x.shape[-1], module.num_classes).init, apply)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "make_network", make_network)
        yield traces


@pytest.fixture(scope="module")
def config():
    return tiny.config(model__class_conditional=True, training__learning_rate=0.1)


@pytest.fixture(scope="module")
def saved(traces, config):
    """Step → a state that training might have reached then; no array is that of another state."""
    network = factory.Model(config, factory.make_source(config).spec).network

    def random(seed):
        rng, params = np.random.default_rng(seed), network.init(jax.random.key(seed))
        return jax.tree.map(
            lambda leaf: np.float32(leaf + 0.1 * rng.normal(size=leaf.shape)), params
        )

    return {
        step: TrainState(
            step=np.int32(step),
            params={"network": random(step)},
            ema={"network": random(10 + step)},
            opt_state=({"mu": random(20 + step)},),
            extra=(),
        )
        for step in (2, 4, 6)
    }


@pytest.fixture(scope="module")
def workdir(saved, config, tmp_path_factory):
    """A run on the digits with these checkpoints."""
    workdir = tmp_path_factory.mktemp("trained")
    save_identity(workdir, config, factory.make_source(config).spec)
    with Checkpoints(workdir, keep_last=3, keep_every=0) as checkpoints:
        for state in saved.values():
            checkpoints.save(int(state.step), to_items(jax.device_put(state)), config, {})
    return workdir


@pytest.fixture(scope="module")
def run(workdir):
    return jax_ddpm.load(workdir)


@pytest.fixture
def damage(workdir, tmp_path):
    """``damage(step, item)`` copies the run and changes a bit in an item of a checkpoint."""

    def damage(*places):
        copy = tmp_path / "damaged"
        shutil.copytree(workdir, copy)
        for step, item in places:
            files = (copy / "checkpoints" / str(step) / item).rglob("*")
            largest = max(
                (path for path in files if path.is_file()), key=lambda p: p.stat().st_size
            )
            content = bytearray(largest.read_bytes())
            content[len(content) // 2] ^= 1
            largest.write_bytes(content)
        return copy

    return damage


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


class TestLoad:
    @pytest.mark.parametrize("kind", [str, pathlib.Path])
    def test_in_three_lines(self, workdir, kind):
        run = jax_ddpm.load(kind(workdir))
        samples = run.sample(4)
        assert (samples.shape, samples.dtype) == ((4, 8, 8, 1), np.uint8)
        assert len(np.unique(samples, axis=0)) == 4

    @pytest.mark.parametrize("step", [2, 4, 6])
    def test_gives_the_parameters_of_the_step(self, workdir, saved, step):
        averaged, raw = (jax_ddpm.load(workdir, step, raw) for raw in (False, True))
        assert (averaged.step, averaged.item) == (step, "ema")
        assert (raw.step, raw.item) == (step, "params")
        assert_equal(averaged.params, saved[step].ema["network"])
        assert_equal(raw.params, saved[step].params["network"])
        assert np.any(averaged.params["gain"] != raw.params["gain"])
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(raw.params))

    def test_takes_the_newest_and_the_averages_by_default(self, run, saved):
        assert run.step == 6
        assert_equal(run.params, saved[6].ema["network"])

    def test_knows_the_config_and_the_data(self, run):
        assert run.config.training.learning_rate == 0.1
        assert run.spec == factory.make_source(run.config).spec

    def test_records_differ_between_checkpoints_and_kinds(self, workdir):
        records = [
            jax_ddpm.load(workdir, step, raw).record for step in (4, 6) for raw in (False, True)
        ]
        assert len({record["sha256"] for record in records}) == 4
        assert len({json.dumps(record) for record in records}) == 4
        assert jax_ddpm.load(workdir, 4).record == records[0]

    def test_another_folder_is_the_same_record(self, workdir, run, tmp_path):
        shutil.copytree(workdir, tmp_path / "elsewhere")
        assert jax_ddpm.load(tmp_path / "elsewhere").record == run.record


class TestRefusals:
    """One line, naming what is there."""

    @staticmethod
    def refuses(*arguments):
        with pytest.raises(UserError) as caught:
            jax_ddpm.load(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("step", [0, 3, 7, -2])
    def test_of_a_step_that_is_not_there(self, workdir, step):
        line = self.refuses(workdir, step)
        assert line.startswith(f"step={step}:")
        assert "has checkpoints at 2, 4, 6" in line

    @pytest.mark.parametrize("step", [None, 2])
    def test_of_a_run_without_checkpoints(self, workdir, tmp_path, step):
        for name in ("config.json", "data.json"):
            shutil.copy(workdir / name, tmp_path / name)
        assert "no checkpoint there yet" in self.refuses(tmp_path, step)

    def test_of_no_run(self, tmp_path):
        assert "no run there" in self.refuses(tmp_path / "nothing")

    def test_of_a_damaged_step_that_is_asked_for(self, damage):
        line = self.refuses(damage((4, "ema")), 4)
        assert "checkpoint 4" in line
        assert "has changed since it was written" in line

    def test_of_nothing_but_damaged_checkpoints(self, damage):
        folder = damage((2, "ema"), (4, "ema"), (6, "ema"))
        with pytest.warns(UserWarning, match="is damaged") as warned:
            assert "every checkpoint is damaged" in self.refuses(folder)
        assert len(warned) == 3


class TestDamage:
    def test_leads_to_the_one_before(self, damage, saved):
        folder = damage((6, "ema"))
        with pytest.warns(UserWarning, match="checkpoint 6 is damaged: ema/.* has changed"):
            run = jax_ddpm.load(folder)
        assert run.step == 4
        assert_equal(run.params, saved[4].ema["network"])

    @pytest.mark.parametrize("item", ["params", "opt_state"])
    def test_elsewhere_does_not_matter(self, damage, item):
        """Damage to what is not read; a warning would be an error here."""
        assert jax_ddpm.load(damage((6, item))).step == 6

    def test_of_the_raw_parameters_alone(self, damage, saved):
        folder = damage((6, "params"))
        with pytest.warns(UserWarning, match="checkpoint 6 is damaged"):
            assert_equal(jax_ddpm.load(folder, raw=True).params, saved[4].params["network"])

    def test_to_the_manifest(self, workdir, tmp_path):
        folder = tmp_path / "damaged"
        shutil.copytree(workdir, folder)
        (folder / "checkpoints" / "6" / "manifest.json").unlink()
        with pytest.warns(UserWarning, match=r"checkpoint 6 is damaged: manifest\.json"):
            assert jax_ddpm.load(folder).step == 4


class TestBesideATrainer:
    """A run that is being trained deletes checkpoints that have been superseded."""

    @pytest.fixture
    def copy(self, workdir, tmp_path):
        return shutil.copytree(workdir, tmp_path / "copy")

    def supersede(self, copy):
        folder = copy / "checkpoints"
        if (folder / "6").exists():
            shutil.copytree(folder / "6", folder / "8")
            for step in (2, 4, 6):
                shutil.rmtree(folder / str(step))

    @pytest.mark.parametrize("name", ["verify", "restore_note", "restore_item"])
    def test_the_newest_is_taken_whatever_is_deleted_meanwhile(self, copy, monkeypatch, name):
        real = getattr(checkpoint, name)

        def late(*arguments):
            self.supersede(copy)
            return real(*arguments)

        monkeypatch.setattr(checkpoint, name, late)
        assert jax_ddpm.load(copy).step == 8

    def test_the_one_asked_for_is_missed(self, copy, monkeypatch):
        real = checkpoint.restore_item

        def late(*arguments):
            self.supersede(copy)
            return real(*arguments)

        monkeypatch.setattr(checkpoint, "restore_item", late)
        with pytest.raises(UserError, match=r"checkpoint 6 in .*manifest.json cannot be read"):
            jax_ddpm.load(copy, 6)


class TestSample:
    def test_is_what_the_command_writes(self, run, tmp_path):
        write_samples(run, tmp_path / "folder", 11, seed=5)
        samples = run.sample(11, seed=5)
        for i, image in enumerate(samples):
            written = images.load_png(tmp_path / "folder" / f"{i:06}.png")
            np.testing.assert_array_equal(written, image)

    @pytest.mark.parametrize("number", [3, 9])
    def test_is_so_for_a_batch_size_of_ones_own(self, run, tmp_path, number):
        """A batch size larger than the number of samples is one."""
        write_samples(run, tmp_path / "file.npz", number, request={"label": 7}, batch_size=4)
        with np.load(tmp_path / "file.npz") as arrays:
            samples = run.sample(number, label=7, batch_size=4)
            np.testing.assert_array_equal(arrays["images"], samples)

    def test_i_depends_on_seed_i_and_label_alone(self, run):
        ten, four, threes = run.sample(10), run.sample(4), run.sample(4, label=3).astype(int)
        np.testing.assert_allclose(four.astype(int), ten[:4], atol=1)
        np.testing.assert_allclose(threes[3], ten[3], atol=1)
        assert np.any(threes[:3] != ten[:3], axis=(1, 2, 3)).all()
        assert np.any(run.sample(4, seed=1) != four, axis=(1, 2, 3)).all()

    def test_again_does_not_compile_again(self, workdir, traces):
        run = jax_ddpm.load(workdir)
        assert len(traces) == (before := len(traces))
        first = run.sample(4)
        assert len(traces) > before
        before = len(traces)
        np.testing.assert_array_equal(run.sample(4), first)
        run.sample(4, seed=1, label=2)
        run.sample(12, batch_size=4)
        assert len(traces) == before

    def test_of_unknown_classes_is_refused(self, run):
        with pytest.raises(
            UserError, match="label=10: it must be one of this model's classes, 0 to 9"
        ):
            run.sample(4, label=10)

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_of_a_seed_that_is_none_is_refused(self, run, seed):
        """Also where no argument is checked; JAX itself would take the remainder."""
        with pytest.raises(UserError, match=rf"seed={seed}: it must be in \[0, 4294967295\]"):
            Trained.sample(run, 4, seed)

    @pytest.mark.parametrize("size", [-1, 0])
    def test_in_batches_of_nothing_is_refused(self, run, size):
        for draw in (Trained.generator, Run.sample):
            with pytest.raises(UserError, match=f"(sample_batch|batch_size)={size}: it must be"):
                draw(run, batch_size=size)

    def test_of_raw_parameters_differs(self, workdir, run):
        assert np.any(jax_ddpm.load(workdir, raw=True).sample(4) != run.sample(4))
