"""A trace of a few steps of a run, in workdir/profile: XProf and TensorBoard's profile plugin open it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"
SETTLE = 3  # steps before the traced ones: the first are slower


class Profile:
    """Of `steps` steps of a run that goes on from step `first`; none for 0."""

    def __init__(self, workdir: str | Path, first: int, steps: int):
        self._folder = Path(workdir) / FOLDER
        self._begin, self._end = first + SETTLE + 1, first + SETTLE + steps
        self._tracing = False

    def before(self, step: int, unread: Any) -> None:
        """To be called before a step is dispatched; what is `unread` of the step before is waited for."""
        if step == self._begin <= self._end:
            jax.block_until_ready(unread)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def after(self, step: int, metrics: Any) -> None:
        if step == self._end and self._tracing:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that the run has cut short."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
