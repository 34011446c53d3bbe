# SPDX-License-Identifier: Apache-2.0
"""Products of activations and kernels, in the form that is fastest on a platform.

In float32, and on accelerators, these are XLA's products as they are. On CPUs XLA has
fast bfloat16 products in one form: the left operand contracts its last axis, both are
stored row by row, and the result is float32. It casts the operands of every other form
to float32, so that they take longer than float32 products. There the product and both
its gradients are written in the fast form, and activations between products stay
float32, as in torch's autocast. docs/design/products.md has the times.
"""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxunlearn import sharding
from jaxunlearn.typing import Array


def fastest_dtype() -> str:
    """What `compute_dtype="auto"` stands for: "bfloat16" or "float32".

    bfloat16 on TPUs, on GPUs from compute capability 8.0, and on x86 processors with
    bfloat16 products (`avx512_bf16` among their flags), where a step takes two thirds
    of the time of float32. float32 elsewhere: other processors were not measured.
    """
    platform = sharding.platform()
    if platform == "cpu":
        return "bfloat16" if "avx512_bf16" in _processor_flags() else "float32"
    if platform == "gpu":
        # A described GPU, as a plan has one, is not among the devices.
        capable = (getattr(d, "compute_capability", "") for d in jax.local_devices())
        old = any(float(c) < 8 for c in capable if c.replace(".", "", 1).isdigit())
        return "float32" if old else "bfloat16"
    return "bfloat16"


@cache
def _processor_flags() -> frozenset[str]:
    """The features that Linux lists for the first processor; none elsewhere."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return frozenset()
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def activations(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of activations between products, where `dtype` is that of operands."""
    return jnp.dtype("float32") if _fast_form(dtype) else dtype


def dot(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """x [..., D] times kernel [D, F], operands in `dtype`, the product in x's dtype.

    Gradients have the dtypes of x and of the kernel. The fast form has gradients, and
    forward mode over gradients (Hessian products), but no forward mode alone.
    """
    if _fast_form(dtype):
        return _on_rows(x, kernel, False)
    return x @ kernel.astype(x.dtype)


def logits(x: Array, kernel: Array, *, transposed: bool) -> Array:
    """x [..., D] times kernel [D, V], or a transposed kernel [V, D], in float32.

    The kernel is what `cast` returns. In the fast form the gradient by the logits is
    rounded to bfloat16 before the two products that use it.
    """
    if _fast_form(x.dtype):
        return _on_rows(x.astype(jnp.float32), kernel, transposed)
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


def _on_rows(x, kernel, transposed):
    y = _dot(x.reshape(-1, x.shape[-1]), kernel, transposed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x, kernel, transposed):
    """float32 x [R, D] times kernel [D, F], or [F, D] transposed, in float32."""
    return _forward(x, kernel, transposed)[0]


def _forward(x, kernel, transposed):
    x = x.astype(jnp.bfloat16)
    return _rows_times(x, kernel.astype(x.dtype), transposed), (x, kernel)


def _backward(transposed, saved, grad):
    x, kernel = saved
    grad = grad.astype(x.dtype)
    dx = _rows_times(grad, kernel.astype(x.dtype), not transposed)
    left, right = (grad, x) if transposed else (x, grad)
    dkernel = _rows_times(_stored_transposed(left), right, False)
    return dx, dkernel.astype(kernel.dtype)


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
