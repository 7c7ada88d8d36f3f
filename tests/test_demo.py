"""The demo data: what they hold, that they stay as they are, and the dials of noise."""

import os
import subprocess
import sys
from functools import partial

import h5py
import numpy as np
import pytest

from mcn_ext.data.store import Store, StoreError, validate
from mcn_ext.prepare import demo
from mcn_ext.prepare.__main__ import main as prepare
from tests.conftest import ROOT, run


@pytest.mark.slow
def test_demo_is_what_it_says(tmp_path):
    demo.prepare(tmp_path, videos=40)
    train, evaluation = Store(tmp_path / "train.h5"), Store(tmp_path / "eval.h5")
    validate(tmp_path / "train.h5")
    known = set(demo.CONCEPTS) | set(demo.FILLER)
    assert any(set(text.split()) - known for text in train.texts()), "some words have no vector"
    clips = [train.clips(i, "mel", *train.caption_times(i)[1:]) for i in range(len(train))]
    silent = [np.ptp(clip.astype(float)) == 0 for several in clips for clip in several]
    assert 0.01 < np.mean(silent) < 0.15
    concepts = [frozenset(t.split()) & set(demo.CONCEPTS) for t in evaluation.texts()]
    assert len(set(concepts)) == len(concepts) >= 300, "every evaluation caption asks for one clip"


def test_two_runs_that_need_the_demo_data_make_them_once(tmp_path):
    code = "from pathlib import Path; from mcn_ext.prepare import demo; demo.N_EVAL = 8; "
    code += "print(demo.prepare(Path('demo'), videos=3))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = partial(subprocess.Popen, [sys.executable, "-c", code], cwd=tmp_path, env=environment)
    both = [start(stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and said[0] == said[1]
    assert validate(tmp_path / "demo/train.h5")["videos"] == 3


@pytest.fixture
def demo_of(tmp_path, monkeypatch):
    """Two videos and 8 clips with dials -> {(store, dataset): (crc32, values)}."""
    monkeypatch.setattr(demo, "N_EVAL", 8)

    def make(**dials):
        out, content = tmp_path / str(dials), {}
        demo.prepare(out, videos=2, **dials)
        for store in ("train", "eval"):
            with h5py.File(out / f"{store}.h5") as file:
                for name in ("2d/data", "3d/data", "mel/data", "caption/end", "caption/text"):
                    content[store, name] = int(file[name].attrs["crc32"]), file[name][:]
        return content

    return make


def test_demo_data_stay_as_they_were(demo_of):
    """The README's figures are of these. A NumPy with other random streams would change them."""
    assert [crc for crc, _ in demo_of().values()] == [
        1424648413,
        3790344051,
        3940325181,
        3563005773,
        2317921987,
        4216847680,
        3850608509,
        60495058,
        827987887,
        2634091655,
    ]


@pytest.mark.parametrize(
    "dial,own",
    [
        ("video_noise", ("2d/data", "3d/data")),
        pytest.param("audio_noise", ("mel/data",), marks=pytest.mark.slow),
    ],
)
def test_a_dial_of_noise_changes_its_own_streams_alone(demo_of, dial, own):
    clean, *noisy = [demo_of(**{dial: level}) for level in (0, 1, 3, 1000)]
    for key, (_, wanted) in clean.items():
        values = [content[key][1] for content in noisy]
        if key[1] in own:
            distance = [
                1 - np.corrcoef(wanted.ravel().astype(float), v.ravel().astype(float))[0, 1]
                for v in values
            ]
            assert np.isfinite(distance).all() and (np.diff([0, *distance]) > 0).all(), key
        else:
            assert all(np.array_equal(wanted, v) for v in values), key


def test_a_shift_moves_neighbours_in_one_modality(demo_of):
    plain, shifted = demo_of(shift=0), demo_of(shift=1)
    assert all(crc == plain[key][0] for key, (crc, _) in demo_of().items()), "0 is the default"
    for key, (_, before) in plain.items():
        after, rows = shifted[key][1], before.ndim == 2
        moved = key[0] == "train" and rows
        assert np.array_equal(before, after) != moved, key
        if rows:  # the same rows in another order
            assert sorted(map(bytes, before)) == sorted(map(bytes, after))


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 1])
def test_the_share_of_clips_is_shifted(share):
    rng, places = np.random.default_rng(0), {"video": 0, "audio": 0}
    lengths = rng.integers(1, 15, 2000)
    for n in lengths:
        order = demo.shifted_order(n, share, rng)
        changed = {name: np.flatnonzero(o != np.arange(n)) for name, o in order.items()}
        assert not set(changed["video"]) & set(changed["audio"]), "in one modality"
        for name, o in order.items():
            assert np.array_equal(o[o], np.arange(n)) and (abs(o - np.arange(n)) <= 1).all()
            places[name] += len(changed[name])
        if share == 1:  # all but an odd one
            assert sum(map(len, changed.values())) == n // 2 * 2
    possible = (lengths // 2 * 2 if share == 1 else lengths * (lengths > 1)).sum()
    assert sum(places.values()) == pytest.approx(share * possible, rel=0.05)
    assert places["video"] == pytest.approx(places["audio"], rel=0.1)


@pytest.mark.slow
def test_other_dials_are_not_taken_for_these(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "N_EVAL", 5)
    words = ["demo", "--out", str(tmp_path), "--videos", "2"]
    assert prepare([*words, "--video-noise", "2"]) == 0
    noisy = Store(tmp_path / "eval.h5").source
    assert noisy == "demo data (made up; --video_noise 2.0 --videos 2)"
    with h5py.File(tmp_path / "train.h5") as file:
        assert file["mel"].attrs["tool"] == (
            "mcn_ext.prepare demo --seed 0 --video_noise 2.0 --audio_noise 1.0 --videos 2 "
            "--shift 0.0"
        )
    assert prepare([*words, "--video_noise", "2"]) == 0, "the same again"
    capsys.readouterr()
    (tmp_path / "train.h5").unlink()  # as an interrupted run leaves it
    assert prepare(words) == 1 and Store(tmp_path / "eval.h5").source == noisy
    said = capsys.readouterr().err
    assert all(word in said for word in ("eval.h5", noisy, "--video_noise 1.0", "--overwrite"))
    assert prepare([*words, "--overwrite"]) == 0 and "--video_noise" not in capsys.readouterr().out
    with pytest.raises(StoreError, match="--audio_noise inf must be 0 to 1000"):
        demo.prepare(tmp_path, audio_noise=float("inf"))
    with pytest.raises(StoreError, match="--shift 1.5 must be 0 to 1"):
        demo.prepare(tmp_path, shift=1.5)


def test_a_stores_captions_are_shifted_the_same_way(tmp_path, store_path):
    """benchmarks/shift.py: at share 1 each clip shows, or sounds like, its neighbour."""
    out = tmp_path / "shifted.h5"
    run(ROOT / "benchmarks/shift.py", store_path, out, "--share 1 --seed 3", cwd=tmp_path)
    validate(out)
    before, after = Store(store_path), Store(out)
    changed = {"video": 0, "audio": 0}
    for video in range(len(before)):
        _, start, end = before.caption_times(video)
        order = demo.shifted_order(6, 1, np.random.default_rng((3, 4, video)))
        assert after.caption_texts(video) == before.caption_texts(video)
        assert np.array_equal(after.caption_times(video)[1:], (start, end))
        for stream, modality in before.modalities.items():
            had, has = (store.clips(video, stream, start, end) for store in (before, after))
            # Not the last two: the last segment is shorter, as it ends with its caption.
            for rows, of in zip(has[:4], order[modality], strict=False):
                n = min(len(rows), len(had[of]))
                assert np.array_equal(rows[:n], had[of][:n])
            changed[modality] += sum(order[modality] != np.arange(6))
    assert min(changed.values()) > 10
