"""Compute per second of conversation at 46M active parameters, beside Moshi's streaming step of 46M.

    python -m benchmarks.moshi_compare [--seconds=60]

Both on one thread of one core, with random weights, every step speaking. Ours: 5 ticks of 200 ms a second, with
dMel of the incoming sound and the vocoder of the outgoing one. Moshi (0.2.13): 12.5 steps of 80 ms a second of its
language model alone, without its Mimi codec. The peer needs an environment of its own and is left out without it:

    export PEERS_DIR=~/.cache/tmljax-peers
    python -m venv $PEERS_DIR/moshi && $PEERS_DIR/moshi/bin/pip install torch moshi==0.2.13

One JSON line each, then their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

MOSHI_SMALL = dict(  # noqa: C408 - 46M parameters; the proportions of the 7B model
    n_q=8, dep_q=4, card=1024, text_card=1024, context=250, dim=512, num_heads=8, num_layers=8, hidden_scale=4.125,
    depformer_dim=256, depformer_dim_feedforward=1056, depformer_num_heads=4, depformer_num_layers=4,
)  # fmt: skip
STEP_SECONDS = 0.08
WARM = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of conversation, on each side")
    parser.add_argument("--side", choices=("both", "ours", "moshi"), default="both", help="one side, in this process")
    given = parser.parse_args()
    if given.side == "ours":
        print(json.dumps(measure_ours(given.seconds)), flush=True)
    elif given.side == "moshi":
        print(json.dumps(measure_moshi(given.seconds)), flush=True)
    else:
        compare(given.seconds)
    return 0


def compare(seconds: float) -> None:
    ours = run_side([sys.executable, "-m", "benchmarks.moshi_compare"], "ours", seconds)
    print(json.dumps(ours), flush=True)
    python = os.path.join(os.path.expanduser(os.environ.get("PEERS_DIR", "~/.cache/tmljax-peers")), "moshi/bin/python")
    if not os.path.exists(python):
        print(f"no peer: {python} does not exist (python -m benchmarks.moshi_compare --help)", file=sys.stderr)
        return
    moshi = run_side([python, os.path.abspath(__file__)], "moshi", seconds)
    print(json.dumps(moshi), flush=True)
    ratio = ours["compute_ms_per_second"] / moshi["compute_ms_per_second"]
    print(json.dumps({"ours_over_moshi": round(ratio, 3)}), flush=True)


def run_side(command: list[str], side: str, seconds: float) -> dict:
    """In a process of its own that has one core and one thread."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = os.environ | one_thread | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NO_TORCH_COMPILE": "1"}
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        [*command, f"--side={side}", f"--seconds={seconds}"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_ours(seconds: float) -> dict:
    from benchmarks.tick import Talk, about, draw_params, percentiles, random_engine
    from tmljax.config import Experiment, Flow, Model, Moe
    from tmljax.model.interaction import Definition
    from tmljax.stream.microturn import MICROTURN_SECONDS

    experiment = Experiment(
        model=Model(
            d_model=512, layers=8, heads=8, kv_heads=2, head_dim=64, window=100,
            moe=Moe(experts=4, top_k=2, expert_width=704, shared_width=1024, tick_matmul="gathered"),
            flow=Flow(width=512, depth=3),
        )
    )  # fmt: skip
    engine = random_engine(experiment, draw_params(experiment), sessions=1)
    talk = Talk(engine)
    for _ in range(WARM):
        talk.tick()
    import numpy as np

    tick_ms, vocoder_ms, whole_ms = np.array([talk.tick() for _ in range(round(seconds / MICROTURN_SECONDS))]).T
    total, active = count(Definition(experiment.stream, experiment.model), experiment.model.moe)
    return {
        "side": "tmljax",
        "parameters": total,
        "active_parameters": active,
        "window_seconds": experiment.model.window * MICROTURN_SECONDS,
        "step_ms": percentiles(whole_ms),
        "tick_ms": percentiles(tick_ms),
        "vocoder_ms": percentiles(vocoder_ms),
        "compute_ms_per_second": round(float(np.median(whole_ms)) / MICROTURN_SECONDS, 2),
        "speaking": talk.speaking,
        **about(),
    }


def count(definition, moe) -> tuple[int, int]:
    """(all, active) parameters: of the experts, `top_k` work for a position."""
    import jax

    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    total = active = 0
    for leaf, axes in zip(
        jax.tree.leaves(definition.abstract()), jax.tree.leaves(definition.axes(), is_leaf=is_names), strict=True
    ):
        total += leaf.size
        active += leaf.size * moe.top_k // moe.experts if "experts" in axes else leaf.size
    return total, active


def measure_moshi(seconds: float) -> dict:
    import statistics

    import torch
    from moshi.models.lm import LMGen, LMModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    streams, spoken = MOSHI_SMALL["n_q"], MOSHI_SMALL["dep_q"]
    delays = [0] + ([0] + [1] * (spoken - 1)) + ([0] + [1] * (streams - spoken - 1))
    model = LMModel(
        **MOSHI_SMALL, delays=delays, norm="rms_norm_f32", causal=True, layer_scale=None, max_period=10000,
        gating="silu", positional_embedding="rope", depformer_layer_scale=None, depformer_multi_linear=True,
        depformer_context=8, depformer_max_period=10000, depformer_gating="silu", depformer_pos_emb="none",
        depformer_weights_per_step=True, device="cpu", dtype=torch.float32,
    ).eval()  # fmt: skip
    steps = round(seconds / STEP_SECONDS)
    codes = torch.randint(0, MOSHI_SMALL["card"], (WARM + steps, 1, streams - spoken, 1))
    generator, ms = LMGen(model, use_sampling=True, temp=0.8, temp_text=0.7), []
    with torch.no_grad(), generator.streaming(1):
        for code in codes:
            begin = time.perf_counter()
            generator.step(code)
            ms.append(1e3 * (time.perf_counter() - begin))
    ms = sorted(ms[WARM:])
    return {
        "side": "moshi",
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": {"p50": round(statistics.median(ms), 3), "p99": round(ms[int(0.99 * (len(ms) - 1))], 3)},
        "compute_ms_per_second": round(statistics.median(ms) / STEP_SECONDS, 2),
        "cores": len(os.sched_getaffinity(0)),
        "load1": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
