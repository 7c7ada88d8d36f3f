"""The report of a made-up study, whole or with gaps; what is significant."""

import csv
import json
import re
from itertools import combinations, permutations, product

import numpy as np
import pytest

from mcn_ext import report as report_command
from mcn_ext.evaluation.metrics import summarize
from mcn_ext.modalities import MODALITIES
from mcn_ext.study import report, tables
from mcn_ext.study.bootstrap import compare_family, paired_bootstrap, recall_interval
from mcn_ext.study.predict import predictions, predictive_power
from mcn_ext.study.statistics import MAIN, Study, StudyError

pytestmark = pytest.mark.slow
EVIL = "<script>alert('x')</script> | fry & *boil*"
METHODS = {  # label, quality
    "AV_T": ("AV then T, frozen", 1.2),
    "AV_T-finetune": ("AV then T, finetuned", 1.25),
    "VT_A": ("VT then A, frozen", 0.9),
    "AVT-30": ("one stage, equal steps", 1.0),
    "AVT-23": ("one stage, equal compute", 0.95),
}


# ------------------------------------------------------------------------- a study, made up
def write_run(folder, letters, quality, n, seed, steps, lr=0.002):
    """A run folder as training and evaluation leave it; more ``quality``: ranks nearer 1."""
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(seed), [MODALITIES[letter].name for letter in letters]
    args = dict(batch_size=16, n_pair=8, cluster_size=64, lr=lr, seed=seed, data="x.h5", epochs=3)
    args["temperature"] = 0.1
    (folder / "args.json").write_text(json.dumps(args))
    row = dict(total=8.0, contrastive=7.0, clips_per_s=640.0, live_clusters=60, largest_share=0.05)
    row |= {f"rank_{name}": 20.0 for name in names}
    if len(names) == 3:
        row["gradient_text"] = -0.25
    row |= {f"contrastive_{a}_{b}": 4.0 + seed for a, b in combinations(sorted(names), 2)}
    rows = [{"step": step, **row} for step in range(10, steps + 1, 10)]
    rows.insert(1, {"step": 11, "skipped": "the loss is not finite"})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    directions = [f"{a}->{b}" for a, b in permutations(names, 2)] + [MAIN] * (len(names) == 3)
    found = {name: np.ceil(n * rng.random(n) ** (3 * quality)).astype(int) for name in directions}
    if MAIN in found:  # a made-up gain
        found[f"{MAIN} (bank)"] = np.maximum(1, found[MAIN] - 10)
    measured = {name: summarize(rank, resamples=20) for name, rank in found.items()}
    metrics = {"youcook2": {"n": n, "data": "eval.h5", **measured}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    np.savez(folder / "youcook2.npz", **{f"rank:{name}": rank for name, rank in found.items()})


def write_study(root, cells=({"name": ""},), methods=METHODS, seeds=(0, 1), n=80, quality=None):
    """A study folder; ``quality(cell, method)`` overrides METHODS'."""
    runs, orders = [], [method for method in methods if "_" in method]
    for cell, seed, (number, method) in product(cells, seeds, enumerate(methods)):
        where = f"{cell['name'] or 'runs'}/seed{seed}"
        (label, good), order = METHODS[method], method.split("-")[0]
        entry = {"cell": cell["name"], "method": method, "order": order, "label": label}
        entry |= {"seed": seed, "run": f"{where}/{method}", "flops": 1.5e12}
        if method in orders:
            entry |= {"epochs": [20, 10], "stage1": f"{where}/stage1-{order[:2]}"}
            if not (root / entry["stage1"]).exists():
                write_run(root / entry["stage1"], order[:2], 0.8, n, seed, 80)
        elif "30" in method:
            entry |= {"epochs": [30], "steps_of": orders}
        else:
            entry |= {"epochs": [30], "baseline_of": ["AV_T"]}
        good = quality(cell, method) if quality else good
        lr = 0.001 if method == "AVT-23" else 0.002
        write_run(root / entry["run"], "VAT", good, n, 9 * seed + number, 40, lr)
        runs.append(entry)
    spec = {"format": "mcn-study", "version": 1, "cells": list(cells), "runs": runs}
    (root / "study.json").write_text(json.dumps(spec))
    return root


def markdown(root):
    return report.write(root).with_name("report.md").read_text()


def section(text, heading):
    return text.split(f"## {heading}")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    root = write_study(tmp_path_factory.mktemp("study"))
    report.write(root)
    return root


def foreign(html):
    """What in a page runs, or is loaded from elsewhere."""
    return re.findall(r"<script|<[^>]*\son\w+=|<[^>]*=.http", html)


# -------------------------------------------------------------------------------- the report
def test_the_answer_comes_first_and_the_tables_have_the_numbers(study_folder):
    study, text = Study(study_folder), (study_folder / "report.md").read_text()
    answer, points = text.split("\n\n")[1:3]
    assert "percent of 80 captions (chance 12.5; 2 seeds)" in answer
    by_sum, by_bank = (f for f in study.families() if f["kind"] == "frozen")
    assert (by_sum["fusion"], by_bank["fusion"]) == ("sum", "bank")
    best, last = by_sum["methods"]
    first, second = (study.labels[m].split(",")[0] for m in (best, last))
    (pair,) = by_sum["pairs"]
    lead = f"**{first} is best**, significantly above {second}"
    lead = lead if pair["significant"] else f"{first} is highest, but not significantly"
    assert f"- Frozen, by the sum: {lead} ({first} {study.mean(best):.1f} ± " in points
    assert "- Frozen, by the bank: " in points and "Finetuned" not in points  # one order alone
    low, high = pair["simultaneous"]
    row = f"| frozen | sum | {first} | {second} | {pair['difference']:+.1f}"
    assert f"{row}<br>({low:+.1f} to {high:+.1f})" in section(
        text, "Orders against each other"
    ).replace("**", "")
    assert "one stage of equal steps (one stage, equal steps)" in points
    values = study.values("AV_T", "R@5")
    row = f"| AV then T, frozen | 2 | .* | {values.mean():.1f} ± {values.std(ddof=1):.1f}"
    assert re.search(row.replace("|", r"\|"), section(text, f"Result: {MAIN}").replace("*", ""))
    equal = section(text, "Two stages against one of equal compute")
    gap = study.mean("AV_T") - study.mean("AVT-23")
    assert equal.count("| AV then T") == 1 and f"{gap:+.1f}<br>" in equal
    gain = study.mean("AV_T")
    gain = study.values("AV_T", direction=f"{MAIN} (bank)").mean() - gain
    assert f"{gain:+.1f}<br>" in section(text, "How to search video and audio together")
    # 2 seeds, 2 stages, one skipped each; 16 x 8 clips x (80 + 40 steps); 640 clips a second
    assert "| AV then T, frozen | 4 | 60 of 64 | 5.0 |" in text
    assert "| AV then T, frozen | - | - | -0.25 |" in text
    assert "| AV then T, frozen | 20 + 10 | 15,360 | 24 | 1.50e+12 |" in text
    assert re.search(
        r"`lr` \| `0.002` \| all others \|\n\|  \| `0.001` \| one stage, equal c", text
    )
    low, high = study.compare("AV_T-finetune", "AV_T")["ci95"]
    kinds = section(text, "One order, other kinds of stage 2")
    assert kinds.count("| AV then T, finetuned |") == 1 and f"({low:+.1f} to {high:+.1f})" in kinds
    assert "Nothing: every run of the study was trained" in text


def test_tables_for_a_thesis(study_folder):
    folder, study = study_folder / "figures", Study(study_folder)
    with open(folder / "result-text-video-audio.csv", newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    assert header == ["method", "seeds", "R@1", "R@5", "R@10", "MedR"]
    assert rows[0][:2] == ["AV then T, frozen", "2"] and rows[0][4].startswith(
        f"{study.mean('AV_T'):.1f} ± "
    )
    text = (folder / "what-is-equal-what-is-not.tex").read_text()
    assert text.startswith("\\begin{tabular}{lrr}\n\\toprule\ndiffers & value & in \\\\")
    assert "\nlr & 0.002 & all others \\\\\n" in text and text.endswith("\\end{tabular}\n")
    text = (folder / "one-order-other-kinds-of-stage-2.tex").read_text()
    assert re.search(r"& (\\textbf\{)?(\+|\$-\$)\d+\.\d \((\+|\$-\$)\d+\.\d to ", text)
    first = "## A b?\n| a | b |\n|---|---:|\n| x\\|y | **1 ± 2** |\n"
    rows = tables.tables(first + "\n| c |\n|---|\n| `d_e` |")
    assert rows["a-b"][1] == [("x|y", False), ("1 ± 2", True)] and rows["a-b-2"][1] == [
        ("d_e", False)
    ]
    assert tables.latex(rows["a-b"]).splitlines()[4] == r"x|y & \textbf{1 $\pm$ 2} \\"


def test_html_stands_alone_and_is_escaped(study_folder, monkeypatch, no_pictures):
    text = (study_folder / "report.html").read_text()
    for kind in ("png", "pdf"):
        pictures = sorted(path.stem for path in (study_folder / "figures").glob(f"*.{kind}"))
        assert pictures == ["differences", "losses", "recall"]
    assert not foreign(text) and text.count("<img") == len(pictures)
    spec = json.loads((study_folder / "study.json").read_text())
    for entry in spec["runs"]:
        entry["label"] = EVIL if entry["method"] == "VT_A" else entry["label"]
    (study_folder / "study.json").write_text(json.dumps(spec))
    text = report.write(study_folder).read_text()
    assert not foreign(text) and "<img" not in text and "&lt;script&gt;alert(&#39;x&#39;)" in text
    text = (study_folder / "report.md").read_text()
    assert "<script" not in text and r"\| fry &amp; \*boil\*" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):  # no cell broke its row
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_losses_by_pair(study_folder):
    (run,) = [r for r in Study(study_folder).runs if (r.method, r.seed) == ("AV_T", 0)]
    clips = 16 * 8
    first = [(clips * step, 4.0) for step in range(10, 81, 10)]
    second = [(clips * (80 + step), 4.0 + 0) for step in range(10, 41, 10)]
    assert run.losses(("video", "audio")) == [first, second]
    assert run.losses(("text", "video")) == [[], second]


def test_forgetting(study_folder):
    study = Study(study_folder)
    rows = {(r["method"], r["direction"]): r for r in study.forgetting()}
    assert len(rows) == 6
    row = rows["VT_A", "text->video"]
    before, after = (
        np.mean([100 * (run.stages[i].ranks["text->video"] <= 10) for run in study.of("VT_A")])
        for i in (0, 1)
    )
    assert (row["before"], row["after"]) == pytest.approx((before, after), abs=1e-3)
    assert row["change"]["difference"] == pytest.approx(after - before, abs=1e-3)


def test_incomplete_and_broken_studies(tmp_path, no_pictures):
    root = write_study(tmp_path, methods=["AV_T", "VT_A", "AVT-30"], n=30)
    (root / "runs/seed1/VT_A/metrics.json").unlink()
    (root / "runs/seed0/AVT-30/log.jsonl").write_text(
        '{"step": 10, "total": NaN, "clips_per_s": 5.0, "rank_text": 1.0}\n{"step"'
    )
    (root / "runs/seed0/stage1-AV/youcook2.npz").write_bytes(b"PK not a zip")
    (root / "runs/seed1/AVT-30/metrics.json").write_text("{")
    text = markdown(root)
    missing = section(text, "What is missing")
    assert "- VT then A, frozen, seed 1: not evaluated" in missing
    assert "- AV then T, frozen, seed 0, stage 1: no youcook2.npz" in missing
    assert missing.count("\n- ") == 3 and "not complete: **3 gaps" in text.replace("****", "**")
    assert "1 seed both have" in text  # the winner is compared on the seed VT_A has
    assert "(effective rank below 2); the last loss is not finite" in text
    for run in root.glob("runs/*/*/metrics.json"):
        run.unlink()
    assert "Nothing to compare yet" in markdown(root)
    (root / "study.json").write_text('{"format": "other"}')
    with pytest.raises(StudyError, match="not a study of format mcn-study"):
        report.write(root)


def test_report_command(study_folder, no_pictures, capsys):
    assert report_command.main([str(study_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(study_folder / "report.html")
    run = study_folder / "runs/seed0/AV_T"
    assert report_command.main([str(run)]) == 0
    html, text = ((run / f"report.{end}").read_text() for end in ("html", "md"))
    assert not foreign(html) and "text-&gt;video+audio" in html
    assert "| chance | 1.2 |" in text and "1 step skipped" in text
    with pytest.raises(SystemExit, match="--language, --media: for studies"):
        report_command.main([str(run), "--language", "ja"])


def test_one_seed_and_no_significant_winner(tmp_path, no_pictures):
    root = write_study(tmp_path, methods=["AV_T", "VT_A"], seeds=[3], quality=lambda *_: 1.0)
    answer, points = markdown(root).split("\n\n")[1:3]
    assert "is highest, but not significantly" in points and "±" not in points
    assert "One seed: the intervals" in points and "baseline has not been evaluated" in points


def test_a_baseline_above_all_orders_is_named(tmp_path, no_pictures):
    root = write_study(
        tmp_path, seeds=[0], quality=lambda cell, method: 3.0 if "AVT" in method else 0.5
    )
    assert "One stage finds more" in markdown(root).split("\n\n")[2]


def test_noise_grid(tmp_path):
    cells = [
        {"name": f"v{video}-a{audio}", "video_noise": video, "audio_noise": audio}
        for video, audio in product((0.5, 1.0), (0.0, 2.0))
    ]
    best = {"v0.5-a0.0": "AV_T", "v0.5-a2.0": "VT_A", "v1.0-a0.0": "AV_T"}

    def quality(cell, method):
        return 3.0 if best.get(cell["name"]) == method else 0.5

    methods = ["AV_T", "VT_A", "AVT-30"]
    root = write_study(tmp_path, cells, methods, seeds=[0], n=60, quality=quality)
    for run in root.glob("v1.0-a2.0/*/*/metrics.json"):
        run.unlink()
    page = report.write(root).read_text()
    assert {r["name"]: r["winner"] for r in Study(root).winners()} == best | {"v1.0-a2.0": None}
    assert "Of 3 noise settings: AV_T is best in 2 (2 of them significantly), VT_A" in page
    assert not foreign(page) and page.count("<img") == 2
    assert sorted(path.stem for path in (root / "figures").glob("*.png")) == ["noise", "winners"]


def test_what_was_predicted_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "AT_V", ("AT then V, frozen", 0.7))
    scores = {"VT": 0.9, "AT": 0.7, "AV": 0.6}
    probes = {"knn": scores, "clean": {"VT": 0.9}}  # a probe that lacks pairs predicts nothing
    cells = [
        {"name": f"v{i}", "video_noise": i, "audio_noise": 0, "probes": probes} for i in range(3)
    ]
    right = {"VT_A": 3.0, "AT_V": 0.9, "AV_T": 0.3}
    best = {"v0": right, "v1": right, "v2": {"VT_A": 0.3, "AT_V": 0.9, "AV_T": 3.0}}
    root = write_study(
        *(tmp_path, cells, ["AV_T", "VT_A", "AT_V"]),
        seeds=[0],
        quality=lambda cell, method: best[cell["name"]][method],
    )
    study = Study(root)
    rows, of = predictions(study), ("knn", "frozen, sum")
    by_sum = [row for row in rows if (row["probe"], row["family"]) == of]
    assert [r["tau"] for r in by_sum] == [1, 1, -1]
    for row in by_sum:  # where the cleaner pair's order is higher, the margin is positive
        assert [round(x, 9) for x, *_ in row["margins"]] in ([0.2, 0.3, 0.1], [0.1, 0.3, 0.2])
        assert all((y > 0) == (row["tau"] > 0) for _, y, _ in row["margins"])
        assert all(low <= y <= high for _, y, (low, high) in row["margins"])
    assert by_sum[0]["predicted"] == by_sum[0]["measured"] == ["VT_A", "AT_V", "AV_T"]
    (power,) = [p for p in predictive_power(rows) if (p["probe"], p["family"]) == of]
    assert (power["probe"], power["hits"], power["n"]) == ("knn", 2, 3)
    # Each cell by the others' sign: +1 +1 of (1 - 1 = 0, so undecided), and -1 of +2.
    assert power["tau"] == pytest.approx(1 / 3) and power["unseen"] == pytest.approx(-1 / 3)
    text = markdown(root)
    assert "| frozen, sum | 2 of 3; 0.33; -0.33 |" in text
    assert "| v0 | knn | 0.600 | 0.900 | 0.700 | VT_A, AT_V, AV_T |" in text
    assert "| v2 | frozen, sum | AV_T, AT_V, VT_A | -1.00 |" in text
    for log in root.glob("v0/seed0/stage1-*/log.jsonl"):  # VT's first epoch ends lowest
        loss = {"VT": 2.0, "AT": 4.0, "AV": 6.0}[log.parent.name[-2:]]
        log.write_text(json.dumps({"step": 8, "epoch": 1, "total": 1, "contrastive": loss}) + "\n")
    for run in root.glob("v1/seed0/stage1-*"):  # and VT's pair is found best
        metrics = json.loads((run / "metrics.json").read_text())
        for key in metrics["youcook2"]:
            if "->" in key:
                recall = {"VT": 90.0, "AT": 60.0, "AV": 30.0}[run.name[-2:]]
                metrics["youcook2"][key]["R@10"] = recall
        (run / "metrics.json").write_text(json.dumps(metrics))
    by_pair = [r for r in predictions(Study(root)) if r["probe"] == "stage1"]
    assert {(r["cell"], r["tau"]) for r in by_pair} >= {("v1", 1.0)}
    by_loss = [r for r in predictions(Study(root)) if r["probe"] == "loss"]
    # Elsewhere the logs are the same for all pairs.
    assert {(r["cell"], r["tau"]) for r in by_loss} == {("v0", 1.0), ("v1", 0.0), ("v2", 0.0)}


# ------------------------------------------------------------------------------ the bootstrap
def test_paired_bootstrap_by_hand():
    same = np.random.default_rng(0).integers(1, 40, (3, 50)).astype(float)
    nothing = {"difference": 0.0, "ci95": (0.0, 0.0), "significant": False}
    assert paired_bootstrap(same, same.copy()) == nothing
    # One seed, n queries, of which a has one more hit: 100 Binomial(n, 1/n) / n.
    a, b = np.array([[11.0, 11.0, 10.0, 11.0]]), np.full((1, 4), 11.0)
    got, half = paired_bootstrap(a, b), 1.96 * 100 * (0.25 * 0.75 / 4) ** 0.5
    assert got["difference"] == 25.0 and not got["significant"]
    assert got["ci95"] == pytest.approx((25 - half, 25 + half), abs=2.5)
    got = paired_bootstrap(np.full((2, 9), 1.0), np.full((2, 9), 50.0))
    assert got == {"difference": 100.0, "ci95": (100.0, 100.0), "significant": True}
    # Two seeds that are 100 and 0, one degree of freedom: 50 -+ 12.706 x 50.
    a, b = np.array([[1.0] * 200, [50.0] * 200]), np.full((2, 200), 50.0)
    assert paired_bootstrap(a, b)["ci95"] == pytest.approx((50 - 635.3, 50 + 635.3), rel=0.15)
    assert paired_bootstrap(a[:1], b[:1])["significant"]
    with pytest.raises(ValueError, match="the same for both"):
        paired_bootstrap(a, b[:, :5])


def test_intervals_cover_the_truth():
    rng, covered = np.random.default_rng(1), np.zeros(2)
    for _ in range(100):
        # a is right in 60 %, b in 50 % of cases; seeds differ by 3 points, queries in hardness.
        hard, seed = rng.normal(0, 0.15, 200), rng.normal(0, 0.03, (2, 3, 1))
        hit = rng.random((2, 3, 200)) < np.array([0.6, 0.5])[:, None, None] + hard + seed
        a, b = np.where(hit, 1.0, 99.0)
        intervals = [paired_bootstrap(a, b, resamples=300)["ci95"], recall_interval(a, 10, 300)]
        covered += [
            low <= truth <= high for truth, (low, high) in zip((10, 60), intervals, strict=True)
        ]
    assert (91 <= covered).all() and (covered <= 100).all()


def made_up_ranks(rng, rates, n_seeds=3, n=150, seed_deviation=0.05):
    """{method: {seed: ranks}}: hits at the given rates; queries differ in hardness, seeds, too."""
    hard = rng.normal(0, 0.15, n)
    found = {}
    for name, rate in rates.items():
        chance = rate + hard + rng.normal(0, seed_deviation, (n_seeds, 1))
        ranks = np.where(rng.random((n_seeds, n)) < chance, 1.0, 99.0)
        found[name] = dict(enumerate(ranks))
    return found


def test_all_against_all_in_one_test():
    rng = np.random.default_rng(0)
    rates = {"a": 0.8, "b": 0.78, "c": 0.3}
    family = compare_family(made_up_ranks(rng, rates, n_seeds=4))
    assert [(f["a"], f["b"]) for f in family] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [f["significant"] for f in family] == [False, True, True]
    for f in family:
        (low, high), (lower, higher) = f["ci95"], f["simultaneous"]
        assert lower < low < f["difference"] < high < higher
        # Step-down tests are never weaker than the simultaneous intervals.
        assert f["p"] < 0.05 or not f["significant"]
        assert 0 < high - f["difference"] < f["detectable"] < 100
    assert compare_family({"a": {0: np.ones(3)}}) == [] and compare_family({}) == []
    ranks = made_up_ranks(rng, {"a": 0.5})["a"]
    (same,) = compare_family({"a": ranks, "b": ranks})
    assert same["p"] == 1 and not same["significant"] and same["difference"] == 0
    missing = {"a": ranks, "b": {1: ranks[1], 7: ranks[2]}}
    assert compare_family(missing)[0]["seeds"] == [1]


def test_family_wise_error_is_at_most_five_percent():
    rng, wrong, n = np.random.default_rng(2), np.zeros(2), 200
    for _ in range(n):
        family = compare_family(made_up_ranks(rng, dict.fromkeys("abcd", 0.6)), resamples=300)
        wrong += any(f["significant"] for f in family), any(f["p"] < 0.05 for f in family)
    assert (wrong / n <= 0.08).all()  # 5 %, and two standard deviations of 200 studies
