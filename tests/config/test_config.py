"""Every config holds together, and every mistake is one line that names the field."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.config import default, rules
from jax_ddpm.config.fields import fields
from jax_ddpm.config.validation import validate
from jax_ddpm.errors import UserError
from jax_ddpm.options import kind_of
from jax_ddpm.tasks.table import make_model

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


def load(path):
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config()


def named(name):
    (path,) = [path for path in CONFIGS if path.stem == name]
    return load(path)


def validate_for_data(config, shape, num_classes):
    """What the data decides is checked by building the model."""
    make_model(config, tiny.spec(shape, num_levels=256, num_classes=num_classes))


def meaning(config):
    """The meaning of the network's output and input."""
    fields = config.parameterisation
    return fields.target, fields.variance, fields.condition_on, fields.normalise_input


@pytest.mark.parametrize("num_devices", [1, 4, 8])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid(path, num_devices):
    """Eight devices are a TPU v3-8 or one box of GPUs."""
    validate(load(path), num_devices)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_set_only_fields_that_exist(path):
    config = load(path)
    assert config.to_dict().keys() == default().to_dict().keys()
    for section, held in default().to_dict().items():
        if isinstance(held, dict):
            assert config[section].to_dict().keys() == held.keys()


DIGITS = {  # name → samples' classes, chain length (0: none), evaluations
    "digits": (0, 1000, 1000),
    "digits_conditional": (10, 1000, 1000),
    "digits_v": (10, 1000, 50),
    "digits_edm": (10, 0, 35),
    "digits_flow": (10, 0, 34),
    "digits_self_conditioned": (10, 0, 50),
    "digits_ve": (10, 0, 200),
}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_configs_fit_their_data(name):
    config = named(name)
    num_classes, num_timesteps, num_evaluations = DIGITS[name]
    model = factory.Model(config, factory.make_source(config).spec)
    assert model.conditions.attributes.get("num_classes", 0) == num_classes
    assert model.process.num_timesteps == num_timesteps
    assert model.sampler().num_evaluations == num_evaluations


def test_digits_have_the_standard_deviation_that_their_configs_say():
    source = factory.make_source(named("digits"))
    images = source.batch("train", np.arange(source.spec.split_sizes["train"]))["image"]
    std = np.std(images / (source.spec.num_levels - 1) * 2 - 1)
    for name in DIGITS:
        config = named(name)
        if config.parameterisation.normalise_input:
            np.testing.assert_allclose(config.parameterisation.data_std, std, atol=0.01)


@pytest.mark.parametrize(
    ("name", "heldout", "shape"),
    [("digits_classifier", 359, (8, 8, 1)), ("fashion_mnist_classifier", 10_000, (28, 28, 1))],
)
def test_classifiers_have_few_features_and_are_measured_on_all_held_out_images(
    name, heldout, shape
):
    config = named(name)
    validate_for_data(config, shape, num_classes=10)
    network = make_model(config, tiny.spec(shape, num_classes=10)).network
    params = network.init(jax.random.key(0))
    assert params["logits"]["kernel"].shape == (64, 10)
    assert config.training.heldout_examples >= heldout


def test_cifar10_is_the_papers_recipe():
    """Ho et al. 2020, appendix B, and their code."""
    config = named("cifar10")
    validate_for_data(config, (32, 32, 3), num_classes=10)
    model, process, training = config.model, config.process, config.training
    assert (model.base_channels, model.channel_multipliers) == (128, (1, 2, 2, 2))
    assert (model.num_res_blocks, model.attention_resolutions) == (2, (16,))
    assert (model.num_groups, model.dropout, model.class_conditional) == (32, 0.1, False)
    assert (process.name, process.num_timesteps) == ("linear", 1000)
    assert (process.beta_start, process.beta_end) == (1e-4, 0.02)
    assert meaning(config) == ("eps", "fixedlarge", "time", False)
    assert (config.loss.kind, config.loss.weighting) == ("error", "simple")
    assert config.loss.time_sampler == "uniform"
    assert (training.learning_rate, training.warmup_steps, training.decay) == (
        2e-4, 5000, "constant",
    )  # fmt: skip
    assert (training.adam_b1, training.adam_b2, training.adam_eps) == (0.9, 0.999, 1e-8)
    assert (training.grad_clip, training.ema_decay) == (1, 0.9999)
    assert (training.batch_size, training.num_steps) == (128, 800_000)
    assert config.data.flip
    assert config.sampling.clip

    network = factory.Model(config, tiny.spec((32, 32, 3), num_levels=256)).network
    params = network.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307


def the_error(check, *args, **fields):
    with pytest.raises(UserError) as caught:
        check(tiny.config(**fields), *args)
    message = str(caught.value)
    assert "\n" not in message
    return message


BAD = [
    ("task", "classify"),
    ("seed", -1),
    ("seed", 2**32),
    ("parallel", "pjit"),
    ("fsdp", 0),
    ("fsdp", 3),  # of four devices
    ("data.resident_gigabytes", -1.0),
    ("model.remat", "everything"),
    ("training.steps_per_dispatch", 0),
    ("data.source", "mnist"),
    ("data.image_size", 32),  # of the digits
    ("data.shift", 1),  # of a diffusion model
    ("model.dtype", "float16"),
    ("model.base_channels", 0),
    ("model.channel_multipliers", ()),
    ("model.channel_multipliers", (1, 0)),
    ("model.num_res_blocks", 0),
    ("model.num_groups", 3),
    ("model.num_groups", 16),
    ("model.dropout", 1.0),
    ("model.dropout", -0.1),
    ("process.name", "linaer"),
    ("process.num_timesteps", 1),
    ("process.sigma_min", 0.0),
    ("process.sigma_max", float("inf")),
    ("process.shift", 0.0),
    ("process.shift", float("inf")),
    ("parameterisation.target", "epsilon"),
    ("parameterisation.variance", "large"),
    ("parameterisation.condition_on", "sigma"),
    ("parameterisation.data_std", 0.0),
    ("loss.kind", "mse"),
    ("loss.weighting", "snr2"),
    ("loss.bound_weight", -1.0),
    ("loss.time_sampler", "normal"),
    ("loss.time_std", 0.0),
    ("training.num_steps", 0),
    ("training.batch_size", 6),  # over four devices
    ("training.accumulate", 0),
    ("training.learning_rate", 0.0),
    ("training.learning_rate", float("nan")),
    ("training.warmup_steps", -1),
    ("training.decay", "linear"),
    ("training.adam_b1", 1.0),
    ("training.adam_b2", 1.0),
    ("training.adam_eps", -1e-8),
    ("training.grad_clip", 0.0),
    ("training.ema_decay", 1.0),
    ("training.label_drop", 1.1),
    ("training.log_every", 0),
    ("training.heldout_every", 0),
    ("training.heldout_examples", 0),
    ("training.sample_every", -5),
    ("training.checkpoint_every", 0),
    ("training.keep_last", 0),
    ("training.keep_every", -1),
    ("sampling.num_samples", 0),
    ("sampling.batch_size", 0),
    # of another kind
    ("training.num_steps", True),
    ("model.channel_multipliers", (1.5,)),
    ("model.channel_multipliers", (True, 2)),
    ("model.attention_resolutions", (4.0,)),
    ("training.learning_rate", float("inf")),
    ("loss.time_mean", float("nan")),
    ("training.batch_size", None),
    ("training.learning_rate", None),
    ("model.class_conditional", None),
    ("data.path", None),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=str)
def test_bad_value_is_one_line_naming_the_field(field, value):
    message = the_error(validate, 4, **{field.replace(".", "__"): value})
    assert f"config.{field} is {value}" in message.replace("'", "")


# What a large number of does no harm: it is only ever the lesser of two, or the work wanted.
ENDLESS = {
    *(f"training.{name}" for name in ("num_steps", "warmup_steps", "keep_last", "keep_every")),
    *(f"training.{name}_every" for name in ("log", "heldout", "sample", "checkpoint")),
    *("training.heldout_examples", "seed"),
}


@pytest.mark.parametrize(
    "field", [name for name, option in fields().items() if kind_of(option) is int]
)
def test_a_number_that_no_machine_has_memory_for_is_one_line(field):
    config = {field.replace(".", "__"): 10**9}
    if field in ENDLESS:
        validate(tiny.config(**config), 4)
    else:
        the_error(validate, 4, **config)


@pytest.mark.parametrize(
    "multipliers", [(1.5,), (1, 10**9), (1,) * 9, (), ("1",), (True,)], ids=str
)
def test_levels_that_cannot_be_are_one_line(multipliers):
    def build(config):
        validate(config, 4)
        validate_for_data(config, (64, 64, 3), num_classes=0)

    assert "config.model.channel_multipliers" in the_error(
        build, model__channel_multipliers=multipliers, model__attention_resolutions=()
    )


def test_several_processes_go_without_pmap(monkeypatch):
    monkeypatch.setattr(rules, "several", lambda: True)
    assert "config.parallel is 'pmap'" in the_error(validate, 4, parallel="pmap")
    validate(tiny.config(), 4)


NOT_TOGETHER = {
    "rising_noise": (
        {"process.name": "edm", "process.sigma_max": 0.002, "sampling.num_steps": 4},
        "config.process.sigma_max is 0.002",
    ),
    "pmap_of_shared_state": ({"fsdp": 2, "parallel": "pmap"}, "config.fsdp"),
    "npz_of_what": ({"data.source": "npz"}, "config.data.path"),
    "idx_of_what": ({"data.source": "idx"}, "config.data.path"),
    "cifar10_from_where": ({"data.source": "cifar10"}, "config.data.path"),
    "folder_of_what": ({"data.source": "folder"}, "config.data.path"),
    "tfds_of_what": ({"data.source": "tfds", "data.path": "somewhere"}, "config.data.name"),
    "negative_size": (
        {"data.source": "folder", "data.path": "somewhere", "data.image_size": -1},
        "config.data.image_size",
    ),
    "size_of_an_npz": (
        {"data.source": "npz", "data.path": "some.npz", "data.image_size": 32},
        "config.data.image_size",
    ),
    "names_of_the_digits": ({"data.class_names": ("nought",)}, "config.data.class_names"),
    "two_classes_of_one_name": (
        {"data.source": "npz", "data.path": "some.npz", "data.class_names": ("cat", "cat")},
        "config.data.class_names",
    ),
    "numbers_for_names": (
        {"data.source": "npz", "data.path": "some.npz", "data.class_names": (1, 2)},
        "config.data.class_names",
    ),
    "shift_backwards": ({"task": "classification", "data.shift": -1}, "config.data.shift"),
    "classifier_that_is_told": (
        {"task": "classification", "model.class_conditional": True},
        "config.model.class_conditional",
    ),
    "no_signal_but_eps": ({"process.name": "jsd", "parameterisation.target": "eps"}, "target"),
    "hybrid_of_fixed": ({"loss.kind": "hybrid"}, "loss.kind"),
    "error_of_learned": ({"parameterisation.variance": "learned_range"}, "loss.kind"),
    "too_narrow_to_embed_times": (
        {"model.base_channels": 2, "model.num_groups": 2},
        "base_channels",
    ),
    "accumulate_does_not_divide": ({"training.accumulate": 3}, "training.accumulate"),
    "log_normal_times_of_a_chain": ({"loss.time_sampler": "log_normal"}, "loss.time_sampler"),
    "beta_over_1": ({"process.name": "linear", "process.num_timesteps": 10}, "config.process"),
    "negative_beta": ({"process.name": "linear", "process.beta_start": -1e-4}, "config.process"),
}


@pytest.mark.parametrize(("fields", "named"), NOT_TOGETHER.values(), ids=NOT_TOGETHER)
def test_fields_that_contradict_each_other_are_one_line(fields, named):
    fields = {"process.num_timesteps": 1000} | fields
    assert named in the_error(validate, 1, **{k.replace(".", "__"): v for k, v in fields.items()})


@pytest.mark.parametrize(
    ("field", "value", "shape"),
    [
        ("model.channel_multipliers", (1, 2, 2), (10, 8, 1)),
        ("model.channel_multipliers", (1, 2, 2), (8, 10, 1)),
        ("model.attention_resolutions", (16,), (8, 8, 1)),
        ("model.attention_resolutions", (4, 2), (8, 8, 1)),
        ("model.class_conditional", True, (8, 8, 1)),
        ("task", "classification", (8, 8, 1)),
    ],
    ids=str,
)
def test_what_the_data_does_not_allow_is_one_line_naming_the_field(field, value, shape):
    fields = {"model__attention_resolutions": (), field.replace(".", "__"): value}
    message = the_error(validate_for_data, shape, 0, **fields)
    assert f"config.{field}" in message


def test_names_for_some_of_the_classes_are_one_line(tmp_path):
    path, names = str(tmp_path / "some.npz"), ("cat", "dog")
    np.savez(path, train_images=np.zeros((20, 2, 2), np.uint8), train_labels=np.arange(20) % 3)
    fields = {"data__source": "npz", "data__path": path, "data__class_names": names}
    message = the_error(factory.make_source, **fields)
    assert message.startswith("config.data.class_names is ('cat', 'dog'); it must be one name for")


@pytest.mark.parametrize("source", sorted(factory.SOURCES))
def test_every_source_can_be_chosen(source):
    validate(tiny.config(data__source=source, data__path="somewhere", data__name="some_set"), 1)


CONTINUOUS = ["vp_linear", "vp_cosine", "vp_sigmoid", "ve", "edm", "rectified_flow"]
OF_CHAINS = {
    "process.zero_terminal_snr": True,
    "parameterisation.target": "posterior_mean",
    "parameterisation.variance": "learned_range",
    "loss.kind": "bound",
    "loss.weighting": "vlb",
    "loss.time_sampler": "loss_second_moment",
}


def continuous(name, **fields):
    """A valid config of the process."""
    fields = {"process.name": name, "parameterisation.target": "v", "sampling.num_steps": 4} | {
        field.replace("__", "."): value for field, value in fields.items()
    }
    return {field.replace(".", "__"): value for field, value in fields.items()}


class TestContinuousTime:
    @pytest.mark.parametrize("name", CONTINUOUS)
    @pytest.mark.parametrize("field", OF_CHAINS)
    def test_has_nothing_that_only_a_chain_has(self, name, field):
        fields = continuous(name, **{field: OF_CHAINS[field]})
        message = the_error(validate, 1, **fields)
        assert message.startswith(f"config.{field} is {OF_CHAINS[field]!r}; ")
        assert name in message

    @pytest.mark.parametrize("name", CONTINUOUS)
    @pytest.mark.parametrize("kind", ["bound", "hybrid"])
    def test_has_no_bound_to_train_a_variance_by(self, name, kind):
        fields = continuous(name, loss__kind=kind, parameterisation__variance="learned")
        assert the_error(validate, 1, **fields).startswith(f"config.loss.kind is '{kind}'; ")

    @pytest.mark.parametrize("name", CONTINUOUS)
    @pytest.mark.parametrize(
        "time_sampler", ["uniform", "stratified", "log_normal", "logit_normal"]
    )
    def test_has_times_of_its_own_range(self, name, time_sampler):
        """Log-normal ones are σ, which has no end; logit-normal ones lie in (0, 1)."""
        fields = continuous(name, loss__time_sampler=time_sampler)
        if (time_sampler, name == "edm") in [("log_normal", False), ("logit_normal", True)]:
            message = the_error(validate, 1, **fields)
            assert message.startswith(f"config.loss.time_sampler is '{time_sampler}'; ")
        else:
            validate(tiny.config(**fields), 1)

    @pytest.mark.parametrize("end", ["beta_start", "beta_end"])
    @pytest.mark.parametrize("value", [0.0, -1e-4, float("inf")])
    def test_has_a_positive_beta(self, end, value):
        fields = continuous("vp_linear", **{f"process.{end}": value})
        message = the_error(validate, 1, **fields)
        assert message.startswith("config.process: ")
        assert str(value) in message


NO_SIGNAL = {
    "jsd": {"process__name": "jsd"},
    "zero_terminal_snr": {"process__zero_terminal_snr": True},
    "rectified_flow": {"process__name": "rectified_flow", "sampling__num_steps": 4},
}


@pytest.mark.parametrize("fields", NO_SIGNAL.values(), ids=NO_SIGNAL)
@pytest.mark.parametrize("target", ["eps", "score"])
def test_where_a_process_ends_without_signal_eps_tells_nothing(fields, target):
    message = the_error(validate, 1, parameterisation__target=target, **fields)
    assert message.startswith(f"config.parameterisation.target is '{target}'; ")
    assert "without signal" in message


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_models_are_told_apart_by_one_line_where_a_chain_is_needed(name):
    config = tiny.config(**continuous(name))
    with pytest.raises(UserError, match="no chain") as caught:
        _ = factory.Model(config, tiny.spec()).chain
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["x0", "v"])
@pytest.mark.parametrize("variance", ["fixedsmall", "learned_range"])
def test_valid_combinations_pass(target, variance):
    kind = "hybrid" if variance == "learned_range" else "error"
    validate(
        tiny.config(
            process__name="jsd",
            parameterisation__target=target,
            parameterisation__variance=variance,
            loss__kind=kind,
        ),
        num_devices=4,
    )


PAPERS_256 = {  # steps, flips: Ho et al. 2020, appendix B
    "celebahq256": (500_000, True),
    "lsun_bedroom": (2_400_000, False),
    "lsun_cat": (1_800_000, True),
    "lsun_church": (1_200_000, True),
}


@pytest.mark.parametrize("name", PAPERS_256)
def test_256_pixels_are_the_papers_recipe(name):
    config = named(name)
    validate_for_data(config, (256, 256, 3), num_classes=0)
    model, process, training = config.model, config.process, config.training
    assert (training.num_steps, config.data.flip) == PAPERS_256[name]
    assert (config.data.source, config.data.image_size) == ("folder", 256)
    assert (model.base_channels, model.channel_multipliers) == (128, (1, 1, 2, 2, 4, 4))
    assert (model.num_res_blocks, model.attention_resolutions) == (2, (16,))
    assert (model.num_groups, model.dropout, model.class_conditional) == (32, 0.0, False)
    assert (process.name, process.num_timesteps) == ("linear", 1000)
    assert (process.beta_start, process.beta_end) == (1e-4, 0.02)
    assert meaning(config) == ("eps", "fixedsmall", "time", False)
    assert (config.loss.kind, config.loss.weighting) == ("error", "simple")
    assert config.loss.time_sampler == "uniform"
    assert (training.learning_rate, training.warmup_steps, training.decay) == (
        2e-5, 5000, "constant",
    )  # fmt: skip
    assert (training.batch_size, training.grad_clip, training.ema_decay) == (64, 1, 0.9999)


def test_256_pixels_take_the_papers_114_million_parameters():
    """The published weights have as many."""
    config = named("celebahq256")
    spec = tiny.spec((256, 256, 3), num_levels=256)
    network = factory.Model(config, spec).network
    params = network.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 113_673_219


@pytest.mark.parametrize(
    ("name", "shape"), [("fashion_mnist", (28, 28, 1)), ("folder64", (64, 64, 3))]
)
def test_other_configs_fit_their_images(name, shape):
    config = named(name)
    validate_for_data(config, shape, num_classes=10)
    assert config.data.image_size in (0, shape[0])
