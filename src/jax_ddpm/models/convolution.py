"""Convolution as a primitive of its own, for the sake of its derivatives.

XLA's CPU backend is fast only at a convolution whose axes lie in their usual order, and puts axes
in that order only outside loops. JAX's own rule for a kernel's gradient orders them differently,
so that gradient takes hundreds of times as long inside ``lax.scan`` (several steps per dispatch,
accumulation, a guide's gradient; jax issue 12868). The rules here are JAX's own, except that they
put the axes in order first on a CPU.
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
    """A convolution, padded by this many zeros before and after in each direction; None: SAME."""
    if padding is None:
        rows, columns = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride,) * 2, "SAME")
        padding = (rows, columns)
    return convolve_p.bind(x, kernel, stride=stride, padding=padding)


def _convolve(x: Array, kernel: Array, *, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=_ORDER)


def _input_gradient(
    cotangent: Array, x: Any, kernel: Array, *, stride: int, padding: Padding
) -> Array:
    """Σ over places of cotangent[place]·kernel[offset]: a convolution with the flipped kernel."""

    def pad(axis: int) -> tuple[int, int]:
        last = stride * (cotangent.shape[axis] - 1)
        before = kernel.shape[axis - 1] - 1 - padding[axis - 1][0]
        return before, x.aval.shape[axis] + padding[axis - 1][0] - 1 - last

    flipped, order = jnp.flip(kernel, (0, 1)), ("NHWC", "HWOI", "NHWC")
    return _slide(cotangent, flipped, order, (pad(1), pad(2)), lhs_dilation=(stride,) * 2)


def _kernel_gradient(
    cotangent: Array, x: Array, kernel: Any, *, stride: int, padding: Padding
) -> Array:
    """Σ over examples and places of x[place + offset]·cotangent[place]: examples are summed like
    channels, and the channels of x take the place of the examples."""

    def pad(axis: int) -> tuple[int, int]:
        before, last = padding[axis - 1][0], stride * (cotangent.shape[axis] - 1)
        return before, last + kernel.aval.shape[axis - 1] - x.shape[axis] - before

    order = ("CHWN", "IHWO", "HWNC")
    return _slide(x, cotangent, order, (pad(1), pad(2)), rhs_dilation=(stride,) * 2)


def _slide(
    x: Array, window: Array, order: tuple[str, str, str], padding: Padding, **dilation: Any
) -> Array:
    """A convolution of axes in any order; a CPU gets them in the usual order."""

    def as_they_are(x: Array, window: Array) -> Array:
        return lax.conv_general_dilated(
            x, window, (1, 1), padding, dimension_numbers=order, **dilation
        )

    def in_order(x: Array, window: Array) -> Array:
        x, window = _reorder(x, order[0], _ORDER[0]), _reorder(window, order[1], _ORDER[1])
        result = lax.conv_general_dilated(
            x, window, (1, 1), padding, dimension_numbers=_ORDER, **dilation
        )
        return _reorder(result, _ORDER[2], order[2])

    return lax.platform_dependent(x, window, cpu=in_order, default=as_they_are)


def _reorder(array: Array, axes: str, wanted: str) -> Array:
    return array.transpose([axes.index(axis) for axis in wanted])


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
