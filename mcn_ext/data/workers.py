"""How the loader's worker processes start and end: with their run, however it ends."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys

import torch


def start_worker(_worker: int) -> None:
    """Ignore signals meant for the run, which without its workers would fail before it has saved:
    SLURM and torchrun signal every process, a terminal's Ctrl-C the whole group."""
    # End with the run, even if it is killed: torch's watchdog notes the parent only after this, and
    # would not miss one that was killed before. PR_SET_PDEATHSIG is 1.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)
    # One thread each, since there may be a worker for every core: default_workers.
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill what workers are left: multiprocessing would send the SIGTERM they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls a killed worker an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
