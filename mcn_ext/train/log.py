"""What a run prints and keeps, on rank 0: console, progress, args, env, log.jsonl."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from mcn_ext import __version__, distributed
from mcn_ext.console import printable
from mcn_ext.data.files import append, replace, write_text, writing

__all__ = ["RunLog", "environment", "read", "replace", "say", "write_text"]


def say(text: str) -> None:
    """Print on rank 0, above the progress bar."""
    if distributed.rank() == 0:
        tqdm.write(printable(text))


def environment(device: torch.device) -> str:
    """What a bug report or a paper needs to know of where this ran."""

    def git(*words):
        try:
            return subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
        # No git here, or not a clone: "unknown" is no reason to stop a run.
        except (OSError, subprocess.SubprocessError):
            return None

    sha = git("rev-parse", "HEAD")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return "\n".join(
        [
            f"command: {shlex.join(sys.argv)}",
            f"mcn_ext: {__version__}",
            f"git: {sha or 'unknown'}{' (dirty)' if sha and git('status', '--porcelain') else ''}",
            f"torch: {torch.__version__}, CUDA {torch.version.cuda}",
            f"GPU: {gpu}",
            f"ranks: {distributed.world()}",
            f"python: {platform.python_version()}",
            f"host: {platform.node()} ({platform.platform()}, {os.cpu_count()} cores)",
            f"started: {time.strftime('%Y-%m-%d %H:%M:%S %Z')}",
            "",
        ]
    )


class RunLog:
    """One run folder's records, and the bar with the time left.

    log.jsonl has one object per logged step, and one per skipped step ("skipped": why). A resumed
    run goes on after the step it resumed from. ``waited``: seconds for data since the last row,
    which whoever loops over batches adds to.
    """

    def __init__(self, folder: Path, args: dict, device: torch.device, step: int, total_steps: int):
        self.args, self.device, self.first = args, device, distributed.rank() == 0
        self.last_time, self.waited, self.clips = time.perf_counter(), 0.0, 0
        self.warned: set[str] = set()
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            disable=not self.first,
            # In a file, such as a cluster's, every refresh stays: there are fewer.
            mininterval=0.5 if sys.stderr.isatty() else 15,
            desc=folder.name,
            dynamic_ncols=True,
        )
        # Files are written by rank 0 alone.
        if not self.first:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "args.json", json.dumps(args, indent=1) + "\n")
        append(folder / "env.txt", environment(device) + "\n")  # one block per start
        self.file = log = folder / "log.jsonl"
        if log.exists():  # drop what came after the checkpoint, and a line cut short by a kill
            rows = [json.dumps(row) + "\n" for row in read(log) if row["step"] <= step]
            write_text(log, "".join(rows))

    def count(self, step: int, n_clips: int) -> None:
        """Count a step of ``n_clips`` clips over all ranks."""
        self.clips += n_clips
        self.bar.update(step - self.bar.n)

    def skipped(self, step: int, epoch: int, n_clips: int, why: dict) -> None:
        """Count a step that was skipped, and write why (:meth:`.Guard.skip`)."""
        self.count(step, n_clips)
        if self.first:
            append(self.file, json.dumps({"step": step, "epoch": epoch, **why}) + "\n")

    def write(self, row: dict, terms: dict[str, torch.Tensor], more: dict) -> None:
        """Add a row: ``row``, the terms' means over ranks, speed, then ``more``. All ranks call
        this; it waits for the device."""
        # Each rank holds its share of the terms that are not of the global batch.
        mean = distributed.total(torch.stack(list(terms.values())).float()) / distributed.world()
        values = dict(zip(terms, mean.tolist(), strict=True))
        now = time.perf_counter()
        # Speed and waiting are of the steps since the last row, saves included.
        seconds = now - self.last_time
        speed = {
            "clips_per_s": round(self.clips / seconds, 1),
            "data_wait": round(self.waited / seconds, 4),
            "peak_mib": round(self._peak_mib(), 1),
        }
        self.last_time, self.waited, self.clips = now, 0.0, 0
        self.bar.set_postfix_str(self._sum_of(values), refresh=False)
        if self.first:
            append(self.file, json.dumps({**row, **values, **speed, **more}) + "\n")

    def _sum_of(self, terms: dict[str, float]) -> str:
        """The loss as the sum that it is; before the first k-means fit no clustering is in it."""
        parts = [f"contrastive {terms['contrastive']:.3f}"]
        if terms["cluster"]:
            parts.append(f"{self.args['cluster_weight']:g} x cluster {terms['cluster']:.3f}")
        if self.args["recon_weight"]:
            weight = self.args["recon_weight"]
            parts.append(f"{weight:g} x reconstruction {terms['reconstruction']:.4f}")
        known = terms["contrastive"] + self.args["cluster_weight"] * terms["cluster"]
        # What the three known terms do not explain; 1e-4 of the loss may be rounding.
        rest = terms["total"] - known - self.args["recon_weight"] * terms["reconstruction"]
        if abs(rest) > 1e-4 * abs(terms["total"]):  # of a term of your own
            parts.append(f"others {rest:.3f}")
        return f"loss {terms['total']:.3f} = {' + '.join(parts)}"

    def warn_once(self, step: int, signs: list[str]) -> None:
        """Say each sign of collapse the first time that it shows."""
        for sign in signs:
            if sign not in self.warned:
                self.warned.add(sign)
                say(f"step {step}: collapse? {sign}; see curves.png and docs/nan.md")

    def _peak_mib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        # ru_maxrss is in KiB on Linux, in bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**10 if sys.platform != "darwin" else 2**20
        )

    def close(self) -> None:
        self.bar.close()


def read(path: Path) -> list[dict]:
    """Rows of a log.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
