import threading
import time

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
