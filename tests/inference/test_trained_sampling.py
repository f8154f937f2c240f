"""A trained model sampled in fewer steps or with guidance: asked for when it is loaded."""

import json

import jax
import numpy as np
import pytest
import tiny

import jax_ddpm
from jax_ddpm import factory
from jax_ddpm.diffusion.guidance import ClassifierFreeGuidance
from jax_ddpm.errors import UserError
from jax_ddpm.inference.companions import x0_error_path
from jax_ddpm.inference.sampling import write_samples
from jax_ddpm.runs.checkpoint import Checkpoints, digest
from jax_ddpm.runs.identity import save_identity
from jax_ddpm.training.state import TrainState, to_items

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """A network of a few parameters in place of the UNet."""

    def make_network(module, x, *_):
        return tiny.network(x.shape[-1], module.num_classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "make_network", make_network)
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """``make(section__field=value)`` is the folder of a run on the digits."""

    def make(**fields):
        config = tiny.config(**({"model__class_conditional": True} | fields))
        workdir = tmp_path_factory.mktemp("trained")
        spec = factory.make_source(config).spec
        params = factory.Model(config, spec).network.init(jax.random.key(0))
        state = TrainState(
            np.int32(2), {"network": params}, {"network": params}, ({"mu": params},), ()
        )
        save_identity(workdir, config, spec)
        with Checkpoints(workdir, keep_last=1, keep_every=0) as checkpoints:
            checkpoints.save(int(state.step), to_items(jax.device_put(state)), config, {})
        return workdir

    return make


@pytest.fixture(scope="module")
def workdir(make):
    return make()


@pytest.fixture(scope="module")
def plain(workdir):
    return jax_ddpm.load(workdir).sample(6)


def sampler(run):
    return run.record["num_steps"], run.record["guidance_scale"]


class TestLoad:
    def test_samples_as_the_run_says_by_default(self, make):
        workdir = make(sampling__num_steps=3, sampling__guidance_scale=2.0)
        run = jax_ddpm.load(workdir)
        assert sampler(run) == (3, 2)
        assert len(run.model.sampler().nodes.time) == 3
        assert isinstance(run.model.guided_denoiser(run.params).denoiser, ClassifierFreeGuidance)

    def test_overrides_what_the_run_says(self, make, plain):
        """Each field alone, and both, back to what a plain run draws."""
        workdir = make(sampling__num_steps=3, sampling__guidance_scale=2.0)
        both = jax_ddpm.load(workdir, num_steps=0, guidance_scale=1.0)
        np.testing.assert_array_equal(both.sample(6), plain)
        one = jax_ddpm.load(workdir, num_steps=5)
        assert sampler(one) == (5, 2)

    def test_leaves_the_run_as_it_is(self, workdir):
        before = (workdir / "config.json").read_text()
        jax_ddpm.load(workdir, num_steps=3, guidance_scale=2.0)
        assert (workdir / "config.json").read_text() == before
        assert sampler(jax_ddpm.load(workdir)) == sampler(jax_ddpm.load(workdir, num_steps=8))

    def test_takes_whole_numbers_for_the_scale(self, workdir):
        run = jax_ddpm.load(workdir, guidance_scale=2)
        np.testing.assert_array_equal(
            run.sample(3), jax_ddpm.load(workdir, guidance_scale=2.0).sample(3)
        )

    @pytest.mark.parametrize("field", ["num_step", "guidance_scal", "sample"])
    def test_does_not_pass_over_a_mistyped_field(self, workdir, field):
        with pytest.raises(UserError, match=f"unknown field '{field}'; did you mean"):
            jax_ddpm.load(workdir, **{field: 2})

    @pytest.mark.parametrize("fields", [{"num_steps": 9}, {"num_steps": -1}], ids=str)
    def test_refuses_steps_that_the_chain_has_not(self, workdir, fields):
        with pytest.raises(UserError, match=r"num_steps is -?\d; .*num_timesteps = 8"):
            jax_ddpm.load(workdir, **fields)

    @pytest.mark.parametrize("label", [10, 99])
    def test_refuses_to_lead_away_from_classes_that_the_data_has_not(self, workdir, label):
        jax_ddpm.load(workdir, guidance_scale=2.0, negative_class=9)
        with pytest.raises(UserError, match=f"negative_class is {label}; .* 0 to 9"):
            jax_ddpm.load(workdir, guidance_scale=2.0, negative_class=label)

    def test_refuses_guidance_of_a_model_without_classes(self, make):
        workdir = make(model__class_conditional=False)
        jax_ddpm.load(workdir, guidance_scale=1.0)
        for scale in (0.0, 2.0):
            with pytest.raises(UserError, match=f"guidance_scale is {scale}; it must be 1"):
                jax_ddpm.load(workdir, guidance_scale=scale)


class TestSamples:
    def test_in_fewer_steps_are_others(self, workdir, plain):
        fewer = jax_ddpm.load(workdir, num_steps=3).sample(6)
        assert np.all(np.any(fewer != plain, axis=(1, 2, 3)))
        np.testing.assert_array_equal(jax_ddpm.load(workdir, num_steps=8).sample(6), plain)

    @pytest.mark.parametrize("fields", [{}, {"num_steps": 5}, {"grid": "quadratic"}], ids=str)
    def test_visit_the_times_that_are_given(self, workdir, fields):
        """Times may lie between whole steps, whatever the grid and the number of steps would be."""
        run = jax_ddpm.load(workdir, times=(7.0, 2.5, 1.0), **fields)
        np.testing.assert_array_equal(run.model.sampler().nodes.time, [7.0, 2.5, 1.0])

    def test_at_scale_1_are_those_of_the_conditional_model(self, workdir, plain):
        run = jax_ddpm.load(workdir, guidance_scale=1.0)
        np.testing.assert_array_equal(run.sample(6), plain)

    def test_at_scale_0_do_not_depend_on_the_label(self, workdir, plain):
        run = jax_ddpm.load(workdir, guidance_scale=0.0)
        np.testing.assert_array_equal(run.sample(4, label=3), run.sample(4, label=7))
        assert np.any(run.sample(6) != plain)

    def test_at_other_scales_go_beyond_the_class(self, workdir, plain):
        guided = [jax_ddpm.load(workdir, guidance_scale=s).sample(6) for s in (0.5, 2.0, 4.0)]
        assert len({image.tobytes() for image in (plain, *guided)}) == 4

    def test_guided_do_not_depend_on_the_batch(self, workdir):
        run = jax_ddpm.load(workdir, guidance_scale=2.0)
        whole, parts = run.sample(6), run.sample(6, batch_size=4)
        np.testing.assert_allclose(whole.astype(int), parts, atol=1)


class TestRecord:
    FIELDS = ({}, {"num_steps": 3}, {"guidance_scale": 2.0}, {"guidance_scale": 0.0})

    def test_tells_samplers_apart_and_nothing_else(self, workdir):
        records = [jax_ddpm.load(workdir, **fields).record for fields in self.FIELDS]
        assert len({str(record) for record in records}) == 4
        rest = [record | {"num_steps": 0, "guidance_scale": 0} for record in records]
        assert all(record == rest[0] for record in rest)

    WAYS = (
        *FIELDS,
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.5},
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "heun"},
        {"sampler": "heun", "churn": 2.0},
        {"sampler": "heun", "churn": 2.0, "churn_range": (0.1, 1.0)},
        {"sampler": "heun", "churn": 2.0, "churn_noise": 1.01},
        {"sampler": "unipc"},
        {"sampler": "unipc", "order": 3},
        {"sampler": "predictor_corrector"},
        {"sampler": "predictor_corrector", "snr": 0.1},
        {"sampler": "predictor_corrector", "corrector_steps": 2},
        {"variance": "fixedsmall"},
        {"clip": False},
        {"dynamic_threshold": 0.995},
        {"num_steps": 3, "grid": "karras"},
        {"num_steps": 3, "process": "edm"},
        {"num_steps": 3, "process": "vp_cosine"},
        {"times": (7.0, 4.0, 0.0)},
        {"times": (7.0, 3.0, 0.0)},
        {"guidance_scale": 2.0, "guidance_interval": (0.1, 1.0)},
        {"guidance_scale": 2.0, "guidance_rescale": 0.7},
        {"guidance_scale": 2.0, "negative_class": 3},
    )

    def test_tells_every_way_of_sampling_apart(self, workdir):
        records = [jax_ddpm.load(workdir, **fields).record for fields in self.WAYS]
        for i, record in enumerate(records):
            assert record not in records[:i], self.WAYS[i]

    def test_tells_every_field_that_decides_a_sample(self):
        """Other fields are the guide's, which another record tells, or say how many at a time."""
        told = {name for fields in self.WAYS for name in fields} | {"guidance"}
        passed_over = {"num_samples", "batch_size", "guide", "guide_step"}
        assert told | passed_over == set(tiny.config().sampling)

    def test_tells_a_class_by_its_number(self, workdir):
        by_name, by_number = (
            jax_ddpm.load(workdir, guidance_scale=2.0, negative_class=value).record
            for value in ("3", 3)
        )
        assert by_name == by_number

    def test_tells_nothing_of_how_many_are_drawn_at_a_time(self, workdir):
        record = jax_ddpm.load(workdir).record
        assert jax_ddpm.load(workdir, num_samples=3, batch_size=2).record == record

    @pytest.mark.parametrize("fields", WAYS, ids=str)
    def test_comes_back_from_a_file(self, workdir, fields):
        """A folder of such samples could not be continued otherwise."""
        record = jax_ddpm.load(workdir, **fields).record
        assert json.loads(json.dumps(record)) == record

    def test_of_the_model_is_the_same_however_it_is_sampled(self, workdir):
        """Only clipping counts, as part of the denoiser: kept likelihoods are found by it."""
        plain = jax_ddpm.load(workdir).model_record
        for fields in self.WAYS:
            record = jax_ddpm.load(workdir, **fields).model_record
            assert (record == plain) == ("clip" not in fields)
        assert jax_ddpm.load(workdir, raw=True).model_record != plain

    def test_of_given_times_counts_them(self, workdir):
        assert jax_ddpm.load(workdir, times=(7.0, 3.0, 0.0)).record["num_steps"] == 3

    @pytest.mark.parametrize("fields", FIELDS[1:], ids=str)
    @pytest.mark.parametrize("name", ["folder", "file.npz"])
    def test_so_that_one_folder_holds_one_kind(self, workdir, tmp_path, fields, name):
        """The refusal names what differs, and the samples stay as they were."""
        write_samples(jax_ddpm.load(workdir), tmp_path / name, 4)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        other = jax_ddpm.load(workdir, **fields)
        (field,) = fields
        with pytest.raises(UserError, match=f"was made with {field} ") as caught:
            write_samples(other, tmp_path / name, 9)
        assert "\n" not in str(caught.value)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files

    def test_and_the_same_sampler_goes_on_however_it_is_asked_for(self, workdir, tmp_path):
        write_samples(jax_ddpm.load(workdir), tmp_path / "folder", 4)
        same = jax_ddpm.load(workdir, num_steps=8, guidance_scale=1)
        write_samples(same, tmp_path / "folder", 6)
        assert len(list((tmp_path / "folder").iterdir())) == 6

    def test_moments_are_at_most_the_steps_taken(self, workdir, tmp_path):
        run = jax_ddpm.load(workdir, num_steps=3)
        write_samples(run, tmp_path / "three.png", 2, moments=3)
        with pytest.raises(UserError, match=r"--progressive=4: .* at most 3 moments"):
            write_samples(run, tmp_path / "four.png", 2, moments=4)


class TestOptimalVariance:
    """The statistic lies beside the parameters."""

    @staticmethod
    def store(workdir, mse):
        statistic = {"log_snr": [-10.0, 10.0], "mse": mse}
        of = {"sha256": digest(np.array([*statistic.values()]))}
        of["model"] = {"sha256": jax_ddpm.load(workdir).record["sha256"]}
        x0_error_path(workdir, 2, "ema").write_text(json.dumps(of | statistic))

    def test_needs_the_statistic(self, make):
        with pytest.raises(UserError, match=r"sampling\.variance=optimal: .* is missing"):
            jax_ddpm.load(make(), variance="optimal")

    def test_draws_and_is_recorded_by_the_statistic(self, make):
        workdir = make()
        runs = []
        for power in ([1.0, 0.0], [1.0, 0.0], [0.9, 0.0]):
            self.store(workdir, power)
            runs.append(jax_ddpm.load(workdir, variance="optimal"))
        one, again, other = runs
        assert one.record == again.record != other.record
        assert one.model_record == other.model_record
        np.testing.assert_array_equal(one.sample(4), again.sample(4))
        assert np.any(one.sample(4) != other.sample(4))

    def test_leaves_the_checkpoint_whole(self, make):
        """Its manifest speaks of the parameters; a warning would be an error here."""
        workdir = make()
        self.store(workdir, [1.0, 0.0])
        assert jax_ddpm.load(workdir).step == 2
