"""Precision, recall, density and coverage against their definitions and what they are to show."""

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.manifold import precision_recall_density_coverage as measure


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng):
    return rng.standard_normal((60, 3)), rng.standard_normal((40, 3)) + 0.7


def by_definition(real, fake, k):
    def squared(x, y):
        return np.sum((x[:, None] - y[None]) ** 2, axis=-1)

    def radii(x):
        return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(squared(x, x))])

    near_real = squared(real, fake) <= radii(real)[:, None]
    near_fake = squared(real, fake) <= radii(fake)[None]
    return (
        near_real.any(axis=0).mean(),
        near_fake.any(axis=1).mean(),
        near_real.sum(axis=0).mean() / k,
        near_real.any(axis=1).mean(),
    )


@pytest.mark.parametrize("k", [1, 3, 5, 39])
def test_definitions(pair, k):
    np.testing.assert_allclose(measure(*pair, k=k), by_definition(*pair, k), rtol=1e-12)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_points_at_the_edge_and_copies_are_inside(rng, k, offset):
    """A grid has ties everywhere, and radii of 0; whole numbers make the definition exact."""
    real, fake = rng.integers(-2, 3, (200, 3)), rng.integers(-1, 4, (150, 3))
    found = measure(real + float(offset), (fake + offset).astype(np.float32), k=k, block=7)
    np.testing.assert_allclose(found, by_definition(real, fake, k), rtol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 40, 60, 1000])
def test_blocks_do_not_matter(pair, block):
    assert measure(*pair, block=block) == measure(*pair)


@pytest.mark.parametrize("k", [1, 5])
def test_equal_sets(rng, k):
    """Each point is in its own neighbourhood and in those of k others in the mean."""
    x = rng.standard_normal((200, 8))
    np.testing.assert_allclose(measure(x, x, k=k), (1, 1, (k + 1) / k, 1))


def test_equal_distributions(rng):
    found = measure(*rng.standard_normal((2, 1000, 4)))
    assert found.density == pytest.approx(1, abs=0.1)
    assert found.coverage == pytest.approx(1 - 1 / 2**5, abs=0.03)
    assert min(found.precision, found.recall) > 0.9


@pytest.mark.parametrize("distance", [100.0, 1e8])
def test_far_apart(pair, distance):
    real, fake = pair
    assert measure(real, fake + distance) == (0, 0, 0, 0)


def test_density_can_exceed_1():
    """The centre of a simplex is nearer to each of its 20 corners than these to each other."""
    found = measure(np.eye(20), np.full((10, 20), 1 / 20), k=5)
    assert found == (1, 0, pytest.approx(20 / 5), 1)


def test_a_dropped_mode_costs_recall_and_coverage_only(rng):
    real, fake = rng.standard_normal((2, 500, 4)) + 20 * rng.integers(0, 2, (2, 500, 1))
    whole, dropped = measure(real, fake), measure(real, fake[fake[:, 0] < 10])
    assert dropped.precision == pytest.approx(whole.precision, abs=0.05)
    assert dropped.recall == pytest.approx(whole.recall / 2, abs=0.05)
    assert dropped.coverage == pytest.approx(whole.coverage / 2, abs=0.05)


def test_a_few_far_samples_do_not_blur_the_others(pair):
    """Round-off grows with the distance; it must stay with those that are far."""
    real, fake = pair
    far = np.concatenate([fake, np.full((10, 3), 1e6)])
    near, among = measure(real, fake), measure(real, far)
    assert among.precision == pytest.approx(near.precision * 40 / 50)
    assert among.density == pytest.approx(near.density * 40 / 50)
    assert (among.recall, among.coverage) == (near.recall, near.coverage)


def test_invariances(rng, pair):
    real, fake = pair
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    for change in (lambda x: x @ axes, lambda x: x + 1e4, lambda x: x[::-1], lambda x: 1e-3 * x):
        assert measure(change(real), change(fake)) == measure(real, fake)


def test_exchanged_sets_exchange_precision_and_recall(pair):
    there, back = measure(*pair), measure(*pair[::-1])
    assert (there.precision, there.recall) == (back.recall, back.precision)


@pytest.mark.filterwarnings("ignore")
def test_torch_fidelity(pair):
    oracle = pytest.importorskip("torch_fidelity.metric_prc", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    real, fake = map(torch.tensor, pair)
    expected = oracle.calculate_precision_recall_full(fake, real, neighborhood=5)
    np.testing.assert_allclose(measure(*pair)[:2], expected, rtol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_refuses_what_it_cannot_measure(pair, which):
    few, broken = list(pair), list(pair)
    few[which] = few[which][:5]
    with pytest.raises(UserError, match="5 samples are too few for 5 neighbours"):
        measure(*few)
    broken[which] = np.where(np.arange(3) == 1, np.nan, broken[which])
    with pytest.raises(UserError, match=r"(real|fake) features are not finite"):
        measure(*broken)
