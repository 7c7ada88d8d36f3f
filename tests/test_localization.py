"""Step localisation: dynamic programs against brute force, metrics against worked cases."""

import itertools
import json

import numpy as np
import pytest
import torch

from mcn_ext.data.store import StoreError
from mcn_ext.evaluation.localization import (
    align,
    assign,
    expected_hits,
    hits,
    inside,
    load_steps,
    localize,
    overlaps,
    right_seconds,
    spread_evenly,
    standardize,
)

# ----------------------------------------------------------------------------------- brute force


def all_alignments(n_seconds, n_steps, first=0, step=0):
    """Every list of (start, end) of the steps' runs, in order, without overlap."""
    if step == n_steps:
        yield ()
        return
    for start in range(first, n_seconds):
        for end in range(start + 1, n_seconds + 1):
            for rest in all_alignments(n_seconds, n_steps, end, step + 1):
                yield ((start, end), *rest)


def small_scores(rng, n_seconds, n_steps):
    """Eighths: sums are exact, and ties are many."""
    return rng.integers(-12, 13, (n_seconds, n_steps)) / 8 * rng.integers(0, 2)


def test_assign_against_all_assignments():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n_steps = int(rng.integers(1, 5))
        n_seconds = int(rng.integers(n_steps, 9))
        scores = small_scores(rng, n_seconds, n_steps)
        every = np.array(list(itertools.combinations(range(n_seconds), n_steps)))
        sums = scores[every, np.arange(n_steps)].sum(axis=1)
        best = every[sums == sums.max()]
        # The earliest second of each step among the best assignments is a best assignment, too.
        assert assign(scores) == best.min(axis=0).tolist()
        assert best.min(axis=0).tolist() in best.tolist()
    assert assign(np.full((5, 3), 0.1)) == [0, 1, 2]  # ties: early
    assert assign(np.zeros((4, 0))) == []


def test_align_against_all_alignments():
    rng = np.random.default_rng(1)
    every = {
        shape: list(all_alignments(*shape))
        for shape in itertools.product(range(1, 7), range(1, 4))
        if shape[0] >= shape[1]
    }
    for _ in range(300):
        shape = list(every)[int(rng.integers(len(every)))]
        scores = small_scores(rng, *shape)
        level = rng.integers(-4, 5) / 4
        gain = scores - level
        sums = np.array(
            [sum(gain[s:e, k].sum() for k, (s, e) in enumerate(runs)) for runs in every[shape]]
        )
        best = np.array(every[shape])[sums == sums.max()].min(axis=0)
        wanted = np.full(shape[0], -1)
        for k, (start, end) in enumerate(best):
            wanted[start:end] = k
        assert align(scores, level).tolist() == wanted.tolist()
    assert align(np.zeros((5, 2)), 0.0).tolist() == [0, 1, -1, -1, -1]  # ties: early and short


def test_standardized_scores_do_not_depend_on_scale_and_constants_are_zero():
    scores = np.random.default_rng(3).normal(size=(50, 3))
    z = standardize(scores)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(z.std(axis=0), 1)
    np.testing.assert_allclose(standardize(7 * scores - 3), z)
    assert (standardize(np.full((50, 2), 0.1)) == 0).all()
    assert align(standardize(np.full((5, 2), 0.1)), 1.0).tolist() == [0, 1, -1, -1, -1]


# ---------------------------------------------------------------------------------- worked cases

# A video of 10 s with four steps; step 3 is not annotated, step 0 twice, the second time while
# step 1 goes on.
#   second       0  1  2  3  4  5  6  7  8  9
#   annotated    0  0  -  1  1 01  0  -  2  2
#   labels       0  0  0  1  1  -  -  2  2  3
SEGMENTS = [[0, 0, 2], [1, 3, 6], [0, 5, 7], [2, 8, 10]]
LABELS = np.array([0, 0, 0, 1, 1, -1, -1, 2, 2, 3])


def test_a_worked_video():
    truth = inside(10, 4, SEGMENTS)
    # Step 0: both {0, 1}, labelled {0, 1, 2}, annotated {0, 1, 5, 6}: 2 of 5, 2 of 3.
    # Step 1: both {3, 4}, labelled {3, 4}, annotated {3, 4, 5}: 2 of 3, 2 of 2.
    # Step 2: both {8}, labelled {7, 8}, annotated {8, 9}: 1 of 3, 1 of 2.
    iou, iod = overlaps(LABELS, truth)
    np.testing.assert_allclose(iou, [2 / 5, 2 / 3, 1 / 3])
    np.testing.assert_allclose(iod, [2 / 3, 1, 1 / 2])
    # Right: 0, 1, 3, 4, 8. Second 2 and 7 are background, 5 and 6 are not, 9 is step 2's.
    assert np.flatnonzero(right_seconds(LABELS, truth)).tolist() == [0, 1, 3, 4, 8]
    # Where steps overlap either is right; background is where nothing is annotated.
    assert right_seconds(np.array([-1] * 10), truth).tolist() == [t in (2, 7) for t in range(10)]
    for k in (0, 1):
        assert right_seconds(np.where(np.arange(10) == 5, k, LABELS), truth)[5]
    # Steps in seconds 1, 2, 8, 9: step 1 is not at second 2, step 3 is nowhere.
    assert hits(np.array([1, 2, 8, 9]), truth).tolist() == [True, False, True, False]
    # A step that has no label: nothing detected.
    iou, iod = overlaps(np.where(LABELS == 1, -1, LABELS), truth)
    assert iou[1] == iod[1] == 0


def test_chance_is_exact():
    rng = np.random.default_rng(4)
    for n_seconds, n_steps in ((1, 1), (5, 2), (7, 4), (6, 6)):
        truth = rng.random((n_seconds, n_steps)) < 0.4
        every = np.array(list(itertools.combinations(range(n_seconds), n_steps)))
        mean = np.mean([hits(seconds, truth) for seconds in every], axis=0)
        np.testing.assert_allclose(expected_hits(truth), mean, atol=1e-12)
    np.testing.assert_allclose(expected_hits(np.ones((5000, 12), bool)), 1)
    assert expected_hits(np.ones((2, 3), bool)).tolist() == [0, 0, 0]
    assert spread_evenly(10, 4).tolist() == [1, 3, 6, 8]
    assert spread_evenly(3, 3).tolist() == [0, 1, 2]


# --------------------------------------------------------------------------------------- a set


def example(protocol="crosstask"):
    """Two tasks; "gone" has no scores, "short" fewer seconds than steps, "bare" no annotation."""
    return {
        "protocol": protocol,
        "source": "test",
        "videos": {
            "worked": {"task": "a", "seconds": 10, "steps": list("wxyz"), "segments": SEGMENTS},
            "gone": {"task": "a", "seconds": 4, "steps": list("wxyz"), "segments": [[0, 0, 1]]},
            "short": {"task": "b", "seconds": 1, "steps": ["p", "q"], "segments": [[1, 0, 1]]},
            "found": {
                "task": "b",
                "seconds": 3,
                "steps": ["p", "q"],
                "segments": [[0, 0, 1], [1, 1, 3]],
            },
            "bare": {"task": "b", "seconds": 2, "steps": ["p", "q"], "segments": []},
        },
    }


def scores_of(name, n_seconds, steps):
    """Those of "worked" are the worked labels, the others of step 0 first, then of the last."""
    if name == "gone":
        return None
    labels = torch.tensor(LABELS) if name == "worked" else (torch.arange(n_seconds) > 0).long()
    of_step = torch.nn.functional.one_hot(labels + 1, len(steps) + 1)[:, 1:]
    return of_step.float(), torch.ones(len(steps), dtype=torch.bool)


def test_a_worked_set():
    result = localize(example(), scores_of)
    assert [result[k] for k in ("videos", "missing", "too_short", "tasks")] == [5, 1, 1, 2]
    # Annotated steps: 3 + 1 of task a, 1 + 2 of task b. One second a step, the earliest best:
    # "worked" 0, 3, 7, 9: steps 0 and 1 hit, step 2 is at 8 and 9, step 3 nowhere; "found" both.
    assert result["steps"] == 7
    assert result["recall_per_task"] == {"a": 50.0, "b": 66.667}  # 2 of 4, 2 of 3
    assert result["recall"] == 58.333
    # Of videos: a (2 / 3 + 0) / 2, b (0 + 1) / 2.
    assert result["recall_by_video"] == pytest.approx(100 * (1 / 3 + 1 / 2) / 2, abs=1e-3)
    # "worked" is labelled as above: step 3, at 1 of 10 seconds, is 3 standard deviations up there,
    # step 0, at 3 of 10, still 1.5. "found" is right: its last step, at 2 of 3, is 0.7 there.
    # "gone" and "short" are 0; "bare" has no step to count.
    iou, iod = (2 / 5 + 2 / 3 + 1 / 3) / 3, (2 / 3 + 1 + 1 / 2) / 3
    assert result["IoU"] == pytest.approx(100 * (iou + 0 + 0 + 1) / 4, abs=1e-3)
    assert result["IoD"] == pytest.approx(100 * (iod + 0 + 0 + 1) / 4, abs=1e-3)
    # Seconds: 5 of 10, none, none, 3 of 3; "bare" has two steps in its two seconds: none of 2.
    assert result["frame_accuracy"] == pytest.approx(100 * (0.5 + 0 + 0 + 1 + 0) / 5, abs=1e-3)
    # Annotated seconds: 5 of 8, none, none, 3 of 3.
    assert result["frame_accuracy_steps"] == pytest.approx(100 * (5 / 8 + 1) / 4, abs=1e-3)
    # Evenly: "worked" 1, 3, 6, 8: two; "gone" 0 to 3: one; "found" 0, 2: both, of 3 in b.
    assert result["evenly"] == pytest.approx(100 * (3 / 4 + 2 / 3) / 2, abs=1e-3)
    assert result["recall_ci95"][0] <= result["recall"] <= result["recall_ci95"][1]
    pooled = localize(example("miningyoutube"), scores_of)
    assert pooled["recall_per_task"] == {"all": 57.143} and pooled["recall"] == 57.143  # 4 of 7
    assert json.loads(json.dumps(result)) == result  # plain numbers


def test_background_above_a_steps_scores_leaves_it_one_second():
    only = example() | {"videos": {"found": example()["videos"]["found"]}}
    assert localize(only, scores_of)["IoU"] == 100.0
    # The last step stands 0.7 standard deviations out, below 1: one of its two seconds is left.
    assert localize(only, scores_of, background=1.0)["IoU"] == 75.0


def test_broken_scores_name_the_video():
    with pytest.raises(FloatingPointError, match="video worked: 40 of 40 similarities"):
        localize(
            example(), lambda name, *of: (scores_of("worked", *of)[0] * torch.nan, torch.ones(4))
        )
    with pytest.raises(ValueError, match="no step of any video is annotated"):
        localize(example() | {"videos": {"bare": example()["videos"]["bare"]}}, scores_of)


def test_steps_files_are_checked(tmp_path):
    path = tmp_path / "x.h5.steps.json"
    with pytest.raises(StoreError, match="x.h5.steps.json: not the steps .*No such file"):
        load_steps(tmp_path / "x.h5")
    path.write_text(json.dumps(example()))
    assert load_steps(tmp_path / "x.h5") == example()
    for change in (
        {"protocol": "other"},
        {"videos": {}},
        {"videos": []},
        {"videos": {"v": {"task": "a", "seconds": 3, "steps": ["x"], "segments": [[0, 2, 4]]}}},
        {"videos": {"v": {"task": "a", "seconds": 3, "steps": ["x"], "segments": [[1, 0, 1]]}}},
        {"videos": {"v": {"task": "a", "seconds": 3, "steps": ["x"], "segments": [[0, 2]]}}},
    ):
        path.write_text(json.dumps(example() | change))
        with pytest.raises(StoreError, match="x.h5.steps.json: not the steps of a store"):
            load_steps(tmp_path / "x.h5")
