"""From values to numbers with uncertainty.

Sessions are drawn, not values: two replies in one conversation share a voice and a fate. The bootstrap says
nothing when every value is the same 0 or 1, so there a rate gets the exact binomial (Clopper-Pearson) bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tmljax.evals.item import Measurement

DRAWS = 1000
LEVEL = 0.95
SEED = 0
MOST_CELLS = 20_000_000  # draws x values kept in memory

Bounds = tuple[float, float]


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


class Summary(NamedTuple):
    name: str
    family: str
    unit: str
    better: str
    n: int
    not_applicable: int
    mean: Estimate | None  # None where n is 0
    median: Estimate | None
    p99: Estimate | None  # of ticks only


def summarise(measurement: Measurement, family: str) -> Summary:
    applicable = [v for v in measurement.values if v.value is not None]
    values = np.array([v.value for v in applicable], np.float64)
    _, groups = np.unique([v.session for v in applicable], return_inverse=True)
    estimates: list[Estimate | None] = [None, None, None]
    if len(values):
        rate = measurement.unit == "rate"
        estimates = [estimate(values, groups, None, rate), estimate(values, groups, 0.5, rate), None]
        if measurement.unit == "ms":
            estimates[2] = estimate(values, groups, 0.99, rate)
    return Summary(
        measurement.name,
        family,
        measurement.unit,
        measurement.better,
        len(values),
        len(measurement.values) - len(values),
        *estimates,
    )


def estimate(values: np.ndarray, groups: np.ndarray, quantile: float | None, rate: bool) -> Estimate:
    """The mean (quantile None) or a quantile with its 95% interval; `groups` [n]: which values are drawn together."""
    point = float(np.mean(values) if quantile is None else np.quantile(values, quantile))
    if rate and quantile is None and np.all(values == values[0]) and values[0] in (0.0, 1.0):
        return Estimate(point, *unanimous(int(groups.max()) + 1, bool(values[0])))
    return Estimate(point, *bootstrap(values, groups, quantile))


def bootstrap(values: np.ndarray, groups: np.ndarray, quantile: float | None, seed: int = SEED) -> Bounds:
    """Percentile interval over `DRAWS` resamples of whole groups."""
    G = int(groups.max()) + 1
    draws = int(np.clip(MOST_CELLS // len(values), 100, DRAWS))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(G, np.full(G, 1 / G), size=draws)[:, groups]  # [draws, n]: times each value was drawn
    drawn = counts @ values / counts.sum(1) if quantile is None else weighted_quantiles(values, counts, quantile)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def weighted_quantiles(values: np.ndarray, counts: np.ndarray, quantile: float) -> np.ndarray:
    """Per row of `counts` [draws, n]: np.quantile of the values, each repeated as often as it was drawn."""
    order = np.argsort(values, kind="stable")
    ranked, reached = values[order], np.cumsum(counts[:, order], axis=1)
    position = (reached[:, -1] - 1) * quantile
    below = np.floor(position)
    pick = [(reached <= k[:, None]).sum(1) for k in (below, np.ceil(position))]
    share = position - below
    return ranked[pick[0]] * (1 - share) + ranked[pick[1]] * share


def unanimous(n: int, passed: bool) -> Bounds:
    """Clopper-Pearson interval of n passes in n trials, or of none."""
    edge = ((1 - LEVEL) / 2) ** (1 / n)
    return (edge, 1.0) if passed else (0.0, 1 - edge)
