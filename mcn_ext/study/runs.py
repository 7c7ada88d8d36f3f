"""A study as it lies on the disk: which runs are there, what they measured, what is missing.

Nothing here fails for a run that was not trained, not evaluated or cut short; :meth:`Study.missing`
lists those.
"""

from __future__ import annotations

import json
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mcn_ext.evaluation.metrics import paired_bootstrap
from mcn_ext.reference import unit_rows
from mcn_ext.train.log import read

MAIN = "text->video+audio"
LETTERS = {"A": "audio", "V": "video", "T": "text"}
# Flags in which runs of a study differ by its design, or that say nothing of what is learned.
NOT_COMPARED = frozenset(
    "pair add out epochs seed init init_published init_run_id init_step "
    "first_epoch resume detect tensorboard stage1_encoders "
    "keep_epochs".split()
)


class StudyError(ValueError):
    """A study.json that cannot be read, with the file and the fix."""


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class RunFolder:
    """What one trained run left; empty where it left nothing."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def args(self) -> dict:
        return _json(self.path / "args.json")

    @cached_property
    def log(self) -> list[dict]:
        file = self.path / "log.jsonl"
        return read(file) if file.exists() else []

    @cached_property
    def metrics(self) -> dict:
        return _json(self.path / "metrics.json").get("youcook2", {})

    def _arrays(self, prefix: str) -> dict[str, np.ndarray]:
        try:
            with np.load(self.path / "youcook2.npz", allow_pickle=False) as file:
                return {
                    key.removeprefix(prefix): file[key]
                    for key in file.files
                    if key.startswith(prefix)
                }
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return {}

    @cached_property
    def ranks(self) -> dict[str, np.ndarray]:
        """{direction: rank of each query's answer}."""
        return self._arrays("rank:")

    def embeddings(self) -> dict[str, torch.Tensor]:
        """{modality: (n, D) fp32 rows}, unit rows unless the run compares by dot; rows of what is
        missing or not finite are NaN. Not kept: they are large."""
        valid, out = self._arrays("valid:"), {}
        for name, rows in self._arrays("embedding:").items():
            x = torch.from_numpy(rows).float()
            x = x if self.args.get("similarity") == "dot" else unit_rows(x)
            here = torch.from_numpy(valid[name]) if name in valid else torch.ones(len(x)).bool()
            x[~(here & torch.isfinite(x).all(dim=1))] = float("nan")
            out[name] = x
        return out

    @property
    def problem(self) -> str:
        """Why there is nothing to report of it, or nothing less than all of it; or ""."""
        if not any("total" in row for row in self.log):
            return "not trained"
        if not self.metrics:
            return "not evaluated (no youcook2 in metrics.json)"
        return "" if self.ranks else "no youcook2.npz: no intervals, no embeddings of it"

    def last(self, key: str) -> float:
        """The last logged value, NaN if none."""
        return next((float(row[key]) for row in reversed(self.log) if key in row), float("nan"))

    @property
    def skipped(self) -> int:
        return sum("skipped" in row for row in self.log)

    @property
    def clips_per_step(self) -> int:
        return self.args.get("batch_size", 0) * self.args.get("n_pair", 0)

    @property
    def clips(self) -> int:
        return self.clips_per_step * max((row.get("step", 0) for row in self.log), default=0)

    @property
    def seconds(self) -> float:
        """Training time: of each logged row the clips since the one before, by their speed."""
        total, before = 0.0, 0
        for row in self.log:
            if row.get("clips_per_s"):
                total += (row["step"] - before) * self.clips_per_step / row["clips_per_s"]
                before = row["step"]
        return total


class Run:
    """One entry of study.json: a method with one seed in one cell, of one or two stages."""

    def __init__(self, root: Path, entry: dict):
        self.cell, self.method = entry.get("cell", ""), entry["method"]
        self.order, self.seed = entry["order"], entry["seed"]
        self.label = entry.get("label") or self.method
        self.encoders, self.flops = entry.get("encoders"), entry.get("flops")
        self.epochs = entry.get("epochs") or []
        # Methods of as many steps, and of as many FLOPs, as this baseline.
        self.equal = {
            kind: entry.get(key) or []
            for kind, key in (("steps", "steps_of"), ("compute", "baseline_of"))
        }
        self.final = RunFolder(root / entry["run"])
        self.first = RunFolder(root / entry["stage1"]) if entry.get("stage1") else None

    @property
    def stages(self) -> list[RunFolder]:
        return [self.first, self.final] if self.first else [self.final]

    @property
    def pair(self) -> tuple[str, str] | None:
        """The modalities of the first pair; None of the one-stage baseline."""
        first = self.order.partition("_")[0]
        return None if "_" not in self.order else tuple(LETTERS[letter] for letter in first)


class Study:
    """study.json and all its runs. StudyError if that cannot be read."""

    def __init__(self, root: Path):
        self.root, spec = Path(root), _json(Path(root) / "study.json")
        if spec.get("format") != "mcn-study" or spec.get("version") != 1:
            raise StudyError(
                f"{self.root / 'study.json'}: not a study of format mcn-study, "
                "version 1; make one with python -m mcn_ext.study"
            )
        self.command, self.flags = spec.get("command", ""), spec.get("flags", {})
        self.cells = spec.get("cells") or [{"name": ""}]
        self.runs = [Run(self.root, entry) for entry in spec.get("runs", [])]
        if not self.grid:  # one grade of noise is no grid, and its name says nothing
            for run in self.runs:
                run.cell = ""
        baselines_last = sorted(self.runs, key=lambda run: run.pair is None)
        self.labels = {run.method: run.label for run in baselines_last}
        self.orders = {run.method: run.order for run in baselines_last}
        self.equal = {run.method: run.equal for run in baselines_last}

    @property
    def methods(self) -> list[str]:
        """In the order of study.json, the one-stage baselines last."""
        return list(self.labels)

    @property
    def grid(self) -> bool:
        return len(self.cells) > 1

    def of(self, method: str, cell: str = "") -> list[Run]:
        """The evaluated runs of a method, by seed."""
        return sorted(
            (
                run
                for run in self.runs
                if (run.method, run.cell) == (method, cell) and run.final.metrics
            ),
            key=lambda run: run.seed,
        )

    def values(
        self, method: str, metric: str = "R@10", direction: str = MAIN, cell: str = ""
    ) -> np.ndarray:
        """A metric, one for each seed."""
        found = (run.final.metrics.get(direction, {}).get(metric) for run in self.of(method, cell))
        return np.array([v for v in found if v is not None and np.isfinite(v)], float)

    def mean(
        self, method: str, metric: str = "R@10", direction: str = MAIN, cell: str = ""
    ) -> float:
        """NaN if there is none."""
        values = self.values(method, metric, direction, cell)
        return float(values.mean()) if len(values) else float("nan")

    def ranked(self, methods, cell: str = "") -> list[str]:
        """Of methods with a main result, the best by R@10 first."""
        means = {method: self.mean(method, cell=cell) for method in methods}
        return sorted((m for m in means if np.isfinite(means[m])), key=lambda m: -means[m])

    def by_order(self, cell: str = "") -> list[str]:
        """The best method of each two-stage order, best first."""
        best: dict[str, str] = {}
        for method in self.ranked(self.methods, cell):
            if self.orders[method] != "AVT":
                best.setdefault(self.orders[method], method)
        return list(best.values())

    def baselines(self, cell: str = "", of: str | None = None) -> list[str]:
        """The one-stage methods, best first; those equal to a method ``of`` in steps or compute,
        or all."""
        found = self.ranked((m for m in self.methods if self.orders[m] == "AVT"), cell)
        return [m for m in found if of is None or self.kinds(m, of)]

    def kinds(self, baseline: str, of: str) -> list[str]:
        """In what a baseline equals a method: "steps", "compute"."""
        return [kind for kind, methods in self.equal[baseline].items() if of in methods]

    def ranks(self, method: str, direction: str = MAIN, cell: str = "") -> dict[int, np.ndarray]:
        """{seed: ranks}."""
        return {
            run.seed: run.final.ranks[direction]
            for run in self.of(method, cell)
            if direction in run.final.ranks
        }

    def compare(self, a: str, b: str, cell: str = "") -> dict | None:
        """:func:`paired_bootstrap` of two methods on the seeds both have, which "seeds" names."""
        return paired(self.ranks(a, cell=cell), self.ranks(b, cell=cell))

    def n_queries(self) -> list[int]:
        return sorted({run.final.metrics["n"] for run in self.runs if "n" in run.final.metrics})

    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs if run.final.metrics})

    @property
    def demo(self) -> bool:
        return any(run.final.args.get("demo") for run in self.runs)

    def missing(self) -> list[str]:
        """Each run of study.json there is nothing of, or not all, and why."""
        out = []
        for run in self.runs:
            name = f"{run.cell + ': ' if run.cell else ''}{run.label}, seed {run.seed}"
            if run.final.problem:
                out.append(f"{name}: {run.final.problem}")
            if run.first and run.first.problem:
                out.append(f"{name}, stage 1: {run.first.problem}")
        return out


def paired(a: dict[int, np.ndarray], b: dict[int, np.ndarray], k: int = 10) -> dict | None:
    """paired_bootstrap of {seed: ranks}, None if no seed has both over the same queries."""
    seeds = [s for s in sorted(a.keys() & b.keys()) if len(a[s]) == len(b[s])]
    seeds = [s for s in seeds if len(a[s]) == len(a[seeds[0]])]
    if not seeds:
        return None
    result = paired_bootstrap(np.stack([a[s] for s in seeds]), np.stack([b[s] for s in seeds]), k)
    return result | {"seeds": seeds}


def compare_args(study: Study) -> tuple[dict, dict[str, list[tuple[str, list[str]]]]]:
    """Flags of args.json over all runs, both stages: ({flag: value} that are the same, {flag:
    [(value, runs), ...]} that differ, the value most runs have first); flags in which runs differ
    by design are left out."""
    seen: dict[str, dict[str, list[str]]] = {}
    for run in study.runs:
        for number, stage in enumerate(run.stages, 1):
            where = run.label + (f", stage {number}" if len(run.stages) > 1 else "")
            for key in stage.args.keys() - NOT_COMPARED - ({"data"} if study.grid else set()):
                names = seen.setdefault(key, {}).setdefault(str(stage.args[key]), [])
                if where not in names:
                    names.append(where)
    same = {key: next(iter(values)) for key, values in sorted(seen.items()) if len(values) == 1}
    return same, {
        key: sorted(values.items(), key=lambda item: -len(item[1]))
        for key, values in sorted(seen.items())
        if len(values) > 1
    }
