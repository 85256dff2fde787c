"""Products of one input with several matrices."""

import math

import jax
import jax.numpy as jnp

FEW = 128  # rows, up to which copying the matrices side by side costs more than reading the input again


def project(x_D: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    """`x_D` [..., D] times each of the matrices [D, W] of one shape: for many rows in one product, forward and back."""
    if len(weights) == 1 or math.prod(x_D.shape[:-1]) <= FEW:
        return [jnp.dot(x_D, weight) for weight in weights]
    # Stacked on a dim of their own, so that a mesh axis on W divides each of them as it did.
    y_gW = jnp.einsum("...D,DgW->...gW", x_D, jnp.stack(weights, axis=1))
    return [y_gW[..., g, :] for g in range(len(weights))]
