"""What the benchmarks share: the machine's description, the clock, tables and results.

Environment variables serve all of them:

    DEVICE    cpu or cuda (default: a GPU if there is one)
    QUICK=1   tiny sizes that show that the script runs; no result is written without OUT
    OUT       the folder of the results (default: benchmarks/results)
"""

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that was built in place, not installed

import torch  # noqa: E402

from mcn_ext.evaluation.metrics import markdown  # noqa: E402

DEVICE = os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
QUICK = bool(os.environ.get("QUICK"))


def output_of(*command: str) -> str:
    """What a program prints, "unknown" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def describe() -> dict:
    """The machine and the versions that the numbers belong to."""
    cpus = [line for line in output_of("lscpu").splitlines() if line.startswith("Model name")]
    facts = {
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpus[0].split(":")[1].strip() if cpus else "unknown",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    if DEVICE == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = output_of(*query)
    return facts


def save(name: str, report: dict) -> None:
    """Writes ``report``; called after each part, as a run may be stopped before its end."""
    if QUICK and "OUT" not in os.environ:
        return
    folder = Path(os.environ.get("OUT", ROOT / "benchmarks/results"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{DEVICE}.json").write_text(json.dumps(report, indent=1) + "\n")


def show(title: str, rows: list[dict]) -> None:
    """Prints dicts as a Markdown table whose columns are the keys of all."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(key, "") for key in columns] for row in rows]
    body = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in cells]
    print(f"\n{title}\n\n{markdown(columns, body)}", flush=True)


def now() -> float:
    """Milliseconds, once the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def take_turns(calls: dict, repeats: int, n: int = 1) -> dict[str, dict]:
    """Median milliseconds of each call by name.

    In every repeat the calls take turns, so that what else the machine does meets all of them; each
    is made ``n`` times in a row without waiting. "ms" is the time of one, "host_ms" the part of it
    until the last was launched. The first repeat warms up and does not count.
    """
    taken = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            begin = now()
            for _ in range(n):
                call()
            launched = 1e3 * time.perf_counter()
            taken[name].append(((now() - begin) / n, (launched - begin) / n))
    found = {}
    for name, times in taken.items():
        whole, host = zip(*times[1:], strict=True)
        found[name] = {"ms": median(whole), "host_ms": median(host)}
    return found


def capture(call) -> tuple:
    """A CUDA graph of ``call``, and the tensors that each replay fills."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture wants a warm-up on a stream of its own
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def relative(found, true) -> float:
    """Frobenius norm of the error over that of the truth, over all tensors."""
    found, true = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (found, true))
    return float((found - true).norm() / true.norm())
