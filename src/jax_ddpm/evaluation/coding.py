"""Pictures of progressive coding (Ho et al. 2020, section 4.3)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jax_ddpm import images
from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import Source
from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.editing import perturbed
from jax_ddpm.diffusion.interpolation import interpolate
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import Process, noise_between
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.grid import to_clean
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.generate import require_finite
from jax_ddpm.inference.outputs import beside
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream, stream_key

_CANDIDATES = 256  # images among which to find two of a class


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sender:
    """A denoiser that knows x_0: the ancestral sampler draws x_s ~ q(x_s | x_t, x_0) with it."""

    x0: Array
    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        return Prediction(self.x0, noise_between(self.process, self.x0, xt, t))


def progressive_decoding(
    process: Process,
    denoiser: Denoiser,
    x0: Float[Array, "batch *shape"],
    times: Float64[np.ndarray, " k"],
    key: jax.Array,
    conditioning: Conditioning,
) -> tuple[Float[Array, "k batch *shape"], Float[Array, "k batch *shape"]]:
    """x_t as a receiver holds it at decreasing times, and the x_0 predicted from it.

    The x_t are one trajectory of the forward process, sent from the noisiest on, each through
    q(x_s | x_t, x_0) given the one before (Ho et al. 2020, algorithms 3 and 4).
    """
    first_key, step_keys = jax.random.split(key)
    grid = to_clean(process, times)
    first = perturbed(grid, x0, jax.random.split(first_key, len(x0)))
    sender, keys = Sender(x0, process), jax.random.split(step_keys, len(x0))
    sampler = ancestral(grid, "fixedsmall")
    _, snapshots = sample(sampler, sender, first, keys, {}, num_snapshots=len(times))
    xt = jnp.concatenate([first[None], snapshots.x[:-1]])  # the last snapshot is x_0 itself

    def decode(moment: tuple[Array, Array]) -> Array:
        x, t = moment
        return denoiser(x, t, conditioning).x0

    return xt, jax.lax.map(decode, (xt, jnp.asarray(times, x0.dtype)))


def decoding_picture(
    trained: Trained, x0: Float[Array, "batch h w c"], conditioning: Conditioning
) -> Float[np.ndarray, "n h w c"]:
    """Images at twelve moments of their transmission, evenly spaced in t, as rows of thirteen.

    Each image has a row of x_t and below it one of the x_0 predicted; the image itself comes last.
    A shorter chain is shown at all of its moments.
    """
    model, last = trained.model, trained.model.chain.num_timesteps - 1
    times = np.unique(np.round(np.linspace(0, last, 12)))[::-1]
    key = stream_key(jax.random.key(0), Stream.CODING)

    @jax.jit
    def decode(denoiser: Denoiser, x0: Array, conditioning: Conditioning):
        return progressive_decoding(model.chain, denoiser, x0, times, key, conditioning)

    denoiser = model.denoiser(trained.params)
    xt, decoded = decode(denoiser, x0, conditioning)
    rows = jnp.stack([jnp.concatenate([part, x0[None]]) for part in (xt, decoded)])
    return np.asarray(rows.transpose(2, 0, 1, 3, 4, 5).reshape(-1, *x0.shape[1:]))


def interpolation_picture(
    trained: Trained, pair: Float[Array, "2 h w c"], conditioning: Conditioning
) -> Float[np.ndarray, "n h w c"]:
    """Two images mixed in x_t, from coarse to fine: in four rows t = T, ¾T, ½T, ¼T.

    A row of nine goes from one to the other, with their own reconstructions at its ends. All have
    the ``conditioning`` of one example.
    """
    model, num_timesteps = trained.model, trained.model.chain.num_timesteps
    weights = jnp.linspace(0, 1, 9)
    key = stream_key(jax.random.key(0), Stream.CODING)
    given = jax.tree.map(lambda x: np.repeat(x, len(weights), axis=0), conditioning)
    rows = []
    for quarters in (4, 3, 2, 1):
        start = max(1, num_timesteps * quarters // 4) - 1
        sampler = ancestral(to_clean(model.chain, np.arange(start, -1.0, -1.0)), model.variance)

        @jax.jit
        def mix(denoiser, pair, given, sampler=sampler):
            return interpolate(sampler, denoiser, model.chain, pair, weights, key, given)

        rows.append(mix(model.denoiser(trained.params), pair, given))
    return np.concatenate(rows)


def draw_coding(trained: Trained, source: Source, split: str, stem: pathlib.Path) -> None:
    """Writes both pictures, as ``<stem>_decoding.png`` and ``<stem>_interpolation.png``.

    Four images of the split are decoded; two are mixed, of one class if there are classes.
    """
    size = source.spec.split_sizes[split]
    batch = source.batch(split, batch_indices(0, 0, size, size)[:_CANDIDATES])
    x0 = trained.model.codec.encode(batch)
    labels = batch.get("label", np.zeros(len(x0), np.int32))
    given = trained.model.conditions.given(batch)
    decoding = decoding_picture(trained, x0[:4], jax.tree.map(lambda x: x[:4], given))
    columns = len(decoding) // (2 * len(x0[:4]))
    pair = np.resize(np.flatnonzero(labels == np.bincount(labels).argmax()), 2)
    first = jax.tree.map(lambda x: x[pair[:1]], given)
    rows = interpolation_picture(trained, x0[pair], first)
    require_finite(decoding, "cells of the picture of decoding")
    require_finite(rows, "cells of the picture of interpolation")
    decode = trained.model.codec.decode
    for name, cells, width in (("decoding", decoding, columns), ("interpolation", rows, 9)):
        path, note = stem.with_name(f"{stem.name}_{name}.png"), beside(stem)
        images.save_grid(path, decode(cells), width, note=note)
