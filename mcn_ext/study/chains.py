"""Chains of runs, each a training and its evaluation: side by side, resumable, safe to kill."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PR_SET_PDEATHSIG = 1
SLURM = """\
#!/bin/bash
#SBATCH --array=1-{n} --job-name=mcn-study --requeue --signal=USR1@120 --time=48:00:00
#SBATCH --ntasks=1 --gpus-per-node={gpus} --cpus-per-task={cpus}
# Submit from the folder this was printed in, and again after a time limit: what is done is not
# done twice. When all tasks are done, the study's command, without --print, draws the report.
# On a signal a run saves itself; the shell only waits for it, and goes no further.
read -r -d '' CHAIN < <(sed -n "${{SLURM_ARRAY_TASK_ID}}p" <<'CHAINS'
{chains}
CHAINS
)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "trap : USR1 TERM; $CHAIN"
"""


def finished(run: Path, store: str | None = None) -> bool:
    """Whether a run was trained to its end and evaluated since, on ``store``."""
    metrics, kept, trained = (
        run / name for name in ("metrics.json", "youcook2.npz", "checkpoint.pt")
    )
    try:
        result = json.loads(metrics.read_text())["youcook2"]
        return (
            bool(result["complete"])
            and store in (None, result["data"])
            and kept.stat().st_size > 0
            and (not trained.exists() or metrics.stat().st_mtime >= trained.stat().st_mtime)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _unfinished(chain: list) -> list:
    """A chain from its first run that is not finished on: those after it may rest on an older."""
    for i, (folder, commands) in enumerate(chain):
        words = commands[-1]
        store = words[words.index("--youcook2") + 1] if "--youcook2" in words else None
        if not finished(folder, store):
            return chain[i:]
    return []


@contextlib.contextmanager
def only_one(out: Path, patience: float = 60.0) -> Iterator[int]:
    """A lock on the study that its runs hold too: those of a study that was killed may still be
    saving. Yields the descriptor to pass on to them."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as file:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise SystemExit(
                        f"{out}: another study, or a run of one, is at work in this "
                        "folder; wait for it, or give another --out"
                    ) from None
                time.sleep(0.5)
            except OSError:
                break  # a disk without locks
        yield file.fileno()


def _die_with_parent():
    """For a child to do first: SIGTERM, on which runs save and end, should the study be killed."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):  # not Linux
        return None
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Progress:
    """Lines for the console: what ended, how many of all, time left by the FLOPs done."""

    def __init__(self, work: dict[Path, float], todo: list[Path], jobs: int):
        least = 0.05 * max(work.values(), default=0.0)  # starting and evaluating take time, too
        self.work = {folder: max(flops, least) for folder, flops in work.items()}
        self.left, self.jobs, self.all, self.first = set(todo), jobs, len(work), time.monotonic()
        self.begun: dict[Path, float] = {}
        self.done, self.took = 0.0, 0.0  # work of the runs that ended, their seconds

    def start(self, folder: Path) -> None:
        self.begun.setdefault(folder, time.monotonic())

    def end(self, folder: Path) -> None:
        self.left.discard(folder)
        now = time.monotonic()
        self.done += self.work[folder]
        self.took += now - self.begun[folder]
        # Of runs that are under way, what they have done already does not count.
        rate = self.took / self.done
        remaining = (
            sum(max(0.0, self.work[f] * rate - now + self.begun.get(f, now)) for f in self.left)
            / self.jobs
        )
        print(
            f"{self.all - len(self.left)} of {self.all} runs done, {folder}; "
            f"{_clock(now - self.first)} so far"
            + (f", about {_clock(remaining)} left" if self.left else ""),
            flush=True,
        )


def _clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"


def run(
    chains: list[list], cost: Callable[[Path], float], out: Path, jobs: int, lock: int
) -> list[str]:
    """Run what is not finished of the chains, ``jobs`` at a time; what has failed, in words.

    chains: lists of (run folder in ``out``, its commands), each run after the one before it. A
    command that fails ends its chain alone. A signal ends all: runs save themselves, SystemExit.
    """
    stop: list[int] = []
    units = [folder for chain in chains for folder, _ in chain]
    chains = [left for chain in chains if (left := _unfinished(chain))]
    progress = Progress(
        {folder: cost(folder) for folder in units},
        [folder for chain in chains for folder, _ in chain],
        jobs,
    )
    environment = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs)),
        **os.environ,
    }
    previous = {
        s: signal.signal(s, lambda number, _: stop.append(number))
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    die_with_parent = _die_with_parent()
    running: list[tuple] = []  # process, the unit's commands left, chain, output
    failed: list[str] = []

    def start(chain, commands):
        progress.start(chain[0][0])
        output = out / "output" / f"{chain[0][0].relative_to(out)}.txt"
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a") as file:
            process = subprocess.Popen(
                commands[0],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        running.append((process, commands, chain, output))

    try:
        while (chains or running) and not (stop and not running):
            while chains and len(running) < jobs and not stop:
                chain = chains.pop(0)
                start(chain, chain[0][1])
            for item in list(running):
                process, commands, chain, output = item
                if process.poll() is None:
                    continue
                running.remove(item)
                last, (folder, _) = not commands[1:], chain[0]
                # One that a signal ended early exits with 0 as well.
                if stop and not (last and finished(folder)):
                    continue
                if process.returncode or last and not finished(folder):
                    failed.append(
                        f"{shlex.join(commands[0])}\n  exit status "
                        f"{process.returncode}; its output is in {output}, the last "
                        f"line: {_last_line(output)}"
                    )
                    print(f"FAILED: {failed[-1]}", flush=True)
                elif not last:
                    start(chain, commands[1:])
                else:
                    progress.end(folder)
                    if chain[1:] and not stop:
                        start(chain[1:], chain[1][1])
            for process, *_ in running:
                if stop and not getattr(process, "told", False):
                    process.send_signal(signal.SIGTERM)
                    process.told = True
            time.sleep(0.1)
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
    if stop:
        print(f"{signal.Signals(stop[0]).name}: runs are saved; the same command goes on")
        raise SystemExit(128 + stop[0])
    return failed


def _last_line(output: Path) -> str:
    return (output.read_text(errors="replace").strip().splitlines() or [""])[-1]
