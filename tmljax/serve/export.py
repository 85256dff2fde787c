"""A checkpoint as a self-contained directory that serves without this model's source.

    weights.safetensors   every parameter under its flat name, matrices in the dtype of the activations
    tick.stablehlo        the tick for N sessions, `jax.export` of (weights, state, inputs) -> (state, outputs)
    state.json            the initial state: name -> shape, dtype and what fills it
    config.json           the exact experiment
    tokenizer.json
    manifest.json         format version, platforms, shapes of inputs and outputs, versions, SHA-256 of each file

`tmljax.serve.bundle` reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tmljax import config, files
from tmljax.config import Experiment, UserError
from tmljax.decode.engine import Arrays, program_shapes
from tmljax.decode.program import PLATFORMS, initial_state, lower_tick, weights_of
from tmljax.model.interaction import Definition
from tmljax.serve.bundle import FILES, FORMAT, FORMAT_VERSION, is_export
from tmljax.stream.text import Tokenizer

RECORDED = ("jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers")


def export(
    output: str | Path,
    experiment: Experiment,
    tokenizer: Tokenizer,
    params: Any,
    *,
    step: int,
    name: str = "",
    sessions: int = 1,
) -> dict[str, Any]:
    """Writes the directory whole or not at all, in place of an earlier export; returns the manifest.

    Raises UserError when something else is there, the disk is full or writing is refused.
    """
    output = Path(os.path.abspath(output))
    refuse_foreign(output)
    program = lower_tick(experiment, sessions, PLATFORMS)
    weights = weights_of(params, Definition(experiment.stream, experiment.model))
    with _whole_directory(output) as folder:
        save_file(weights, folder / "weights.safetensors", metadata={"format": "np"})
        (folder / "tick.stablehlo").write_bytes(program.serialize())
        _write_json(folder / "state.json", describe(initial_state(experiment, sessions)))
        (folder / "config.json").write_text(config.to_json(experiment), encoding="utf-8")
        shutil.copymode(folder / "config.json", folder / "weights.safetensors")  # which safetensors makes private
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": name,
            "step": step,
            "sessions": sessions,
            "parameters": sum(array.size for array in weights.values()),
            "platforms": list(program.platforms),
            "calling_convention_version": program.calling_convention_version,
            "inputs": _describe_shapes(program_shapes(program)[2]),
            "outputs": _describe_shapes(jax.tree.unflatten(program.out_tree, program.out_avals)[1]),
            "versions": {package: importlib.metadata.version(package) for package in RECORDED},
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())
            },
        }
        _write_json(folder / "manifest.json", manifest)
    return manifest


def refuse_foreign(output: Path) -> None:
    """Raises UserError unless `output` is free, empty or an export, and nothing else, that may be replaced."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; --output must name a directory")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not is_export(output):
        raise UserError(f"{output} holds other things than an export; name an empty or a new directory")
    others = sorted({path.name for path in output.iterdir()} - {*FILES, "manifest.json"})
    if others:
        raise UserError(f"{output} holds {', '.join(others)} beside an export; move that away, or name a new directory")


@contextlib.contextmanager
def _whole_directory(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place at the end, or vanishes when anything goes wrong. What an
    export that was killed left behind is put in order first."""
    folder, replaced = (output.with_name(f".{output.name}.{state}") for state in ("partial", "replaced"))
    try:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        for path in folder.iterdir():
            files.sync(path)
        if output.exists():
            output.rename(replaced)
        folder.rename(output)
    except (OSError, SafetensorError) as e:
        why = "the disk is full" if files.is_full(e) else getattr(e, "strerror", None) or e
        raise UserError(f"cannot write {output}: {why}") from None
    finally:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_json(path: Path, tree: Any) -> None:
    text = json.dumps(tree, indent=2)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # shapes on one line
    path.write_text(text + "\n", encoding="utf-8")


def describe(state: Arrays) -> dict[str, Any]:
    """A fresh state repeats one value, or one row of its last dim, so that gigabytes of it are a page of text."""
    description = {}
    for name, array in state.items():
        row = array.reshape(-1, *array.shape[-1:])[0]
        assert (array == row).all(), f"{name} of the initial state does not repeat one row"
        fill = row[0].item() if (row == row[0]).all() else row.tolist()
        description[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "fill": fill}
    return description


def _describe_shapes(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
