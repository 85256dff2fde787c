"""A program that asks for huge pages begins anew, once, as it was called, and what it starts does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tmljax.pages import with_huge_pages

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")

ASK = """
import json, os, sys
from tmljax.pages import ask_for_huge_pages
sys.executable = os.environ.get("SHIM", sys.executable)
os.environ["STARTS"] = os.environ.get("STARTS", "") + "1"
began = os.environ.get("GLIBC_TUNABLES", "")
ask_for_huge_pages()
print(json.dumps([os.environ["STARTS"], began, os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.optimize]))
"""


def start(**more: str) -> list:
    """Of a program that asks: its starts, its tunables, those of what it starts, its arguments and -O."""
    environment = {name: value for name, value in os.environ.items() if name not in ("STARTS", "GLIBC_TUNABLES")}
    called = [sys.executable, "-O", "-c", ASK, "--flag=a b", "c"]
    done = subprocess.run(called, env=environment | more, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_what_is_said_already_stays(said, wanted):
    assert with_huge_pages({"HOME": "h", **said}) == {"HOME": "h", "GLIBC_TUNABLES": wanted}


@linux
def test_a_program_begins_anew_once_as_it_was_called():
    called = [["--flag=a b", "c"], 1]
    assert start() == ["11", "glibc.malloc.hugetlb=1", None, *called]
    perturbed = "glibc.malloc.perturb=0"
    assert start(GLIBC_TUNABLES=perturbed) == ["11", f"{perturbed}:glibc.malloc.hugetlb=1", perturbed, *called]
    refused = "glibc.malloc.hugetlb=0"
    assert start(GLIBC_TUNABLES=refused) == ["1", refused, refused, *called]


@linux
def test_where_it_cannot_it_goes_on_as_it_is(tmp_path):
    """Where the interpreter is not to be executed, or comes without what it was given: no second try."""
    assert start(SHIM=str(tmp_path / "nothing"))[:3] == ["1", "", None]
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nunset GLIBC_TUNABLES\nexec {sys.executable} "$@"\n')
    shim.chmod(0o755)
    assert start(SHIM=str(shim))[:3] == ["11", "", None]


@linux
def test_a_verb_asks(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        f"import shutil\nshutil.copy('/proc/self/environ', '{tmp_path}/began')\ndef get_config():\n    return 1\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    verb = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={tmp_path}/run"]
    subprocess.run(verb, env=environment, cwd=ROOT, stderr=subprocess.PIPE, check=False)
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in (tmp_path / "began").read_text().split("\0")
