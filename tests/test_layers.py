"""Who may import whom. A package imports itself and what lies below it, and what this table allows, nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("tmljax", "data_pipelines", "configs", "launch", "benchmarks")

LAYERS = {
    "tmljax.config": 0,
    "tmljax.sharding": 0,
    "tmljax.cluster": 0,
    "tmljax.fingerprint": 0,
    "tmljax.pages": 0,
    "tmljax.pulse": 0,
    "tmljax.files": 0,
    "tmljax.quiet": 0,
    "tmljax.storage": 0,
    "tmljax.terminal": 0,
    "tmljax.stream": 1,
    "tmljax.ops": 1,
    "tmljax.model": 2,
    "tmljax.checkpoint": 2,
    "tmljax.lineage": 3,
    "tmljax.train": 4,
    "tmljax.decode": 4,
    "tmljax.evals": 5,
    "tmljax.serve": 5,
    "tmljax.plan": 5,
    "configs": 6,
    "data_pipelines": 6,
    "launch": 7,
    "benchmarks": 8,
}

# Narrower than the layer: all that these may import of the project.
ONLY = {
    "tmljax.stream": {"tmljax.config", "tmljax.files"},
    "tmljax.ops": {"tmljax.sharding"},  # arrays and static ints, no config objects
    "configs": {"tmljax.config"},
    "data_pipelines": {
        "tmljax.config",
        "tmljax.files",
        "tmljax.pulse",
        "tmljax.stream",
    },  # a loader worker initialises no device
}

# Other people's packages, where not everything will do.
THIRD_PARTY = {
    "tmljax.stream": {"numpy", "scipy", "soundfile", "soxr", "tokenizers"},
    "tmljax.config": {"ml_collections"},
    "configs": {"ml_collections"},
}
NEVER = {"data_pipelines": {"jax", "flax", "optax", "orbax", "chex"}}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for top in TOP for path in sorted((ROOT / top).rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, in functions too: `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return found


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def package(module: str) -> str:
    """The row of the table that a module belongs to."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "tmljax" and len(parts) > 1 else parts[0]


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in TOP}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_downwards(module):
    me = package(module)
    if me == "tmljax":
        assert not GRAPH[module], "tmljax/__init__.py imports nothing"
        return
    assert me in LAYERS, f"{me} has no layer"
    for target in ours(GRAPH[module]):
        other = package(target)
        if other == me:
            continue
        below = LAYERS[other] < LAYERS[me] or LAYERS[other] == LAYERS[me] == 0
        assert below, f"{module} (L{LAYERS[me]}) imports {target} (L{LAYERS[other]})"
        assert other in ONLY.get(me, {other}), f"{module} imports {target}; {me} may use only {ONLY.get(me)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_the_libraries_of_its_package(module):
    libraries = {name.split(".")[0] for name in GRAPH[module]} - sys.stdlib_module_names - set(TOP)
    me = package(module)
    assert libraries <= THIRD_PARTY.get(me, libraries)
    assert not libraries & NEVER.get(me, set())


def test_no_module_imports_itself_in_a_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done or module not in GRAPH:
            return
        path.append(module)
        for target in sorted(ours(GRAPH[module])):
            visit(target)
        done.add(path.pop())

    for module in sorted(GRAPH):
        visit(module)


def reachable(module: str) -> set[str]:
    found, todo = set(), [module]
    while todo:
        here = todo.pop()
        if here not in found and here in GRAPH:
            found.add(here)
            todo += ours(GRAPH[here])
    return found


def test_serving_an_export_needs_neither_trainer_nor_model_source():
    found = {package(module) for module in reachable("tmljax.serve.bundle")}
    assert not found & {"tmljax.train", "tmljax.model", "tmljax.checkpoint", "data_pipelines"}


def test_checkpoints_are_read_without_the_trainer():
    found = {package(module) for module in reachable("tmljax.checkpoint")}
    assert not found & {"tmljax.train", "tmljax.decode", "tmljax.model"}


def names_of(prefix: str) -> str:
    return ", ".join(name for name in MODULES if name == prefix or name.startswith(prefix + "."))


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_stream_package_runs_without_jax():
    run_python(f"import sys, {names_of('tmljax.stream')}; assert 'jax' not in sys.modules")


def test_the_data_pipelines_touch_no_device():
    check = "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    run_python(f"import {names_of('data_pipelines')}; {check}")


def test_this_table_sees_what_it_forbids(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from tmljax.decode import tick\n    import tmljax.model.interaction, jax.numpy\n")
    assert imports(file) == {"tmljax.decode.tick", "tmljax.model.interaction", "jax.numpy"}
