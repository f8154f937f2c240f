"""The train step: invariance to how the batch is split, its arithmetic, and its safety."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jax_ddpm.errors import UserError
from jax_ddpm.keys import Stream
from jax_ddpm.runtime.devices import make_mesh, split, whole
from jax_ddpm.tasks.adam import clipped_adam
from jax_ddpm.tasks.optimisers import gated
from jax_ddpm.tasks.recipe import Average, Frozen, Phase, Recipe, make_learning_rate, never_warm
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.layout import spread
from jax_ddpm.training.state import init_state

SEED = jax.random.key(7)
both_ways = pytest.mark.parametrize("parallel", ["jit", "pmap"])


def start(recipe, mesh, params, **changed):
    """The state before step 0, of copies that may be donated."""
    state = init_state(recipe, jax.tree.map(jnp.array, params))
    return spread(state._replace(**changed), mesh)


def in_a_row(*batches):
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def train(recipe, mesh, params, batches, parallel="jit", steps_per_dispatch=1, **changed):
    """The state and the metrics after each batch, as NumPy."""
    state = start(recipe, mesh, params, **changed)
    step = compile_step(recipe, state, mesh, parallel)
    log = []
    for i in range(0, len(batches), steps_per_dispatch):
        state, metrics = step(state, in_a_row(*batches[i : i + steps_per_dispatch]), SEED)
        log += [jax.tree.map(lambda x, j=j: x[j], metrics) for j in range(steps_per_dispatch)]
    return jax.device_get((state, log))


def all_close(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)


@pytest.fixture(scope="module")
def run(make_setting, mesh_of):
    """Two steps of DDPM training with a time sampler, split as told."""

    @functools.cache
    def run(time_sampler, accumulate, num_devices, parallel="jit"):
        everything = time_sampler == "uniform"  # once suffices, random numbers compile slowly
        setting = make_setting(
            loss__time_sampler=time_sampler,
            data__flip=everything,
            model__class_conditional=everything,
            training__label_drop=0.4,
        )
        extra = setting.objective.init()
        if time_sampler == "loss_second_moment":  # warmed up: its draws follow the losses
            losses = np.random.default_rng(0).uniform(0.5, 2, extra.losses.shape)
            extra = extra._replace(losses=jnp.asarray(losses, "f"), counts=extra.counts + 10)
        params = {"network": setting.model.network.init(jax.random.key(0))}
        batches = [tiny.batch(setting.spec, seed=i) for i in range(2)]
        recipe, mesh = setting.recipe._replace(accumulate=accumulate), mesh_of(num_devices)
        return train(recipe, mesh, params, batches, parallel, extra=(extra,))

    return run


@pytest.mark.parametrize(
    ("time_sampler", "accumulate", "num_devices", "parallel"),
    [
        ("uniform", 2, 4, "jit"),
        ("stratified", 2, 4, "jit"),
        ("loss_second_moment", 2, 1, "jit"),
        ("uniform", 1, 4, "pmap"),
        ("stratified", 1, 1, "pmap"),
        ("stratified", 2, 2, "pmap"),
        ("loss_second_moment", 2, 4, "pmap"),
    ],
)
def test_splitting_the_batch_changes_neither_state_nor_metrics(
    run, time_sampler, accumulate, num_devices, parallel
):
    """Noise, time, dropout, flips and label drop belong to examples, not to where they are."""
    whole = run(time_sampler, accumulate=1, num_devices=1)
    split = run(time_sampler, accumulate, num_devices, parallel)
    all_close(split, whole, rtol=2e-5, atol=1e-6)


class Quadratic:
    """½‖w - x‖² of the trained name, whose gradient is w - mean(x)."""

    def __init__(self, name="network"):
        self.name = name

    def init(self):
        return ()

    def __call__(self, params, extra, batch, keys, step):
        difference = params[self.name]["w"][None] - batch["x"]
        return 0.5 * jnp.sum(difference**2, axis=1), {}, extra


@pytest.fixture
def quadratic_recipe(make_setting):
    """The optimiser and averages of DDPM training around a quadratic objective."""

    def make(objective=None, **fields):
        setting = make_setting(**fields)
        recipe = setting.recipe
        (phase,) = recipe.phases
        return recipe._replace(phases=(phase._replace(objective=objective or Quadratic()),))

    return make


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(0.3, 1, (6, 8, 3)).astype("f")


START = {"network": {"w": np.array([3.0, -1.0, 0.5], "f")}}


@both_ways
def test_update_is_clipped_adam_with_warm_up_and_an_average(quadratic_recipe, points, parallel):
    """The algorithms of Kingma & Ba 2015 and Ho et al. 2020 are written out in float64."""
    rate, beta1, beta2, epsilon, clip, decay = 0.1, 0.8, 0.95, 1e-3, 3.1, 0.2
    recipe = quadratic_recipe(
        training__learning_rate=rate,
        training__warmup_steps=4,
        training__adam_b1=beta1,
        training__adam_b2=beta2,
        training__adam_eps=epsilon,
        training__grad_clip=clip,
        training__ema_decay=decay,
    )
    state, log = train(recipe, make_mesh(), START, [{"x": x} for x in points], parallel)

    w = START["network"]["w"].astype(np.float64)
    average, first, second, norms = w, np.zeros(3), np.zeros(3), []
    for i, x in enumerate(points.astype(np.float64)):
        gradient = w - x.mean(axis=0)
        norms.append(np.linalg.norm(gradient))
        gradient *= min(1, clip / norms[-1])
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        unbiased = first / (1 - beta1 ** (i + 1)), second / (1 - beta2 ** (i + 1))
        w = w - rate * min(1, i / 4) * unbiased[0] / (np.sqrt(unbiased[1]) + epsilon)
        weight = min(decay, (1 + i) / (10 + i))
        average = weight * average + (1 - weight) * w
        assert log[i]["loss"][0] / log[i]["loss"][1] > 0
        np.testing.assert_allclose(log[i]["parameter_norm"][0], np.linalg.norm(w), rtol=1e-5)
        np.testing.assert_allclose(log[i]["learning_rate"][0], rate * min(1, i / 4), rtol=1e-6)

    assert min(norms) < clip < max(norms)
    np.testing.assert_allclose([m["gradient_norm"][0] for m in log], norms, rtol=1e-5)
    np.testing.assert_allclose(state.params["network"]["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.ema["network"]["w"], average, rtol=1e-5)
    assert state.step == len(points)


def test_average_warms_up_to_its_decay(quadratic_recipe):
    """It goes from a tenth, so that the random start is soon forgotten, to the configured decay."""
    decay = quadratic_recipe(training__ema_decay=0.99).averages["network"].decay
    values = np.array([decay(step) for step in (0, 1, 90, 10_000)])
    np.testing.assert_allclose(values, [1 / 10, 2 / 11, 91 / 100, 0.99], rtol=1e-6)


class TestLearningRate:
    @pytest.fixture
    def schedule(self, make_setting):
        def make(**fields):
            fields = {f"training__{name}": value for name, value in fields.items()}
            config = make_setting(training__learning_rate=0.5, **fields).config
            return lambda *steps: np.array([make_learning_rate(config)(step) for step in steps])

        return make

    def test_warms_up_from_0_and_stays(self, schedule):
        rate = schedule(warmup_steps=10, num_steps=100, decay="constant")
        np.testing.assert_allclose(rate(0, 5, 10, 99), [0, 0.25, 0.5, 0.5], rtol=1e-6)

    @pytest.mark.parametrize(("warmup", "said"), [(199, ""), (200, "reaches 100%"), (5000, "4%")])
    def test_a_warm_up_that_outlasts_the_run_is_told(self, make_setting, warmup, said):
        setting = make_setting(training__warmup_steps=warmup, training__num_steps=200)
        line = never_warm(setting.config)
        assert said in line
        assert bool(said) == bool(line)

    def test_falls_to_0_along_a_cosine(self, schedule):
        rate = schedule(warmup_steps=20, num_steps=100, decay="cosine")
        np.testing.assert_allclose(rate(10, 20, 60, 100), [0.25, 0.5, 0.25, 0], atol=1e-7)

    def test_without_warm_up_starts_at_its_peak(self, schedule):
        assert schedule(warmup_steps=0)(0) == 0.5

    def test_may_warm_up_throughout(self, schedule):
        rate = schedule(warmup_steps=10, num_steps=5, decay="cosine")
        np.testing.assert_allclose(rate(0, 4), [0, 0.2], rtol=1e-6)


class Towards(Quadratic):
    """½‖w - goal‖² where the goal is the sum of what is read; its memory sums up drawn numbers."""

    def __init__(self, name, *goals):
        super().__init__(name)
        self.goals = goals

    def init(self):
        return jnp.zeros(())

    def __call__(self, params, extra, batch, keys, step):
        goal = sum(params[name]["w"] for name in self.goals)
        difference = (params[self.name]["w"] - goal)[None] + 0 * batch["x"]
        drawn = jax.vmap(jax.random.uniform)(keys.per_example(Stream.NOISE))
        extra = extra + jnp.mean(keys.gather(drawn))
        return 0.5 * jnp.sum(difference**2, axis=1), {"drawn": (drawn, 1 + 0 * drawn)}, extra


def sgd(rate):
    return gated(optax.sgd(rate), np.inf)


def two_phases(**second):
    """a moves to the data's mean; b, every third step, towards a, a's average and a frozen c."""
    goals = ("a", "ema/slow", "c")
    return Recipe(
        networks={},
        phases=(
            Phase(Quadratic("a"), ("a",), sgd(0.1), optax.constant_schedule(0.1)),
            Phase(
                Towards("b", *goals),
                ("b",),
                sgd(0.5),
                optax.constant_schedule(0.5),
                reads=goals,
                every=3,
                project=lambda trained: jax.tree.map(lambda w: jnp.maximum(w, 1.5), trained),
            ),
        ),
        averages={"slow": Average("a", lambda step: 0.75)},
        frozen={"c": Frozen({"w": np.array([0.1, 0.2, -9.0], "f")}, None, {})},
    )


AB = {name: {"w": np.full(3, value, "f")} for name, value in zip("ab", (1, 2), strict=True)}


@both_ways
@pytest.mark.parametrize("steps_per_dispatch", [1, 3])
def test_phases_train_their_names_in_turn_with_their_own_optimiser(
    points, parallel, steps_per_dispatch
):
    """The second sees what the first has just updated, the average of before, and what is frozen.

    It runs at every third step, and what it trains is projected.
    """
    recipe = two_phases()
    batches = [{"x": x} for x in points]
    state, log = train(recipe, make_mesh(), AB, batches, parallel, steps_per_dispatch)

    a, b, slow = np.full(3, 1.0), np.full(3, 2.0), np.full(3, 1.0)
    c = recipe.frozen["c"].params["w"]
    for step, x in enumerate(points.astype(np.float64)):
        a = a - 0.1 * (a - x.mean(axis=0))
        if step % 3 == 0:
            b = np.maximum(b - 0.5 * (b - (a + slow + c)), 1.5)
        slow = 0.75 * slow + 0.25 * a
        assert log[step]["b/loss"][1] == (8 if step % 3 == 0 else 0)
        assert log[step]["a/loss"][1] == 8
        assert log[step]["finite"][0] == 1
    all_close(state.params, {"a": {"w": a}, "b": {"w": b}}, rtol=1e-5)
    all_close(state.ema, {"slow": {"w": slow}}, rtol=1e-5)
    drawn = [np.divide(*log[step]["b/drawn"]) for step in (0, 3)]
    np.testing.assert_allclose(state.extra[1], sum(drawn), rtol=1e-6)


@pytest.mark.parametrize(("accumulate", "num_devices", "parallel"), [(2, 4, "jit"), (2, 2, "pmap")])
def test_splitting_the_batch_changes_no_phase(points, mesh_of, accumulate, num_devices, parallel):
    def run(accumulate, num_devices, parallel="jit"):
        recipe = two_phases()._replace(accumulate=accumulate)
        batches = [{"x": x} for x in points]
        state, log = train(recipe, mesh_of(num_devices), AB, batches, parallel)
        return state.params, state.ema, log

    all_close(run(accumulate, num_devices, parallel), run(1, 1), rtol=1e-5, atol=1e-6)


def test_the_first_phase_has_the_keys_of_a_run_of_one_phase_and_others_have_their_own(points):
    drawn = []
    for number in range(2):
        phases = [
            Phase(Towards(name), (name,), sgd(0.1), optax.constant_schedule(0.1)) for name in "ab"
        ]
        recipe = Recipe({}, tuple(phases[: 2 - number]), {})
        params = {name: AB[name] for name in "ab"[: 2 - number]}
        _, (log,) = train(recipe, make_mesh(), params, [{"x": points[0]}])
        drawn.append({name: float(pair[0]) for name, pair in log.items() if "drawn" in name})
    assert drawn[0]["a/drawn"] == drawn[1]["drawn"]
    assert drawn[0]["b/drawn"] != drawn[1]["drawn"]


class Odd(Quadratic):
    """Gives something else than an objective must."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __call__(self, *args):
        loss, _, _ = super().__call__(*args)
        return self.change(loss)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda loss: (loss.mean(), {}, ()), r"its loss is \(\); it must be one"),
        (lambda loss: (loss[:, None], {}, ()), r"its loss is \(\d, 1\)"),
        (lambda loss: (loss, {"loss": (loss, loss)}, ()), "rename its metric loss"),
        (lambda loss: (loss, {"q": loss}, ()), "its metric q must be values and"),
        (lambda loss: (loss, {"q": (loss, 1.0)}, ()), "its metric q must be"),
        (lambda loss: (loss, {}, (loss,)), r"its extra is not .* that init\(\) gives"),
    ],
)
def test_an_objective_that_gives_something_else_is_named(quadratic_recipe, points, change, said):
    with pytest.raises(UserError, match=f"^the objective of phase network: {said}"):
        train(quadratic_recipe(Odd(change)), make_mesh(), START, [{"x": points[0]}])


@pytest.mark.parametrize(
    "project",
    [lambda trained: {}, lambda trained: jax.tree.map(lambda x: x[:1], trained)],
    ids=["nothing", "another shape"],
)
def test_a_projection_that_gives_something_else_is_named(quadratic_recipe, points, project):
    recipe = quadratic_recipe()
    recipe = recipe._replace(phases=(recipe.phases[0]._replace(project=project),))
    with pytest.raises(UserError, match=r"^phase network: what project returns is not .* it gets"):
        train(recipe, make_mesh(), START, [{"x": points[0]}])


class Failing(Quadratic):
    """Fails at step 1 in the given way; its memory counts the steps."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def init(self):
        return jnp.zeros(())

    def __call__(self, params, extra, batch, keys, step):
        loss, metrics, _ = super().__call__(params, extra, batch, keys, step)
        w = params["network"]["w"]
        bad = {
            "loss_nan": jnp.nan + jax.lax.stop_gradient(w[0]),
            "loss_of_one_example_nan": jnp.where(keys.index == 3, jnp.nan, 0.0),
            "gradient_nan": jnp.sqrt(w[0] - w[0] + (step != 1)),  # the root has no slope at 0
        }[self.how]
        return jnp.where(step == 1, loss + bad, loss), metrics, extra + 1


@pytest.mark.parametrize("how", ["loss_nan", "loss_of_one_example_nan", "gradient_nan"])
@pytest.mark.parametrize("accumulate", [1, 2])
@both_ways
def test_an_update_that_is_not_finite_is_not_applied(
    quadratic_recipe, points, how, accumulate, parallel
):
    """All devices keep what they had, whichever it happens on."""
    recipe = quadratic_recipe(Failing(how), training__accumulate=accumulate)
    state = start(recipe, make_mesh(), START)
    step = compile_step(recipe, state, make_mesh(), parallel)

    states, finite = [], []
    for x in points[:3]:
        state, metrics = step(state, {"x": x[None]}, SEED)
        states.append(jax.device_get(state))
        finite.append(metrics["finite"][0].item())
        on_devices = [shard.data for shard in state.params["network"]["w"].addressable_shards]
        assert np.ptp(on_devices, axis=0).max() == 0
    assert finite == [1, 0, 1]
    assert [int(state.step) for state in states] == [1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, states[1]._replace(step=states[0].step), states[0])
    assert np.all(states[2].params["network"]["w"] != states[1].params["network"]["w"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states[2]))


@pytest.mark.parametrize("bad", [0, 1])
def test_from_the_first_phase_that_is_not_finite_on_nothing_is_updated(points, bad):
    class Spoilt(Quadratic):
        def __call__(self, *args):
            loss, metrics, extra = super().__call__(*args)
            return loss * (jnp.nan if self.name == "ab"[bad] else 1), metrics, extra

    rate = optax.constant_schedule(0.1)
    adam = clipped_adam(rate, 0.9, 0.999, 1e-8, 1.0)
    recipe = Recipe(
        networks={},
        phases=tuple(Phase(Spoilt(name), (name,), adam, rate) for name in "ab"),
        averages={name: Average(name, lambda step: 0.5) for name in "ab"},
    )
    params = {name: {"w": np.full(3, 2.0, "f")} for name in "ab"}
    state, (log,) = train(recipe, make_mesh(), params, [{"x": points[0]}])
    moved = {name: np.any(state.params[name]["w"] != params[name]["w"]) for name in "ab"}
    assert moved == {"a": bad == 1, "b": False}
    all_close(state.ema, params)
    assert log["finite"][0] == 0


@both_ways
def test_is_compiled_once(quadratic_recipe, points, parallel):
    traces = []

    class Counting(Quadratic):
        def __call__(self, params, *args):
            traces.append(params)
            return super().__call__(params, *args)

    train(quadratic_recipe(Counting()), make_mesh(), START, [{"x": x} for x in points], parallel)
    assert len(traces) == 1


@both_ways
def test_the_state_stays_whole_on_every_device(quadratic_recipe, points, parallel):
    """Its sharding is the one that all else over the mesh is compiled for."""
    recipe, mesh = quadratic_recipe(), make_mesh()
    before = start(recipe, mesh, START)
    shapes = jax.tree.map(jnp.shape, before)
    step = compile_step(recipe, before, mesh, parallel)
    state, metrics = step(before, {"x": points[:1]}, SEED)
    assert jax.tree.map(jnp.shape, state) == shapes
    leaves = jax.tree.leaves((state, metrics))
    assert all(leaf.sharding == whole(mesh) for leaf in leaves)


@both_ways
def test_batches_may_lie_on_the_mesh_already(quadratic_recipe, points, parallel):
    recipe, mesh = quadratic_recipe(), make_mesh()
    host = [{"x": x[None]} for x in points[:2]]
    placed = jax.device_put(host, split(mesh, axis=1))
    results = []
    for batches in (host, placed):
        state = start(recipe, mesh, START)
        step = compile_step(recipe, state, mesh, parallel)
        for batch in batches:
            state, metrics = step(state, batch, SEED)
        results.append(jax.device_get((state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *results)


class TestDonation:
    @both_ways
    def test_the_old_state_is_given_up(self, quadratic_recipe, points, parallel):
        recipe, mesh = quadratic_recipe(), make_mesh()
        state = start(recipe, mesh, START)
        old = jax.tree.leaves(state)
        compile_step(recipe, state, mesh, parallel)(state, {"x": points[:1]}, SEED)
        assert all(leaf.is_deleted() for leaf in old)

    def test_averages_are_copies(self, quadratic_recipe):
        """Sharing a buffer with the parameters would donate it twice."""
        state = init_state(quadratic_recipe(), jax.tree.map(jnp.array, START))
        jax.tree.map(lambda leaf: leaf.delete(), state.params)
        np.testing.assert_array_equal(state.ema["network"]["w"], START["network"]["w"])


def test_objectives_get_keys_by_global_index(quadratic_recipe, mesh_of, points):
    """Each example's noise is that of its place in the global batch and of its step."""

    class Noise(Quadratic):
        def __call__(self, params, extra, batch, keys, step):
            loss, _, extra = super().__call__(params, extra, batch, keys, step)
            noise = jax.vmap(jax.random.normal)(keys.per_example(Stream.NOISE))
            return loss, {"noise": (noise * batch["x"][:, 0], jnp.ones_like(loss))}, extra

    logs = [
        train(
            quadratic_recipe(Noise())._replace(accumulate=n),
            mesh_of(d),
            START,
            [{"x": x} for x in points[:2]],
            parallel,
        )[1]
        for n, d, parallel in ((1, 1, "jit"), (4, 2, "jit"), (2, 4, "pmap"))
    ]
    for step, metrics in enumerate(zip(*logs, strict=True)):
        key = jax.random.fold_in(jax.random.fold_in(SEED, Stream.NOISE), step)
        noise = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(8)]
        expected = np.sum(points[step][:, 0] * np.array(noise)), 8
        for found in metrics:
            np.testing.assert_allclose(found["noise"], expected, rtol=1e-5)
