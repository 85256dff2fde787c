"""A program that asks for huge pages begins anew, once, as it was called."""

import json
import os
import subprocess
import sys

import pytest

from tmljax.pages import with_huge_pages

ASK = """
import json, os, sys
from tmljax.pages import ask_for_huge_pages
os.environ["STARTS"] = os.environ.get("STARTS", "") + "1"
ask_for_huge_pages()
print(json.dumps([os.environ["STARTS"], os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.optimize]))
"""


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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_a_program_begins_anew_once_as_it_was_called():
    environment = {name: value for name, value in os.environ.items() if name not in ("STARTS", "GLIBC_TUNABLES")}
    called = [sys.executable, "-O", "-c", ASK, "--flag=a b", "c"]
    done = subprocess.run(called, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == ["11", "glibc.malloc.hugetlb=1", ["--flag=a b", "c"], 1]
