# SPDX-License-Identifier: Apache-2.0
"""Products of activations and kernels, in the form that is fastest on a platform.

In float32, and on accelerators, these are XLA's products as they are. On CPUs XLA has
fast bfloat16 products in one form: the left operand contracts its last axis, both are
stored row by row, and the result is float32. It casts the operands of every other form
to float32, so that they take longer than float32 products. There the product and both
its gradients are written in the fast form. docs/design/low-precision.md has the times.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import sharding
from jaxunlearn.typing import Array


def dot(x: Array, kernel: Array) -> Array:
    """x [..., D] times kernel [D, F], in x's dtype.

    The kernel is cast to x's dtype, and its gradient has the kernel's. The fast form has
    gradients, and forward mode over gradients (Hessian products), but no forward mode
    alone.
    """
    if _fast_form(x.dtype):
        return _on_rows(x, kernel, False, x.dtype)
    return x @ kernel.astype(x.dtype)


def logits(x: Array, kernel: Array, *, transposed: bool) -> Array:
    """x [..., D] times kernel [D, V], or a transposed kernel [V, D], in float32.

    The kernel is what `cast` returns. In the fast form the gradient by the logits is
    rounded to bfloat16 before the two products that use it.
    """
    if _fast_form(x.dtype):
        return _on_rows(x, kernel, transposed, jnp.dtype("float32"))
    form = "...d,vd->...v" if transposed else "...d,dv->...v"
    return jnp.einsum(form, x, kernel, preferred_element_type=jnp.float32)


def cast(kernel: Array, dtype: jnp.dtype) -> Array:
    """The kernel in `dtype`; unchanged where `logits` casts it, so that its gradient is
    not rounded."""
    return kernel if _fast_form(dtype) else kernel.astype(dtype)


def _fast_form(dtype) -> bool:
    return (
        dtype == jnp.bfloat16
        and sharding.platform() == "cpu"
        and sharding.parts_of("context") == 1
    )


def _on_rows(x, kernel, transposed, dtype):
    y = _dot(x.reshape(-1, x.shape[-1]), kernel, transposed, dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(x, kernel, transposed, dtype):
    """bfloat16 x [R, D] times kernel [D, F], or [F, D] transposed, in `dtype`."""
    return _rows_times(x, kernel.astype(x.dtype), transposed).astype(dtype)


def _forward(x, kernel, transposed, dtype):
    return _dot(x, kernel, transposed, dtype), (x, kernel)


def _backward(transposed, dtype, saved, grad):
    del dtype
    x, kernel = saved
    grad = grad.astype(x.dtype)
    dx = _rows_times(grad, kernel.astype(x.dtype), not transposed)
    left, right = (grad, x) if transposed else (x, grad)
    dkernel = _rows_times(_stored_transposed(left), right, False)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_dot.defvjp(_forward, _backward)


def _rows_times(x, kernel, transposed):
    """The fast form: float32 sums of x [R, D] times kernel [D, F] or [F, D]."""
    axes = ((1,), (1 if transposed else 0,))
    return jax.lax.dot_general(
        x, kernel, (axes, ((), ())), preferred_element_type=jnp.float32
    )


def _stored_transposed(x):
    # The barrier and the axis of size 1 keep XLA from merging the transpose into the
    # product that reads it, which would not have the fast form.
    return jax.lax.optimization_barrier(x.T[None])[0]
