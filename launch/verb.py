"""What every verb shares: flags that end in one clear line, and the config they name.

A verb is a module with a docstring, `define_flags()` and `main(argv)`, started by `sys.exit(verb.run(main))`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import math
import operator
import os
import re
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags, logging

from tmljax.config import Experiment, UserError, from_config_dict, nearest, refuse_address

MISTAKE = "TMLJAX_MISTAKE"  # names a file to make, for whoever cannot see this process's exit code (slurm.sh)
OVERRIDE = re.compile(r"--?config\.(?P<field>[^=]+)(=(?P<value>.*))?", re.DOTALL)
WRITTEN = ("workdir", "output", "json", "pictures", "trace")  # flags of any verb that name a folder or a file to write
MISTAKES = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}


def define_config(values: flags.FlagValues | None = None) -> None:
    """--config, and --config.a.b=VALUE for any of its fields; among `values`, by default those of the process."""
    values = flags.FLAGS if values is None else values
    flags.DEFINE_string(
        "config",
        None,
        "config file; FILE.py:X hands X to its get_config. Any field is overridden by --config.GROUP.FIELD=VALUE",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "config_field", [], "the same as --config.GROUP.FIELD=VALUE, as GROUP.FIELD=VALUE", flag_values=values
    )


# What serving may set otherwise than training did.
SERVING = (
    *("sampling.temperature", "sampling.top_k", "model.flow.steps", "model.flow.temperature"),
    "model.moe.tick_matmul",
)


def define_serving(more: Sequence[str] = ()) -> None:
    """--step, for `tmljax.checkpoint.load_for_serving`, and --config.FIELD=VALUE for `adapt`, of SERVING and `more`."""
    flags.DEFINE_string(
        "step",
        None,
        "checkpoint of the workdir: its step, or best for that of the lowest held-out loss; "
        "the newest complete one by default",
    )
    free = ", ".join([*SERVING, *more])
    flags.DEFINE_multi_string("config_field", [], f"or --config.FIELD=VALUE: otherwise than in training, one of {free}")


def overrides(more: Sequence[str] = ()) -> list[str]:
    """The FIELD=VALUE flags of a serving verb, of SERVING and `more`. Raises UserError for what training fixed."""
    free = [*SERVING, *more]
    for override in flags.FLAGS.config_field:
        field = override.partition("=")[0]
        if field not in free:
            named = [f"config.{name}" for name in free]
            hint = nearest(f"config.{field}", named, f"what can be is {', '.join(named)}")
            raise UserError(f"config.{field} cannot be set after training; {hint}")
    return flags.FLAGS.config_field


def adapt(trained: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment of a checkpoint with FIELD=VALUE `overrides`. Raises UserError for an impossible value."""
    tree = dataclasses.asdict(trained)
    for override in overrides:
        field, _, text = override.partition("=")
        set_field(tree, field.split("."), text)
    return from_config_dict(ml_collections.ConfigDict(tree, type_safe=False))


def settings(served: Experiment) -> dict[str, Any]:
    """What serving is free to set, as it was set: field -> value."""
    return {field: operator.attrgetter(field)(served) for field in SERVING}


def experiment() -> Experiment:
    """The experiment that the flags describe. Raises UserError naming the field or the file at fault."""
    return load_experiment(flags.FLAGS.config, flags.FLAGS.config_field)


def refuse_file(flag: str) -> None:
    """Raises UserError where the folder that this flag names is something else."""
    path = flags.FLAGS[flag].value
    if path is not None and os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"--{flag}={path} is no folder; name one, or one that can be made")


def run(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    keep: Callable[[Sequence[str]], Sequence[str]] = lambda arguments: arguments,
) -> int:
    """Runs a verb, on what `keep` keeps of the arguments, and returns its exit code: 2 and one line for a mistake, 130
    after Ctrl-C, 141 where nobody reads on."""
    logging.set_verbosity(logging.FATAL)  # libraries log what they also raise
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see launch/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = list(sys.argv if argv is None else argv)
    try:
        if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
            print(help_text(main), flush=True)
            return 0
        return main(parse_flags(keep(expand(argv)))) or 0
    except UserError as e:
        return complain(str(e))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not abandoned(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.errno not in MISTAKES:
            raise
        return complain(f"{e.filename or 'writing'}: {e.strerror}")


def abandoned(pipe: int) -> bool:
    """Whether nobody reads the other end, as in `... | head -1`."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def complain(message: str) -> int:
    if os.environ.get(MISTAKE):
        with contextlib.suppress(OSError):  # whoever looks for it takes the mistake for a failure then
            Path(os.environ[MISTAKE]).touch()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def parse_flags(argv: Sequence[str], values: flags.FlagValues | None = None) -> list[str]:
    """Returns the name of the program. Raises UserError for unknown flags, impossible values, addresses and nothing in
    place of folders, and what is no flag."""
    values = flags.FLAGS if values is None else values
    try:
        program, *rest = values(argv)
    except flags.Error as e:
        raise UserError(f"{flag_error(e)}; see --help") from None
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; see --help")
    for name in values:
        value = values[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} must be a finite number")
        if name in WRITTEN:
            refuse_address(f"--{name}", value)
        if name == "workdir" and value == "":
            raise UserError("--workdir is empty, which would be this folder; name one")
    return [program]


def flag_error(error: flags.Error) -> str:
    """What absl found, in our words where its own need some."""
    missing = re.search(r"--(\w+) must have a value other than None", str(error))
    if missing:
        return f"--{missing[1]} is missing"
    unread = re.search(r"Unable to open flagfile: .*\] (.*): '(.*)'", str(error))
    if unread:
        return f"--flagfile={unread[2]} cannot be read: {unread[1]}"
    return str(error).removeprefix("flag ")


def words_of(flag: str) -> list[str]:
    """The words of a flag that holds options of another program. Raises UserError where a quotation does not end."""
    value = flags.FLAGS[flag].value
    try:
        return shlex.split(value)
    except ValueError as e:
        raise UserError(f"--{flag}={value} is no list of words: {e}") from None


def expand(argv: Sequence[str]) -> list[str]:
    """With what stands in a --flagfile, and --config.a.b=v, which absl has no flag for, as --config_field=a.b=v; also
    in the form --config.a.b v."""
    try:
        rest = iter([argv[0], *flags.FlagValues().read_flags_from_files(argv[1:])])
    except flags.Error as e:
        raise UserError(f"{flag_error(e)}; see --help") from None
    rewritten = []
    for argument in rest:
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            rewritten.append(argument)
            continue
        value = match["value"] if match["value"] is not None else next(rest, None)
        if value is None:
            raise UserError(f"{argument} needs a value: {argument}=VALUE")
        rewritten.append(f"--config_field={match['field']}={value}")
    return rewritten


def help_text(main: Callable[..., Any]) -> str:
    module = sys.modules[main.__module__]
    lines = [(module.__doc__ or "").strip(), "", "flags:"]
    for name in sorted(flags.FLAGS):
        flag = flags.FLAGS[name]
        if flags.FLAGS.find_module_defining_flag(name) in (sys.argv[0], module.__name__, __name__, "launch.training"):
            told = flag.default not in (None, []) and flag.default is not False  # 0 is told
            default = f" (default: {flag.default_as_str})" if told else ""
            lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def load_experiment(file: str, overrides: Sequence[str] = ()) -> Experiment:
    """Of FILE.py or FILE.py:ARGUMENT, and GROUP.FIELD=VALUE overrides."""
    path, _, argument = file.partition(".py:")
    config = run_config_file(path + ".py" if argument else path, argument)
    tree = config.to_dict()
    for override in overrides:
        field, _, text = override.partition("=")
        set_field(tree, field.split("."), text)
    return from_config_dict(ml_collections.ConfigDict(tree, type_safe=False))


def run_config_file(path: str, argument: str = "") -> ml_collections.ConfigDict:
    """What get_config() of this file returns. Raises UserError for a file that is absent or fails."""
    if os.path.isdir(path):
        raise UserError(f"--config={path} is a folder; name a file in it")
    if not os.path.isfile(path):
        folder = Path(path).parent
        near = difflib.get_close_matches(Path(path).name, [p.name for p in folder.glob("*.py")], n=1)
        raise UserError(
            f"--config={path}: there is no such file" + (f"; did you mean {folder / near[0]}?" if near else "")
        )
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as e:
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(e.__traceback__)) if f.filename == spec.origin), None
        )
        where = f"{path}:{line}" if line else path
        raise UserError(f"--config={where} fails: {type(e).__name__}: {e}") from e
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={path}: get_config() returned {type(config).__name__}, not a ConfigDict")
    return config


def set_field(tree: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Names and types are judged later, with the whole config (`tmljax.config.from_config_dict`)."""
    *groups, name = path
    for depth, group in enumerate(groups):
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise UserError(
                f"config.{'.'.join(path[: depth + 1])} is a value, so config.{'.'.join(path)} does not exist"
            )
    if isinstance(tree.get(name), dict) and not text.startswith("{"):
        field = f"config.{'.'.join(path)}"
        known = f"; it has {', '.join(sorted(tree[name]))}" if tree[name] else ""
        raise UserError(f"{field} is a group: set --{field}.NAME=VALUE{known}")
    tree[name] = text if isinstance(tree.get(name), str) else parse_value(text)


def parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return float(text) if re.fullmatch(r"[+-]?(inf|infinity|nan)", text, re.IGNORECASE) else text
