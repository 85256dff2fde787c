import dataclasses
import typing

import ml_collections
import pytest

from tmljax import config
from tmljax.config import (
    Experiment,
    Mesh,
    UserError,
    from_config_dict,
    from_json,
    from_tree,
    to_config_dict,
    to_json,
    validate,
)

LEAVES = 75  # an avalanche of options begins with one more; style: fork a config, do not add a switch


def edited(**fields) -> ml_collections.ConfigDict:
    """The default config with a__b=value set as config.a.b."""
    config = to_config_dict(Experiment())
    for name, value in fields.items():
        *groups, field = name.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[field] = value
    return config


def complaint(**fields) -> str:
    with pytest.raises(UserError) as e:
        from_config_dict(edited(**fields))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_the_defaults_are_valid_and_come_back():
    assert from_config_dict(to_config_dict(Experiment())) == Experiment()


def test_edits_arrive():
    experiment = from_config_dict(edited(model__moe__experts=16, data__name="mine", optimizer__name="muon"))
    assert (experiment.model.moe.experts, experiment.data.name, experiment.optimizer.name) == (16, "mine", "muon")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model__d_modle": 3}, "config.model.d_modle does not exist; did you mean d_model?"),
        ({"modle": {"d_model": 3}}, "config.modle does not exist; did you mean model?"),
        ({"model__moe__top_kk": 3}, "config.model.moe.top_kk does not exist; did you mean top_k?"),
    ],
)
def test_a_typo_names_the_nearest_field(fields, said):
    assert complaint(**fields) == said


def test_a_name_like_no_other_lists_the_fields():
    assert (
        complaint(mesh__zzz=1)
        == "config.mesh.zzz does not exist; the fields are context, data, expert, fsdp, slices, tensor"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model__layers": 4.0}, "config.model.layers must be int, got float 4.0"),
        ({"model__layers": "4"}, "config.model.layers must be int, got str '4'"),
        ({"model__layers": True}, "config.model.layers must be int, got bool True"),
        ({"model__layers": None}, "config.model.layers must be int, got NoneType None"),
        ({"loss__idle": "much"}, "config.loss.idle must be float, got str 'much'"),
        ({"data__name": 3}, "config.data.name must be str, got int 3"),
        ({"optimizer__name": "sgd"}, "config.optimizer.name='sgd' must be one of 'adamw', 'muon'"),
        ({"model__moe": 3}, "config.model.moe must be a group of fields, got 3"),
        ({"data__mixture": 1}, "config.data.mixture must map names to numbers, got 1"),
        ({"data__mixture": {"pause": "x"}}, "config.data.mixture.pause must be float, got str 'x'"),
        ({"model__moe__capacity_factor": "x"}, "config.model.moe.capacity_factor must be float, got str 'x'"),
    ],
)
def test_a_wrong_type_names_field_type_and_value(fields, said):
    assert complaint(**fields) == said


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stream__frames_per_slot": 3}, "frames_per_slot"),
        ({"data__name": "a/../../b"}, "data.name='a/../../b'"),
        ({"data__name": ".."}, "data.name='..'"),
        ({"stream__video_height": 50}, "video_height=50"),
        ({"stream__video_every": 0}, "video_every"),
        ({"stream__vocab_size": 100}, "vocab_size"),
        ({"model__kv_heads": 3}, "kv_heads=3"),
        ({"model__head_dim": 5}, "head_dim"),
        ({"model__moe__top_k": 9}, "top_k=9"),
        ({"data__window": 61}, "window=61"),
        ({"data__batch": 0}, "batch"),
        ({"optimizer__accumulate": 5}, "accumulate=5"),
        ({"train__steps": 0}, "steps"),
        ({"train__keep": 0}, "keep"),
        ({"data__train_hours": 0.0}, "train_hours"),
    ],
)
def test_an_impossible_value_names_its_field(fields, named):
    assert named in complaint(**fields)


def test_whole_numbers_are_good_floats_and_none_is_good_where_it_may_be():
    experiment = from_config_dict(edited(optimizer__learning_rate=1, model__moe__capacity_factor=2))
    assert isinstance(experiment.optimizer.learning_rate, float)
    assert experiment.model.moe.capacity_factor == 2.0
    assert from_config_dict(edited(model__moe__capacity_factor=None)).model.moe.capacity_factor is None


def test_an_experiment_cannot_be_changed_at_any_depth():
    experiment = Experiment()
    for target, field in [(experiment, "model"), (experiment.model, "d_model"), (experiment.model.moe, "experts")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, field, 1)


def test_json_gives_back_the_same_experiment():
    experiment = from_config_dict(
        edited(data__mixture={"pause": 0.25, "turn_taking": 1}, model__moe__capacity_factor=1.25, loss__idle=0.1 + 0.2)
    )
    assert from_json(to_json(experiment)) == experiment
    assert to_json(from_json(to_json(experiment))) == to_json(experiment)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"modle": {}}', '{"model": {"layers": "x"}}'])
def test_json_that_is_no_experiment_is_a_users_error(text):
    with pytest.raises(UserError):
        from_json(text)


def test_part_of_a_tree_leaves_the_rest_at_its_default():
    assert from_tree(Experiment, {"mesh": {"fsdp": 2}}) == dataclasses.replace(Experiment(), mesh=Mesh(fsdp=2))


def leaves(cls) -> list[tuple[str, object]]:
    found = []
    for name, kind in typing.get_type_hints(cls).items():
        found += leaves(kind) if dataclasses.is_dataclass(kind) else [(f"{cls.__name__}.{name}", kind)]
    return found


def test_there_are_few_options_and_no_switches():
    found = leaves(Experiment)
    assert len(found) <= LEAVES, f"{len(found)} options"
    assert not [name for name, kind in found if kind is bool], "choose by value, not by switch"


def test_validate_lets_the_defaults_pass():
    validate(Experiment())


@pytest.mark.parametrize("path", sorted(config.LIMITS))
def test_every_limit_is_held(path):
    """A value beyond its bound is refused with the field's name."""
    least, most = config.LIMITS[path]
    edited = config.to_config_dict(config.Experiment())
    *groups, name = path.split(".")
    group = edited
    for part in groups:
        group = group[part]
    for bound, step in ((least, -1), (most, 1)):
        if bound is not None:
            group[name] = bound + step
            with pytest.raises(config.UserError, match=rf"config\.{path}="):
                config.from_config_dict(edited)
