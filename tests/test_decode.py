"""Media files, made here, to a frame a second and log-mel spectrograms; broken ones are skipped."""

from fractions import Fraction

import numpy as np
import pytest

from mcn_ext.prepare import Skipped, logmel
from mcn_ext.prepare.decode import Seconds, decode
from tests.conftest import ROOT

av = pytest.importorskip("av")
CLIP = ROOT.parent / "shared" / "data" / "raw_video" / "v_GGSY1Qvo990.mp4"


def make_media(path, times=(), pictures=None, sound=None, sound_at=0.0, sounds=(), length=None):
    """A file whose frames are shown from ``times`` (s); each grey of 10 * its second, or given.

    sound: (n,) float32 at 16 kHz, beginning at ``sound_at`` s; sounds: more tracks. length: of the
    last frame (s).
    """
    tracks, packets, streams = [x for x in (sound, *sounds) if x is not None], [], []
    with av.open(str(path), "w", options={"write_xing": "0"}) as container:
        if len(times):
            video = container.add_stream(
                "libx264", rate=25, width=64, height=48, options={"preset": "ultrafast"}
            )
            video.codec_context.time_base = video.time_base = Fraction(1, 1000)
            streams.append(video)
        codec = {".mkv": "pcm_s16le", ".wav": "pcm_s16le", ".mp3": "libmp3lame"}
        codec = codec.get(path.suffix, "aac")
        streams += [container.add_stream(codec, rate=16_000, layout="mono") for _ in tracks]
        for i, at in enumerate(times):
            grey = np.full((48, 64, 3), 10 * int(at) + 5, np.uint8)
            picture = grey if pictures is None else pictures[i]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(1000 * at), Fraction(1, 1000)
            packets += video.encode(frame)
        for stream, samples in zip(streams[len(streams) - len(tracks) :], tracks, strict=True):
            for lo in range(0, len(samples), 1024):
                block = (samples[None, lo : lo + 1024] * 32767).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
                frame.sample_rate, frame.time_base = 16_000, Fraction(1, 16_000)
                frame.pts = round(sound_at * 16_000) + lo
                packets += stream.encode(frame)
        for stream in streams:
            packets += stream.encode(None)
        if length:
            last = max((p for p in packets if p.stream is video), key=lambda p: p.pts)
            last.duration = round(length / last.time_base)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):  # interleaved, as players
            container.mux(packet)  # expect them
    return path


def tone(seconds, hz=440.0):
    return (0.4 * np.sin(2 * np.pi * hz * np.arange(int(16_000 * seconds)) / 16_000)).astype(
        np.float32
    )


def decoded(path, **options):
    """(times of the frames, their pixels, spectrogram or None)."""
    out = {"frame": [], "mel": []}
    for kind, value in decode(str(path), **options):
        if kind == "frame":
            assert value[0] == len(out["frame"])  # every second, in order
            out["frame"].append(value[1:])
        elif kind == "mel":
            out["mel"].append(value)
    return (
        [at for at, _ in out["frame"]],
        [p for _, p in out["frame"]],
        np.concatenate(out["mel"]) if out["mel"] else None,
    )


# ---------------------------------------------------------------------------------- decoding


def test_frames_nearest_to_each_second():
    rng = np.random.default_rng(0)
    for _ in range(20):
        times = np.cumsum(rng.exponential(rng.choice([0.04, 0.5, 3.0]), 60)) + rng.uniform(0, 3)
        picker = Seconds()
        got = [s for at in times for s in picker.add(at, at)] + list(picker.end(0.04))
        assert [second for second, _, _ in got] == list(range(len(got)))
        for second, at, frame in got:
            assert at == frame and abs(at - second) == np.abs(times - second).min()
        assert len(got) == max(1, np.ceil(times[-1] + 0.04))
    with pytest.raises(Skipped, match="time stamp"):
        list(Seconds().add(1e9, None))


def test_constant_variable_and_late_time_stamps(tmp_path):
    constant = make_media(tmp_path / "a.mp4", np.arange(0, 5, 0.04))
    times, pixels, mel = decoded(constant)
    assert mel is None and np.abs(np.array(times) - np.arange(5)).max() <= 0.02
    assert [round((p.mean() - 5) / 10) for p in pixels] == [0, 1, 2, 3, 4]
    # A slide show: 0 to 2.6 s at 10 a second, then one picture each from 4.2, 4.9 and 8 s on.
    variable = make_media(tmp_path / "b.mkv", [*np.arange(0, 2.6, 0.1), 4.2, 4.9, 8.0])
    times, pixels, _ = decoded(variable)
    np.testing.assert_allclose(times, [0, 1, 2, 2.5, 4.2, 4.9, 4.9, 8, 8], atol=2e-3)
    assert [round((p.mean() - 5) / 10) for p in pixels] == [0, 1, 2, 2, 4, 4, 4, 8, 8]
    # The sound begins 1.5 s after the picture: its spectrogram does, too.
    late = make_media(tmp_path / "c.mkv", np.arange(0, 3, 0.1), sound=tone(1), sound_at=1.5)
    _, _, mel = decoded(late)
    loud = np.flatnonzero(mel.max(1) > -30)
    assert len(mel) == 251 and abs(loud[0] - 150) <= 2 and loud[-1] >= 247


def test_sound_without_video_and_video_without_sound(tmp_path):
    times, _, mel = decoded(make_media(tmp_path / "a.wav", sound=tone(2)))
    assert times == [] and mel.shape == (201, 40) and mel.dtype == np.float16
    _, _, silent = decoded(make_media(tmp_path / "b.mkv", [0, 0.1], sound=np.zeros(16_000)))
    assert np.ptp(silent) == 0  # which training takes for no sound
    times, _, mel = decoded(make_media(tmp_path / "c.mp4", [0.0]))
    assert len(times) == 1 and mel is None
    assert decoded(tmp_path / "b.mkv", video=False)[0] == []


def quiet_then_loud(seconds):
    half = 8_000 * seconds
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, half)
    return np.concatenate([np.zeros(half), noise]).astype(np.float32)


@pytest.mark.parametrize(
    "name,content,frames,seconds",
    [
        # Without an index FFmpeg guesses a length by the first packets, 17 and 2 times too long.
        ("a.aac", {"sound": quiet_then_loud(30)}, 0, 30),
        ("a.mp3", {"sound": quiet_then_loud(30)}, 0, 30),
        # The second sound track is longer: the file is as long as that.
        ("b.mkv", {"times": np.arange(0, 9, 0.1), "sound": tone(9), "sounds": [tone(40)]}, 9, 9),
        ("b.mp4", {"times": np.arange(0, 9, 0.1), "sound": tone(9), "sounds": [tone(40)]}, 9, 9),
        # Slide shows: the last picture stays, as the file says, or until the sound ends.
        ("c.mkv", {"times": [0, 5, 10], "length": 20}, 30, 0),
        ("c.mp4", {"times": [0, 5, 10], "length": 20}, 30, 0),
        ("d.mkv", {"times": [0, 5, 10], "sound": tone(30)}, 30, 30),
        ("d.mp4", {"times": [0, 5, 10], "sound": tone(30)}, 30, 30),
        ("e.mkv", {"times": [0], "sound": tone(30)}, 30, 30),
        # Videos that end before their sound do not.
        ("f.mkv", {"times": np.arange(0, 9, 0.1), "sound": tone(30)}, 9, 30),
    ],
)
def test_whole_files_are_read_to_their_end(tmp_path, name, content, frames, seconds):
    times, _, mel = decoded(make_media(tmp_path / name, **content))
    assert abs(len(times) - frames) <= 1
    assert (mel is None) == (not seconds) and (mel is None or abs(len(mel) - 100 * seconds) < 20)


def test_a_turned_camera(tmp_path):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32, 0] = 220  # the left half is red
    path = make_media(tmp_path / "a.mp4", [0, 0.04], [picture] * 2)
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track header, 16.16 fixed point
    numbers = [0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30]  # x' = -y + 48, y' = x
    matrix = b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)
    path.write_bytes(data[:at] + matrix + data[at + 36 :])
    _, (pixels, *_), _ = decoded(path)
    assert pixels.shape == (64, 48, 3)
    assert pixels[:28, :, 0].min() > 150 and pixels[36:, :, 0].max() < 60  # clockwise: now on top


def test_broken_files_are_skipped_with_a_reason(tmp_path):
    good = make_media(tmp_path / "good.mkv", np.arange(0, 20, 0.1), sound=tone(20))
    data = good.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, len(data), np.uint8).tobytes()
    mp4 = make_media(tmp_path / "x.mp4", np.arange(0, 2, 0.1)).read_bytes()
    for name, content, reason in (
        ("cut.mkv", data[: len(data) // 2], "breaks off after 10 of 20 s"),
        ("cut.mp4", mp4[: len(mp4) // 2], "Invalid data"),
        ("empty.mp4", b"", "Invalid data"),
        ("text.mp4", b"not a video " * 99, "Invalid data"),
        ("list.mp4", b"ffconcat version 1.0\nfile good.mkv\n", "a playlist"),
        ("noise.mkv", data[:2000] + noise[2000:], "breaks off after 0 of 20 s"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Skipped, match=f"{name}: .*{reason}"):
            decoded(tmp_path / name)
    assert len(decoded(good)[0]) == 20


def test_a_full_temporary_folder_ends_the_run(tmp_path, monkeypatch):
    wav = make_media(tmp_path / "a.wav", sound=tone(2))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "w+b", buffering=0))
    with pytest.raises(SystemExit, match="temporary folder .*No space left.*set TMPDIR"):
        decoded(wav)


@pytest.mark.skipif(not CLIP.exists(), reason="the real clip is not beside this checkout")
def test_real_time_stamps():
    times, pixels, mel = decoded(CLIP)
    with av.open(str(CLIP)) as container:
        stamps = np.array(
            [float(p.pts * p.time_base) for p in container.demux(video=0) if p.pts is not None]
        )
    nearest = [stamps[np.abs(stamps - k).argmin()] for k in range(len(times))]
    np.testing.assert_array_equal(times, nearest)
    assert len(times) == 19 and np.abs(np.array(times) - np.arange(19)).max() < 0.026
    assert pixels[0].shape == (240, 320, 3) and mel.shape == (1816, 40)


# -------------------------------------------------------------------------------- spectrogram


@pytest.mark.slow  # librosa compiles for half a minute
def test_log_mel_is_librosas():
    librosa = pytest.importorskip("librosa")
    rng = np.random.default_rng(0)
    n = 16_000 * 50 + 77  # more than one block of frames
    t = np.arange(n) / 16_000
    signals = [
        0.3 * np.sin(2 * np.pi * (200 + 50 * t) * t) + 0.01 * rng.normal(size=n) + 0.1,
        rng.normal(size=399),
        np.ones(3),
        np.zeros(1000),
        np.r_[np.zeros(9999), 1e-3],
    ]
    if CLIP.exists():
        with av.open(str(CLIP)) as container:
            resampler = av.AudioResampler("flt", "mono", 16_000)
            signals.append(
                np.concatenate(
                    [
                        r.to_ndarray().ravel()
                        for frame in container.decode(audio=0)
                        for r in resampler.resample(frame)
                    ]
                )
            )
    for signal_ in signals:
        y = signal_.astype(np.float64) - signal_.mean(dtype=np.float64)
        y = np.append(y[0], y[1:] - 0.97 * y[:-1])
        power = librosa.feature.melspectrogram(
            y=y,
            sr=16_000,
            n_fft=400,
            win_length=400,
            hop_length=160,
            window="hamming",
            n_mels=40,
            fmin=20,
        )
        wanted = librosa.power_to_db(power, ref=np.max, top_db=80).T
        got = logmel.log_mel(signal_)
        print(f"{len(signal_)} samples: {np.abs(got - wanted).max():.1e} dB")
        assert got.shape == wanted.shape and np.abs(got - wanted).max() < 1e-3
    np.testing.assert_allclose(
        logmel.mel_filters(),
        librosa.filters.mel(sr=16_000, n_fft=400, n_mels=40, fmin=20, dtype=np.float64),
        atol=1e-12,
    )
