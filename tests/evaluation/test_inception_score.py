"""The inception score at its extremes, against its definition and against torch-fidelity."""

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.inception_score import inception_score


@pytest.fixture
def logits():
    return 3 * np.random.default_rng(0).standard_normal((103, 7))


def by_definition(logits):
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    marginal = p.mean(axis=0)
    return np.exp(
        np.mean([sum(q * np.log(q / r) for q, r in zip(x, marginal, strict=True)) for x in p])
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_split_is_the_definition(logits, dtype):
    logits = logits.astype(dtype)
    value, std = inception_score(logits, splits=1)
    assert value == pytest.approx(by_definition(logits.astype(float)), rel=1e-12)
    assert std == 0


def test_mean_and_std_over_consecutive_parts(logits):
    parts = [
        by_definition(part) for part in (logits[:25], logits[25:51], logits[51:77], logits[77:])
    ]
    np.testing.assert_allclose(
        inception_score(logits, splits=4), (np.mean(parts), np.std(parts)), rtol=1e-12
    )


@pytest.mark.parametrize("level", [0.0, 1e4])
def test_is_1_where_the_classifier_sees_nothing(level):
    np.testing.assert_allclose(inception_score(np.full((40, 9), level)), (1, 0), atol=1e-12)


@pytest.mark.parametrize("classes", [2, 10])
def test_is_the_number_of_classes_that_are_certain_and_balanced(classes):
    """It is so even where other probabilities are too small for a float."""
    logits = np.tile(2e3 * np.eye(classes), (30, 1))
    np.testing.assert_allclose(inception_score(logits, splits=10), (classes, 0), atol=1e-9)


def test_sees_only_the_classes_that_occur():
    logits = np.tile(2e3 * np.eye(10)[:4], (30, 1))
    assert inception_score(logits).value == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
def test_lies_between_1_and_the_number_of_classes(logits, scale):
    assert 1 <= inception_score(scale * logits).value <= 7


def test_a_constant_added_to_all_logits_changes_nothing(logits):
    moved = logits + np.linspace(-500, 500, len(logits))[:, None]
    np.testing.assert_allclose(inception_score(moved), inception_score(logits), rtol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_torch_fidelity(logits):
    oracle = pytest.importorskip("torch_fidelity.metric_isc", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    found = oracle.isc_features_to_metric(torch.tensor(logits), splits=10, shuffle=False)
    np.testing.assert_allclose(inception_score(logits), [*found.values()], rtol=1e-9)


def test_refuses_what_it_cannot_measure(logits):
    with pytest.raises(UserError, match=r"10 samples or more; there are 9"):
        inception_score(logits[:9])
    logits[5, 2] = np.inf
    with pytest.raises(UserError, match="1 of the 721 values of the logits are not finite"):
        inception_score(logits)
