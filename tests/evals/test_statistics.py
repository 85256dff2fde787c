"""Intervals that cover what they promise."""

import numpy as np
import pytest

from tmljax.evals.item import Measurement, Value
from tmljax.evals.statistics import bootstrap, estimate, summarise, unanimous, weighted_quantiles


def measured(values, unit="s", sessions=None):
    names = sessions or [f"s{i}" for i in range(len(values))]
    return Measurement("x", tuple(Value(n, v) for n, v in zip(names, values, strict=True)), unit, "lower")


def test_point_values_and_what_does_not_apply():
    summary = summarise(measured([1.0, None, 4.0, 2.0, None]), "pause")
    assert (summary.n, summary.not_applicable, summary.family) == (3, 2, "pause")
    assert summary.mean.value == pytest.approx(7 / 3)
    assert summary.median.value == 2.0
    assert summary.mean.low < 7 / 3 < summary.mean.high
    assert summary.p99 is None


def test_nothing_applies():
    summary = summarise(measured([None, None]), "pause")
    assert (summary.n, summary.not_applicable, summary.mean, summary.median) == (0, 2, None, None)


def test_coverage_of_a_known_mean():
    """Of 95% intervals for the mean of 60 normal values, about 95% hold the true one."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(rng.normal(3.0, 1.0, 60), np.arange(60), None)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 199


def test_coverage_needs_groups():
    """Values of one session that agree are one observation: the interval is as wide as if each were there once."""
    rng = np.random.default_rng(2)
    once = rng.normal(size=30)
    alone = bootstrap(once, np.arange(30), None)
    tenfold = bootstrap(np.repeat(once, 10), np.repeat(np.arange(30), 10), None)
    pretended = bootstrap(np.repeat(once, 10), np.arange(300), None)
    assert tenfold == pytest.approx(alone)
    assert pretended[1] - pretended[0] < 0.5 * (alone[1] - alone[0])


def test_seeded():
    values, groups = np.arange(20.0), np.arange(20)
    assert bootstrap(values, groups, 0.5) == bootstrap(values, groups, 0.5)
    assert bootstrap(values, groups, None) != bootstrap(values, groups, None, seed=1)


def test_weighted_quantiles_are_numpys():
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=9), rng.integers(0, 4, (20, 9))
    for quantile in (0.0, 0.5, 0.99, 1.0):
        found = weighted_quantiles(values, counts, quantile)
        plain = [np.quantile(np.repeat(values, row), quantile) for row in counts]
        assert found == pytest.approx(plain)


def test_unanimous_rates_are_not_certain():
    assert unanimous(48, True) == (pytest.approx(0.026 ** (1 / 48), abs=2e-3), 1.0)
    passed = estimate(np.ones(10), np.arange(10), None, rate=True)
    assert passed.value == 1.0
    assert passed.low == pytest.approx(0.6915, abs=1e-3)  # Clopper-Pearson, 10 of 10
    failed = estimate(np.zeros(10), np.arange(10), None, rate=True)
    assert failed.high == pytest.approx(0.3085, abs=1e-3)


def test_ticks_get_their_tail():
    summary = summarise(measured([*range(1, 101)], unit="ms", sessions=["s"] * 50 + ["t"] * 50), "all")
    assert summary.p99.value == pytest.approx(np.quantile(np.arange(1, 101), 0.99))
