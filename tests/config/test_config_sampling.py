"""How a model can be sampled is checked against the model, in one line that names the field.

And what is allowed draws images.
"""

import itertools
import math

import jax
import numpy as np
import pytest
import tiny

from jax_ddpm.config.validation import validate, validate_sampling
from jax_ddpm.diffusion.processes import over_the_range_of
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.errors import UserError
from jax_ddpm.tasks.table import make_model

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


def validate_for_data(config, shape, num_classes):
    """What the data decides is checked by building the model."""
    make_model(config, tiny.spec(shape, num_levels=256, num_classes=num_classes))


def the_error(check, *args, **fields):
    with pytest.raises(UserError) as caught:
        check(tiny.config(**fields), *args)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [-1, -8, 9, 1000])
def test_steps_are_at_most_those_of_the_chain(value):
    for check in ((validate, 1), (validate_sampling,)):
        message = the_error(*check, sampling__num_steps=value)
        assert f"config.sampling.num_steps is {value}; " in message
        assert "process.num_timesteps = 8" in message


@pytest.mark.parametrize("value", [0, 1, 2, 7, 8])
def test_any_number_up_to_the_chains_passes(value):
    validate(tiny.config(sampling__num_steps=value), 1)


UNGUIDED = {
    "unconditional": {},
    "always_told_the_class": {"model__class_conditional": True, "training__label_drop": 0.0},
    "dropped_but_unconditional": {"training__label_drop": 0.5},
}


@pytest.mark.parametrize("fields", UNGUIDED.values(), ids=UNGUIDED)
@pytest.mark.parametrize("value", [0.0, 0.5, 2.0, -1.0])
def test_guidance_needs_a_model_that_knows_both(fields, value):
    """Scale 0 as well: a model that was always told the class has never seen the null label."""
    message = the_error(make_model, tiny.spec((8, 8, 1)), sampling__guidance_scale=value, **fields)
    assert f"config.sampling.guidance_scale is {value}; it must be 1" in message


@pytest.mark.parametrize("fields", UNGUIDED.values(), ids=UNGUIDED)
def test_every_model_can_be_sampled_without_guidance(fields):
    config = tiny.config(**fields)
    validate(config, 1)
    make_model(config, tiny.spec((8, 8, 1)))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 2.0, 100.0])
def test_a_conditional_model_with_dropped_labels_can_be_guided(value):
    config = tiny.config(model__class_conditional=True, sampling__guidance_scale=value)
    validate(config, 1)
    make_model(config, tiny.spec((8, 8, 1)))


@pytest.mark.parametrize("value", [-0.1, -2.0, math.nan, math.inf])
def test_scales_that_mean_nothing_are_refused(value):
    """An infinite one too: it leads to images of NaN, which are drawn as black."""
    fields = {"model__class_conditional": True, "sampling__guidance_scale": value}
    message = the_error(validate, 1, **fields)
    assert f"config.sampling.guidance_scale is {value}; " in message


SAMPLERS = {  # with the options that each takes
    "ancestral": {"variance": "fixedsmall"},
    "ddim": {"eta": 0.5},
    "euler": {},
    "heun": {"churn": 1.0, "churn_range": (0.1, 1.0), "churn_noise": 1.01},
    "dpmpp_2m": {},
    "dpmpp_2m_sde": {"eta": 0.5},
    "unipc": {"order": 3},
    "predictor_corrector": {"snr": 0.1, "corrector_steps": 2},
}
GRIDS = ["uniform", "quadratic", "karras", "log_snr"]


class TestNames:
    @pytest.mark.parametrize(
        ("field", "known"),
        [("sampler", SAMPLERS), ("grid", ["''", *GRIDS])],
        ids=["sampler", "grid"],
    )
    def test_unknown_ones_list_the_known(self, field, known):
        message = the_error(validate_sampling, **{f"sampling__{field}": "kutta"})
        assert message.startswith(f"config.sampling.{field} is 'kutta'; ")
        assert message.endswith(f"one of {', '.join(known)}")

    @pytest.mark.parametrize("name", ["kutta", "cosine"])
    def test_a_process_to_sample_under_is_one_of_continuous_time(self, name):
        message = the_error(validate_sampling, sampling__process=name, sampling__num_steps=3)
        assert message.startswith(f"config.sampling.process is '{name}'; ")
        assert message.endswith(f"one of '', {', '.join(CONTINUOUS)}")


class TestOptions:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_are_taken_by_their_sampler(self, sampler):
        fields = {f"sampling__{name}": value for name, value in SAMPLERS[sampler].items()}
        validate_sampling(tiny.config(sampling__sampler=sampler, **fields))

    @pytest.mark.parametrize(("owner", "sampler"), [*itertools.permutations(SAMPLERS, 2)])
    def test_of_another_sampler_are_refused_naming_it(self, owner, sampler):
        for name, value in SAMPLERS[owner].items():
            if name in SAMPLERS[sampler]:
                continue
            fields = {"sampling__sampler": sampler, f"sampling__{name}": value}
            message = the_error(validate_sampling, **fields)
            assert f"config.sampling.{name} is {value!r}; it must be left out" in message
            assert owner in message.partition("it is for ")[2].split(", ")

    @pytest.mark.parametrize(
        ("sampler", "name", "value"),
        [
            ("ancestral", "variance", "learned"),
            ("ancestral", "variance", "beta"),
            ("ddim", "eta", -0.1),
            ("ddim", "eta", 1.1),
            ("dpmpp_2m_sde", "eta", math.nan),
            ("heun", "churn", -1.0),
            ("heun", "churn", math.inf),
            ("heun", "churn_noise", -1.0),
            ("heun", "churn_noise", math.nan),
            ("heun", "churn_range", (1.0, 0.1)),
            ("heun", "churn_range", (1.0,)),
            ("heun", "churn_range", (0.1, 1.0, 2.0)),
            ("heun", "churn_range", (-0.1, 1.0)),
            ("heun", "churn_range", ("a", "b")),
            ("unipc", "order", 0),
            ("unipc", "order", 5),
            ("predictor_corrector", "snr", 0.0),
            ("predictor_corrector", "snr", math.inf),
            ("predictor_corrector", "corrector_steps", -1),
        ],
        ids=str,
    )
    def test_out_of_their_range_are_refused(self, sampler, name, value):
        fields = {"sampling__sampler": sampler, f"sampling__{name}": value}
        assert f"config.sampling.{name} is {value!r}; " in the_error(validate_sampling, **fields)

    @pytest.mark.parametrize(
        ("sampler", "name", "value"),
        [
            ("ancestral", "variance", "fixedlarge"),
            ("ancestral", "variance", "optimal"),
            ("ddim", "eta", 0.0),
            ("ddim", "eta", 1.0),
            ("heun", "churn", 0.0),
            ("heun", "churn_range", (0.0, math.inf)),
            ("unipc", "order", 1),
            ("unipc", "order", 4),
            ("predictor_corrector", "corrector_steps", 0),
        ],
        ids=str,
    )
    def test_at_its_ends_pass(self, sampler, name, value):
        fields = {"sampling__sampler": sampler, f"sampling__{name}": value}
        validate_sampling(tiny.config(**fields))

    def test_the_optimal_variance_is_not_for_training(self):
        """Training would have to sample a model whose optimal variance is not known."""
        message = the_error(validate, 1, sampling__variance="optimal")
        assert message.startswith("config.sampling.variance is 'optimal'; ")


LEARNED = {"parameterisation__variance": "learned", "loss__kind": "hybrid"}
NOT_EVERY_STEP = {
    "num_steps": {"num_steps": 4},
    "grid": {"grid": "quadratic"},
    "times": {"times": (7.0, 3.0)},
    "process": {"process": "vp_cosine", "num_steps": 8},
}


class TestLearnedLogVariances:
    """They belong to single steps of the chain."""

    @pytest.mark.parametrize("field", NOT_EVERY_STEP)
    def test_are_not_for_other_steps(self, field):
        fields = {f"sampling__{name}": value for name, value in NOT_EVERY_STEP[field].items()}
        message = the_error(validate_sampling, **LEARNED, **fields)
        assert message.startswith(f"config.sampling.{field} is {NOT_EVERY_STEP[field][field]!r}; ")
        assert "single steps" in message

    @pytest.mark.parametrize("field", NOT_EVERY_STEP)
    @pytest.mark.parametrize("other", [{"sampler": "ddim"}, {"variance": "fixedsmall"}], ids=str)
    def test_do_not_matter_where_they_are_not_drawn(self, field, other):
        fields = {f"sampling__{k}": v for k, v in (NOT_EVERY_STEP[field] | other).items()}
        validate(tiny.config(**LEARNED, **fields), 1)

    @pytest.mark.parametrize("num_steps", [0, 8])
    def test_are_for_all_of_the_chain(self, num_steps):
        validate(tiny.config(**LEARNED, sampling__num_steps=num_steps), 1)


class TestTimes:
    @pytest.mark.parametrize("times", [(7.0, 3.0, 0.0), (7, 6), (2.5,), ()], ids=str)
    def test_of_the_process_fall(self, times):
        validate(tiny.config(sampling__times=times), 1)

    @pytest.mark.parametrize(
        "times",
        [(3.0, 7.0), (7.0, 7.0), (8.0, 1.0), (7.0, -1.0), (math.nan,), (7.0, math.nan), ("a",)],
        ids=str,
    )
    def test_else_are_refused(self, times):
        message = the_error(validate_sampling, sampling__times=times)
        assert message.startswith(f"config.sampling.times is {times}; ")

    def test_are_those_of_the_process_that_was_trained(self):
        fields = {"sampling__process": "edm", "sampling__num_steps": 2}
        message = the_error(validate_sampling, sampling__times=(7.0, 3.0), **fields)
        assert message.startswith("config.sampling.times is (7.0, 3.0); it must be empty")

    def test_need_no_number_of_steps(self):
        validate(tiny.config(process__name="edm", sampling__times=(80.0, 1.0)), 1)


@pytest.mark.parametrize("name", ["num_samples", "batch_size"])
def test_of_a_trained_model_too_at_least_one_image_is_drawn(name):
    message = the_error(validate_sampling, **{f"sampling__{name}": 0})
    assert message == f"config.sampling.{name} is 0; it must be in [1, 1000000]"


CONTINUOUS = ["vp_linear", "vp_cosine", "vp_sigmoid", "ve", "edm", "rectified_flow"]


class TestNumSteps:
    """Only a chain gives a number of steps by itself."""

    @pytest.mark.parametrize("name", CONTINUOUS)
    def test_is_needed_in_continuous_time(self, name):
        fields = {"process__name": name, "parameterisation__target": "v"}
        for value in (0, -3):
            message = the_error(validate, 1, sampling__num_steps=value, **fields)
            assert message.startswith(f"config.sampling.num_steps is {value}; it must be 1 or more")
        validate(tiny.config(sampling__num_steps=1, **fields), 1)

    @pytest.mark.parametrize("name", CONTINUOUS)
    def test_is_needed_to_sample_in_continuous_time(self, name):
        message = the_error(validate_sampling, sampling__process=name)
        assert message.startswith("config.sampling.num_steps is 0; it must be 1 or more")
        validate(tiny.config(sampling__process=name, sampling__num_steps=100), 1)

    @pytest.mark.parametrize("grid", GRIDS[1:])
    def test_may_exceed_a_chain_on_grids_between_its_steps(self, grid):
        validate(tiny.config(sampling__grid=grid, sampling__num_steps=100), 1)
        message = the_error(validate_sampling, sampling__grid=grid, sampling__num_steps=-1)
        assert message.startswith("config.sampling.num_steps is -1; it must be 1 or more")


GUIDED = {"model__class_conditional": True, "sampling__guidance_scale": 2.0}
GUIDE = {"sampling__guide": "runs/other", "sampling__guidance_scale": 2.0}


class TestGuidance:
    @pytest.mark.parametrize("guidance", ["classifier_free", "classifier", "autoguidance"])
    @pytest.mark.parametrize("conditional", [False, True])
    @pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
    def test_by_another_model_is_for_every_model_at_any_scale(self, guidance, conditional, scale):
        fields = {"sampling__guidance": guidance, "model__class_conditional": conditional}
        guide = "" if guidance == "classifier_free" else "runs/other"
        config = tiny.config(sampling__guide=guide, sampling__guidance_scale=scale, **fields)
        validate_sampling(config)
        if guide or conditional or scale == 1:
            make_model(config, tiny.spec((8, 8, 1)))
        else:
            with pytest.raises(UserError, match=r"config\.sampling\.guidance_scale is "):
                make_model(config, tiny.spec((8, 8, 1)))

    @pytest.mark.parametrize("guidance", ["classifier", "autoguidance"])
    @pytest.mark.parametrize("scale", [-1.0, math.inf, math.nan])
    def test_by_another_model_at_scales_that_mean_nothing_is_refused(self, guidance, scale):
        fields = GUIDE | {"sampling__guidance": guidance, "sampling__guidance_scale": scale}
        assert f"config.sampling.guidance_scale is {scale}; " in the_error(
            validate_sampling, **fields
        )

    @pytest.mark.parametrize("guidance", ["classifier", "autoguidance"])
    def test_by_another_model_names_it(self, guidance):
        message = the_error(validate_sampling, sampling__guidance=guidance)
        assert message.startswith("config.sampling.guide is ''; it must be the folder of a run")

    def test_without_another_model_names_none(self):
        message = the_error(validate_sampling, sampling__guide="runs/other")
        assert message.startswith("config.sampling.guide is 'runs/other'; it must be empty")
        message = the_error(validate_sampling, sampling__guide_step=5)
        assert message.startswith("config.sampling.guide_step is 5; it must be 0")

    def test_by_another_model_is_not_for_training(self):
        message = the_error(validate, 1, sampling__guidance="autoguidance", **GUIDE)
        assert message.startswith("config.sampling.guidance is 'autoguidance'; ")

    def test_by_no_known_model_lists_the_known(self):
        message = the_error(validate_sampling, sampling__guidance="clip")
        assert message.endswith("one of classifier_free, classifier, autoguidance")

    @pytest.mark.parametrize(
        ("name", "value"), [("guidance_interval", (0.1, 2.0)), ("guidance_rescale", 0.7)]
    )
    def test_is_edited_only_where_there_is_some(self, name, value):
        fields = {f"sampling__{name}": value}
        validate(tiny.config(**GUIDED, **fields), 1)
        validate_sampling(tiny.config(sampling__guidance="autoguidance", **GUIDE, **fields))
        message = the_error(validate, 1, model__class_conditional=True, **fields)
        assert message.startswith(f"config.sampling.{name} is {value}; it must be left out")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("guidance_interval", (2.0, 0.1)),
            ("guidance_interval", (1.0,)),
            ("guidance_interval", (-1.0, 1.0)),
            ("guidance_interval", ("a", "b")),
            ("guidance_rescale", -0.1),
            ("guidance_rescale", 1.1),
            ("guidance_rescale", math.nan),
            ("negative_class", -1),
        ],
        ids=str,
    )
    def test_is_not_edited_by_values_out_of_range(self, name, value):
        message = the_error(validate, 1, **GUIDED, **{f"sampling__{name}": value})
        assert message.startswith(f"config.sampling.{name} is {value!r}; ")

    @pytest.mark.parametrize("scale", [0.0, 1.0])
    def test_away_from_a_class_needs_a_scale_that_leads_away(self, scale):
        fields = GUIDED | {"sampling__negative_class": 1}
        validate(tiny.config(**fields), 1)
        message = the_error(validate, 1, **fields | {"sampling__guidance_scale": scale})
        assert message.startswith("config.sampling.negative_class is 1; it must be left out")

    def test_away_from_a_class_is_classifier_free(self):
        fields = {"sampling__guidance": "autoguidance", "sampling__negative_class": 1}
        message = the_error(validate_sampling, **GUIDE, **fields)
        assert message.startswith("config.sampling.negative_class is 1; it must be left out")

    @pytest.mark.parametrize(("label", "known"), [(0, True), (2, True), (3, False), (99, False)])
    def test_away_from_a_class_needs_the_data_to_have_it(self, label, known):
        """Class 3 of three is the null label."""
        fields = GUIDED | {"sampling__negative_class": label}
        if known:
            validate_for_data(tiny.config(**fields), (8, 8, 1), num_classes=3)
        else:
            message = the_error(validate_for_data, (8, 8, 1), 3, **fields)
            assert message.startswith(f"config.sampling.negative_class is {label}; ")
            assert message.endswith("0 to 2")


@pytest.mark.parametrize("value", [0.0, 0.995, 1.0])
def test_thresholds_are_quantiles(value):
    validate(tiny.config(sampling__dynamic_threshold=value), 1)


@pytest.mark.parametrize("value", [-0.1, 1.01, 99.5, math.nan])
def test_other_thresholds_are_refused(value):
    message = the_error(validate_sampling, sampling__dynamic_threshold=value)
    assert message.startswith(f"config.sampling.dynamic_threshold is {value}; ")


PROCESSES = {
    name: {"process__name": name}
    for name in (
        *("linear", "quad", "const", "warmup10", "warmup50", "sigmoid", "cosine", "jsd"),
        *CONTINUOUS,
    )
} | {
    "zero_terminal_snr": {"process__name": "linear", "process__zero_terminal_snr": True},
    "shifted": {"process__name": "vp_cosine", "process__shift": 2.0},
}
TARGETS = ["eps", "x0", "v", "score", "velocity", "edm", "posterior_mean"]
# They end in pure noise, where ε and what is read off it say nothing of x_0.
NO_SIGNAL = ["jsd", "zero_terminal_snr", "rectified_flow"]
CHAINS = [name for name in PROCESSES if name not in (*CONTINUOUS, "shifted")]


def settings(process, **fields):
    """Settings of a few steps, under a chain long enough for every schedule."""
    target = "v" if process in NO_SIGNAL else "eps"
    fields = {"process__num_timesteps": 100, "parameterisation__target": target} | fields
    return tiny.config(**PROCESSES[process], **{"sampling__num_steps": 4} | fields)


def assert_finite_images(batches):
    """Runs differ only in their nodes: each batch is ``[(model, nodes), …]``."""
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    keys = jax.random.split(jax.random.key(1), 2)
    models = [model for model, _ in batches[0]]

    @jax.jit
    def draw(params, nodes):
        return [
            sample(
                model.sampler()._replace(nodes=rows),
                model.guided_denoiser(params),
                model.sampling_process.prior_std(model.grid().now.time[0]) * noise,
                keys,
                {},
            )[0]
            for model, rows in zip(models, nodes, strict=True)
        ]

    params = models[0].network.init(jax.random.key(2))
    for batch in batches:
        for (model, _), images in zip(
            batch, draw(params, [nodes for _, nodes in batch]), strict=True
        ):
            assert np.all(np.isfinite(images)), model._sampling
            assert np.abs(images).max() <= 1
            assert np.any(images[0] != images[1])


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_takes_its_targets_and_no_others(process):
    models = []
    for target in TARGETS:
        config = settings(process, parameterisation__target=target)
        of_chains = target == "posterior_mean" and process not in CHAINS
        of_signal = process in NO_SIGNAL and target in ("eps", "score", "posterior_mean")
        if of_chains or of_signal:
            with pytest.raises(UserError, match=f"config.parameterisation.target is '{target}'"):
                validate(config, 1)
        else:
            config.sampling.sampler = "ddim"
            validate(config, 1)
            models.append(tiny.model(config, tiny.spec()))
    assert_finite_images([[(model, model.sampler().nodes) for model in models]])


def model_of(process, sampler, grid, **fields):
    config = settings(process, sampling__sampler=sampler, sampling__grid=grid, **fields)
    validate(config, 1)
    return tiny.model(config, tiny.spec())


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_has_finite_nodes_for_each_sampler_on_its_grids(process):
    """The grids include the sampler's default, "", which every process has."""
    for sampler, grid in itertools.product(SAMPLERS, ["", *GRIDS]):
        if process in NO_SIGNAL and grid in ("karras", "log_snr"):
            with pytest.raises(UserError, match=f"config.sampling.grid is '{grid}'; .* signal"):
                model_of(process, sampler, grid)
        else:
            nodes = model_of(process, sampler, grid).sampler().nodes
            for name, column in nodes._asdict().items():
                assert np.all(np.isfinite(column)), (sampler, grid, name)


OF_EACH_KIND = ["cosine", "zero_terminal_snr", "vp_linear", "ve", "edm", "rectified_flow"]


@pytest.mark.parametrize("process", OF_EACH_KIND)
def test_every_sampler_draws_images_on_every_grid(process):
    models = [
        [model_of(process, sampler, grid) for sampler in SAMPLERS]
        for grid in GRIDS[: 2 if process in NO_SIGNAL else 4]
    ]
    assert_finite_images(
        [[(model, model.sampler().nodes) for model in of_one_grid] for of_one_grid in models]
    )


@pytest.mark.parametrize("process", OF_EACH_KIND)
def test_every_model_can_be_sampled_under_every_continuous_process(process):
    models = [
        model_of(process, "dpmpp_2m_sde", "uniform", sampling__process=name) for name in CONTINUOUS
    ]
    for name, model in zip(CONTINUOUS, models, strict=True):
        assert model.sampling_process == over_the_range_of(model.process, name)
        assert model.grid().process is model.sampling_process
    assert_finite_images([[(model, model.sampler().nodes) for model in models]])
