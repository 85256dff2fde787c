import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tmljax import config
from tmljax.config import UserError
from tmljax.decode.program import weights_of
from tmljax.model.interaction import Definition
from tmljax.plan import report
from tmljax.plan.compile import too_large
from tmljax.plan.forecast import by_formula
from tmljax.plan.hardware import find_slice
from tmljax.plan.search import candidates, lies_whole, overrides, rank, search
from tmljax.plan.serving import Serving, best_serving
from tmljax.plan.setting import Setting
from tmljax.sharding import AXES

WHERE = find_slice("v5p:2x2x1")


def test_the_fastest_that_fits_comes_first(small):
    ranked = candidates(small, WHERE)
    assert len(ranked) > 6
    assert ranked[0].step_seconds == min(f.step_seconds for f in ranked if f.fits)
    assert {f.setting.where.devices for f in ranked} == {4}
    tiny = dataclasses.replace(WHERE, chip=dataclasses.replace(WHERE.chip, memory=1e6))
    none_fits = [dataclasses.replace(f, setting=dataclasses.replace(f.setting, where=tiny)) for f in ranked]
    assert rank(none_fits)[0].memory.total == min(f.memory.total for f in none_fits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": {"slices": 2}}, "config.mesh.slices=2: a plan is of one slice"),
        ({"mesh": {"context": 3}}, "no mesh of v5p:2x2x1 has config.mesh.context=3; set config.mesh.context=1"),
        ({"model": {"moe": {"matmul": "hopper"}}}, "'hopper' is a kernel for NVIDIA H100 and H200; on"),
        (
            {"model": {"kv_heads": 1}, "data": {"batch": 3}},
            "config.data.batch=3 does not divide over",
        ),
    ],
)
def test_what_no_mesh_mends_is_named(small, changes, said):
    tree = dataclasses.asdict(small)
    for group, fields in changes.items():
        for field, value in fields.items():
            tree[group][field] = tree[group][field] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=re.escape(said)):
        candidates(config.from_tree(config.Experiment, tree), WHERE)


def test_the_compiler_has_the_last_word(small):
    """A candidate that compiles too large falls behind one that fits; progress names each."""
    said, compiled = [], []

    def confirm(setting):
        compiled.append(setting)
        forecast = by_formula(setting)
        if len(compiled) == 1:
            return dataclasses.replace(forecast, memory=forecast.memory._replace(activations=1e12))
        return forecast

    ranked = search(small, WHERE, confirm, 60, said.append)
    assert len(compiled) == 3
    assert ranked[0].setting == compiled[1]
    assert not ranked[2].fits
    assert sum(line.startswith("compiling") for line in said) == 3


def test_a_search_without_time_compiles_one(small):
    compiled = []
    search(small, WHERE, lambda s: compiled.append(s) or by_formula(s), 0, print)
    assert len(compiled) == 1


def test_what_compiles_too_large_is_not_the_best_though_nothing_else_was_compiled(small):
    """The compiler finds twice what the formula did: first comes what twice the formula leaves room for, the fastest of
    it; where time allows, that is compiled next."""
    totals = [f.memory.total for f in candidates(small, WHERE)]
    narrow = dataclasses.replace(WHERE, chip=dataclasses.replace(WHERE.chip, memory=2.02 * min(totals)))

    def confirm(setting):
        compiled.append(setting)
        forecast = by_formula(setting)
        return dataclasses.replace(forecast, memory=type(forecast.memory)(*(2 * x for x in forecast.memory)))

    compiled, said = [], []
    ranked = search(small, narrow, confirm, 0, said.append)
    assert len(compiled) == 1
    assert compiled[0] not in [ranked[0].setting]
    assert 2 * ranked[0].memory.total <= narrow.chip.memory
    assert ranked[0].sources["memory"] == "formula"
    assert "none that was compiled fits" in said[-1]

    compiled = []
    again = search(small, narrow, confirm, 60, said.append)
    assert again[0].fits
    assert again[0].setting == compiled[1] == ranked[0].setting


def test_what_the_compiler_refuses_ends_no_search(small):
    compiled, said = [], []

    def confirm(setting):
        compiled.append(setting)
        if len(compiled) == 1:
            too_large("INTERNAL: Mosaic failed to compile\nof a kernel", 1.0)
        return by_formula(setting)

    ranked = search(small, WHERE, confirm, 60, said.append)
    assert len(compiled) == 4
    assert compiled[0] not in [f.setting for f in ranked]
    assert ranked[0].setting == compiled[1]
    assert sum("the compiler refuses this step (INTERNAL: Mosaic failed to compile)" in line for line in said) == 1

    def refuse(setting):
        too_large("vmem", 1.0)

    for seconds in (60, 0):  # all are tried, or one
        with pytest.raises(UserError, match=r"refuses this step \(vmem\)"):
            search(small, WHERE, refuse, seconds, said.append)


def test_a_program_refused_for_its_size_has_sizes():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\n  program 103.5G\n  arguments 12.0G\n"
    found = too_large(message, 2.0)
    assert (found.temporaries, found.arguments, found.program) == (103.5 * 2**30, 12 * 2**30, None)


def test_axes_along_parts_of_a_torus_dim_are_left_out():
    where = find_slice("v5p:4x8x8")
    assert lies_whole(config.Mesh(data=1, fsdp=64, expert=4), where)
    assert not lies_whole(config.Mesh(data=1, fsdp=16, expert=16), where)


def test_the_best_is_a_flag_file(small, tmp_path):
    best = candidates(small, WHERE)[0]
    (tmp_path / "best.flags").write_text(overrides(best))
    where = [f"--topology={WHERE.name}", "--method=formula", f"--output={tmp_path}"]
    command = [sys.executable, "-m", "launch.plan", "--config=configs/smoke.py", f"--flagfile={tmp_path}/best.flags"]
    subprocess.run([*command, *where], cwd=Path(__file__).parents[2], check=True)
    there = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert there["mesh"] == dict(best.setting.axes)
    assert there["remat"] == best.setting.experiment.model.remat


def test_both_reports(small, tmp_path):
    ranked = [dataclasses.replace(f, price=2.0, tokens=1e9) for f in candidates(small, WHERE)]
    paths = report.write(tmp_path, "small on v5p:2x2x1", ranked, None)
    tree, html = json.loads(paths[0].read_text()), paths[1].read_text()
    assert tree["plan"]["memory"]["total"] == ranked[0].memory.total
    assert set(tree["plan"]["sources"].values()) == {"formula"}
    assert len(tree["alternatives"]) == len(ranked) - 1
    assert html.count('class="bar"') == min(len(ranked), 12)
    assert "routed experts" in html
    assert "Fits" in html


def test_serving_by_hand(small):
    """One device: as many rings of 9 x 5 rows of keys and values as fit beside the weights."""
    alone = find_slice("v5e:1x1")
    serving = Serving(Setting(small, alone, dict.fromkeys(AXES, 1)))
    assert serving.session_bytes == 2 * 9 * 5 * 2 * 4 * 16 * 4
    assert serving.passes() == [5]  # three inputs, and what was written and said before
    for frames_per_slot, texts, passes in ((8, 2, [5, 1]), (4, 1, [5, 2]), (4, 2, [5, 1, 2]), (2, 1, [7, 2, 1, 1])):
        stream = dataclasses.replace(small.stream, frames_per_slot=frames_per_slot, model_text_slots=texts)
        other = Serving(Setting(dataclasses.replace(small, stream=stream), alone, dict.fromkeys(AXES, 1)))
        assert other.passes() == passes
        assert sum(passes) == other.setting.layout.slots
    assert serving.by_memory == int((16e9 * 0.95 - serving.weight_bytes) / serving.session_bytes)
    turns = [serving.turn(n).seconds for n in (1, 10, 1000)]
    assert turns == sorted(turns)
    slow = dataclasses.replace(alone, chip=dataclasses.replace(alone.chip, memory_bandwidth=2e9, flops=1e11))
    late = Serving(Setting(small, slow, dict.fromkeys(AXES, 1)))
    assert 10 < late.by_time < late.by_memory
    assert late.turn(late.by_time).seconds <= 0.2 < late.turn(late.by_time + 1).seconds


def test_what_a_turn_reads_and_moves_by_hand(small):
    """Chosen experts alone are read, everything else whole; tensor neighbours add up twice a layer."""
    model, alone = small.model, find_slice("v5e:1x1")
    moe = dataclasses.replace(model.moe, experts=64, top_k=2, tick_matmul="gathered")
    sparse = dataclasses.replace(small, model=dataclasses.replace(model, moe=moe))
    serving = Serving(Setting(sparse, alone, dict.fromkeys(AXES, 1)))
    D, L, width = model.d_model, model.layers, 4
    attention = 2 * D * (model.heads + model.kv_heads) * model.head_dim
    dense = L * ((attention + 3 * D * moe.shared_width) * width + D * moe.experts * 4)
    routed = L * 3 * moe.experts * D * moe.expert_width * width * (1 - (1 - 2 / 64) ** 5)
    read = (dense + routed + serving.session_bytes) / (alone.chip.memory_bandwidth * 0.85)
    assert serving.one_pass(1, 5).memory == pytest.approx(read)
    layout = serving.setting.layout
    text, flow = (serving.held[name] for name in ("text heads", "flow head"))
    heads = layout.model_text * text + model.flow.steps * layout.model_audio * flow
    assert serving.heads(3).memory == pytest.approx(heads / (alone.chip.memory_bandwidth * 0.85))

    pair = dict.fromkeys(AXES, 1) | {"tensor": 2}
    split = Serving(Setting(small, find_slice("v5e:2x2"), pair | {"data": 2}))
    sums = 2 * L * 3 * 5 * D * width  # both halves of a layer, of 5 positions of 3 sessions; there and back
    assert split.one_pass(3, 5).links == pytest.approx(sums / alone.chip.link)


def test_weights_weigh_what_a_tick_holds(small):
    """In half precision not half: tables, the flow head and routers stay in float32."""
    half = dataclasses.replace(small, model=dataclasses.replace(small.model, dtype="bfloat16"))
    serving = Serving(Setting(half, find_slice("v5e:1x1"), dict.fromkeys(AXES, 1)))
    definition = Definition(half.stream, half.model)
    weights = weights_of(definition.init(jax.random.key(0)), definition)
    assert serving.weight_bytes == sum(array.nbytes for array in weights.values())


def test_a_slice_that_is_too_small_to_serve_is_named(small):
    wide = dataclasses.replace(small, model=dataclasses.replace(small.model, window=10**9))
    with pytest.raises(config.UserError, match=r"holds no session: at least .* GB"):
        best_serving(wide, WHERE)
