"""The Gaussian forward process: x_t = α(t)·x_0 + σ(t)·ε, ε ~ N(0, I)."""

from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

# NumPy float64 for sampler tables made on the host, a JAX array inside compiled programs.
Times = TypeVar("Times", np.ndarray, jax.Array)

# x_t is nearly pure noise below this λ (α/σ < exp(-5.1)). Lu et al. 2022 begin to sample here under
# the cosine schedule, which spends a third of its λ below.
ALL_NOISE = -10.2


@runtime_checkable
class Process(Protocol):
    """A noise process, defined by its signal and noise levels.

    All methods act elementwise and keep the array type and dtype of their argument: the same code
    serves float64 tables on the host and float32 inside ``jit``. λ = log(α²/σ²) is the log
    signal-to-noise ratio in nats; it falls as t grows.
    """

    @property
    def num_timesteps(self) -> int:
        """Steps of its own, at whole times from 0; 0 in continuous time."""
        ...

    @property
    def time_range(self) -> tuple[float, float]:
        """The least and the most noisy time that training draws and sampling visits."""
        ...

    def alpha(self, t: Times) -> Times:
        """Signal level α(t)."""
        ...

    def sigma(self, t: Times) -> Times:
        """Noise level σ(t)."""
        ...

    def log_snr(self, t: Times) -> Times:
        """λ(t) = log(α(t)²/σ(t)²)."""
        ...

    def time(self, log_snr: Times) -> Times:
        """The inverse t(λ)."""
        ...

    def prior_std(self, t: float) -> float:
        """Standard deviation of the noise that stands for x_t where sampling starts at t."""
        ...


def sqrt_sigmoid(x: Times) -> Times:
    """√(1/(1 + exp(-x))): α at x = λ and σ at x = -λ, where α² + σ² = 1."""
    xp = x.__array_namespace__()
    return xp.exp(-xp.logaddexp(-x, xp.zeros_like(x)) / 2)


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(coef_x0·x_0 + coef_xt·x_t, variance·I), with less noise at s than t."""

    coef_x0: np.ndarray
    coef_xt: np.ndarray
    variance: np.ndarray


def posterior_coefficients(
    beta: np.ndarray,
    alpha_t: np.ndarray,
    sigma_t: np.ndarray,
    alpha_s: np.ndarray,
    sigma_s: np.ndarray,
) -> Posterior:
    """Bayes' rule for one step back (Ho et al. 2020, eqs. 6-7; Kingma et al. 2021, eq. 25).

    ``beta`` is the variance of q(x_t | x_s) = N(α_t/α_s·x_s, β·I): σ_t² - (α_t/α_s)²·σ_s².
    The two mean coefficients do not sum to 1. All arguments and results are float64 on the host.
    """
    return Posterior(
        coef_x0=alpha_s * beta / sigma_t**2,
        coef_xt=alpha_t / alpha_s * sigma_s**2 / sigma_t**2,
        variance=beta * sigma_s**2 / sigma_t**2,
    )


def expand(coefficient: Float[Array, "..."], x: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Append axes to a scalar or ``[batch]`` coefficient so that it broadcasts against x."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def q_sample(
    process: Process,
    x0: Float[Array, "batch *shape"],
    t: Float[Array, "#batch"] | Float[Array, ""],
    eps: Float[Array, "batch *shape"],
) -> Float[Array, "batch *shape"]:
    """Draw x_t ~ q(x_t | x_0) = N(α·x_0, σ²·I) with the noise ε given (Ho et al. 2020, eq. 4)."""
    return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * eps


def prior(
    process: Process, t: float, keys: Any, shape: tuple[int, ...], dtype: Any = float
) -> Float[Array, "batch *shape"]:
    """What sampling from t starts with, N(0, prior_std(t)²·I): of ``shape`` for each key."""
    return process.prior_std(t) * _normal(keys, shape, dtype)


def corrupt(
    process: Process,
    keys: Any,
    x0: Float[Array, "batch *shape"],
    t: Float[Array, "#batch"] | Float[Array, ""],
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
    """x_t ~ q(x_t | x_0) and its noise ε; those of example i depend only on its own and key i."""
    eps = per_example_normal(keys, x0)
    return q_sample(process, x0, t, eps), eps


def noise_between(
    process: Process,
    x0: Float[Array, "batch *shape"],
    xt: Float[Array, "batch *shape"],
    t: Float[Array, "#batch"] | Float[Array, ""],
) -> Float[Array, "batch *shape"]:
    """ε = (x_t - α·x_0)/σ, the noise with which ``q_sample`` leads from x_0 to x_t."""
    return (xt - expand(process.alpha(t), xt) * x0) / expand(process.sigma(t), xt)


def per_example_normal(keys: Any, x: Float[Array, "batch *shape"]) -> Float[Array, "batch *shape"]:
    """Standard normal noise shaped like x; example i depends only on key i, whatever the batch."""
    return _normal(keys, x.shape[1:], x.dtype)


def _normal(keys: Any, shape: tuple[int, ...], dtype: Any) -> Float[Array, "batch *shape"]:
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def float_dtype(x: Shaped[Array, "..."]) -> Any:
    """The dtype of real numbers beside x: its own, or the default where x holds none."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)


def fold_in(keys: Any, data: Any) -> Any:
    """``jax.random.fold_in`` over a ``[batch]`` of keys."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, jnp.asarray(data))
