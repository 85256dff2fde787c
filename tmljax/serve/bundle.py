"""An export, verified and running: what `tmljax.serve.export` wrote becomes an Engine again.

The serialized tick is the model; nothing of tmljax.train, tmljax.model or tmljax.decode.tick is imported.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.export
import ml_dtypes  # noqa: F401  names bfloat16 to numpy
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tmljax import config
from tmljax.config import UserError
from tmljax.decode.engine import Arrays, Engine, compile_engine
from tmljax.stream.text import Tokenizer

FORMAT = "tmljax-export"
FORMAT_VERSION = 2
FILES = ("weights.safetensors", "tick.stablehlo", "state.json", "config.json", "tokenizer.json")


def is_export(path: str | Path) -> bool:
    """Does this directory say that it is an export (of any version, whole or not)?"""
    try:
        return json.loads((Path(path) / "manifest.json").read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Raises UserError when there is none, or one of another format version."""
    file = Path(path) / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}; an export has a manifest.json (python -m launch.export)") from None
    except ValueError:
        raise UserError(f"{file} is not valid JSON; export the checkpoint again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} does not describe a {FORMAT}")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has export format version {version}, this program reads {FORMAT_VERSION}: "
            "export the checkpoint again, or use the release of tmljax that wrote it"
        )
    return manifest


def verify(path: str | Path, manifest: dict[str, Any]) -> None:
    """Raises UserError naming the file that is missing or differs from what was exported."""
    recorded = manifest.get("files", {})
    for name in sorted({*FILES, *recorded}):
        file = Path(path) / name
        if name not in recorded:
            raise UserError(f"{path}/manifest.json does not list {name}; export the checkpoint again")
        if not file.is_file():
            raise UserError(f"{file} is missing; export the checkpoint again")
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != recorded[name]["sha256"]:
            raise UserError(f"{file} was altered or damaged: its SHA-256 is not the manifest's; export again")


def load(path: str | Path) -> Engine:
    """The engine of an export. Raises UserError for an export that is damaged, altered or of another version."""
    path = Path(path)
    manifest = read_manifest(path)
    verify(path, manifest)
    try:
        program = jax.export.deserialize(bytearray((path / "tick.stablehlo").read_bytes()))
        weights = load_file(path / "weights.safetensors")
        state = restore(json.loads((path / "state.json").read_bytes()))
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        wrote, here = manifest.get("versions", {}).get("jax"), jax.__version__
        raise UserError(f"{path} cannot be read with jax {here} (exported with {wrote}): {e}") from None
    platform = jax.default_backend()
    if platform not in program.platforms and not (platform == "gpu" and "cuda" in program.platforms):
        raise UserError(f"{path} runs on {', '.join(program.platforms)}, and this machine's device is a {platform}")
    experiment = config.from_json((path / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    return compile_engine(program, weights, state, experiment, tokenizer, manifest["step"], manifest["name"])


def restore(description: dict[str, Any]) -> Arrays:
    """The initial state from its description (name -> shape, dtype, and the value or last-dim row that fills it)."""
    return {name: np.full(d["shape"], d["fill"], np.dtype(d["dtype"])) for name, d in description.items()}
