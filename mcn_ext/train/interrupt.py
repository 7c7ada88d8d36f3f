"""Signals by which SLURM, torchrun or a person end a run before its time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

# SLURM signals every process of a step, and torchrun passes on what it got: seconds within which a
# signal that comes again is the same request.
SAME = 10.0


class StopRequest:
    """From now on, SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 only leave their name in ``came``, with the
    time.

    The same signal once more, over ``SAME`` seconds later, ends the process at once; so does any,
    a second after Ctrl-C: torchrun passes a person's second one on as SIGTERM.
    """

    def __init__(self):
        self.came: dict[str, float] = {}
        self.before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def _note(self, number: int, _frame) -> None:
        now, name, person = time.monotonic(), signal.Signals(number).name, number == signal.SIGINT
        if person and name not in self.came and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nending after this step, and saving it; Ctrl-C again ends at once\n")
        first = self.came.setdefault(name, now)
        if now - first > SAME or now - self.came.get("SIGINT", now) > 1.0:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def close(self, ending: bool = False) -> None:
        """Signals do again what they did before; ``ending``: nothing, the exit status stays 0."""
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)


@contextlib.contextmanager
def born_deaf():
    """Processes started inside have SIGTERM blocked from birth, for :func:`outlive_signals`: torch
    starts threads in them before any code of ours, and one that is not blocked ends the process."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # one that came meanwhile, comes now


def outlive_signals() -> None:
    """In a process that reads ahead: only its parent's SIGTERM ends it, not one meant for the run,
    which would fail without it before it has saved."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all processes
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
