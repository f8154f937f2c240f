"""Which names stand for which split."""

from collections.abc import Iterable

from jax_ddpm.errors import UserError

_TRAIN = ("train", "training", "trainset")
# Validation comes before test: test images wait for the end, and may lack labels, as ImageNet's.
_HELDOUT = (
    "heldout", "holdout", "validation", "valid", "val", "valset", "dev", "devset", "eval",
    "evaluation", "test", "testing", "testset",
)  # fmt: skip


def splits_among(names: Iterable[str], where: str) -> dict[str, str]:
    """Of these names that of "train" and that of "heldout", as far as there are such.

    Only letters count, in any case, so ``Train_2017`` is one; of several held-out sets the first in
    the order above is taken.

    Raises:
      UserError: naming ``where``, if two names stand for the same split.
    """
    found: dict[str, str] = {}
    for split, words in (("train", _TRAIN), ("heldout", _HELDOUT)):
        ranked = sorted((words.index(_word(name)), name) for name in names if _word(name) in words)
        best = [name for rank, name in ranked if split == "train" or rank == ranked[0][0]]
        if len(best) > 1:
            raise UserError(
                f"{where}: {' and '.join(best)} both stand for the {split} split; rename or "
                "remove all but one"
            )
        found |= {split: best[0]} if best else {}
    return found


def is_split_name(name: str) -> bool:
    """Whether it says a split rather than a class."""
    return _word(name) in (*_TRAIN, *_HELDOUT)


def _word(name: str) -> str:
    return "".join(filter(str.isalpha, name)).casefold()
