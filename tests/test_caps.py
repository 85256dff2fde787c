"""How long a file and a function may be, and how many parameters a function may have."""

import ast

import pytest

from tests.test_layers import MODULES

FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """All that a caller may give; `self` and `cls` are given already."""
    taken = function.args
    every = [*taken.posonlyargs, *taken.args, taken.vararg, *taken.kwonlyargs, taken.kwarg]
    return sum(one is not None and one.arg not in ("self", "cls") for one in every)


def too_big(text: str) -> list[str]:
    found = [f"{lines} lines"] if (lines := len(text.splitlines())) > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                found.append(f"{node.name} has {lines} lines")
            if (count := parameters(node)) > PARAMETERS:
                found.append(f"{node.name} has {count} parameters")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_is_read_fits_in_a_head(module):
    assert not too_big(MODULES[module].read_text())


def test_the_caps_see_what_is_too_big():
    body = "\n    pass" * FUNCTION_LINES
    assert too_big(f"def long():{body}") == ["long has 61 lines"]
    assert too_big("class A:\n  def m(self, a, b, /, c, *d, e, f, g, **h): 0") == []
    assert too_big("class A:\n  async def m(self, a, b, /, c, *d, e, f, g, h, **i): 0") == ["m has 9 parameters"]
    assert too_big("\n" * (FILE_LINES + 1)) == ["401 lines"]
