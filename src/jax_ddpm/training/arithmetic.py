"""The arithmetic of a traced program and the bytes it keeps, before XLA sees it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxprs_in_params


def array_bytes(array: Any) -> int:
    """The bytes of an array, or of one of its shape and dtype."""
    return array.size * array.dtype.itemsize


def activation_bytes(function: Callable, params: Any, *arguments: Any) -> int:
    """The bytes kept to differentiate ``function`` by ``params``, beside the arguments.

    They are those of the traced program; XLA may keep less, and needs room for gradients of
    activations as well.
    """

    def kept(params: Any, *arguments: Any) -> Any:
        return jax.vjp(lambda params: function(params, *arguments), params)[1]

    jaxpr = jax.make_jaxpr(kept)(params, *arguments).jaxpr
    new = {var for var in jaxpr.outvars if isinstance(var, Var)} - set(jaxpr.invars)
    return sum(array_bytes(var.aval) for var in new)


def flops(function: Callable, *arguments: Any) -> int:
    """Floating-point operations of all convolutions and matrix products in ``function``.

    A multiply-add counts two. Operations on a convolution's padding and on the holes of dilation do
    not count, so its two gradients cost as much as the convolution. Elementwise operations count
    nothing. A loop counts as often as it runs (``while``, which may run any number of times, once),
    a choice as its dearest branch, and a program mapped over devices once for each device.

    ``arguments`` are arrays or only their shapes and dtypes.
    """
    return total_of(jax.make_jaxpr(function)(*arguments).jaxpr, product_flops)


def total_of(jaxpr: Jaxpr, of: Callable[[JaxprEqn], int]) -> int:
    """The sum of ``of`` over the operations that run, including those of inner programs."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [total_of(each, of) for each in _programs(equation)]
        chosen = max(inner) if equation.primitive.name == "cond" else sum(inner)
        total += of(equation) + _runs(equation) * chosen
    return total


def _programs(equation: JaxprEqn) -> list[Jaxpr]:
    if equation.primitive.name == "convolve":  # our own: see models/convolution.py
        function = partial(equation.primitive.impl, **equation.params)
        return [jax.make_jaxpr(function)(*(var.aval for var in equation.invars)).jaxpr]
    return list(jaxprs_in_params(equation.params))


def _runs(equation: JaxprEqn) -> int:
    if equation.primitive.name == "scan":
        return equation.params["length"]
    return equation.params["mesh"].size if equation.primitive.name == "shard_map" else 1


def product_flops(equation: JaxprEqn) -> int:
    """The operations of one equation, counted as in ``flops``."""
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        lhs, _, out = _operands(equation)
        return 2 * out.size * math.prod(lhs.shape[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        return _convolution_flops(equation)
    return 0


def product_bytes(equation: JaxprEqn) -> int:
    """The bytes of a convolution's or matrix product's operands and results, once each."""
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return 0
    return sum(map(array_bytes, _operands(equation)))


def _operands(equation: JaxprEqn) -> list[Any]:
    """Shapes and dtypes of the inputs, then of the outputs."""
    return [var.aval for var in (*equation.invars, *equation.outvars)]


def _convolution_flops(equation: JaxprEqn) -> int:
    params = equation.params
    lhs, rhs, out = (operand.shape for operand in _operands(equation))
    lhs_axes, rhs_axes, out_axes = params["dimension_numbers"]
    batch, features, *out_spatial = out_axes
    _, inputs, *rhs_spatial = rhs_axes
    _, _, *lhs_spatial = lhs_axes
    spatial = zip(
        (lhs[axis] for axis in lhs_spatial),
        (rhs[axis] for axis in rhs_spatial),
        (out[axis] for axis in out_spatial),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    pairs = math.prod(_pairs(*axis) for axis in spatial)
    return 2 * out[batch] * out[features] * rhs[inputs] * pairs


def _pairs(
    length: int,
    taps: int,
    places: int,
    stride: int,
    padding: tuple[int, int],
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """The number of pairs (place of the output, tap of the kernel) that meet an input element."""
    place, tap = np.ogrid[:places, :taps]
    position = place * stride + tap * rhs_dilation - padding[0]
    within = (position >= 0) & (position <= (length - 1) * lhs_dilation)
    return int(np.sum(within & (position % lhs_dilation == 0)))
