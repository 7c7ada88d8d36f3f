"""Signals by which SLURM, torchrun or a person end a run before its time."""

from __future__ import annotations

import os
import signal

from mcn_ext import distributed
from mcn_ext.train.log import say


class StopRequest:
    """From now on SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 only set ``requested``: the run ends after
    its step, and saves it. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.signals: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    @property
    def requested(self) -> bool:
        return bool(self.signals)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if not self.requested and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nending after this step, and saving it; Ctrl-C again ends at once\n")
        self.signals.append(number)

    def end(self, message: str) -> None:
        """End the run, on all ranks: exit status 0, of Ctrl-C 130, so that `a && b` ends."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        names = sorted({signal.Signals(number).name for number in self.signals})
        say(f"{' and '.join(names) or 'a signal to another rank'}: {message}")
        distributed.barrier()
        distributed.finish()
        raise SystemExit(130 if signal.SIGINT in self.signals else 0)
