"""Ranks' signs of life: a dead or hanging one ends the job in bounded time, by name and step."""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

from mcn_ext import distributed

INTERVAL = 1.0  # seconds between two signs of life
SILENT = 8.0  # without one: dead, or stopped
DOING = ("reading", "computing", "saving")  # in the order of a step


class Heartbeat:
    """Tells the other ranks every few seconds which step this one is at, and watches the time.

    After ``minutes`` without a call of :meth:`at`, which is what all ranks see when one hangs, or
    when an exception ends this one, the ranks that are silent or behind are named and the process
    ends, so that whoever started it (torchrun, srun) can end or restart the others. One process
    alone has nothing to watch.
    """

    def __init__(self, minutes: float):
        self.limit, self.place = 60 * minutes, [0, DOING[0]]
        self.ended, self.beats, self.since = threading.Event(), 0, time.monotonic()
        if distributed.world() == 1:
            return
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=SILENT),
        )
        # A restarted job finds the store of the first one.
        attempt = distributed.broadcast_object(secrets.token_hex(8))
        self.store = dist.PrefixStore(f"mcn_ext/heartbeat/{attempt}", store)
        self.excepthook, sys.excepthook = sys.excepthook, self._explain
        self._beat()
        distributed.barrier()  # from here on every rank can be asked for
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, step: int, doing: str) -> None:
        """This rank has come to a step (from 1), one of DOING."""
        self.place, self.since = [step, doing], time.monotonic()

    def close(self) -> None:
        self.ended.set()
        if distributed.world() > 1:
            sys.excepthook = self.excepthook

    def _beat(self) -> None:
        self.beats += 1
        self.store.set(
            str(distributed.rank()),
            json.dumps([self.beats, socket.gethostname(), os.getpid(), *self.place]),
        )

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(INTERVAL):
            now = time.monotonic()
            if now - before > SILENT:  # the whole job was suspended: that time does not count
                self.since += now - before
            try:
                self._beat()
            except RuntimeError:
                pass  # whoever keeps the store is gone: the limit, or torch, ends this rank
            before = time.monotonic()  # after what may wait for the store
            since = self.since
            if now - since > self.limit and not self.ended.is_set():
                self._say(f"no progress for {self.limit / 60:g} minutes (--hang_minutes)")
                if self.since != since:
                    continue  # it has come to an end while ranks were asked
                if distributed.rank() in self.suspects:
                    step, doing = self.place
                    print(
                        f"rank {distributed.rank()} itself is {doing} step {step}, here:",
                        file=sys.stderr,
                        flush=True,
                    )
                    faulthandler.dump_traceback(sys.stderr)
                os._exit(1)

    def _explain(self, kind, error, trace) -> None:
        """sys.excepthook: an exception that ends this rank may be another rank's end."""
        traceback.print_exception(kind, error, trace)
        step, doing = self.place
        print(
            f"rank {distributed.rank()} ({socket.gethostname()}) ended {doing} step {step}: "
            f"{kind.__name__}",
            file=sys.stderr,
            flush=True,
        )
        if isinstance(error, RuntimeError):  # so does torch say that others do not answer
            self._say("communication failed, or this rank did")
        self.ended.set()

    def _say(self, what: str) -> None:
        """Name the ranks that are silent or behind; one of the others does for all."""
        # A stopped process that keeps the store leaves whoever asks it waiting, timeout or not.
        bound = threading.Timer(4 * SILENT, self._end)
        bound.daemon = True
        bound.start()
        ranks = range(distributed.world())
        try:
            first = self._read()
            time.sleep(SILENT)  # this thread's beats go on, if it is not the one that beats
            if threading.current_thread() is not threading.main_thread():
                self._beat()
                time.sleep(INTERVAL)
            last = self._read()
        except RuntimeError as error:
            print(f"{what}; {self._keeper()} cannot be read ({error})", file=sys.stderr, flush=True)
            self.suspects = [0]
            return
        finally:
            bound.cancel()
        silent = [r for r in ranks if first[r][0] == last[r][0]]
        order = [(last[r][3], DOING.index(last[r][4])) for r in ranks]
        behind = [r for r in ranks if order[r] < max(order)]
        self.suspects = silent or behind
        others = [r for r in ranks if r not in self.suspects]
        if distributed.rank() != min(others, default=0):
            return
        lines = [
            what
            + ":"
            + (
                ""
                if self.suspects
                else " all ranks are at the same place; look at the network and the disks"
            )
        ]
        for r in self.suspects or ranks:
            _, host, pid, step, doing = last[r]
            lines.append(
                f"  rank {r} (host {host}, process {pid}) "
                + ("has ended or is stopped, last seen " if r in silent else "is ")
                + f"{doing} step {step}"
            )
        if self.suspects and others:
            lines.append(f"  the others are {last[others[0]][4]} step {last[others[0]][3]}")
        lines.append("the same command goes on from the last checkpoint")
        print("\n".join(lines), file=sys.stderr, flush=True)

    @staticmethod
    def _keeper() -> str:
        return (
            "the signs of life, kept by rank 0 or by torchrun on "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']},"
        )

    def _end(self) -> None:
        step, doing = self.place
        print(
            f"rank {distributed.rank()}, {doing} step {step}: no progress, and {self._keeper()} "
            "do not come: that process hangs or is stopped. The same command goes on from the "
            "last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _read(self) -> list[list]:
        names = [str(r) for r in range(distributed.world())]
        return [json.loads(value) for value in self.store.multi_get(names)]
