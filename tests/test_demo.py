"""The demo data: what they hold, that they stay as they are, and the dials of noise."""

import h5py
import numpy as np
import pytest

from mcn_ext.data.store import Store, validate
from mcn_ext.prepare import demo
from mcn_ext.prepare.__main__ import main as prepare


@pytest.mark.slow
def test_demo_is_what_it_says(tmp_path):
    demo.prepare(tmp_path / "demo", videos=40)
    train, evaluation = Store(tmp_path / "demo/train.h5"), Store(tmp_path / "demo/eval.h5")
    validate(tmp_path / "demo/train.h5")
    assert len(evaluation) >= 300 and 10 / len(evaluation) <= 0.035
    known = set(demo.CONCEPTS) | set(demo.FILLER)
    words = [text.split() for text in train.texts()]
    assert any(set(w) - known for w in words), "some words have no vector"
    lengths = {
        round(float(e - s))
        for i in range(len(train))
        for s, e in zip(*train.caption_times(i)[1:], strict=True)
    }
    assert len(lengths) > 1
    silent = [
        np.ptp(c.astype(float)) == 0
        for i in range(len(train))
        for c in train.clips(i, "mel", *train.caption_times(i)[1:])
    ]
    assert 0.01 < np.mean(silent) < 0.15
    concepts = [frozenset(t.split()) & set(demo.CONCEPTS) for t in evaluation.texts()]
    assert len(set(concepts)) == len(concepts), "every evaluation caption asks for one clip"
    again = demo.prepare(tmp_path / "again", videos=40)
    assert "40 training videos" in again
    np.testing.assert_array_equal(
        Store(tmp_path / "again/train.h5").clips(3, "mel", [0], [99])[0],
        train.clips(3, "mel", [0], [99])[0],
    )


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


@pytest.mark.slow
def test_other_dials_are_not_taken_for_these(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "N_EVAL", 5)
    words = ["demo", "--out", str(tmp_path), "--videos", "2"]
    assert prepare([*words, "--video-noise", "2"]) == 0
    noisy = Store(tmp_path / "eval.h5").source
    assert noisy == "demo data (made up; --video_noise 2.0 --videos 2)"
    with h5py.File(tmp_path / "train.h5") as file:
        assert file["mel"].attrs["tool"] == (
            "mcn_ext.prepare demo --seed 0 --video_noise 2.0 --audio_noise 1.0 --videos 2"
        )
    assert prepare([*words, "--video_noise", "2"]) == 0, "the same again"
    capsys.readouterr()
    (tmp_path / "train.h5").unlink()  # as an interrupted run leaves it
    assert prepare(words) == 1 and Store(tmp_path / "eval.h5").source == noisy
    said = capsys.readouterr().err
    assert all(word in said for word in ("eval.h5", noisy, "--video_noise 1.0", "--overwrite"))
    assert prepare([*words, "--overwrite"]) == 0 and "--video_noise" not in capsys.readouterr().out
    for bad in ("-1", "nan", "x"):
        with pytest.raises(SystemExit):
            prepare([*words, "--audio_noise", bad])
    assert prepare([*words, "--audio_noise", "inf"]) == 1
    assert "--audio_noise inf must be 0 to 1000" in capsys.readouterr().err
