import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from tests.train import toy
from tmljax.sharding import batch_sharding, make_mesh
from tmljax.train.feed import DEPTH, Feed


@pytest.fixture
def sharding():
    return batch_sharding(make_mesh(toy.experiment().mesh))


def wait_until(holds) -> None:
    for _ in range(500):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("never came true")


def test_state_is_that_of_the_batches_taken_not_of_those_read_ahead(sharding):
    source = toy.Source(8)
    feed = Feed(source, sharding)
    try:
        wait_until(lambda: source.taken > DEPTH)
        for taken in (1, 2, 3):
            fed = feed.next()
            assert fed.state == {"taken": taken}
        again = toy.Source(8)
        again.set_state(fed.state)
        wait_until(lambda: source.taken > 3)
        expected = next(again)["x"]
    finally:
        feed.close()
    fourth = toy.Source(8)
    for _ in range(3):
        next(fourth)
    assert (next(fourth)["x"] == expected).all()


def test_batches_arrive_on_their_devices_in_order(sharding):
    feed, plain = Feed(toy.Source(8), sharding), toy.Source(8)
    try:
        for _ in range(4):
            batch, expected = feed.next().batch, next(plain)
            assert batch["x"].sharding == sharding
            assert len(batch["x"].sharding.device_set) == len(jax.devices())
            assert (batch["x"] == expected["x"]).all()
    finally:
        feed.close()


def test_what_the_source_raises_reaches_the_loop(sharding):
    class Failing(toy.Source):
        def __next__(self):
            if self.taken == 1:
                raise OSError("the disk is gone")
            return super().__next__()

    feed = Feed(Failing(8), sharding)
    feed.next()
    with pytest.raises(OSError, match="the disk is gone"):
        feed.next()
    feed.close()


def test_close_ends_the_thread_though_nobody_reads(sharding):
    before = threading.active_count()
    feed = Feed(toy.Source(8), sharding)
    feed.next()
    feed.close()
    wait_until(lambda: threading.active_count() <= before)


TWO_PROCESSES = """
import sys
import jax
import numpy as np
from tmljax.config import Mesh
from tmljax.sharding import AXES, batch_sharding, make_mesh, process_rows
from tmljax.train.feed import to_devices

jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
batch = np.arange(48).reshape(16, 3)
for sizes in {"data": 8}, {"fsdp": 2, "context": 4}, {"context": 2, "tensor": 4}, {"expert": 4, "context": 2}:
    made = make_mesh(Mesh(**{"data": 1} | sizes))
    apart = made.devices.ravel().reshape(2, 4).T.reshape(made.devices.shape)  # neighbours in different processes
    for mesh in made, jax.sharding.Mesh(apart, AXES):
        with jax.transfer_guard("disallow"):  # as in the training loop
            array = to_devices({"x": batch[process_rows(mesh, 16)]}, batch_sharding(mesh))["x"]
        assert array.shape == batch.shape
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, batch[shard.index])
"""


def test_what_two_processes_read_is_one_batch_on_every_mesh():
    """Wherever the devices of a process lie, and where both hold parts of one example."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(index)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
