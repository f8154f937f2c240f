"""β schedules of the T-step chain, as float64 NumPy arrays of shape ``[T]``.

``beta_start`` and ``beta_end`` are meant for T = 1000 and scaled by 1000/T, so that a chain of
any length destroys about as much signal. β_t is the variance that step t adds:
q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I)  (Ho et al. 2020, eq. 2).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

Betas = Float64[np.ndarray, " T"]


def linear(num_timesteps: int, beta_start: float, beta_end: float) -> Betas:
    """β rising linearly: the paper's schedule with 1e-4 → 0.02."""
    return np.linspace(beta_start, beta_end, num_timesteps)


def quad(num_timesteps: int, beta_start: float, beta_end: float) -> Betas:
    """√β rising linearly."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2


def const(num_timesteps: int, beta_start: float, beta_end: float) -> Betas:
    """β = beta_end throughout."""
    return np.full(num_timesteps, beta_end)


def _warmup(num_timesteps: int, beta_start: float, beta_end: float, fraction: float) -> Betas:
    betas = np.full(num_timesteps, beta_end)
    warmup_steps = int(num_timesteps * fraction)
    betas[:warmup_steps] = np.linspace(beta_start, beta_end, warmup_steps)
    return betas


def warmup10(num_timesteps: int, beta_start: float, beta_end: float) -> Betas:
    """Linear over the first tenth of the chain, then beta_end."""
    return _warmup(num_timesteps, beta_start, beta_end, 0.1)


def warmup50(num_timesteps: int, beta_start: float, beta_end: float) -> Betas:
    """Linear over the first half of the chain, then beta_end."""
    return _warmup(num_timesteps, beta_start, beta_end, 0.5)


def sigmoid(num_timesteps: int, beta_start: float, beta_end: float) -> Betas:
    """β rising along the logistic function over [-6, 6] (Xu et al. 2022, GeoDiff)."""
    rise = 1 / (1 + np.exp(-np.linspace(-6.0, 6.0, num_timesteps)))
    return beta_start + (beta_end - beta_start) * rise


def jsd(num_timesteps: int) -> Betas:
    """β = 1/T, 1/(T-1), …, 1 (Sohl-Dickstein et al. 2015): ᾱ falls linearly, to exactly 0."""
    return 1 / np.linspace(num_timesteps, 1, num_timesteps)


def cosine(num_timesteps: int, offset: float = 0.008, max_beta: float = 0.999) -> Betas:
    """ᾱ along a squared cosine, β capped below 1 (Nichol & Dhariwal 2021, eq. 17).

    β = 1 - cos²b/cos²a is written as sin(a + b)·sin(b - a)/cos²a, which loses no digits at small β.
    """
    angle = (np.arange(num_timesteps + 1) / num_timesteps + offset) / (1 + offset) * np.pi / 2
    a, b = angle[:-1], angle[1:]
    return np.minimum(np.sin(a + b) * np.sin(b - a) / np.cos(a) ** 2, max_beta)


BETWEEN_ENDPOINTS: dict[str, Callable[[int, float, float], Betas]] = {
    "linear": linear,
    "quad": quad,
    "const": const,
    "warmup10": warmup10,
    "warmup50": warmup50,
    "sigmoid": sigmoid,
}
FREE_OF_ENDPOINTS: dict[str, Callable[[int], Betas]] = {"cosine": cosine, "jsd": jsd}
SCHEDULES = (*BETWEEN_ENDPOINTS, *FREE_OF_ENDPOINTS)


def make_betas(
    name: str, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Betas:
    """The schedule ``name`` for a chain of ``num_timesteps`` steps.

    Raises:
      ValueError: for an unknown name, or where scaling by 1000/T pushes β out of (0, 1].
    """
    if name in FREE_OF_ENDPOINTS:
        return FREE_OF_ENDPOINTS[name](num_timesteps)
    if name not in BETWEEN_ENDPOINTS:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    scale = 1000 / num_timesteps
    betas = BETWEEN_ENDPOINTS[name](num_timesteps, scale * beta_start, scale * beta_end)
    if not (np.all(betas > 0) and np.all(betas <= 1)):
        raise ValueError(
            f"schedule {name!r} gives β in [{betas.min():.3g}, {betas.max():.3g}] at "
            f"T={num_timesteps}, outside (0, 1]: β endpoints are scaled by 1000/T; take a longer "
            "chain, smaller endpoints, or the cosine schedule"
        )
    return betas


def _log_alpha_bar(betas: Betas) -> np.ndarray:
    with np.errstate(divide="ignore"):  # β = 1 ends at ᾱ = 0
        return np.cumsum(np.log1p(-betas))


def _from_log_alpha_bar(log_alpha_bar: np.ndarray) -> Betas:
    """β = 1 - ᾱ_t/ᾱ_{t-1}, with ᾱ = 1 before the chain."""
    return -np.expm1(np.diff(log_alpha_bar, prepend=0.0))


def shifted(betas: Betas, factor: float) -> Betas:
    """The chain whose σ/α is ``factor`` times as large at every t (Hoogeboom et al. 2023).

    A factor of resolution/64 makes a schedule for 64² destroy larger images as much.
    """
    log_alpha_bar = _log_alpha_bar(betas)
    # ᾱ' = 1/(1 + factor²·(1-ᾱ)/ᾱ)
    noise_to_signal = -np.expm1(log_alpha_bar) * np.exp(-log_alpha_bar)
    return _from_log_alpha_bar(-np.log1p(factor**2 * noise_to_signal))


def zero_terminal_snr(betas: Betas) -> Betas:
    """√ᾱ shifted and scaled to end at 0 and to begin where it did (Lin et al. 2024, algorithm 1).

    The last β is 1, where a model of ε would learn nothing; a model of x_0 or v does.
    """
    root = np.exp(_log_alpha_bar(betas) / 2)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    previous = np.append(1.0, root[:-1])
    # 1 - (root/previous)² is written as a product, which keeps the digits of small β.
    return (previous - root) * (previous + root) / previous**2
