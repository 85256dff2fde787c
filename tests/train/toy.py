"""A model with every kind of parameter, small enough to train in a blink, and its data.

Run as a script it trains in a workdir, for tests that kill it:  python tests/train/toy.py WORKDIR STEPS [DELAY]

Legend: B batch, F features, D width, L layers, E experts.
"""

import dataclasses
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmljax import cluster, config
from tmljax.sharding import make_mesh
from tmljax.train.loop import Data, Outcome, Task, train

F, D, L, E = 6, 8, 3, 4


@dataclasses.dataclass(frozen=True)
class Definition:
    def init(self, key: jax.Array) -> dict[str, Any]:
        number = 1 + jax.random.key_data(key)[1].astype(jnp.float32)

        def scattered(shape: tuple[int, ...]) -> jax.Array:  # compiles faster than a random draw
            place = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
            return jnp.sin(1.7 * place * place + number) * (2 / shape[-2]) ** 0.5

        return {
            "enter": scattered((F, D)),
            "blocks": {
                "mix": scattered((L, D, D)),
                "experts": scattered((L, E, D, D)),
                "norm": jnp.ones((L, D)),
                "balance_bias": jnp.zeros((L, E)),
            },
            "leave": scattered((D, 1)),
            "bias": jnp.zeros((1,)),
        }

    def abstract(self) -> dict[str, Any]:
        return jax.eval_shape(self.init, jax.random.key(0))

    def axes(self) -> dict[str, Any]:
        return {
            "enter": ("input", "embed"),
            "blocks": {
                "mix": ("layers", "embed", "small"),
                "experts": ("layers", "experts", "expert_embed", "small"),
                "norm": ("layers", "embed"),
                "balance_bias": ("layers", "small"),
            },
            "leave": ("embed", "small"),
            "bias": ("small",),
        }


class Routing(NamedTuple):
    load_LE: jax.Array
    dropped: jax.Array


def objective(definition, params, batch, key, weights, mesh=None, whole=None):
    x_BD = batch["x"] @ params["enter"]
    loads = []
    for layer in range(L):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        x_BD = jnp.tanh(x_BD @ block["mix"]) * block["norm"][None]
        expert_B = jnp.argmax(x_BD[:, :E] + block["balance_bias"][None], axis=1)
        pick_BE = jax.nn.one_hot(expert_B, E)
        x_BD = x_BD + jnp.einsum("BE,BD,EDd->Bd", pick_BE, x_BD, block["experts"])
        loads.append(jnp.mean(pick_BE, axis=0))
    guess_B = (x_BD @ params["leave"])[:, 0] + params["bias"]
    noise_B = 0.0 if key is None else 0.01 * jax.random.uniform(key, guess_B.shape)
    loss = jnp.mean((guess_B - batch["y"] - noise_B) ** 2)
    return loss, ({"loss/total": loss, "guess": jnp.mean(guess_B)}, Routing(jnp.stack(loads), jnp.float32(1)))


class Source:
    """Batch n depends on n alone. `poison` names batches that hold a NaN; a process of several gets its rows."""

    def __init__(self, batch: int, delay: float = 0.0, poison: tuple[int, ...] = ()):
        self.batch, self.delay, self.poison, self.taken = batch, delay, poison, 0
        rows = batch // cluster.process_count()
        self.mine = slice(cluster.process_index() * rows, (cluster.process_index() + 1) * rows)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        time.sleep(self.delay)
        x_BF = np.random.default_rng([7, self.taken]).normal(size=(self.batch, F)).astype(np.float32)
        y_B = np.tanh(x_BF[:, 0] - x_BF[:, 1])
        if self.taken in self.poison:
            y_B[0] = np.nan
        self.taken += 1
        return {"x": x_BF[self.mine], "y": y_B[self.mine]}

    def get_state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def set_state(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def experiment(steps: int = 8, **changes: Any) -> config.Experiment:
    """`changes` are groups of fields, as {"optimizer": {"name": "muon"}}."""
    settings: dict[str, Any] = {
        "data": {"batch": 8},
        "optimizer": {"name": "adamw", "warmup": 2, "learning_rate": 1e-2},
        "train": {"steps": steps, "log_every": 2, "save_every": 4, "eval_every": 4, "keep": 2},
    }
    for group, fields in changes.items():
        settings[group] = settings.get(group, {}) | fields
    return config.from_tree(config.Experiment, settings)


def run(
    workdir: Any,
    experiment: config.Experiment,
    source: Source | None = None,
    devices: int | None = 1,
    out=None,
    profile: int = 0,
) -> Outcome:
    batch = experiment.data.batch
    data = Data(Source(batch) if source is None else source, [next(Source(batch))])
    mesh = make_mesh(experiment.mesh, jax.devices()[:devices])
    return train(Task(experiment, Definition(), objective), workdir, data, mesh, out=out, profile=profile)


if __name__ == "__main__":
    from launch import verb

    def main(argv: list[str]) -> int:
        workdir, steps, delay = argv[1], int(argv[2]), float(argv[3]) if len(argv) > 3 else 0.0
        settings = experiment(steps, train={"log_every": int(argv[4])} if len(argv) > 4 else {})
        outcome = run(workdir, settings, Source(settings.data.batch, delay))
        return 130 if outcome.signal is not None and outcome.signal.name == "SIGINT" else 0

    sys.exit(verb.run(lambda _: main(sys.argv), sys.argv[:1]))
