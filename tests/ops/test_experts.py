"""Grouped products in several tiles, against `ragged_dot`."""

from functools import partial

import jax
import numpy as np

from tmljax.ops import experts
from tmljax.ops.experts import Experts


def test_tiles_hold_the_whole_depth_and_no_part_of_a_tile():
    """Of the 276B config's matrices [4096, 1792] and [1792, 4096]; small ones are one tile."""
    assert experts.tile(98_304, 4096, 1792) == (experts.TILE_ROWS, 4096, 256)
    assert experts.tile(98_304, 1792, 4096) == (experts.TILE_ROWS, 1792, 512)
    assert experts.tile(64, 32, 48) == (experts.TILE_ROWS, 32, 48)


def test_grouped_in_several_tiles_of_rows_and_columns(monkeypatch):
    """Three tiles of rows, of which experts share two; two and three of columns; one expert has no row. Gates that
    come before the last product are those of its result."""
    monkeypatch.setattr(experts, "TILE_WEIGHTS", 2**15)
    R, D, W, sizes = 700, 256, 384, np.array([300, 0, 190, 210], np.int32)
    assert experts.tile(R, D, W)[2] == experts.tile(R, W, D)[2] == 128
    x_RD, gate, up, down, d_RD = (
        jax.random.normal(key, shape) / 16
        for key, shape in zip(jax.random.split(jax.random.key(0), 5), [(R, D), (4, D, W), (4, D, W), (4, W, D), (R, D)])
    )

    gate_R = jax.random.uniform(jax.random.key(1), (R,))

    def run(f):
        out, pull = jax.vjp(f, x_RD, Experts(gate, up, down), gate_R)
        return out, pull(d_RD)

    same = partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-4)
    grouped, plain = partial(experts.grouped, interpret=True), experts.ragged
    jax.tree.map(same, run(lambda x, w, _: grouped(x, sizes, w)), run(lambda x, w, _: plain(x, sizes, w)))
    gated = run(lambda x, w, gate_R: plain(x, sizes, w) * gate_R[:, None])
    for product in (grouped, experts.ragged):
        jax.tree.map(same, run(lambda x, w, gate_R, product=product: product(x, sizes, w, gate_R)), gated)
