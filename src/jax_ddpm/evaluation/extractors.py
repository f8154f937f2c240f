"""The networks whose features measure samples."""

import hashlib
import pathlib
from typing import Any

from jaxtyping import Array, UInt8

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.features import Extractor
from jax_ddpm.inference.trained_classifier import load_classifier
from jax_ddpm.interop.torch_file import load_state_dict

KINDS = {
    "a file": "FID's InceptionV3, by the weights of pytorch-fid's file.",
    "efficientnet_lite0": "EfficientNet-Lite0 with its ImageNet weights: the default for colour.",
    "the folder of a run": "A classifier of the same data, for small or gray images.",
}


def make_extractor(choice: str | None, image_shape: tuple[int, int, int]) -> Extractor:
    """The extractor that ``--extractor`` names.

    A file is Inception's weights, a folder the run of a classifier. EfficientNet-Lite0 measures
    colour images by default; gray ones need a classifier of their own data.

    Raises:
      UserError: where there is no such extractor, or it does not take these images.
    """
    if choice is None and image_shape[-1] == 1:
        raise UserError(
            "--extractor is missing: gray images are measured by a classifier of their own data; "
            "train one, as configs/digits_classifier.py does, and give its --workdir"
        )
    if choice in (None, "efficientnet_lite0"):
        return efficientnet_lite0()
    path = pathlib.Path(choice)
    if path.is_dir():
        return classifier(path, image_shape)
    if path.is_file():
        return inception(path)
    raise UserError(
        f"--extractor={choice}: give efficientnet_lite0, a file of Inception's weights, or the "
        "folder of a classifier's run"
    )


def inception(path: pathlib.Path) -> Extractor:
    """The InceptionV3 that defines FID, with the weights of pytorch-fid's file."""
    from jax_ddpm.interop.inception_weights import inception_parameters
    from jax_ddpm.models.inception import InceptionV3

    state_dict = load_state_dict(path)
    try:
        params = inception_parameters(state_dict)
    except UserError as error:
        raise UserError(f"--extractor={path}: {error}") from error
    record = {"weights_sha256": _sha256(path), "resize": "299, bilinear without antialiasing"}
    return _extractor("inception", InceptionV3(), params, record)


def efficientnet_lite0() -> Extractor:
    """EfficientNet-Lite0 with its ImageNet weights, from the optional package."""
    from jax_ddpm.interop.efficientnet_weights import (
        efficientnet_lite0_file,
        efficientnet_lite0_parameters,
    )
    from jax_ddpm.models.efficientnet import EfficientNetLite0

    path = efficientnet_lite0_file()
    params = efficientnet_lite0_parameters(load_state_dict(path))
    record = {"weights_sha256": _sha256(path), "resize": "224, bilinear, antialiased"}
    return _extractor("efficientnet_lite0", EfficientNetLite0(), params, record)


def classifier(workdir: pathlib.Path, image_shape: tuple[int, int, int]) -> Extractor:
    """The classifier of one of our runs; its logits are those of the data's own classes.

    Raises:
      UserError: where there is none, or it was trained on images of another size.
    """
    try:
        trained = load_classifier(workdir)
    except UserError as error:
        raise UserError(str(error).replace("--workdir=", "--extractor=")) from error
    if trained.spec.image_shape != image_shape:
        wanted, found = (
            "×".join(map(str, shape)) for shape in (trained.spec.image_shape, image_shape)
        )
        raise UserError(f"--extractor={workdir}: made for images of {wanted}, these are {found}")

    codec = trained.model.codec.with_levels(256)

    def apply(params: Any, images: UInt8[Array, "b h w c"]) -> tuple[Array, Array]:
        return trained.model.network.apply(params, codec.encode({"image": images}))

    record = {"name": "classifier"} | trained.record
    names = trained.spec.class_names
    return Extractor("classifier", apply, trained.params, record, trained.accuracy, names)


def _extractor(name: str, module: Any, params: Any, record: dict[str, Any]) -> Extractor:
    def apply(params: Any, images: UInt8[Array, "b h w c"]) -> tuple[Array, Array]:
        return module.apply({"params": params}, images)

    return Extractor(name, apply, params, {"name": name} | record)


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
