"""Reads a study folder and compares its methods: means, intervals, which differences are
significant.

Runs that were not trained, not evaluated or cut short are allowed: :meth:`Study.missing` lists
them.
"""

from __future__ import annotations

import json
import zipfile
from functools import cached_property
from itertools import product
from math import isfinite, nan
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mcn_ext.modalities import MODALITIES
from mcn_ext.study.bootstrap import compare_family, compare_ranks
from mcn_ext.study.plan import BASELINE
from mcn_ext.train.diagnostics import signs_of_collapse
from mcn_ext.train.log import read

MAIN = "text->video+audio"
FUSIONS = {"sum": MAIN, "mean": f"{MAIN} (mean)", "bank": f"{MAIN} (bank)"}  # of evaluate.py
# Flags in which runs of a study differ by design, or that do not change what is learned.
NOT_COMPARED = frozenset(
    "pair add out epochs seed init init_published init_run_id init_step first_epoch resume detect "
    "tensorboard stage1_encoders keep_epochs".split()
)


class StudyError(ValueError):
    """A study.json that cannot be read; the message names the file and the fix."""


# -------------------------------------------------------------------------------- what is there
def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class RunFolder:
    """The files of one run; empty where there are none."""

    def __init__(self, path: Path):
        self.path = path
        self.args = _json(path / "args.json")
        self.metrics = _json(path / "metrics.json").get("youcook2", {})
        self.clips_per_step = self.args.get("batch_size", 0) * self.args.get("n_pair", 0)

    @cached_property
    def log(self) -> list[dict]:
        file = self.path / "log.jsonl"
        return read(file) if file.exists() else []

    @cached_property
    def ranks(self) -> dict[str, np.ndarray]:
        """{direction: rank of each query's answer}."""
        try:
            with np.load(self.path / "youcook2.npz", allow_pickle=False) as file:
                names = [name for name in file.files if name.startswith("rank:")]
                return {name.removeprefix("rank:"): file[name] for name in names}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return {}

    @property
    def problem(self) -> str:
        """What is missing, or an empty string."""
        if not any("total" in row for row in self.log):
            return "not trained"
        if not self.metrics:
            return "not evaluated (no youcook2 in metrics.json)"
        return "" if self.ranks else "no youcook2.npz, so no intervals"

    def recall(self, direction: str, metric: str = "R@10") -> float:
        return self.metrics.get(direction, {}).get(metric, nan)

    def last(self, key: str) -> float:
        """The last logged value, NaN if there is none."""
        return next((float(row[key]) for row in reversed(self.log) if key in row), nan)

    def average(self, key: str) -> float:
        """Over all logged steps, NaN if there is none."""
        return mean(float(row[key]) for row in self.log if key in row)

    def signs_of_collapse(self) -> list[str]:
        end = next((row for row in reversed(self.log) if "total" in row), {})
        signs = signs_of_collapse(end)
        # signs_of_collapse does not look at the loss.
        return signs if isfinite(end.get("total", 0)) else [*signs, "the last loss is not finite"]

    @property
    def skipped(self) -> int:
        return sum("skipped" in row for row in self.log)

    @property
    def clips(self) -> int:
        return self.clips_per_step * max((row.get("step", 0) for row in self.log), default=0)

    @property
    def seconds(self) -> float:
        """Training time, from the logged speeds."""
        rows = [row for row in self.log if row.get("clips_per_s")]
        # A row's speed is that of the steps since the row before.
        steps = np.diff([0, *(row["step"] for row in rows)])
        return self.clips_per_step * sum(steps / [row["clips_per_s"] for row in rows])


class Run:
    """One entry of study.json: a method with one seed in one cell, of one or two stages."""

    def __init__(self, root: Path, entry: dict):
        self.method, self.order, self.seed = entry["method"], entry["order"], entry["seed"]
        self.cell, self.label = entry.get("cell", ""), entry.get("label") or self.method
        self.flops, self.epochs = entry.get("flops") or nan, entry.get("epochs") or []
        # The methods of as many steps, and of as many FLOPs, as this baseline.
        self.equal = {
            "steps": entry.get("steps_of") or [],
            "compute": entry.get("baseline_of") or [],
        }
        self.final = RunFolder(root / entry["run"])
        self.first = RunFolder(root / entry["stage1"]) if entry.get("stage1") else None
        self.stages = [self.first, self.final] if self.first else [self.final]

    def losses(self, pair: tuple[str, str]) -> list[list[tuple[int, float]]]:
        """For each stage: (clips seen, contrastive loss of two modalities), where it is logged."""
        stages, before = [], 0
        keys = {f"contrastive_{'_'.join(names)}" for names in (pair, pair[::-1])}
        for stage in self.stages:
            found = [(row["step"], float(row[key])) for row in stage.log for key in keys & set(row)]
            stages.append([(before + step * stage.clips_per_step, loss) for step, loss in found])
            before += stage.clips
        return stages

    @property
    def name(self) -> str:
        return f"{self.cell + ': ' if self.cell else ''}{self.label}, seed {self.seed}"


class Study:
    """All runs of a study folder, by method, seed and (for a noise grid) cell."""

    def __init__(self, root: Path):
        self.root, spec = Path(root), _json(Path(root) / "study.json")
        if spec.get("format") != "mcn-study" or spec.get("version") != 1:
            raise StudyError(
                f"{self.root / 'study.json'}: not a study of format mcn-study, "
                "version 1; make one with python -m mcn_ext.study"
            )
        self.command = spec.get("command") or "python -m mcn_ext.study"
        self.cells = spec.get("cells") or [{"name": ""}]
        variants = {f"variant {n}": words for n, words in (spec.get("variants") or {}).items()}
        self.flags_given = (spec.get("flags") or {}) | variants
        self.grid = len(self.cells) > 1
        self.runs = [Run(self.root, entry) for entry in spec.get("runs", [])]
        if not self.grid:  # a single noise level is a plain study; its name says nothing
            for run in self.runs:
                run.cell = ""
        ordered = sorted(self.runs, key=lambda run: run.order == BASELINE)  # baselines last
        self.labels = {run.method: run.label for run in ordered}
        self.orders = {run.method: run.order for run in ordered}
        self.equal = {run.method: run.equal for run in ordered}
        self.methods = list(self.labels)
        self.seeds = sorted({run.seed for run in self.runs if run.final.metrics})
        self.n_queries = sorted({r.final.metrics["n"] for r in self.runs if r.final.metrics})

    def of(self, method: str, cell: str = "") -> list[Run]:
        """The evaluated runs of a method, by seed."""
        runs = [r for r in self.runs if (r.method, r.cell) == (method, cell) and r.final.metrics]
        return sorted(runs, key=lambda run: run.seed)

    def trained(self) -> dict[str, list[Run]]:
        """{method: its runs that have a log}, over all cells."""
        logged = [run for run in self.runs if any(stage.log for stage in run.stages)]
        methods = [m for m in self.methods if m in {run.method for run in logged}]
        return {m: [run for run in logged if run.method == m] for m in methods}

    def values(
        self, method: str, metric: str = "R@10", direction: str = MAIN, cell: str = ""
    ) -> np.ndarray:
        """A metric, one value for each seed."""
        # NaN where a run was not evaluated in this direction.
        found = [run.final.recall(direction, metric) for run in self.of(method, cell)]
        return np.array([value for value in found if isfinite(value)])

    def mean(self, method: str, cell: str = "") -> float:
        """R@10 of text->video+audio, the mean of the seeds; NaN if there is none."""
        return mean(self.values(method, cell=cell))

    def ranked(self, methods, cell: str = "") -> list[str]:
        """Methods that have a main result, the best by R@10 first."""
        found = [method for method in methods if isfinite(self.mean(method, cell))]
        return sorted(found, key=lambda method: -self.mean(method, cell))

    def best_by_order(self, cell: str = "") -> list[str]:
        """The best method of each two-stage order, best first."""
        best: dict[str, str] = {}
        for method in self.ranked(self.methods, cell):
            # The best come first, so the first of an order is its best method.
            best.setdefault(self.orders[method], method)
        best.pop(BASELINE, None)
        return list(best.values())

    def baselines(self, cell: str = "", of: str | None = None) -> list[str]:
        """The one-stage methods, best first; with ``of`` those of its steps or compute alone."""
        found = self.ranked((m for m in self.methods if self.orders[m] == BASELINE), cell)
        return [m for m in found if of is None or self.kinds(m, of)]

    def kinds(self, baseline: str, of: str) -> list[str]:
        """In what a baseline equals a method: "steps", "compute"."""
        return [kind for kind, methods in self.equal[baseline].items() if of in methods]

    def ranks(self, method: str, direction: str = MAIN, cell: str = "") -> dict[int, np.ndarray]:
        """{seed: ranks}."""
        runs = [run for run in self.of(method, cell) if direction in run.final.ranks]
        return {run.seed: run.final.ranks[direction] for run in runs}

    def compare(self, a: str, b: str, cell: str = "") -> dict | None:
        """R@10 of ``a`` minus that of ``b``, see :func:`compare_ranks`."""
        return compare_ranks(self.ranks(a, cell=cell), self.ranks(b, cell=cell))

    def families(self, cell: str = "") -> list[dict]:
        """The orders against each other, for each "kind" of stage 2 and each "fusion": their
        "methods" (highest R@10 first), "recalls", and "pairs" (:func:`compare_family`)."""
        two_stages = [m for m in self.methods if self.orders[m] != BASELINE]
        kinds = dict.fromkeys(m.removeprefix(self.orders[m]) for m in two_stages)
        found = []
        for kind, (fusion, direction) in product(kinds, FUSIONS.items()):
            recalls = {
                m: self.values(m, direction=direction, cell=cell)
                for m in two_stages
                if m.removeprefix(self.orders[m]) == kind
            }
            methods = sorted(
                filter(lambda m: len(recalls[m]), recalls), key=lambda m: -recalls[m].mean()
            )
            pairs = compare_family({m: self.ranks(m, direction, cell) for m in methods})
            if pairs:
                family = {"kind": self.labels[methods[0]].rpartition(", ")[2], "fusion": fusion}
                found.append(family | {"methods": methods, "recalls": recalls, "pairs": pairs})
        return found

    def geometry(self) -> dict[str, dict[str, np.ndarray]]:
        """{method: {what geometry.py finds: one value for each seed}}, of the study's one cell."""
        from mcn_ext.study import geometry

        rows, cache = {}, {}
        for method in tqdm(self.methods, "embeddings", unit="method", leave=False, disable=None):
            found = [
                geometry.describe(
                    run.final.path / "youcook2.npz", run.final.metrics.get("data", ""), cache
                )
                for run in self.of(method)
            ]
            keys = dict.fromkeys(key for one in found for key in one)
            if keys:
                rows[method] = {k: np.array([one[k] for one in found if k in one]) for k in keys}
        return rows

    def missing(self) -> list[str]:
        """Each run that is not all there, and why."""
        out = []
        for run in self.runs:
            if run.final.problem:
                out.append(f"{run.name}: {run.final.problem}")
            if run.first and run.first.problem:
                out.append(f"{run.name}, stage 1: {run.first.problem}")
        return out

    def winners(self) -> list[dict]:
        """For each cell of a grid: the methods "winner", "second" and "baseline" (the best of the
        two best orders, the best with one stage; None if there is none), the "difference" of the
        two best, whether the winner's lead over *all* orders is "significant", and "recalls", R@10
        by order."""
        rows = []
        for cell in self.cells:
            name = cell["name"]
            found, baseline = self.best_by_order(name), (self.baselines(name) or [None])[0]
            best, second = [*found, None, None][:2]
            difference = self.compare(best, second, name) if second else None
            pairs = compare_family({m: self.ranks(m, cell=name) for m in found})
            leads = [pair["significant"] for pair in pairs if best in (pair["a"], pair["b"])]
            methods = [*found, baseline] if baseline else found
            rows.append(
                {
                    **cell,
                    "winner": best,
                    "second": second,
                    "baseline": baseline,
                    "order": self.orders.get(best),
                    "difference": difference,
                    "significant": bool(leads) and all(leads),
                    "recalls": {self.orders[m]: self.mean(m, cell=name) for m in methods},
                }
            )
        return rows

    def forgetting(self) -> list[dict]:
        """R@10 of the first pair, both directions, "before" and "after" stage 2."""
        rows = []
        for method in self.methods:
            # One stage has no state before stage 2 to compare with.
            runs = [run for run in self.of(method) if run.first]
            a, b = (MODALITIES[letter].name for letter in self.orders[method][:2])
            for direction in (f"{a}->{b}", f"{b}->{a}"):
                recalls = [[s.recall(direction) for s in run.stages] for run in runs]
                recalls = [pair for pair in recalls if np.isfinite(pair).all()]
                if recalls:
                    before, after = np.mean(recalls, axis=0)
                    change = compare_ranks(
                        # After less before: negative where stage 2 has forgotten.
                        {run.seed: run.final.ranks.get(direction) for run in runs},
                        {run.seed: run.first.ranks.get(direction) for run in runs},
                    )
                    row = {"method": method, "direction": direction, "change": change}
                    rows.append(row | {"before": before, "after": after})
        return rows

    def flags(self) -> dict[str, dict[str, dict]]:
        """{flag: {value: the runs that have it}} of args.json, without flags that differ by design;
        the value of most runs first."""
        seen: dict[str, dict[str, dict]] = {}
        # In a grid each noise level has data of its own.
        hidden = NOT_COMPARED | ({"data"} if self.grid else set())
        for run in self.runs:
            for number, stage in enumerate(run.stages, 1):
                where = run.label + (f", stage {number}" if run.first else "")
                for flag in stage.args.keys() - hidden:
                    seen.setdefault(flag, {}).setdefault(str(stage.args[flag]), {})[where] = None
        return {
            flag: dict(sorted(seen[flag].items(), key=lambda item: -len(item[1])))
            for flag in sorted(seen)
        }


def mean(values) -> float:
    """Of the finite values; NaN if there is none."""
    values = [value for value in values if isfinite(value)]
    return float(np.mean(values)) if values else nan
