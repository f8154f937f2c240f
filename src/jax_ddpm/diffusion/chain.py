"""The T-step chain of Ho et al. 2020: float64 tables and the closed forms of q.

Times are ``t = 0, …, T-1``, as in the paper's code: t here is t + 1 in the paper. Index 0 is the
first noisy state, and clean data lies before it.
"""

import dataclasses
import warnings
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_ddpm.diffusion.process import (
    Posterior,
    Process,
    Times,
    expand,
    posterior_coefficients,
    sqrt_sigmoid,
)
from jax_ddpm.errors import UserError

# The prior N(0, I) visibly differs from q(x_T | x_0) above this many bits/dim.
_MAX_PRIOR_BITS = 1e-3
_ZERO_SNR = -750.0


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The variance-preserving chain of the given β (a ``Process``).

    Attributes (float64 NumPy, ``[T]``): ``alpha_bar`` is ᾱ_t = Π(1-β) and ``log_alpha_bar`` its
    logarithm. ``one_minus_alpha_bar`` and its logarithm are free of cancellation. ``log_snr_table``
    is λ_t. ``posterior`` holds the coefficients of q(x_{t-1} | x_t, x_0), with exactly clean data
    before t = 0 (ᾱ_{-1} = 1).

    Raises:
      ValueError: where β is not one axis of two values or more in (0, 1), the last in (0, 1].
    """

    betas: np.ndarray

    def __post_init__(self) -> None:
        betas = np.asarray(self.betas, np.float64)
        valid = betas.ndim == 1 and betas.size > 1 and np.all((betas > 0) & (betas <= 1))
        if not valid or np.any(betas[:-1] == 1):  # a step back from β = 1 has nothing to start from
            raise ValueError(
                "betas must be one axis of two or more values in (0, 1), of which the last may be 1"
            )
        object.__setattr__(self, "betas", betas)
        if self.prior_bits_per_dim > _MAX_PRIOR_BITS:
            warnings.warn(
                f"the schedule leaves signal at T: terminal log-SNR {self.log_snr_table[-1]:.2f}, "
                f"L_T up to {self.prior_bits_per_dim:.2g} bits/dim; sampling starts from noise "
                "that training never saw. Raise beta_end or num_timesteps",
                stacklevel=3,
            )

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, self.num_timesteps - 1.0

    @property
    def prior_bits_per_dim(self) -> float:
        """KL(q(x_T | x_0) ‖ N(0, I)) in bits/dim at |x_0| = 1, its largest for data in [-1, 1]."""
        return float(-0.5 * self.log_one_minus_alpha_bar[-1] / np.log(2))

    @cached_property
    def log_alpha_bar(self) -> np.ndarray:
        with np.errstate(divide="ignore"):  # β = 1 ends at ᾱ = 0
            return np.cumsum(np.log1p(-self.betas))

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        return np.exp(self.log_alpha_bar)

    @cached_property
    def one_minus_alpha_bar(self) -> np.ndarray:
        return -np.expm1(self.log_alpha_bar)

    @cached_property
    def log_one_minus_alpha_bar(self) -> np.ndarray:
        # log1p is accurate for small ᾱ, expm1 for small 1-ᾱ.
        return np.where(
            self.alpha_bar < 0.5,
            np.log1p(-np.minimum(self.alpha_bar, 0.5)),
            np.log(self.one_minus_alpha_bar),
        )

    @cached_property
    def log_snr_table(self) -> np.ndarray:
        # A finite λ whose exponential vanishes replaces -∞ at ᾱ = 0: interpolation stays finite.
        return np.maximum(self.log_alpha_bar - self.log_one_minus_alpha_bar, _ZERO_SNR)

    @cached_property
    def posterior(self) -> Posterior:
        alpha, sigma = np.sqrt(self.alpha_bar), np.sqrt(self.one_minus_alpha_bar)
        return posterior_coefficients(
            self.betas, alpha, sigma, np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
        )

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """log β̃_t; entry 1 replaces the -∞ of t = 0, as in Ho et al.'s code."""
        return np.log(np.append(self.posterior.variance[1], self.posterior.variance[1:]))

    # The Process contract: exact tables at whole t, linear interpolation of λ between them.

    def alpha(self, t: Times) -> Times:
        """√ᾱ_t."""
        return self._whole_or_between(t, np.sqrt(self.alpha_bar), sqrt_sigmoid(self.log_snr(t)))

    def sigma(self, t: Times) -> Times:
        """√(1-ᾱ_t)."""
        noise = np.sqrt(self.one_minus_alpha_bar)
        return self._whole_or_between(t, noise, sqrt_sigmoid(-self.log_snr(t)))

    def log_snr(self, t: Times) -> Times:
        """λ_t, linear in t between whole steps."""
        return _interp(t, np.arange(self.num_timesteps), self.log_snr_table)

    def time(self, log_snr: Times) -> Times:
        """t(λ), fractional between steps and held at 0 and T-1 beyond them."""
        steps = np.arange(self.num_timesteps)
        return _interp(log_snr, self.log_snr_table[::-1], steps[::-1])

    def prior_std(self, t: float) -> float:
        """1 at any t: x_t of data of unit variance has it."""
        return 1.0

    def _whole_or_between(self, t: Times, table: np.ndarray, between: Times) -> Times:
        xp = t.__array_namespace__()
        step = xp.clip(xp.floor(t), 0, self.num_timesteps - 1)
        exact = xp.asarray(table, dtype=t.dtype)[step.astype(xp.int32)]
        return xp.where(t == step, exact, between)

    def gather(self, table: np.ndarray, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """``table[t]`` at whole times, cast from float64 to t's dtype."""
        return jnp.asarray(table, t.dtype)[t.astype(jnp.int32)]


def chain_of(process: Process) -> Chain:
    """The process, for what only a T-step chain has.

    Raises:
      UserError: where it has continuous time.
    """
    if isinstance(process, Chain):
        return process
    raise UserError("this model's process is no chain: it has no bound and no coding of T steps")


def _interp(x: Times, xs: np.ndarray, ys: np.ndarray) -> Times:
    xp = x.__array_namespace__()
    between = xp.interp(x, xp.asarray(xs, dtype=x.dtype), xp.asarray(ys, dtype=x.dtype))
    return between.astype(x.dtype)  # NumPy returns float64 for any dtype


def q_step(
    chain: Chain, x_previous: Float[Array, "batch *shape"], t: Float[Array, " batch"]
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *ones"]]:
    """Mean and variance of q(x_t | x_{t-1}) = N(√(1-β_t)·x_{t-1}, β_t) (Ho et al. 2020, eq. 2)."""
    beta = expand(chain.gather(chain.betas, t), x_previous)
    return jnp.sqrt(1 - beta) * x_previous, beta


def q_posterior(
    chain: Chain,
    x0: Float[Array, "batch *shape"],
    xt: Float[Array, "batch *shape"],
    t: Float[Array, " batch"],
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *ones"]]:
    """Mean μ̃ and log-variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eqs. 6-7).

    The true log-variance at t = 0 is -∞; the one of t = 1 replaces it.
    """
    coef_x0 = expand(chain.gather(chain.posterior.coef_x0, t), x0)
    coef_xt = expand(chain.gather(chain.posterior.coef_xt, t), x0)
    log_variance = expand(chain.gather(chain.posterior_log_variance, t), x0)
    return coef_x0 * x0 + coef_xt * xt, log_variance
