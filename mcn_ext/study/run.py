"""Runs chains of commands: several at a time, resumable, one failure does not stop the others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SLURM = """\
#!/bin/bash
#SBATCH --array=1-{n} --job-name=mcn-study --requeue --signal=USR1@120 --time=48:00:00
#SBATCH --ntasks=1 --gpus-per-node={gpus} --cpus-per-task={cpus}
# Submit from the folder in which this was printed. After a time limit submit it again: finished
# runs are skipped. When all tasks are done, the study's command, without --print, writes the
# report.
# On a signal a run saves itself; the shell only waits for it and starts no further command.
read -r -d '' CHAIN < <(sed -n "${{SLURM_ARRAY_TASK_ID}}p" <<'CHAINS'
{chains}
CHAINS
)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "trap : USR1 TERM; $CHAIN"
"""


def _alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a process that has ended and that nobody has waited for


@contextlib.contextmanager
def only_one(out: Path, patience: float = 60.0) -> Iterator[Path]:
    """Hold ``out``/study.lock, which lists host and processes of a study and its runs.

    If an earlier study was killed, its runs may still be at work: wait ``patience`` seconds for
    them. SystemExit if they, or another study, go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, host = out / "study.lock", socket.gethostname()
    end = time.monotonic() + patience
    while True:
        # Mode x fails if the file exists, so that of two studies one gets the lock.
        with contextlib.suppress(FileExistsError), open(file, "x") as lock:
            lock.write(f"{host} {os.getpid()}")
            break
        owner, *pids = file.read_text().split() or [""]
        # Process numbers are known on the host alone that gave them.
        if owner == host and not any(map(_alive, pids)):
            file.unlink(missing_ok=True)
        elif time.monotonic() > end:
            raise SystemExit(
                f"{out}: another study, or a run of one, is at work in this folder (host {owner}, "
                f"processes {', '.join(pids)}); wait for it, or give another --out. If there is "
                f"none, delete {file}"
            )
        else:
            time.sleep(0.5)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def finished(run: Path, store: str | None = None) -> bool:
    """Whether a run was trained to its end and evaluated since, on ``store``."""
    metrics, weights = run / "metrics.json", run / "checkpoint.pt"
    try:
        result = json.loads(metrics.read_text())["youcook2"]
        # Trained on since: the numbers are of older weights.
        newer = not weights.exists() or metrics.stat().st_mtime >= weights.stat().st_mtime
        evaluated = newer and (run / "youcook2.npz").exists()
        return bool(evaluated and result["complete"] and store in (None, result["data"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remove_epochs(folder: Path) -> None:
    """Remove epoch-NN.pt of a run whose checkpoint.pt has the last: dozens of runs with all their
    epochs fill a disk."""
    if (folder / "checkpoint.pt").exists():
        for file in folder.glob("epoch-*.pt"):
            if re.fullmatch(r"epoch-\d+\.pt", file.name):
                with contextlib.suppress(OSError):
                    file.unlink()


def unfinished(chain: list) -> list:
    """A chain from its first unfinished run on: later runs may rest on an older state of it."""
    for i, (folder, commands) in enumerate(chain):
        words = commands[-1]
        store = words[words.index("--youcook2") + 1] if "--youcook2" in words else None
        if not finished(folder, store):
            return chain[i:]
    return []


def run(chains: list[list], out: Path, jobs: int, lock: Path, keep_epochs: bool) -> list[str]:
    """Run what is not finished, ``jobs`` chains at a time; returns a message for each failure.

    chains: lists of (run folder in ``out``, its commands); each run needs those before it. A
    command that fails ends its chain alone. An evaluated run keeps the weights of its last epoch
    alone, unless ``keep_epochs``. On SIGTERM, SIGINT or SIGUSR1 all runs save and end, then
    SystemExit.
    """
    todo, total = list(filter(None, map(unfinished, chains))), sum(map(len, chains))
    left, begin = sum(map(len, todo)), time.monotonic()
    n_cores = len(os.sched_getaffinity(0))
    # Chains share the cores. What the user has set wins.
    environment = {"OMP_NUM_THREADS": str(max(1, n_cores // jobs)), **os.environ}
    signals: list[int] = []
    processes: set[subprocess.Popen] = set()
    failed: list[str] = []
    mutex = threading.Lock()
    owner = lock.read_text()

    def stop(number: int, _frame) -> None:
        signals.append(number)
        # A copy, since threads change the set meanwhile.
        for process in list(processes):
            process.terminate()

    def execute(words: list[str], output: Path) -> int:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            # In a session of its own: a terminal's Ctrl-C reaches it once, from stop().
            process = subprocess.Popen(words, env=environment, start_new_session=True, **streams)
        with mutex:
            processes.add(process)
            lock.write_text(" ".join([owner, *(str(p.pid) for p in processes)]))
        if signals:  # one that came just before the process was listed
            process.terminate()
        status = process.wait()
        with mutex:
            processes.discard(process)
        return status

    def run_chain(chain: list) -> None:
        nonlocal left
        for folder, commands in chain:
            output = out / "output" / f"{folder.relative_to(out)}.txt"
            for words in commands:
                if signals:
                    return
                status = execute(words, output)
                # The last command evaluates: success without its results is a failure, too.
                if status or words is commands[-1] and not finished(folder):
                    if not signals:
                        text = output.read_text(errors="replace").strip().splitlines() or [""]
                        failed.append(
                            f"{shlex.join(words)}\n  exit status {status}; its output is in "
                            f"{output}, the last line: {text[-1]}"
                        )
                        print(f"FAILED: {failed[-1]}", flush=True)
                    return
            if not keep_epochs:
                remove_epochs(folder)
            left -= 1
            minutes = (time.monotonic() - begin) / 60
            print(f"{total - left} of {total} runs done, {folder}; {minutes:.1f} min", flush=True)

    previous = {
        number: signal.signal(number, stop)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    try:
        # Threads are enough: they wait for processes, which do the work.
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run_chain, todo))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signals:
        name = signal.Signals(signals[0]).name
        print(f"{name}: the runs are saved; to resume, run the same command again")
        raise SystemExit(128 + signals[0])
    return failed
