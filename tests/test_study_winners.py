"""Which order of a study wins, and whether it is real: bootstrap, one seed, baselines, a grid."""

import numpy as np
import pytest

from mcn_ext.evaluation.metrics import paired_bootstrap, recall_interval
from mcn_ext.study import grid as study_grid
from mcn_ext.study import report as study_report
from mcn_ext.study.runs import MAIN, Study
from tests.test_study_report import METHODS, Checker, write_study

pytestmark = pytest.mark.slow  # studies are made, and thousands of resamples drawn


# ------------------------------------------------------------------------------ the bootstrap
def test_paired_bootstrap_of_the_same_ranks_is_exactly_zero():
    rank = np.random.default_rng(0).integers(1, 40, (3, 50)).astype(float)
    assert paired_bootstrap(rank, rank.copy()) == {
        "difference": 0.0,
        "ci95": (0.0, 0.0),
        "real": False,
    }


def test_paired_bootstrap_by_hand():
    # One seed, n queries, of which a has one more hit: D* = 100 Binomial(n, 1/n) / n.
    a, b = np.full((1, 4), 11.0), np.full((1, 4), 11.0)
    a[0, 2] = 10.0
    got = paired_bootstrap(a, b)
    assert got["difference"] == 25.0 and not got["real"]
    half = 1.96 * 100 * (0.25 * 0.75 / 4) ** 0.5
    assert got["ci95"] == pytest.approx((25 - half, 25 + half), abs=2.5)
    sure = paired_bootstrap(np.full((2, 9), 1.0), np.full((2, 9), 50.0))
    assert sure == {"difference": 100.0, "ci95": (100.0, 100.0), "real": True}
    # k counts; half ranks (ties) and NaN do as they say.
    assert paired_bootstrap(np.array([[10.5, np.nan]]), np.array([[50.0, 50.0]]))["real"] is False
    assert paired_bootstrap(np.full((1, 9), 5.0), np.full((1, 9), 6.0), k=5)["difference"] == 100


def test_seeds_count_as_much_as_queries():
    # Two seeds that are 100 and 0: sd of the mean is 100 / 2, whatever the number of queries.
    a, b = np.array([[1.0] * 200, [50.0] * 200]), np.full((2, 200), 50.0)
    got = paired_bootstrap(a, b)
    assert got["difference"] == 50.0 and not got["real"]
    # One degree of freedom: 50 -+ 12.706 x 50, but for the draws' own chance.
    assert got["ci95"] == pytest.approx((50 - 635.3, 50 + 635.3), rel=0.15)
    assert paired_bootstrap(a[:1], b[:1])["real"]


@pytest.mark.parametrize("n_seeds", [2, 3])
def test_no_difference_is_seldom_real_where_seeds_are_all_that_varies(n_seeds):
    rng, real = np.random.default_rng(2), 0
    for _ in range(200):
        # Seeds differ by 10 points; 2000 queries leave nothing else to chance.
        hit = rng.random((2, n_seeds, 2000)) < 0.5 + rng.normal(0, 0.1, (2, n_seeds, 1))
        real += paired_bootstrap(*np.where(hit, 1.0, 99.0), resamples=100)["real"]
    assert 1 <= real <= 20  # 5 % of 200 are 10


def test_intervals_cover_the_truth():
    rng, covered, one = np.random.default_rng(1), 0, 0
    for _ in range(100):
        # a is right in 60 %, b in 50 % of cases; seeds differ by 3 points, queries in hardness.
        hard, seed = rng.normal(0, 0.15, 200), rng.normal(0, 0.03, (2, 3, 1))
        hit = rng.random((2, 3, 200)) < np.array([0.6, 0.5])[:, None, None] + hard + seed
        a, b = np.where(hit, 1.0, 99.0)
        low, high = paired_bootstrap(a, b, resamples=300)["ci95"]
        covered += low <= 10 <= high
        low, high = recall_interval(a, resamples=300)
        one += low <= 60 <= high
    assert 91 <= covered <= 100 and 91 <= one <= 100
    with pytest.raises(ValueError, match="the same of both"):
        paired_bootstrap(a, b[:, :5])


# -------------------------------------------------------------------------------- the report
def test_one_seed_and_no_winner(tmp_path, no_pictures):
    root = write_study(
        tmp_path, methods=["AV_T", "VT_A"], seeds=(3,), n=60, quality=lambda cell, method: 1.0
    )
    text = study_report.write(root).with_name("report.md").read_text()
    answer, points = text.split("\n\n")[1:3]
    assert "is ahead, but which order is best is not decided" in answer and "±" not in answer
    assert "not decided, as 0 is inside" in points and "One seed: the intervals" in points
    assert "The one-stage baseline has not been evaluated" in points
    assert "one seed, so no standard deviation" in text


def test_each_order_meets_the_baseline_of_its_own_compute_and_fusions_their_sum(
    tmp_path, no_pictures
):
    root = write_study(
        tmp_path, methods=["AV_T", "AV_T-finetune", "AVT-30", "AVT-23"], seeds=(0,), n=60
    )
    study, text = Study(root), study_report.write(root).with_name("report.md").read_text()
    table = text.split("## Two stages against one of equal compute")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| AV then T")]
    assert len(rows) == 1 and "AV then T, frozen" in rows[0] and METHODS["AVT-23"][0] in rows[0]
    gap = study.mean("AV_T") - study.mean("AVT-23")
    assert f"{gap:+.1f}<br>" in rows[0]
    table = text.split("## How to search video and audio together")[1].split("##")[0]
    row = next(line for line in table.splitlines() if line.startswith("| AV then T, frozen"))
    gain = study.mean("AV_T", direction=f"{MAIN} (bank)") - study.mean("AV_T")
    assert gain > 1 and f"{gain:+.1f}<br>" in row
    assert "(bank)" not in text.split("## All directions")[1].split("##")[0]


def test_a_baseline_above_all_and_of_the_winners_compute(tmp_path, no_pictures):
    root = write_study(
        tmp_path,
        methods=["AV_T", "VT_A", "AVT-30", "AVT-23"],
        seeds=(0,),
        n=60,
        quality=lambda cell, m: {"AV_T": 0.5, "VT_A": 0.9}.get(m, 3.0),
    )
    text = study_report.write(root).with_name("report.md").read_text()
    answer, points = text.split("\n\n")[1:3]
    assert "points below one stage of equal steps (one stage, equal steps)" in points
    assert "equal compute" not in points  # AVT-23 is the baseline of AV_T and AT_V
    top = max(Study(root).baselines(), key=Study(root).mean)
    assert f"But one stage finds more: {Study(root).mean(top):.1f} % ({METHODS[top][0]})" in answer


# ---------------------------------------------------------------------------------- the grid
@pytest.mark.slow
def test_grid_winners(tmp_path):
    cells = [
        {
            "name": f"v{v}-a{a}",
            "data": f"{v}{a}.h5",
            "youcook2": "eval.h5",
            "video_noise": v,
            "audio_noise": a,
        }
        for v in (None, 1.0)
        for a in (0.0, 2.0)
    ]
    signal = {("AV_T", None, 0.0): 3.0, ("VT_A", None, 2.0): 3.0, ("AV_T", 1.0, 0.0): 3.0}
    root = write_study(
        tmp_path,
        cells=cells,
        methods=["AV_T", "VT_A", "AVT-30"],
        seeds=(0,),
        n=60,
        quality=lambda cell, m: signal.get((m, cell["video_noise"], cell["audio_noise"]), 0.7),
    )
    for run in root.glob("v1.0-a2.0/*/*/metrics.json"):
        run.unlink()
    page = study_report.write(root).read_text()
    study = Study(root)
    rows = {row["cell"]["name"]: row for row in study_grid.winners(study)}
    assert [rows[n]["winner"] for n in ("vNone-a0.0", "vNone-a2.0", "v1.0-a0.0", "v1.0-a2.0")] == [
        "AV_T",
        "VT_A",
        "AV_T",
        None,
    ]
    assert all(row["compare"]["real"] for row in rows.values() if row["winner"])
    assert study_grid.levels(study, "video_noise") == [None, 1.0]
    assert (
        "Of 3 grades of noise, AV_T is best in 2 (2 of them beyond chance), VT_A is best in 1 "
        "(1 of them beyond chance)"
    ) in page
    assert Checker(page).wrong == [] and Checker(page).images == 3
    assert sorted(p.stem for p in (root / "pictures").iterdir()) == ["noise", "orders", "winners"]


def test_one_grade_of_noise_is_a_plain_study(tmp_path):
    cell = {
        "name": "v2-a2",
        "data": "train.h5",
        "youcook2": "eval.h5",
        "video_noise": 2.0,
        "audio_noise": 2.0,
    }
    root = write_study(tmp_path, cells=[cell], methods=["AV_T", "VT_A"], seeds=(0,), n=60)
    study = Study(root)
    assert not study.grid and len(study.by_order()) == 2 and study.compare("AV_T", "VT_A")
