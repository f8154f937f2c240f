"""Sets of images to measure: samples, splits of data, files, and any of them with noise added.

All are uint8 in 0…255, whatever the levels of their data, rounded by the one function.
"""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from jax_ddpm.codecs.pixels import PICTURES, pixels
from jax_ddpm.data.contents import file_hashes
from jax_ddpm.data.given import are_files, given_arrays, given_files
from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import Source
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.result_cache import Arrays, ResultCache
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.stopping import Poll, never

_ORDER = "shuffled by contents"  # of images in files, in records


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images by number.

    Attributes:
      identity: everything that decides the pixels, as JSON.
      count: how many images there are.
      read: numbers below ``count`` → uint8 ``[n, h, w, c]``.
      labels: the class asked for of each image; None where none was.
    """

    identity: dict[str, Any]
    count: int
    read: Callable[[Int[np.ndarray, " n"]], UInt8[np.ndarray, "n h w c"]]
    labels: Int[np.ndarray, " count"] | None = None

    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        _, height, width, channels = self.read(np.arange(1)).shape
        return height, width, channels


def sample_set(
    trained: Trained,
    seed: int,
    num_samples: int,
    batch_size: int,
    cache: pathlib.Path,
    poll: Poll = never,
) -> ImageSet:
    """Samples of a model, drawn now or kept from before; classes of a conditional one take turns.

    Batches are drawn whole, so there may be more samples than asked for. Samples with classes in
    turn are not independent, which lowers the kernel distance by a term of order 1/N.
    """
    generator = trained.generator(batch_size)
    size = generator.batch_size
    num_parts = -(-num_samples // size)

    def compute(wanted: Iterable[int]) -> Iterator[tuple[int, Arrays]]:
        starts = (part * size for part in wanted)
        for start, batch in generator.draw(trained.params, seed, starts, poll=poll):
            yield start // size, {"images": trained.model.codec.decode(batch.x[-1])}

    identity = {
        "computes": "samples",
        "model": trained.record,
        "seed": seed,
        "batch_size": size,
    }
    parts = ResultCache(cache, identity, ["images"])
    parts.complete(num_parts, compute, f"samples of seed {seed}")
    load = lru_cache(maxsize=2)(lambda part: parts.load(int(part))["images"])

    def read(index: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w c"]:
        return np.stack(
            [load(part)[place] for part, place in zip(*divmod(index, size), strict=True)]
        )

    everything = np.arange(num_parts * size, dtype=np.int32)
    return ImageSet(identity, everything.size, read, generator.asked(everything).get("label"))


def split_set(source: Source, split: str) -> ImageSet:
    """A split of a data set, in a random order that is always the same."""
    size, codec = source.spec.split_sizes[split], pixels(source.spec)
    order = batch_indices(0, 0, size, size)

    def read(index: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w c"]:
        return codec.decode(codec.encode(source.batch(split, order[index])))

    return ImageSet({"data": source.spec.identity, "split": split}, size, read)


def file_set(path: pathlib.Path) -> ImageSet:
    """An image, or those of a folder or an ``.npz``, shuffled.

    Their contents alone decide the order, so that neither parts of the set nor its first images
    depend on names, or on who wrote them in which order.

    Raises:
      UserError: naming a file that is missing, cannot be read, or has another size.
    """
    if are_files(path):
        files = given_files(path)
        hashes = file_hashes(files.root, files.names)
        digests = [bytes.fromhex(digest) for digest in hashes.values()]
        order = _shuffled(digests)
        together = hashlib.sha256(b"".join(digests[i] for i in order)).hexdigest()
        identity = {"files_sha256": together, "order": _ORDER}
        return ImageSet(identity, len(order), lambda index: files.read(order[index]))
    images, labels = given_arrays(path)
    told = [None] * len(images) if labels is None else labels.tolist()
    digests = [
        hashlib.sha256(image.tobytes() + repr(label).encode()).digest()
        for image, label in zip(images, told, strict=True)
    ]
    order = _shuffled(digests)
    identity = {"file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "order": _ORDER}
    labels = None if labels is None else labels[order]
    return ImageSet(identity, len(images), lambda index: images[order[index]], labels)


def _shuffled(digests: list[bytes]) -> Int[np.ndarray, " n"]:
    """An order as good as random; copies are spread over it like other images."""
    seen: collections.Counter[bytes] = collections.Counter()
    ranks = []
    for digest in digests:
        seen[digest] += 1
        ranks.append(hashlib.sha256(digest + str(seen[digest]).encode()).digest())
    return np.array(sorted(range(len(ranks)), key=ranks.__getitem__))


def as_gray(images: ImageSet) -> ImageSet:
    """Gray images that are kept in colour: its channels are all the same.

    Raises:
      UserError: from ``read``, where an image shows colour.
    """

    def read(index: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 1"]:
        found = images.read(index)
        coloured = np.any(found != found[..., :1], axis=(1, 2, 3)).sum()
        if coloured:
            raise UserError(
                f"images in colour are compared with gray ones: of {len(index)} of them {coloured} "
                "show more than grays; bring both to one kind"
            )
        return found[..., :1]

    return dataclasses.replace(images, identity=images.identity | {"read_as": "gray"}, read=read)


def noised(images: ImageSet, std: int) -> ImageSet:
    """The images with Gaussian noise of deviation ``std``, in levels of 0…255, keyed by number."""

    def read(index: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w c"]:
        clean = images.read(index)
        noise = np.stack([np.random.default_rng(i).standard_normal(clean.shape[1:]) for i in index])
        return PICTURES.decode((clean + std * noise) / 127.5 - 1)

    return dataclasses.replace(images, identity=images.identity | {"noise": std}, read=read)
