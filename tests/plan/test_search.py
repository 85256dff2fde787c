import dataclasses
import json

import jax
import pytest

from launch import verb
from tmljax import config
from tmljax.decode.program import weights_of
from tmljax.model.interaction import Definition
from tmljax.plan import report
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


def test_axes_along_parts_of_a_torus_dim_are_left_out():
    where = find_slice("v5p:4x8x8")
    assert lies_whole(config.Mesh(data=1, fsdp=64, expert=4), where)
    assert not lies_whole(config.Mesh(data=1, fsdp=16, expert=16), where)


def test_the_best_is_a_flag_file_that_verbs_take(small, tmp_path):
    best = candidates(small, WHERE)[0]
    lines = overrides(best).split()
    assert all(line.startswith("--config_field=") for line in lines)
    file = tmp_path / "small.py"
    file.write_text("from configs.base import get_config\n")
    there = verb.load_experiment(str(file), [line.removeprefix("--config_field=") for line in lines])
    assert {axis: getattr(there.mesh, axis) for axis in best.setting.axes} == dict(best.setting.axes)
    assert there.model.remat == best.setting.experiment.model.remat


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
    assert serving.turn(serving.by_time).seconds <= 0.2 < serving.turn(serving.by_time + 1).seconds or (
        serving.by_time == 2 * serving.by_memory
    )


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
