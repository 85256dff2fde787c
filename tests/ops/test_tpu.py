"""The exchange through the TPU's compiler, which needs no TPU: pip install -e '.[tpu]'."""

import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from tmljax import config
from tmljax.cluster import compiler_options
from tmljax.ops import dispatch, experts
from tmljax.ops.experts import Experts
from tmljax.ops.route import route
from tmljax.sharding import BATCH_AXES, make_mesh, spec

B, P, D, E, K = 8, 256, 256, 16, 4


def chips(topology: str, **options):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install -e '.[tpu]'")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    return topologies.get_topology_desc(topology, "tpu", **options).devices


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(config.Mesh(data=1, fsdp=2, expert=4), chips("v5p:2x2x2"))


def compiled(mesh, exchange, W=256) -> str:
    """The program of the gradients of one expert layer in bfloat16."""

    def loss(x_BPD, weights, router_DE):
        routing = route(x_BPD, router_DE, jnp.zeros(E), K)
        local = dispatch.in_rows(experts.ragged)
        y_BPD, dropped = dispatch.apply_experts(x_BPD, routing, weights, local, exchange, 1.5, mesh)
        return jnp.sum(y_BPD.astype(jnp.float32) ** 2), dropped

    def array(shape, *axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    columns, lines = spec(("experts", "expert_embed", "width")), spec(("experts", "inner_width", "small"))
    weights = Experts(array((E, D, W), *columns), array((E, D, W), *columns), array((E, W, D), *lines))
    x_BPD, router_DE = array((B, P, D), BATCH_AXES, "context"), array((D, E), "fsdp", dtype=jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return step.lower(x_BPD, weights, router_DE).compile().as_text()


def exchanged(text: str, operation: str) -> int:
    """How many exchanges of rows of bfloat16 there are."""
    return len(re.findall(rf"= \(?bf16\[[\d,]*\][^=]* {operation}(?:-start)?\(", text))


@pytest.mark.slow
def test_ragged_rows_go_there_and_back_forward_and_backward(mesh):
    text = compiled(mesh, dispatch.ragged)
    assert exchanged(text, "ragged-all-to-all") == 4
    assert exchanged(text, "all-to-all") == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [256, 2 * 56])
def test_gradients_of_experts_are_scattered_not_copied(mesh, width):
    """Each member of `fsdp` ends with its part of the sum: no reduction of whole expert matrices."""
    text = compiled(mesh, dispatch.padded, width)
    assert exchanged(text, "all-to-all") == 4
    assert re.search(r"reduce-scatter", text)
    assert not re.search(rf"= \w+\[{E // 4},[\d,]*\][^=]* all-reduce(?:-start)?\(", text)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "has_one"), [("v5e:2x4", False), ("v5p:2x2x2", True), ("v6e:2x4", True)])
def test_the_sparse_core_scatters_sums_where_there_is_one(topology, has_one):
    mesh = make_mesh(config.Mesh(data=1, fsdp=8), chips(topology))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    scatter = jax.shard_map(
        lambda x: jax.lax.psum_scatter(jax.lax.all_gather(x, "fsdp", tiled=True), "fsdp", tiled=True),
        mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False,
    )  # fmt: skip
    text = jax.jit(scatter, compiler_options=compiler_options(mesh, cpu_level=2)).lower(x).compile().as_text()
    assert " reduce-scatter(" in text
    assert ("sparsecore" in text) == has_one


@pytest.mark.slow
def test_slices_of_a_pod_lie_along_data():
    mesh = make_mesh(config.Mesh(data=4, fsdp=2, slices=2), chips("v5p:2x2x1", num_slices=2))
    assert [{chip.slice_index for chip in replica.flat} for replica in mesh.devices] == [{0}, {0}, {1}, {1}]


@pytest.mark.slow
def test_an_axis_may_be_part_of_a_physical_one():
    """16 is no product of whole axes of 4 x 8 x 8."""
    mesh = make_mesh(config.Mesh(data=1, fsdp=16, expert=16), chips("v5p:4x8x8"))
    assert len(set(mesh.devices.flat)) == 256


@pytest.mark.slow
def test_grouped_products_of_the_big_model_fit_vmem():
    """Forward and backward, 64 experts of [4096, 1792]; what does not fit is refused by the compiler."""
    R, D, W, E = 98_304, 4096, 1792, 64
    where = SingleDeviceSharding(chips("v5p:2x2x1")[0])
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)  # noqa: E731
    weights = Experts(array(E, D, W), array(E, D, W), array(E, W, D))

    def loss(x_RD, weights, rows_E):
        return jnp.sum(experts.grouped(x_RD, rows_E, weights).astype(jnp.float32) ** 2)

    rows_E = jax.ShapeDtypeStruct((E,), jnp.int32, sharding=where)
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(array(R, D), weights, rows_E).compile().as_text()
    assert text.count("tpu_custom_call") == 9  # three forward and six backward
