"""Reads a study folder and compares its methods: means, intervals, which differences are
significant.

Runs that were not trained, not evaluated or cut short are allowed: :meth:`Study.missing` lists
them.
"""

from __future__ import annotations

import json
import zipfile
from functools import cached_property, lru_cache
from math import isfinite, nan
from pathlib import Path

import numpy as np

from mcn_ext.modalities import MODALITIES
from mcn_ext.study.plan import BASELINE
from mcn_ext.train.diagnostics import signs_of_collapse
from mcn_ext.train.log import read

MAIN = "text->video+audio"
# Flags in which runs of a study differ by design, or that do not change what is learned.
NOT_COMPARED = frozenset(
    "pair add out epochs seed init init_published init_run_id init_step first_epoch resume detect "
    "tensorboard stage1_encoders keep_epochs".split()
)


class StudyError(ValueError):
    """A study.json that cannot be read; the message names the file and the fix."""


# ----------------------------------------------------------------------------------- bootstrap
@lru_cache(maxsize=1)  # a study compares many methods on the same queries
def _query_counts(n: int, resamples: int) -> np.ndarray:
    """How often each of n queries is in each resample, (n, resamples) fp32."""
    rng = np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples)]
    return np.stack(drawn, axis=1).astype(np.float32)


def _bootstrap_means(values: np.ndarray, resamples: int) -> np.ndarray:
    """Bootstrap draws of the mean of ``values`` (seeds, queries), both resampled, crossed.

    Seeds and queries are two random samples that meet in every cell, so each is resampled as a
    whole (the pigeonhole bootstrap, Owen 2007)::

        draw = mean_q d_q + sqrt(S / (S - 1)) (1/S) sum_s (u_s - 1) d_s,  over the drawn queries q

    with u_s how often seed s was drawn. The root corrects that S draws from S seeds vary too
    little, which matters for two or three seeds. One seed is not resampled.
    """
    n_seeds, n = values.shape
    correction = np.sqrt(n_seeds / (n_seeds - 1)) if n_seeds > 1 else 0.0
    # (seeds, resamples): each seed's mean over the same drawn queries.
    per_seed = values.astype(np.float32) @ _query_counts(n, resamples) / n
    rng = np.random.default_rng([0, 1])  # another stream than the one that draws queries
    counts = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples).T
    return per_seed.mean(axis=0) + correction * ((counts - 1) * per_seed).mean(axis=0)


# 97.5 % quantile of Student's t by degrees of freedom; in between, log t is linear in 1 / df.
STUDENT_T = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    6: 2.447,
    10: 2.228,
    20: 2.086,
    np.inf: 1.960,
}


def interval95(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` (seeds, queries): t times the bootstrap's standard
    deviation.

    Two or three seeds say little about how much seeds vary, so t has Satterthwaite's degrees of
    freedom: S - 1 where seeds are all the variance, many where queries are.
    """
    n_seeds, mean = len(values), float(values.mean())
    variance = float(_bootstrap_means(values, resamples).var())
    of_seeds = float(values.mean(axis=1).var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    # Satterthwaite: df = V^2 / (V_s^2 / (S - 1)); the queries' share of V has many degrees.
    # By chance V may be below the seeds' V_s, hence max.
    df = (n_seeds - 1) * max(1.0, variance / of_seeds) ** 2 if of_seeds else np.inf
    inverse = [1 / x for x in STUDENT_T]
    # np.interp needs rising x: 1 / df falls along the table, so both are reversed.
    log_t = np.interp(1 / df, inverse[::-1], np.log(list(STUDENT_T.values()))[::-1])
    half = float(np.exp(log_t)) * variance**0.5
    return mean - half, mean + half


def recall_interval(ranks: np.ndarray, k: int = 10, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of R@k in percent, of ranks (seeds, queries)."""
    low, high = interval95(100.0 * (ranks <= k), resamples)
    # The interval is symmetric and may leave what a recall can be.
    return max(0.0, low), min(100.0, high)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, k: int = 10, resamples: int = 2000) -> dict:
    """Compares R@k of two methods: ranks (seeds, queries) of the same seeds and the same queries.

    Returns "difference" in percentage points, its 95 % interval "ci95", and "significant", whether
    0 lies outside of it::

        difference = 100 / (S Q) sum_sq ([a_sq <= k] - [b_sq <= k])

    Pairing cancels what makes a query hard for both. With one seed the interval says nothing on how
    another seed would do. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"ranks must be (seeds, queries), the same for both: {a.shape}, {b.shape}")
    # -100, 0 or 100 for each query: their mean is in percentage points.
    gain = 100.0 * ((a <= k).astype(np.float32) - (b <= k))
    low, high = interval95(gain, resamples)
    significant = low > 0 or high < 0
    return {"difference": float(gain.mean()), "ci95": (low, high), "significant": significant}


def compare_ranks(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> dict | None:
    """:func:`paired_bootstrap` of {seed: ranks} on the common seeds, which "seeds" lists; None if
    there is none."""
    pairs = {seed: (a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())}
    pairs = {s: pair for s, pair in pairs.items() if all(ranks is not None for ranks in pair)}
    n = {len(ranks) for pair in pairs.values() for ranks in pair}
    if len(n) != 1:  # no common seed, or seeds that were evaluated on different stores
        return None
    return paired_bootstrap(*np.stack(list(pairs.values()), axis=1)) | {"seeds": list(pairs)}


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
        two best, and "recalls", R@10 by order."""
        rows = []
        for cell in self.cells:
            name = cell["name"]
            found, baseline = self.best_by_order(name), (self.baselines(name) or [None])[0]
            best, second = [*found, None, None][:2]
            difference = self.compare(best, second, name) if second else None
            methods = [*found, baseline] if baseline else found
            rows.append(
                {
                    **cell,
                    "winner": best,
                    "second": second,
                    "baseline": baseline,
                    "order": self.orders.get(best),
                    "difference": difference,
                    "significant": bool(difference and difference["significant"]),
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
