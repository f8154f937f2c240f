"""Bits/dim of a trained model by its probability-flow ODE (Song et al. 2021, section 4.3)."""

import pathlib

import numpy as np

from jax_ddpm.data.source import Source
from jax_ddpm.diffusion.ode_likelihood import dequantised_nll
from jax_ddpm.evaluation.estimate import Estimate
from jax_ddpm.evaluation.finite import finite
from jax_ddpm.evaluation.split_terms import split_terms
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream
from jax_ddpm.runtime.stopping import Poll, never

_TOLERANCE = 1e-5  # relative and absolute, as in Song et al.
# The settings, besides the data, that two values must share to compare.
SETTINGS = {"divergence": "hutchinson", "draws": 1, "rtol": _TOLERANCE, "atol": _TOLERANCE}


def measure_nll(
    trained: Trained,
    source: Source,
    split: str,
    num_examples: int,
    batch_size: int,
    cache: pathlib.Path,
    poll: Poll = never,
) -> Estimate:
    """The negative log-likelihood of ``num_examples`` of the split, each exactly once, in bits/dim.

    Uniform dequantisation bounds it from above, with one draw of it and one probe of the divergence
    per example; see ``dequantised_nll``. The standard error covers both as well as the choice of
    examples, which are those that ``measure_bound`` takes. Predictions are not clipped.

    Raises:
      UserError: where a likelihood is not finite.
    """
    model = trained.model
    count = min(num_examples, source.spec.split_sizes[split])

    def terms(denoiser, x0, keys, conditioning):
        nats = dequantised_nll(
            model.process,
            denoiser,
            x0,
            keys,
            conditioning,
            model.spec.num_levels,
            rtol=_TOLERANCE,
            atol=_TOLERANCE,
        )
        return {"nll": nats}

    parts = split_terms(
        trained,
        source,
        split,
        count,
        batch_size,
        cache,
        poll,
        denoiser=model.denoiser(trained.params, clip=False),
        terms=terms,
        stream=Stream.LIKELIHOOD,
        names=("nll",),
        identity={"computes": "likelihood by the probability-flow ODE"} | SETTINGS,
    )
    nats = np.concatenate([part["nll"] for part in parts])[:count]
    assert len(nats) == count
    bits = finite(nats, "log-likelihoods") / np.log(2)
    return Estimate(bits.mean(), bits.std(ddof=min(count - 1, 1)) / np.sqrt(count))
