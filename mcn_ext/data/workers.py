"""Signals and the processes that read ahead."""

from __future__ import annotations

import contextlib
import os
import signal
import threading


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
