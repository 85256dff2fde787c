"""What is timed: `python -m benchmarks.NAME`, each with the pages that the verbs ask for."""

import sys

from tmljax import pages

if sys.argv[:1] == ["-m"]:  # a benchmark is being started
    pages.ask_for_huge_pages()
