"""A verb ends in one clear line, and takes any field of the config."""

import ast
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from absl import flags

from launch import verb
from tmljax.config import Experiment, UserError

CONFIG = """
from tmljax.config import Experiment, to_config_dict

def get_config(dial="1"):
    config = to_config_dict(Experiment())
    config.model.layers = int(dial)
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def no_flags(monkeypatch):
    """As in a process of its own."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    define = {"DEFINE_string": flags.DEFINE_string, "DEFINE_multi_string": flags.DEFINE_multi_string}
    for name, function in define.items():
        monkeypatch.setattr(flags, name, lambda *a, f=function, **k: f(*a, **{"flag_values": values, **k}))
    return values


@pytest.fixture
def serving_flags(no_flags):
    verb.define_serving()
    return no_flags


@pytest.fixture
def own_flags(no_flags):
    """Flags of one verb."""
    values = no_flags
    verb.define_config()
    flags.DEFINE_string("workdir", None, "where it goes", required=True)
    return values


def run(*arguments, main=lambda argv: None):
    return verb.run(main, ["verb", *arguments])


def test_overrides_reach_the_experiment(own_flags, config_file):
    seen = []
    overrides = ["--config.model.d_model=64", "--config.model.moe.capacity_factor=1.5", "--config.data.name=7"]
    more = ["--config.optimizer.name", "muon", "--config.data.mixture.pause=2", "--config.loss.idle=1"]
    code = run(
        f"--config={config_file}:3", "--workdir=w", *overrides, *more, main=lambda _: seen.append(verb.experiment())
    )
    assert code == 0
    (experiment,) = seen
    assert (experiment.model.layers, experiment.model.d_model, experiment.model.moe.capacity_factor) == (3, 64, 1.5)
    assert (experiment.data.name, experiment.optimizer.name, experiment.loss.idle) == ("7", "muon", 1.0)
    assert experiment.data.mixture == {"pause": 2.0}


def test_none_and_whole_groups_can_be_given(own_flags, config_file):
    seen = []
    given = ["--config.model.moe.capacity_factor=None", "--config.data.mixture={'pause': 1.0}"]
    run(f"--config={config_file}", "--workdir=w", *given, main=lambda _: seen.append(verb.experiment()))
    assert seen[0].model.moe.capacity_factor is None
    assert seen[0].data.mixture == {"pause": 1.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.model.d_modle=3"], "config.model.d_modle does not exist; did you mean d_model?"),
        (["--config.modle.d_model=3"], "config.modle does not exist; did you mean model?"),
        (["--config.model.d_model=3.5"], "config.model.d_model must be int, got float 3.5"),
        (["--config.model.d_model=abc"], "config.model.d_model must be int, got str 'abc'"),
        (["--config.optimizer.clip=inf"], "config.optimizer.clip=inf must be finite"),
        (["--config.model.d_model.x=1"], "config.model.d_model is a value, so config.model.d_model.x does not exist"),
        (
            ["--config.model.moe=3"],
            "config.model.moe is a group: set --config.model.moe.NAME=VALUE; it has balance_rate",
        ),
        (["--config.data.mixture=pause:1"], "is a group: set --config.data.mixture.NAME=VALUE\n"),
        (["--config.optimizer.name=sgd"], "config.optimizer.name='sgd' must be one of 'adamw', 'muon'"),
        (["--config.model.d_model"], "--config.model.d_model needs a value"),
        (["config.model.d_model=64"], "'config.model.d_model=64' is not a flag; see --help"),
        (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run is an address; mount the bucket, with gcsfuse say"),
        (["--config.data.root=s3://bucket"], "config.data.root=s3://bucket is an address; mount the bucket"),
        (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(own_flags, config_file, capfd, arguments, said):
    assert run(f"--config={config_file}", "--workdir=w", *arguments, main=lambda _: verb.experiment() and None) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert said in err


@pytest.mark.parametrize("name", ["workdir", "output", "json", "pictures", "trace"])
def test_what_is_written_goes_to_no_address(no_flags, capfd, name):
    """A local folder ./gs: would be made of it."""
    flags.DEFINE_string(name, None, "where it goes")
    assert run(f"--{name}=file:///there", main=lambda _: pytest.fail("it ran")) == 2
    assert capfd.readouterr().err.startswith(f"error: --{name}=file:///there is an address; mount the bucket, ")
    assert run(f"--{name}=there/a:b") == 0


def test_a_missing_flag_is_named(own_flags, config_file, capfd):
    assert run(f"--config={config_file}") == 2
    assert capfd.readouterr().err == "error: --workdir is missing; see --help\n"


def test_a_missing_config_file_names_the_nearest(own_flags, config_file, capfd):
    assert (
        run(f"--config={config_file.replace('mine', 'mime')}", "--workdir=w", main=lambda _: verb.experiment() and None)
        == 2
    )
    assert f"did you mean {config_file}?" in capfd.readouterr().err


def test_a_dial_that_is_no_number_is_named(own_flags, capfd):
    assert run("--config=configs/family.py:abc", "--workdir=w", main=lambda _: verb.experiment() and None) == 2
    assert capfd.readouterr().err == "error: family.py:abc: the dial is a whole number from 1 on, as in family.py:6\n"


def test_a_config_file_that_fails_names_its_line(own_flags, tmp_path, capfd):
    path = tmp_path / "bad.py"
    path.write_text("def get_config():\n    return undefined_name\n")
    assert run(f"--config={path}", "--workdir=w", main=lambda _: verb.experiment() and None) == 2
    assert f"{path}:2 fails: NameError" in capfd.readouterr().err


def test_serving_may_set_what_training_did_not_use():
    trained = Experiment()
    adapted = verb.adapt(trained, ["sampling.temperature=0.7", "model.flow.steps=8"])
    assert (adapted.sampling.temperature, adapted.model.flow.steps) == (0.7, 8)
    assert verb.adapt(adapted, ["sampling.temperature=0", "model.flow.steps=4"]) == trained


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.layers=8", "config.model.layers cannot be set after training"),
        ("sampling.temprature=1", "did you mean config.sampling.temperature"),
    ],
)
def test_serving_may_not_change_the_model(serving_flags, override, said):
    serving_flags(["verb", f"--config_field={override}"])
    with pytest.raises(UserError, match=re.escape(said)):
        verb.overrides()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.temperature=hot", "config.sampling.temperature must be float"),
        ("sampling.top_k=-1", "config.sampling.top_k=-1 must be at least 0"),
    ],
)
def test_serving_may_not_set_the_impossible(override, said):
    with pytest.raises(UserError, match=re.escape(said)):
        verb.adapt(Experiment(), [override])


def test_help_names_the_flags_and_exits_0(own_flags, capfd):
    assert run("--help") == 0
    out = capfd.readouterr().out
    assert __doc__ in out
    assert "--config: config file" in out
    assert "--workdir: where it goes" in out


def test_help_names_a_default_of_0_too(own_flags, capfd):
    flags.DEFINE_integer("restarts", 0, "how often", flag_values=own_flags)
    flags.DEFINE_bool("dry-run", False, "only print", flag_values=own_flags)
    assert run("--help") == 0
    out = capfd.readouterr().out
    assert "--restarts: how often (default: '0')\n" in out
    assert "--dry-run: only print\n" in out


@pytest.mark.parametrize("path", sorted(Path(verb.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_the_lines_of_an_example_are_joined_by_the_shell_alone(path):
    lines = (ast.get_docstring(ast.parse(path.read_text()), clean=False) or "").splitlines()
    for line, after in pairwise((*lines, "")):
        if line.startswith("    ") and after.startswith("        "):
            assert line.endswith("\\"), f"{path.name}: {line}"
        assert len(line) <= 120, f"{path.name}: {line}"


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the cause\nand the remedy"), 2, "error: the cause and the remedy\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (OSError(28, "No space left on device", "metrics.jsonl"), 2, "error: metrics.jsonl: No space left on device\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
    ],
)
def test_exit_codes(own_flags, config_file, capfd, error, code, said):
    assert run(f"--config={config_file}", "--workdir=w", main=raising(error)) == code
    assert capfd.readouterr().err == said


def test_our_own_mistakes_keep_their_traceback(own_flags, config_file):
    with pytest.raises(ZeroDivisionError):
        run(f"--config={config_file}", "--workdir=w", main=lambda _: 1 // 0)


def test_the_exit_code_of_main_is_that_of_the_verb(own_flags, config_file):
    assert run(f"--config={config_file}", "--workdir=w", main=lambda _: 130) == 130


def test_ctrl_c_while_libraries_load_leaves_no_traceback():
    command = [sys.executable, "-X", "importtime", "-m", "launch.train", "--config=configs/smoke.py", "--workdir=none"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, env=os.environ)
    while "tensorflow_datasets" not in (line := process.stderr.readline()):
        assert line, "it ended by itself"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGINT, "a shell reports that as 130"
    assert "Traceback" not in err


def test_a_closed_pipe_is_no_error():
    """As in `python -m launch.plan ... | head -1`."""
    verb_ = "import sys\ndef main(argv):\n    while True: print('a line', flush=True)\n"
    program = f"{verb_}from launch import verb\nsys.exit(verb.run(main, ['it']))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--workdir=", "--workdir is empty, which would be this folder"),
        ("--patience=nan", "--patience=nan must be a finite number"),
        ("--patience=inf", "--patience=inf must be a finite number"),
    ],
)
def test_nothing_is_no_folder_and_no_number(own_flags, config_file, capsys, flag, complaint):
    flags.DEFINE_float("patience", 1.0, "seconds", flag_values=own_flags)
    assert run(f"--config={config_file}", "--workdir=w", flag) == 2
    assert complaint in capsys.readouterr().err


def test_help_that_nobody_reads_is_no_error_either():
    read, write = os.pipe()
    os.close(read)
    program = "import sys\nfrom launch import verb\ndef main(argv): 'Help.'\nsys.exit(verb.run(main, ['it', '--help']))"
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_pipe_to_somebody_else_that_breaks_is_no_quiet_end():
    """As of a worker that was killed."""

    def main(argv):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        verb.run(main, ["it"])


@pytest.mark.parametrize("name", ["evaluate", "export", "stream"])
def test_several_processes_do_not_write_the_same_files(name, tmp_path):
    flags = {"evaluate": [], "export": ["--output=o"], "stream": ["--input=i.wav", "--output=o.wav"]}[name]
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{name}", f"--workdir={tmp_path}", *flags],
        env=os.environ | {"JAX_NUM_PROCESSES": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"launch.{name} is the work of one process, and this is one of 2; only training has more" in done.stderr
