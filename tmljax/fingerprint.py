"""Fingerprints of arrays: a 32-bit sum over their numbers' bits, each scattered by its place.

Sums of integers do not depend on their order, so an array has one fingerprint however it is sharded, and it is
taken where the array lies. One wrong bit changes it; it is no defence against forgery.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Fingerprints = dict[str, int]  # by name of the leaf


def fingerprints(tree: Any) -> Fingerprints:
    """Of device arrays."""
    with jax.transfer_guard("allow"):
        return {name: int(total) for name, total in jax.device_get(_sum_on_devices(flatten(tree))).items()}


def host_fingerprints(tree: Any) -> Fingerprints:
    """Of numpy arrays; no device is touched."""
    return {name: _sum_on_host(np.asarray(x)) for name, x in flatten(tree).items()}


def compare(found: Fingerprints, saved: Fingerprints) -> None:
    """Raises ValueError naming the first array that differs."""
    for name in sorted(found.keys() | saved.keys()):
        if found.get(name) != saved.get(name):
            raise ValueError(f"{name} is not what was saved")


def flatten(tree: Any) -> dict[str, Any]:
    """{"0.mu.trunk.norm": leaf}: a plain dict, whatever classes the tree is made of."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@jax.jit
def _sum_on_devices(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        place, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for dim in reversed(range(x.ndim)):  # not reshape, which would move a sharded array
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
            stride *= x.shape[dim]
        return jnp.sum(mix(bits, place))

    return {name: total(x) for name, x in flat.items()}


def _sum_on_host(x: np.ndarray) -> int:
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    return int(mix(bits, np.arange(x.size, dtype=np.uint32)).sum(dtype=np.uint32))


def mix(bits: Any, place: Any) -> Any:
    """Scatters each number's bits, together with where it stands (MurmurHash3's last step); uint32 arrays."""
    x = bits + place * np.uint32(0x9E3779B9)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
