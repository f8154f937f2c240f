"""How a model can be sampled is checked against the model, in one line that names the field."""

import math

import pytest
import tiny

from jax_ddpm.errors import UserError
from jax_ddpm.validation import validate, validate_sampling


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
    for check in ((validate, 1), (validate_sampling,)):
        message = the_error(*check, sampling__guidance_scale=value, **fields)
        assert f"config.sampling.guidance_scale is {value}; it must be 1" in message


@pytest.mark.parametrize("fields", UNGUIDED.values(), ids=UNGUIDED)
def test_every_model_can_be_sampled_without_guidance(fields):
    validate(tiny.config(**fields), 1)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 2.0, 100.0])
def test_a_conditional_model_with_dropped_labels_can_be_guided(value):
    validate(tiny.config(model__class_conditional=True, sampling__guidance_scale=value), 1)


@pytest.mark.parametrize("value", [-0.1, -2.0, math.nan, math.inf])
def test_scales_that_mean_nothing_are_refused(value):
    """An infinite one too: it leads to images of NaN, which are drawn as black."""
    fields = {"model__class_conditional": True, "sampling__guidance_scale": value}
    message = the_error(validate, 1, **fields)
    assert f"config.sampling.guidance_scale is {value}; " in message
