"""Grouped products on NVIDIA Hopper (H100, H200), by JAX's Mosaic GPU kernels.

XLA:GPU multiplies every row with every expert where a program says `jax.lax.ragged_dot`; these multiply each row once.
The kernels know the forward product and the weights' gradient; here they become one function with a gradient.

Legend: R rows sorted by expert, D and W widths, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np

# What one warpgroup works on at once, how many are on their way to it, how many columns of tiles it goes along.
TILES = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 8}


@jax.custom_vjp
def multiply(x_RD: jax.Array, weight_EDW: jax.Array, rows_E: jax.Array) -> jax.Array:
    """[R, W]: each row times its expert's matrix, `rows_E` rows to each in turn; zeros in the rows beyond."""
    return product(x_RD, weight_EDW, rows_E, transpose=False)


def _multiply_forward(x_RD, weight_EDW, rows_E):
    return multiply(x_RD, weight_EDW, rows_E), (x_RD, weight_EDW, rows_E)


def _multiply_backward(saved, d_RW):
    x_RD, weight_EDW, rows_E = saved
    dx_RD = product(d_RW, weight_EDW, rows_E, transpose=True)
    return dx_RD, gradient(x_RD, d_RW, rows_E), np.zeros(rows_E.shape, jax.dtypes.float0)


multiply.defvjp(_multiply_forward, _multiply_backward)


def product(x_RD: jax.Array, weight_EDW: jax.Array, rows_E: jax.Array, transpose: bool) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot  # half a second that only these GPUs need

    y_RW = ragged_dot(x_RD, weight_EDW, group_sizes=rows_E, transpose_rhs=transpose, **TILES)
    beyond_R = jnp.arange(len(x_RD)) >= jnp.sum(rows_E)  # the kernel leaves these as they were in memory
    return jnp.where(beyond_R[:, None], 0, y_RW)


def gradient(x_RD: jax.Array, d_RW: jax.Array, rows_E: jax.Array) -> jax.Array:
    """Of the matrices [E, D, W], in the dtype of x."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    return transposed_ragged_dot(x_RD, d_RW, group_sizes=rows_E, **TILES)
