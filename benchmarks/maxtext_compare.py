"""Training a mixture-of-experts language model, beside MaxText 0.2.5 on the same machine.

    python -m benchmarks.maxtext_compare [--steps=20] [--cases=one,eight]

Both train d_model 256, 4 layers, 8 heads of 32, 8 experts of width 512 of which 2 work, vocabulary 1024, 8 sequences of
512 tokens a step, AdamW, float32, on random tokens. Case "one": one device; ours drops nothing, MaxText is run with
capacity factor 1.25, which drops, and dropless ("ragged"). Case "eight": eight simulated devices, expert 4 x fsdp 2,
both with capacity factor 1.25 (MaxText's dropless path fails there on a CPU).

What differs: our attention has QK-norm and a learned sink, our router is a sigmoid with a balancing bias, our rotary
position counts 16 tokens as one; MaxText scans its layers and recomputes activations ("minimal"), ours keeps them, and
warms up over a tenth of its steps where ours takes two. Our trainer asks malloc for huge pages, which both get under
GLIBC_TUNABLES=glibc.malloc.hugetlb=1; our experts' blocks are of 128 rows, for so few to an expert. MaxText does not
say how many tokens it drops.

The peer needs an environment of its own and is left out without it:

    export PEERS_DIR=~/.cache/tmljax-peers
    python3.12 -m venv $PEERS_DIR/mx && $PEERS_DIR/mx/bin/pip install uv
    $PEERS_DIR/mx/bin/uv pip install --python $PEERS_DIR/mx/bin/python 'maxtext[tpu]==0.2.5' --resolution=lowest

One JSON line a run, then the ratios. Close other programs first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEGAN = time.perf_counter()
BATCH, LENGTH, VOCABULARY, CAPACITY = 8, 512, 1024, 1.25
SETTLE = 4  # steps before the measured ones
SHAPE = {  # MaxText's names
    "decoder_block": "mixtral", "base_emb_dim": 256, "base_num_decoder_layers": 4, "base_num_query_heads": 8,
    "base_num_kv_heads": 8, "head_dim": 32, "base_mlp_dim": 512, "base_moe_mlp_dim": 512, "num_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": VOCABULARY, "max_target_length": LENGTH,
}  # fmt: skip
SETUP = {
    "hardware": "cpu", "skip_jax_distributed_system": True, "dataset_type": "synthetic", "enable_checkpointing": False,
    "log_config": False, "enable_tensorboard": False, "dtype": "float32", "weight_dtype": "float32",
    "matmul_precision": "default", "remat_policy": "minimal", "megablox": False,
}  # fmt: skip
PEER = {
    "one": {
        "capacity": {"sparse_matmul": False, "capacity_factor": CAPACITY},
        "dropless": {"sparse_matmul": True},
    },
    "eight": {
        "capacity": {
            "sparse_matmul": False, "capacity_factor": CAPACITY, "ici_expert_parallelism": 4, "ici_fsdp_parallelism": 2,
        }
    },
}  # fmt: skip
DEVICES = {"one": 1, "eight": 8}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured")
    parser.add_argument("--cases", default="one,eight", help="of one, eight")
    parser.add_argument("--ours", choices=tuple(DEVICES), help="this side alone, of this case, in this process")
    given = parser.parse_args()
    if given.ours:
        print(json.dumps(measure_ours(given.ours, given.steps)), flush=True)
        return 0
    for case in given.cases.split(","):
        compare(case, given.steps)
    return 0


def compare(case: str, steps: int) -> None:
    command = [sys.executable, "-m", "benchmarks.maxtext_compare", f"--ours={case}", f"--steps={steps}"]
    done = subprocess.run(command, env=environment(case), stdout=subprocess.PIPE, text=True, check=True)
    ours = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(ours), flush=True)
    root = Path(os.environ.get("PEERS_DIR", "~/.cache/tmljax-peers")).expanduser()
    if not (root / "mx/bin/python").exists():
        print(f"no peer: {root}/mx does not exist (python -m benchmarks.maxtext_compare --help)", file=sys.stderr)
        return
    for name, settings in PEER[case].items():
        peer = measure_maxtext(root, case, settings, steps) | {"experts": name}
        print(json.dumps(peer), flush=True)
        ratios = {
            "tokens_per_second": round(ours["tokens_per_second"] / peer["tokens_per_second"], 2),
            "first_step": round(ours["first_step_seconds"] / peer["first_step_seconds"], 2),
        }
        print(json.dumps({"case": case, f"ours_over_maxtext_{name}": ratios}), flush=True)


def environment(case: str) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={DEVICES[case]}" if DEVICES[case] > 1 else ""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2"}


def describe(seconds: list[float], first: float, parameters: float) -> dict:
    step = statistics.median(seconds)
    return {
        "step_seconds": round(step, 4),
        "tokens_per_second": round(BATCH * LENGTH / step),
        "first_step_seconds": round(first, 1),
        "parameters": parameters,
        "load1": round(os.getloadavg()[0], 2),
    }


def measure_ours(case: str, steps: int) -> dict:
    import jax
    import numpy as np

    from benchmarks.language import LanguageDefinition, objective
    from tmljax.config import Data, Experiment, Mesh, Model, Moe, Optimizer, Stream, Train
    from tmljax.model.interaction import count
    from tmljax.sharding import batch_sharding, make_mesh
    from tmljax.train.state import create_state
    from tmljax.train.step import make_program

    moe = Moe(experts=8, top_k=2, expert_width=512, shared_width=0, capacity_factor=CAPACITY, block_rows=128)
    experiment = Experiment(
        stream=Stream(vocab_size=VOCABULARY),
        model=Model(d_model=256, layers=4, heads=8, kv_heads=8, head_dim=32, window=LENGTH, moe=moe),
        optimizer=Optimizer(name="adamw", learning_rate=1e-3, warmup=2, weight_decay=0.1),
        data=Data(batch=BATCH, window=LENGTH),
        train=Train(steps=1000),
        mesh=Mesh(data=1, fsdp=2, expert=4) if case == "eight" else Mesh(data=1),
    )
    mesh, model = make_mesh(experiment.mesh), LanguageDefinition(experiment.stream, experiment.model)
    program = make_program(experiment, model, objective, mesh)
    state = create_state(model, program.optimizer, mesh, seed=0)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1), dtype=np.int32)
    batch = {"tokens": jax.device_put(tokens, batch_sharding(mesh))}
    seconds, dropped, first = [], [], 0.0
    for _ in range(SETTLE + steps):
        before = time.perf_counter()
        state, metrics = program.step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - before)
        dropped.append(float(metrics["experts/dropped"]))
        first = first or time.perf_counter() - BEGAN
    share = statistics.mean(dropped) / (BATCH * LENGTH * 2 * 4)
    line = describe(seconds[SETTLE:], first, count(model.abstract()))
    return {"side": "tmljax", "case": case, "dropped_share": round(share, 4), **line, "jax": jax.__version__}


def measure_maxtext(root: Path, case: str, settings: dict, steps: int) -> dict:
    """Times are those at which its lines arrive, for its own first steps are dispatched before they are done."""
    with tempfile.TemporaryDirectory() as folder:
        run = {"run_name": "compare", "base_output_directory": folder, "steps": SETTLE + steps + 2}
        run["jax_cache_dir"] = os.path.join(folder, "cache")  # its first step compiles, as ours does
        everything = SHAPE | SETUP | settings | run | {"per_device_batch_size": BATCH // DEVICES[case]}
        command = [str(root / "mx/bin/python"), "-u", "-m", "maxtext.trainers.pre_train.train"]
        command += [f"{name}={value}" for name, value in everything.items()]
        began, arrivals, parameters, tail = time.perf_counter(), [], None, []
        with subprocess.Popen(
            command, env=environment(case), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        ) as process:
            for line in process.stdout:
                tail = [*tail[-4:], line]
                if "completed step:" in line:
                    arrivals.append(time.perf_counter() - began)
                if match := re.search(r"number parameters: ([\d.]+) billion", line):
                    parameters = round(float(match[1]) * 1e9)
        if process.returncode or len(arrivals) < SETTLE + 3:
            raise RuntimeError("MaxText failed: " + "".join(tail))
    steps_taken = [b - a for a, b in itertools.pairwise(arrivals)][SETTLE:-1]
    return {"side": "maxtext", "case": case, **describe(steps_taken, arrivals[0], parameters)}


if __name__ == "__main__":
    sys.exit(main())
