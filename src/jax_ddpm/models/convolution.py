"""Convolution as a primitive of its own, for the sake of its derivatives.

XLA's CPU backend knows a convolution only with the axes in their usual order, and puts them in that
order outside of loops alone. JAX's own rule for a kernel's gradient has them in another, so inside
``lax.scan`` (several steps per dispatch, accumulation, a guide's gradient) that gradient runs in a
plain loop, hundreds of times slower (jax issue 12868). The rules here are the same convolutions with
the axes put in order first; on a GPU and a TPU XLA folds these transpositions away.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]

_ORDER = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c f"],
    stride: int = 1,
    padding: Padding | None = None,
) -> Float[Array, "b h2 w2 f"]:
    """A convolution, padded by so many zeros before and after in each direction; None: SAME."""
    if padding is None:
        rows, columns = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride,) * 2, "SAME")
        padding = (rows, columns)
    return convolve_p.bind(x, kernel, stride=stride, padding=padding)


def _convolve(x: Array, kernel: Array, *, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=_ORDER)


def _input_gradient(
    cotangent: Array, x: Any, kernel: Array, *, stride: int, padding: Padding
) -> Array:
    """Σ over places of cotangent[place]·kernel[offset]: with the kernel flipped in space."""

    def pad(axis: int) -> tuple[int, int]:
        last = stride * (cotangent.shape[axis] - 1)
        before = kernel.shape[axis - 1] - 1 - padding[axis - 1][0]
        return before, x.aval.shape[axis] + padding[axis - 1][0] - 1 - last

    return lax.conv_general_dilated(
        cotangent,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        (1, 1),
        (pad(1), pad(2)),
        lhs_dilation=(stride,) * 2,
        dimension_numbers=_ORDER,
    )


def _kernel_gradient(
    cotangent: Array, x: Array, kernel: Any, *, stride: int, padding: Padding
) -> Array:
    """Σ over examples and places of x[place + offset]·cotangent[place]: examples are summed as
    channels are, and channels of x lie where examples do."""

    def pad(axis: int) -> tuple[int, int]:
        before, last = padding[axis - 1][0], stride * (cotangent.shape[axis] - 1)
        return before, last + kernel.aval.shape[axis - 1] - x.shape[axis] - before

    gradient = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        cotangent.transpose(1, 2, 0, 3),
        (1, 1),
        (pad(1), pad(2)),
        rhs_dilation=(stride,) * 2,
        dimension_numbers=_ORDER,
    )
    return gradient.transpose(1, 2, 0, 3)


def _batch(arguments: Any, axes: Any, **parameters: Any) -> tuple[Array, int]:
    return jax.vmap(partial(_convolve, **parameters), axes)(*arguments), 0


convolve_p = Primitive("convolve")
convolve_p.def_impl(_convolve)
convolve_p.def_abstract_eval(
    lambda *arguments, **parameters: jax.typeof(
        jax.eval_shape(partial(_convolve, **parameters), *arguments)
    )
)
mlir.register_lowering(convolve_p, mlir.lower_fun(_convolve, multiple_results=False))
ad.defbilinear(convolve_p, _input_gradient, _kernel_gradient)
batching.primitive_batchers[convolve_p] = _batch
