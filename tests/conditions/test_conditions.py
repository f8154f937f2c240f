"""Several conditions as one: a class, a caption with its mask, a small image with its noise level,
a size.

The last three are toys of what texts, cascades and sizes will be.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.conditions.condition import Conditions
from jax_ddpm.conditions.label import Label, class_number, known_classes, label
from jax_ddpm.data.source import image_spec
from jax_ddpm.errors import UserError
from jax_ddpm.generate import Generator
from jax_ddpm.keys import StepKeys, Stream
from jax_ddpm.models.network import Network
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.tasks import augmentation

SHAPE, LENGTH, COUNT = (4, 4, 1), 5, 8


def caption(text: str) -> dict[str, np.ndarray]:
    """One text as its letters' numbers, and which of its places are taken."""
    ids = np.zeros(LENGTH, np.int32)
    ids[: len(text)] = [ord(letter) - ord("a") for letter in text]
    return {"ids": ids, "mask": np.arange(LENGTH) < len(text)}


class Toy:
    """What most of the toys have in common."""

    must_be, guided, attributes, heads = "anything", False, {}, ()

    def negative(self):
        return {}

    def noted(self, request):
        return {self.name: str(request.get(self.name))}


class Caption(Toy):
    name, must_be, guided = "caption", "a few letters", True

    def training(self, batch, keys):
        drop_keys = jax.vmap(jax.random.fold_in, (0, None))(keys.per_example(Stream.LABEL_DROP), 1)
        return self.given(batch) | {"caption_drop": jax.vmap(jax.random.bernoulli)(drop_keys)}

    def given(self, batch):
        return {"caption": {"ids": batch["ids"], "mask": batch["mask"]}}

    def asked(self, request, index):
        one = caption(request.get("caption", ""))
        return {"caption": jax.tree.map(lambda x: np.repeat(x[None], len(index), axis=0), one)}


class SmallImage(Toy):
    """The image at half its size, with noise in training that the network is told the level of."""

    name, must_be = "small", "a small image"

    def training(self, batch, keys):
        level = jax.vmap(jax.random.uniform)(keys.per_example(Stream.NOISE))
        image = self.given(batch)["small"]["image"] + tiny.per_example(level)
        return {"small": {"image": image, "level": level}}

    def given(self, batch):
        n, h, w, c = batch["image"].shape
        image = batch["image"].reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4)) / 255
        return {"small": {"image": image, "level": jnp.zeros(n)}}

    def asked(self, request, index):
        image = np.asarray(request["small"], np.float32)
        level = np.zeros(len(index), np.float32)
        return {"small": {"image": np.repeat(image[None], len(index), axis=0), "level": level}}


class Size(Toy):
    name = "size"

    def training(self, batch, keys):
        return self.given(batch)

    def given(self, batch):
        return {"size": batch["size"]}

    def asked(self, request, index):
        return {"size": np.full(len(index), request.get("size", 4.0), np.float32)}


TOYS = (Caption(), SmallImage(), Size())
ALL = Conditions((Label(("cat", "dog", "owl"), drop=0.5), *TOYS))
REQUEST = {"caption": "bee", "small": np.full((2, 2, 1), 0.25), "size": 8.0}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    texts = [caption(text) for text in ("a", "bee", "", "cat", "dog", "eel", "fox", "gnu")]
    arrays = {
        "image": rng.integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8),
        "label": np.arange(COUNT, dtype=np.int32) % 3,
        "size": rng.random(COUNT, np.float32),
        **jax.tree.map(lambda *parts: np.stack(parts), *texts),
    }
    return jax.tree.map(jnp.asarray, arrays)


@pytest.fixture
def keys():
    return StepKeys(jax.random.key(0), jnp.array(3), jnp.arange(COUNT), COUNT)


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


class TestJoined:
    def test_each_has_its_part(self, batch, keys):
        for found, parts in (
            (ALL.training(batch, keys), [part.training(batch, keys) for part in ALL.parts]),
            (ALL.given(batch), [part.given(batch) for part in ALL.parts]),
            (ALL.asked(REQUEST, np.arange(3)), [p.asked(REQUEST, np.arange(3)) for p in ALL.parts]),
        ):
            assert {*found} == {name for part in parts for name in part}
            for part in parts:
                for name, tree in part.items():
                    assert_same(found[name], tree)

    def test_training_drops_each_name_that_guides_by_a_mask_of_its_own(self, batch, keys):
        found = ALL.training(batch, keys)
        assert ALL.guided == ("label", "caption")
        assert {name for name in found if name.endswith("_drop")} == {"label_drop", "caption_drop"}
        assert np.any(found["label_drop"] != found["caption_drop"])
        assert found["label_drop"].shape == found["caption_drop"].shape == (COUNT,)

    def test_nothing_is_random_in_measuring(self, batch):
        assert ALL.given(batch).keys() == {*ALL.names}

    def test_what_is_asked_for_is_on_the_host_and_depends_on_the_number_alone(self):
        whole = ALL.asked(REQUEST, np.arange(6, dtype=np.int32))
        part = ALL.asked(REQUEST, np.array([4, 1], np.int32))
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(whole))
        assert_same(part, jax.tree.map(lambda x: x[[4, 1]], whole))

    def test_only_what_is_not_asked_for_takes_turns(self):
        assert ALL.heads({}) == ALL.heads(REQUEST) == ("cat", "dog", "owl")
        assert ALL.heads({"label": 1}) == Conditions(TOYS).heads({}) == ()

    def test_a_record_notes_all(self):
        noted = ALL.noted({"label": 2, "caption": "bee"})
        assert noted == {"class": 2, "caption": "bee", "small": "None", "size": "None"}

    @pytest.mark.parametrize(
        ("request_", "line"),
        [
            ({"colour": "red"}, "--colour=red: this model is told no colour; leave --colour out"),
            (
                {"label": "dig"},
                "--class=dig: it must be one of this model's classes, cat, dog, owl, or 0 to 2; "
                "did you mean dog?",
            ),
        ],
    )
    def test_what_it_cannot_be_told_is_one_line(self, request_, line):
        with pytest.raises(UserError) as caught:
            ALL.asked(REQUEST | request_, np.arange(2))
        assert str(caught.value) == line

    def test_what_is_missing_is_one_line(self):
        ALL.require_all(REQUEST | {"label": 0})
        with pytest.raises(UserError, match=r"^--class: give one of .* cat, dog, owl, or 0 to 2$"):
            ALL.require_all(REQUEST)
        with pytest.raises(UserError, match=r"^--small: give a small image$"):
            Conditions(TOYS).require_all({"caption": "", "size": 2})


def parts_of(conditioning):
    """A number for each example and name that it is told and that is not dropped."""
    numbers = {
        "label": lambda label: 0.1 * (1 + label),
        "caption": lambda text: 0.01 * jnp.sum((1 + text["ids"]) * text["mask"], axis=1),
        "small": lambda small: 0.2 * small["image"].mean(axis=(1, 2, 3)) + small["level"],
        "size": lambda size: 0.01 * size,
    }
    return [
        jnp.where(conditioning.get(f"{name}_drop", False), 0, number(conditioning[name]))
        for name, number in numbers.items()
        if name in conditioning
    ]


@pytest.fixture
def make_model(monkeypatch):
    """``make_model(section__field=value, …)``: x_0 is what the network is told, in all pixels."""

    def conditions(config, spec):
        return Conditions((label(config, spec), *TOYS))

    def apply(params, x, time, conditioning, dropout_keys=None):
        return 0 * x + tiny.per_example(sum(parts_of(conditioning)))

    def make(**fields):
        fields = {"model__class_conditional": True, "parameterisation__target": "x0"} | fields
        model = tiny.model(tiny.config(**fields), tiny.spec(SHAPE, num_levels=256))
        model.network = Network(model.network.init, apply)
        return model

    monkeypatch.setattr(factory, "make_conditions", conditions)
    return make


# Of the class i, "bee", the small image and the size.
WHOLE = 0.1 * (1 + np.arange(4) % 3) + 0.01 * (2 + 5 + 5) + 0.2 * 0.25 + 0.01 * 8


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.0])
def test_samples_are_of_what_was_asked_for(make_model, scale):
    """A guide goes without class and caption, and is told small image and size as the model is."""
    model = make_model(sampling__guidance_scale=scale, sampling__clip=False)
    found = Generator(model, 4, make_mesh())({}, 0, 4, REQUEST)
    shared = 0.2 * 0.25 + 0.01 * 8
    expected = shared + scale * (WHOLE - shared)
    np.testing.assert_allclose(found[:, 0, 0, 0], expected, atol=1e-5)
    np.testing.assert_allclose(np.ptp(found, axis=(1, 2, 3)), 0, atol=1e-5)


def test_a_negative_class_is_what_the_guide_is_told(make_model):
    fields = {"sampling__guidance_scale": 2.0, "sampling__negative_class": 2}
    model = make_model(sampling__clip=False, **fields)
    found = Generator(model, 4, make_mesh())({}, 0, 4, REQUEST)
    without = WHOLE - 0.01 * (2 + 5 + 5) - 0.1 * (1 + np.arange(4) % 3) + 0.1 * 3
    np.testing.assert_allclose(found[:, 0, 0, 0], 2 * WHOLE - without, atol=1e-5)


@pytest.fixture
def told(make_model, batch, keys):
    """``told(section__field=value, …)``: the model, and what its network is told in training and
    in measuring."""
    from jax_ddpm.tasks.table import make_recipe

    def tell(**fields):
        model, seen = make_model(**fields), []

        def spy(params, x, time, conditioning, dropout_keys=None):
            seen.append(conditioning)
            return x

        model.network = Network(model.network.init, spy)
        fields = {"model__class_conditional": True, "parameterisation__target": "x0"} | fields
        objective = make_recipe(tiny.config(**fields), model).phases[0].objective
        params = {"network": {}, "codec": model.codec}
        for measure in (objective, objective.measuring()):
            measure(params, measure.init(), batch, keys, keys.step)
        return model, *seen

    return tell


def test_training_is_told_all(told, batch, keys):
    """So is measuring, which is told the truth."""
    model, in_training, in_measuring = told()
    assert_same(in_training, model.conditions.training(batch, keys))
    assert_same(in_measuring, model.conditions.given(batch))


def test_what_is_told_of_an_image_is_mirrored_with_it(told, batch, keys):
    model, in_training, in_measuring = told(data__flip=True)
    flipped = augmentation.flip(keys.per_example(Stream.FLIP), batch["image"])
    assert np.any(flipped != batch["image"])
    assert_same(in_training, model.conditions.training(batch | {"image": flipped}, keys))
    assert_same(in_measuring, model.conditions.given(batch))


def test_a_network_that_cannot_be_told_is_one_line(monkeypatch):
    @dataclasses.dataclass
    class Words(Caption):
        attributes: ClassVar[dict[str, Any]] = {"vocabulary": 26}

    monkeypatch.setattr(factory, "make_conditions", lambda *_: Conditions((Words(),)))
    with pytest.raises(UserError, match=r"config\.model.name is .*attributes vocabulary"):
        factory.Model(tiny.config(), tiny.spec())


class TestLabel:
    def test_is_there_for_conditional_models(self):
        told = label(tiny.config(model__class_conditional=True), tiny.spec())
        assert told is not None
        assert told.attributes == {"num_classes": 3}
        assert label(tiny.config(), tiny.spec()) is None

    @pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
    def test_is_dropped_as_often_as_it_says(self, drop):
        count = 2000
        keys = StepKeys(jax.random.key(0), jnp.array(0), jnp.arange(count), count)
        found = Label(("a", "b"), drop).training({"label": jnp.zeros(count, jnp.int32)}, keys)
        error = np.sqrt(drop * (1 - drop) / count)
        assert abs(found["label_drop"].mean() - drop) <= 5 * error

    def test_a_class_in_turn_or_as_asked(self):
        told, index = Label(("a", "b", "c")), np.array([5, 0, 10**6], np.int32)
        np.testing.assert_array_equal(told.asked({}, index)["label"], [2, 0, 1])
        np.testing.assert_array_equal(told.asked({"label": 1}, index)["label"], [1, 1, 1])
        for request in ({}, {"label": 1}):
            assert told.asked(request, index)["label"].dtype == np.int32

    @pytest.mark.parametrize("value", ["b", 1, "1", np.int64(1)])
    def test_a_class_has_a_name_and_a_number(self, value):
        told, index = Label(("a", "b", "c")), np.arange(2, dtype=np.int32)
        assert_same(told.asked({"label": value}, index), {"label": np.ones(2, np.int32)})
        assert told.noted({"label": value}) == {"class": 1}

    @pytest.mark.parametrize("value", [-1, 3, "3", "-1", "B", "", 1.0, "1.0", None, True])
    def test_nothing_else_is_a_class(self, value):
        assert class_number(("a", "b", "c"), value) is None

    def test_text_is_a_name_before_it_is_a_number(self):
        names = tuple(sorted(map(str, range(1, 12))))  # folders: "1", "10", "11", "2", …
        assert class_number(names, "10") == 1
        assert class_number(names, 10) == 10
        assert class_number(names, "0") == 0

    def test_a_few_of_many_classes_are_told(self):
        names = [f"class {i}" for i in range(1000)]
        told = known_classes(names, "clas 500")
        assert told.startswith("class 0, class 1, ")
        assert told.endswith("class 19, …, or 0 to 999; did you mean class 500?")

    @pytest.mark.parametrize("value", ["dog", 1, "1"])
    def test_negative_class_by_name_or_number(self, value):
        fields = {"model__class_conditional": True, "sampling__negative_class": value}
        spec = image_spec(SHAPE, 256, 3, {"train": 4}, "animals", ("cat", "dog", "owl"))
        told = label(tiny.config(**fields), spec)
        assert_same(told.negative(), {"label": np.array([1])})
        fields["sampling__negative_class"] = "dok"
        with pytest.raises(UserError, match=r"negative_class is 'dok'; .*did you mean dog\?"):
            label(tiny.config(**fields), spec)
