"""The verbs: `python -m launch.VERB`."""

import signal
import sys
import time

from tmljax import pages, pulse

BEGAN = time.time()

if sys.argv[:1] == ["-m"]:  # a verb is being started; until `verb.run` takes over, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    pages.ask_for_huge_pages()
    pulse.begin()
