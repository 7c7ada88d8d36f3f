"""Broken and hostile files against everything that reads files; prints and writes what came of it.

    python benchmarks/fuzz.py [--seconds 480] [--seed 0] [--out benchmarks/results/fuzz.json]

Files in the real formats are flipped, cut, spliced and edited by structure, and given to the store,
the converters, the pickle reader and the word vectors. Inputs run in forked children under limits
of memory and time. fine: read, and nothing wrong with what came out; error: one of the project's
own; skip: read, with items left out and listed; crash: a signal, the time limit, any other
exception, or a result that is wrong. Inputs that crash are kept in --keep, one folder each.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import torch
from fuzz_inputs import BASE, TARGETS, make_base

from mcn_ext.data import store_file
from mcn_ext.data.store import StoreError
from mcn_ext.prepare.unpickle import UnsafePickle

BATCH, SECONDS, MEMORY = 50, 10, 2 * 2**30  # inputs a child, limits of an input beyond the start


def one(target: str, seed: int, number: int, folder: Path) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng((seed, list(TARGETS).index(target), number))
    signal.alarm(SECONDS)
    try:
        return TARGETS[target](folder, rng)
    except (StoreError, UnsafePickle, SystemExit):
        return "error"
    except BaseException as error:
        return f"crash {type(error).__name__}: {str(error)[:150]}"
    finally:
        signal.alarm(0)


def batch(target: str, seed: int, first: int, folder: Path) -> tuple[list[str], float]:
    """(outcomes of up to BATCH inputs, peak MiB): fewer if one of them ended the child."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        for number in range(first, first + BATCH):
            os.write(into, one(target, seed, number, folder).replace("\n", " ").encode() + b"\n")
        os._exit(0)
    os.close(into)
    with open(out, encoding="utf-8", errors="replace") as pipe:
        outcomes = pipe.read().splitlines()
    _, status, usage = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        outcomes.append("crash time limit" if code == -signal.SIGALRM else f"crash signal {-code}")
    return outcomes, usage.ru_maxrss / 1024


def main():
    store_file.PATIENCE = 3  # seconds are enough for small files
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, help="this one only")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fuzz.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        t: {"outcomes": Counter(), "what": Counter(), "peak_mib": 0.0, "next": 0, "seconds": 0.0}
        for t in ([args.target] if args.target else TARGETS)
    }
    with tempfile.TemporaryDirectory() as tmp:
        make_base()
        begin = time.monotonic()
        while time.monotonic() - begin < args.seconds:
            target = min(results, key=lambda t: results[t]["seconds"])
            row, start = results[target], time.monotonic()
            outcomes, peak = batch(target, args.seed, row["next"], Path(tmp) / "input")
            for number, outcome in enumerate(outcomes, row["next"]):
                row["outcomes"][outcome.split()[0]] += 1
                if outcome.startswith("crash"):
                    row["what"][outcome[6:]] += 1
                    print(f"{target} {number}: {outcome}", file=sys.stderr, flush=True)
                    kept = args.keep / f"{target.replace(', ', '-')}-{args.seed}-{number}"
                    if os.fork() == 0:  # make the input again, without surviving what it does
                        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                        one(target, args.seed, number, kept)
                        os._exit(0)
                    os.wait()
            row["next"] += len(outcomes)
            row["peak_mib"] = max(row["peak_mib"], peak)
            row["seconds"] += time.monotonic() - start
        seconds = time.monotonic() - begin
    shutil.rmtree(BASE)
    print(
        f"{seconds:.0f} s, seed {args.seed}, Python {platform.python_version()}, h5py "
        f"{h5py.__version__}, HDF5 {h5py.version.hdf5_version}, numpy {np.__version__}, torch "
        f"{torch.__version__}\n"
    )
    print("| target | inputs | fine | errors | skips | crashes | peak MiB |\n" + "|---" * 7 + "|")
    for target, row in results.items():
        print(
            f"| {target} | {row['next']} | "
            + " | ".join(str(row["outcomes"][k]) for k in ("fine", "error", "skip", "crash"))
            + f" | {row['peak_mib']:.0f} |"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(
            {
                "seed": args.seed,
                "seconds": round(seconds),
                "python": platform.python_version(),
                "h5py": h5py.__version__,
                "hdf5": h5py.version.hdf5_version,
                "numpy": np.__version__,
                "torch": torch.__version__,
                "targets": results,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
