"""A data set of any images in nested folders."""

import hashlib
import pathlib
import warnings

from jax_ddpm.data.decode import FileInfo
from jax_ddpm.data.image_files import SUFFIXES, list_images, one_size, probe
from jax_ddpm.data.lazy import Encoded, LazySource, keep_if_small, too_many
from jax_ddpm.data.source import ImageSize, Path, Source, image_spec, random_split
from jax_ddpm.errors import UserError

# Validation comes before test: test images wait for the end, and may lack labels, as ImageNet's.
_HELDOUT = ("heldout", "val", "test")


def folder(path: Path, image_size: ImageSize = 0, heldout_fraction: float = 0.1) -> Source:
    """Colour images, cropped and resized to ``image_size``; 0: all have one size already.

    The folders ``train`` and ``heldout``, ``val`` or ``test`` (the first there is) in ``path`` are
    the splits; without them a random ``heldout_fraction`` of the files is held out, always the
    same. If all images of a split lie in folders, two or more at its first level, those are the
    classes, in the order of their names. ``data.image_files`` says which files count.

    Raises:
      UserError: naming the folder or file and what is wrong with it.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise UserError(f"data.path: no folder {path!r}; give the path of a folder of images")
    heldout = next((name for name in _HELDOUT if (root / name).is_dir()), None)
    if heldout and (root / "train").is_dir():
        splits = {"train": list_images(root, "train"), "heldout": list_images(root, heldout)}
        names, labels = _classes(splits["train"], splits["heldout"], root, level=1)
    else:
        files = list_images(root)
        chosen = random_split(len(files), heldout_fraction)
        splits = {split: [files[i] for i in indices] for split, indices in chosen.items()}
        names, labels = _classes(files, [], root, level=0)

    infos = _openable(root, [file for files in splits.values() for file in files], image_size)
    splits = {split: [file for file in files if file in infos] for split, files in splits.items()}
    for split, files in splits.items():
        if not files:
            raise UserError(
                f"{path}: too few images for a {split} split; add more ({' '.join(SUFFIXES)})"
            )
    size = one_size(root, infos, "set data.image_size to bring all to one size")
    spec = image_spec(
        image_shape=(*size, 3),
        num_levels=256,
        num_classes=len(names),
        split_sizes={split: len(files) for split, files in splits.items()},
        identity=_identity(infos, image_size),
        class_names=names,
    )

    def read(split: str, index: int) -> Encoded:
        file = splits[split][index]
        try:
            content = (root / file).read_bytes()
        except OSError as error:  # not damage, which has a stand-in: the set has changed
            raise UserError(
                f"{root / file}: cannot be read ({error.strerror}); restore it"
            ) from error
        return Encoded(str(root / file), content, {"label": labels[file]} if labels else {})

    return keep_if_small(LazySource(read, spec, image_size))


def _classes(
    train: list[str], heldout: list[str], root: pathlib.Path, level: int
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes' names and each file's class; nothing if folders at ``level`` do not tell."""

    def name(file: str) -> str:
        folders = file.split("/")[:-1]
        return folders[level] if len(folders) > level else ""

    names = tuple(sorted({name(file) for file in train}))
    if len(names) < 2 or "" in names:
        return (), {}
    number = {name: i for i, name in enumerate(names)}
    for file in heldout:
        if name(file) not in number:
            raise UserError(
                f"{root / file}: in none of the class folders of the training images; move it "
                "into one of them, or remove it"
            )
    return names, {file: number[name(file)] for file in [*train, *heldout]}


def _openable(root: pathlib.Path, files: list[str], image_size: int) -> dict[str, FileInfo]:
    infos, unreadable = probe(root, files, image_size)
    if unreadable:
        named = [f"{file} ({error})" for file, error in unreadable.items()]
        shown = ", ".join(named[:5]) + (", …" if len(named) > 5 else "")
        message = f"{root}: {len(named)} of {len(files)} images cannot be opened: {shown}"
        if too_many(len(named), len(files)):
            raise UserError(f"{message}; replace or remove them")
        warnings.warn(f"{message}; going on without", stacklevel=3)
    return infos


def _identity(infos: dict[str, FileInfo], image_size: int) -> str:
    listing = "".join(f"{file}\0{infos[file].num_bytes}\0" for file in sorted(infos))
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"folder/{len(infos)}-files/sha256-{digest}/image-size-{image_size}"
