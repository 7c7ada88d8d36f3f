"""Raw videos to a store: ResNet-152, the whole chain; media are made here."""

import os
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcn_ext.data.store import Store, validate
from mcn_ext.prepare import Skipped, resnet, videos
from mcn_ext.prepare.__main__ import main
from tests.test_decode import decoded, make_media, tone

# --------------------------------------------------------------------------------- ResNet-152


def independent_resnet(state, x):
    """Table 1 of He et al. (2015) as a function of the weights: (n, 3, h, w) -> (n, 2048)."""

    def conv_bn(x, conv, norm, stride=1):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(F.pad(x, [weight.shape[-1] // 2] * 4), weight, stride=stride)
        scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-5)
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]

    x = conv_bn(x, "conv1", "bn1", 2).clamp(min=0)
    x = F.pad(x, [1] * 4).unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))  # inputs are >= 0
    for stage, blocks in ((1, 3), (2, 8), (3, 36), (4, 3)):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = conv_bn(x, f"{name}.conv1", f"{name}.bn1").clamp(min=0)
            y = conv_bn(y, f"{name}.conv2", f"{name}.bn2", stride).clamp(min=0)
            y = conv_bn(y, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + y).clamp(min=0)
    return x.flatten(2).mean(2)


@pytest.mark.slow
def test_resnet_is_an_independent_one_on_the_same_weights(tmp_path):
    torch.manual_seed(0)
    net = resnet.ResNet()
    assert sum(p.numel() for p in net.parameters()) == 60_192_808
    generator = torch.Generator().manual_seed(1)
    for name, value in net.state_dict().items():  # statistics as if trained
        if name.endswith("running_mean"):
            value.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
    torch.save(net.state_dict(), tmp_path / "resnet152.pth")
    again = resnet.ResNet()
    assert len(resnet.load(again, tmp_path / "resnet152.pth")) == 64
    images = torch.randn(2, 3, 64, 96, generator=generator)
    state = {k: v.double() for k, v in net.state_dict().items()}
    with torch.inference_mode():
        wanted = independent_resnet(state, images.double())
        single = again.eval()(images)
        double = again.double()(images.double())
    scale = wanted.abs().max()
    print(
        f"largest {scale:.3g}, difference {(double - wanted).abs().max():.2e} in float64, "
        f"{(single - wanted).abs().max():.2e} in float32"
    )
    assert (double - wanted).abs().max() < 1e-12 * scale
    assert (single - wanted).abs().max() < 1e-5 * scale


def test_names_are_torchvisions_and_other_weights_are_refused(tmp_path):
    net = resnet.ResNet((1, 1, 1, 1))
    names = set(net.state_dict())
    assert {
        "conv1.weight",
        "bn1.num_batches_tracked",
        "layer1.0.downsample.1.running_var",
        "layer4.0.conv3.weight",
        "fc.weight",
        "fc.bias",
    } <= names
    with pytest.raises(SystemExit, match="no such file.*resnet152-394f9c45.pth"):
        resnet.load(net, tmp_path / "none.pth")
    wrapped = {f"module._orig_mod.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 90}, tmp_path / "wrapped.pth")
    assert len(resnet.load(resnet.ResNet((1, 1, 1, 1)), tmp_path / "wrapped.pth")) == 64
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    for name in ("other.pth", "bad.pth"):
        with pytest.raises(SystemExit, match=f"{name}: not the weights of a ResNet-152"):
            resnet.load(net, tmp_path / name)


@pytest.mark.parametrize("height,width", [(240, 320), (97, 64), (224, 1000), (2, 3), (3, 4000)])
def test_crops_are_pillows(height, width):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    got = resnet.crop(torch.from_numpy(pixels)).numpy()
    assert got.shape == (224, 224, 3)
    short = min(height, width)
    if max(height, width) > 4 * short:
        return
    size = [256 * width // short, 256 * height // short]
    resized = np.asarray(image.fromarray(pixels).resize(size, image.Resampling.BILINEAR))
    top, left = (round((side - 224) / 2) for side in resized.shape[:2])
    wanted = resized[top : top + 224, left : left + 224].astype(int)
    assert np.abs(got - wanted).max() <= 1


# ---------------------------------------------------------------------------------- the store


@pytest.fixture
def small_resnet(monkeypatch):
    monkeypatch.setattr(resnet.ResNet.__init__, "__defaults__", ((1, 1, 1, 1),))


@pytest.mark.slow
def test_videos_to_a_store(tmp_path, small_resnet, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("in/more", "3d"):
        (tmp_path / name).mkdir(parents=True)
    make_media(Path("in/talk.mkv"), np.arange(0, 5, 0.1), sound=tone(5))
    make_media(Path("in/more/silent.mp4"), np.arange(0, 2, 0.1))
    make_media(Path("in/sound.wav"), sound=tone(3))
    make_media(Path("in/talk.mp4"), [0.0])
    (tmp_path / "in/broken.mp4").write_bytes(b"broken")
    (tmp_path / "in/notes.txt").write_text("not a video")
    (tmp_path / "in/talk.srt").write_text("1\n00:00:01,000 --> 00:00:03,000\nchop it\n")
    np.save("3d/talk.npy", np.full((8, 6), 0.5, np.float32))
    np.savez("3d/silent_3d.npz", features=np.ones((3, 6), np.float16))
    command = "videos in --captions in --out o.h5 --random_weights --streams 3d=3d:1.5".split()
    assert main([*command, "--workers", "2", "--batch_size", "4"]) == 0
    said, listed = capsys.readouterr().out, (tmp_path / "o.h5.skipped.csv").read_text()
    assert "3 of 5 videos (2D features of RANDOM weights)" in said and "2 skipped" in said
    assert "1 without 2d, 1 without 3d, 1 without audio, 2 without captions" in said
    assert "broken.mp4: " in listed and "its id is that of" in listed
    validate(tmp_path / "o.h5")
    store = Store(tmp_path / "o.h5")
    assert store.ids() == ["silent", "sound", "talk"]
    assert store.dims == {"2d": 2048, "3d": 6, "mel": 40}
    assert store.rates == {"2d": 1.0, "3d": 1.5, "mel": 100.0}
    assert store.caption_texts(2) == ["chop it"] and list(store.caption_counts()) == [0, 0, 1]
    rows = [len(store.clips(2, name, [0], [9])[0]) for name in ("2d", "3d", "mel")]
    assert rows == [5, 8, 501] and len(store.clips(1, "2d", [0], [9])[0]) == 0
    frames = resnet.Frames2D(None, torch.device("cpu"))  # the same, by hand
    _, pixels, mel = decoded("in/talk.mkv")
    wanted = frames(torch.stack([resnet.crop(torch.from_numpy(p.copy())) for p in pixels]))
    np.testing.assert_allclose(store.clips(2, "2d", [0], [9])[0], wanted, rtol=2e-3, atol=1e-4)
    np.testing.assert_array_equal(store.clips(2, "mel", [0], [9])[0], mel)
    with h5py.File("o.h5") as file:
        assert "RANDOM" in file["2d"].attrs["model"] and "RANDOM" in file.attrs["source"]


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.mp4"):
        make_media(Path(name), [0.0])
    (tmp_path / "a.srt").write_text("00:01 --> 00:02\nx\n")
    for words, message in (
        ("a.mp4", "--weights: frames need a ResNet-152.*download.pytorch.org"),
        ("none", "none: no such file"),
        ("a.mp4 --captions c.srt", "--captions c.srt: no such file"),
        (". --captions a.srt", "of one video, but there are 2"),
        ("a.mp4 --streams 3d=none:1.5", "--streams .*none: no such file or folder"),
        ("a.mp4 --streams 3d=.", "expected NAME=DIR:RATE"),
        ("a.mp4 --streams mel=.:1", "mel is not a name"),
        ("a.mp4 --random_weights --streams 3d=.:1", "no readable features of any video"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["videos", *words.split(), "--out", "o.h5"])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match=r"pip install av .*\[video\]"):
        main(["videos", "a.mp4", "--random_weights", "--out", "o.h5"])


def _hang(pipe, path, options):
    time.sleep(60)


def _die(pipe, path, options):
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    "child,limit,reason",
    [
        (_hang, 0.5, "no sign of life for 0.5 s"),
        pytest.param(_die, 30, "ended with exit code -11", marks=pytest.mark.slow),
    ],
)
def test_decoders_that_hang_or_die_cost_one_video(child, limit, reason):
    with pytest.raises(Skipped, match=f"x.mp4: .*{reason}"):
        list(videos.decode_apart("x.mp4", limit, {}, target=child))
