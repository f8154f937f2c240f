"""Any images in nested folders."""

import hashlib
import os
import pathlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from jax_ddpm.data.decode import UnreadableError, decoded_size
from jax_ddpm.data.lazy import Encoded, LazySource, keep_if_small, too_many
from jax_ddpm.data.source import ImageSize, Path, Source, Spec, random_split
from jax_ddpm.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Of validation and test images the test ones wait for the end, and may lack labels, as ImageNet's.
_HELDOUT = ("heldout", "val", "test")


def folder(path: Path, image_size: ImageSize = 0, heldout_fraction: float = 0.1) -> Source:
    """Colour images, cropped and resized to ``image_size``; 0: all have one size already.

    The folders ``train`` and ``heldout``, ``val`` or ``test`` (the first there is) in ``path`` are
    the splits; without them a random ``heldout_fraction`` of the files is held out, always the
    same. If all images of a split lie in folders, two or more at its first level, those are the
    classes, in the order of their names. Hidden files and folders are passed over.

    Files that cannot be opened are left out with a warning.

    Raises:
      UserError: naming the folder or file and what is wrong with it.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise UserError(f"data.path: no folder {path!r}; give the path of a folder of images")
    heldout = next((name for name in _HELDOUT if (root / name).is_dir()), None)
    if heldout and (root / "train").is_dir():
        splits = {"train": _images(root, "train"), "heldout": _images(root, heldout)}
        labels = _labels(splits["train"], splits["heldout"], root, level=1)
    else:
        files = _images(root)
        chosen = random_split(len(files), heldout_fraction)
        splits = {split: [files[i] for i in indices] for split, indices in chosen.items()}
        labels = _labels(files, [], root, level=0)

    found = _probe(root, [file for files in splits.values() for file in files], image_size)
    splits = {split: [file for file in files if file in found] for split, files in splits.items()}
    for split, files in splits.items():
        if not files:
            raise UserError(
                f"{path}: too few images for a {split} split; add more ({' '.join(_SUFFIXES)})"
            )
    spec = Spec(
        image_shape=(*_one_shape(path, found), 3),
        num_levels=256,
        num_classes=len(set(labels.values())),
        split_sizes={split: len(files) for split, files in splits.items()},
        identity=_identity(found, image_size),
    )

    def read(split: str, index: int) -> Encoded:
        file = splits[split][index]
        try:
            content = (root / file).read_bytes()
        except OSError as error:  # not damage, which has a stand-in: the set is not what it was
            raise UserError(
                f"{root / file}: cannot be read ({error.strerror}); restore it"
            ) from error
        return Encoded(str(root / file), content, labels.get(file, 0))

    return keep_if_small(LazySource(read, spec, image_size))


def _images(root: pathlib.Path, below: str = "") -> list[str]:
    """Paths relative to ``root`` with forward slashes, sorted: no file system's own order."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); permit it")

    images = []
    for parent, folders, files in os.walk(root / below, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = pathlib.Path(parent).relative_to(root)
        images += [
            (relative / name).as_posix()
            for name in files
            if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(images)


def _labels(train: list[str], heldout: list[str], root: pathlib.Path, level: int) -> dict[str, int]:
    """The class of each file, or nothing if the folders at ``level`` do not tell classes."""

    def name(file: str) -> str:
        folders = file.split("/")[:-1]
        return folders[level] if len(folders) > level else ""

    names = sorted({name(file) for file in train})
    if len(names) < 2 or "" in names:
        return {}
    number = {name: i for i, name in enumerate(names)}
    for file in heldout:
        if name(file) not in number:
            raise UserError(
                f"{root / file}: in none of the class folders of the training images; move it "
                "into one of them, or remove it"
            )
    return {file: number[name(file)] for file in [*train, *heldout]}


class _Found(NamedTuple):
    shape: tuple[int, int]  # height and width once decoded
    num_bytes: int


def _probe(root: pathlib.Path, files: list[str], image_size: int) -> dict[str, _Found]:
    """The files that can be opened."""

    def probe(file: str) -> _Found | UnreadableError:
        path = str(root / file)
        try:
            return _Found(decoded_size(path, image_size), os.path.getsize(path))
        except UnreadableError as error:
            return error

    chunks = [files[i : i + 256] for i in range(0, len(files), 256)]  # a future each is too much
    with ThreadPoolExecutor() as pool:
        probed = pool.map(lambda chunk: [(file, probe(file)) for file in chunk], chunks)
        results = dict(pair for pairs in probed for pair in pairs)
    found = {file: result for file, result in results.items() if isinstance(result, _Found)}
    unreadable = [f"{file} ({results[file]})" for file in files if file not in found]
    if unreadable:
        named = ", ".join(unreadable[:5]) + (", …" if len(unreadable) > 5 else "")
        message = f"{root}: {len(unreadable)} of {len(files)} images cannot be opened: {named}"
        if too_many(len(unreadable), len(files)):
            raise UserError(f"{message}; replace or remove them")
        warnings.warn(f"{message}; going on without", stacklevel=3)
    return found


def _one_shape(path: str, found: dict[str, _Found]) -> tuple[int, int]:
    (first, (shape, _)), *others = found.items()
    for other, (other_shape, _) in others:
        if other_shape != shape:
            raise UserError(
                f"{path}: {first} has {shape[0]}×{shape[1]} pixels but {other} has "
                f"{other_shape[0]}×{other_shape[1]}; set data.image_size to bring all to one size"
            )
    return shape


def _identity(found: dict[str, _Found], image_size: int) -> str:
    listing = "".join(f"{file}\0{found[file].num_bytes}\0" for file in sorted(found))
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"folder/{len(found)}-files/sha256-{digest}/image-size-{image_size}"
