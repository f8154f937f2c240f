"""A data set of any images in nested folders."""

import hashlib
import pathlib
import warnings
from collections.abc import Mapping, Sequence

from jax_ddpm.data.contents import file_hashes
from jax_ddpm.data.decode import FileInfo
from jax_ddpm.data.image_files import SUFFIXES, list_images, one_size, probe, shortened
from jax_ddpm.data.lazy import Encoded, LazySource, keep_if_small, too_many
from jax_ddpm.data.source import (
    Channels,
    HeldoutFraction,
    ImageSize,
    Path,
    Source,
    image_spec,
    random_split,
    warn_of_empty_classes,
)
from jax_ddpm.data.splits import is_split_name, splits_among
from jax_ddpm.errors import UserError


def folder(
    path: Path,
    image_size: ImageSize = 0,
    heldout_fraction: HeldoutFraction = 0.1,
    channels: Channels = 3,
) -> Source:
    """Colour images, cropped and resized to ``image_size``; 0: all have one size already.

    With 1 ``channels`` they are gray.

    The folders of ``path`` that are called ``train`` and ``val`` or the like (``data.splits``) are
    the splits, and nothing beside them counts. Where none is held out, a random
    ``heldout_fraction`` of the files is, always the same. If all images of a split lie in folders,
    two or more at its first level, those are the classes, in the order of their names.
    ``data.image_files`` says which files count.

    Raises:
      UserError: naming the folder or file and what is wrong with it.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise UserError(f"data.path: no folder {path!r}; give the path of a folder of images")
    files = list_images(root)
    if not files:
        raise UserError(f"{path}: no images there ({' '.join(SUFFIXES)})")
    folders = _split_folders(root, files)
    if folders:
        inside = {split: _below(folder, files) for split, folder in folders.items()}
        beside = sorted({*files}.difference(*inside.values()))
        if beside:
            warnings.warn(
                f"{root}: left out, as in none of the splits {' and '.join(folders.values())}: "
                f"{shortened(beside)}",
                stacklevel=2,
            )
    else:
        inside = {"train": files}
    names, labels = _classes(root, 1 if folders else 0, **inside)
    if "heldout" in inside:
        splits = inside
    else:
        chosen = random_split(len(inside["train"]), heldout_fraction, path)
        splits = {split: [inside["train"][i] for i in chosen[split]] for split in chosen}
    if names:
        warn_of_empty_classes(path, names, [labels[file] for file in splits["train"]])

    infos = _openable(root, [file for files in splits.values() for file in files], image_size)
    splits = {split: [file for file in files if file in infos] for split, files in splits.items()}
    for split, files in splits.items():
        if not files:
            raise UserError(
                f"{path}: no images for the {split} split; add some ({' '.join(SUFFIXES)})"
            )
    contents = file_hashes(root, [*infos])
    _warn_of_copies(root, contents, **splits)
    num_bytes = {file: info.num_bytes for file, info in infos.items()}
    described, end = f"{len(infos)}-files", f"image-size-{image_size}"
    if channels == 1:
        end += "/gray"
    elif all(info.gray for info in infos.values()):
        warnings.warn(f"{path}: all images are gray; data.channels=1 keeps them so", stacklevel=2)
    size = one_size(root, infos, "set data.image_size to bring all to one size")
    spec = image_spec(
        image_shape=(*size, channels),
        num_levels=256,
        num_classes=len(names),
        split_sizes={split: len(files) for split, files in splits.items()},
        identity=f"folder/{described}/contents-{_digest(contents)}/{end}",
        formerly=f"folder/{described}/sha256-{_digest(num_bytes)}/{end}",
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


def _split_folders(root: pathlib.Path, files: list[str]) -> dict[str, str]:
    """The folders of the splits; none where all images are of one set.

    Raises:
      UserError: where it is not plain whether folders are splits or classes.
    """
    folders = [path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    splits = splits_among(folders, str(root))
    if "heldout" in splits and "train" in splits:
        return splits
    with_images = {file.split("/")[0] for file in files if "/" in file}
    named = sorted(name for name in with_images if is_split_name(name))
    others = sorted(with_images.difference(named))
    if named and (others or "train" not in splits):
        beside = f"beside {shortened(others)}" if others else "but none is for training"
        raise UserError(
            f"{root}: {' and '.join(named)} by name are splits of a data set, {beside}; put the "
            "training images into a folder 'train' of their own, or rename what is a class"
        )
    return splits if named else {}


def _below(folder: str, files: list[str]) -> list[str]:
    return [file for file in files if file.startswith(f"{folder}/")]


def _classes(
    root: pathlib.Path, level: int, train: list[str], heldout: Sequence[str] = ()
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes' names and each file's class; nothing if folders at ``level`` do not tell."""

    def name(file: str) -> str:
        folders = file.split("/")[:-1]
        return folders[level] if len(folders) > level else ""

    names = tuple(sorted({name(file) for file in train}))
    if "" in names and len(names) > 2:
        loose = [file for file in train if not name(file)]
        warnings.warn(
            f"{root}: no classes, as these are in no folder of a class: {shortened(loose)}; move "
            "them into one, or remove them",
            stacklevel=3,
        )
    inner = {file.split("/")[level + 1] for file in train if file.count("/") > level + 1}
    if len(names) == 1 and len(inner) > 1:
        warnings.warn(
            f"{root}: no classes, as all images are in one folder, {names[0]}; give that by "
            "data.path if the folders in it are classes",
            stacklevel=3,
        )
    if len(names) < 2 or "" in names:
        return (), {}
    if all(map(str.isdecimal, names)) and [*map(int, names)] != [*range(len(names))]:
        numbered = ", ".join(f"{i}: {name}" for i, name in enumerate(names[:12]))
        warnings.warn(
            f"{root}: classes are numbered in the order of their names as text, not by the "
            f"numbers that they are called: {numbered}{', …' if len(names) > 12 else ''}",
            stacklevel=3,
        )
    if all(map(is_split_name, names)):
        raise UserError(
            f"{root}: {' and '.join(names)} by name are splits of a data set, not classes; give "
            "their own folder by data.path"
        )
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
        message = (
            f"{root}: {len(named)} of {len(files)} images cannot be opened: {shortened(named)}"
        )
        if too_many(len(named), len(files)):
            raise UserError(f"{message}; replace or remove them")
        warnings.warn(f"{message}; going on without", stacklevel=3)
    return infos


def _warn_of_copies(
    root: pathlib.Path, contents: dict[str, str], train: list[str], heldout: list[str]
) -> None:
    trained_on = {contents[file] for file in train}
    if copies := [file for file in heldout if contents[file] in trained_on]:
        warnings.warn(
            f"{root}: of {len(heldout)} held-out images the training split has copies: "
            f"{shortened(copies)}",
            stacklevel=3,
        )


def _digest(told: Mapping[str, object]) -> str:
    """Of files, what is told of each."""
    listing = "".join(f"{file}\0{told[file]}\0" for file in sorted(told))
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
