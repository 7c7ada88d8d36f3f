"""Published weights: against an independent model in the published layout, and what is refused."""

import argparse
import builtins
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mcn_ext import published
from mcn_ext.batch import fill_up
from mcn_ext.model import MCN, load_published
from mcn_ext.prepare import inert
from mcn_ext.published import main, read_published
from tests.conftest import SMALL, WORDS, call

# ------------------------------------------------- the published model, from its description alone


def gated(dim_in, dim_out):
    unit = nn.Module()
    unit.fc, unit.cg = nn.Linear(dim_in, dim_out), nn.Module()
    unit.cg.fc = nn.Linear(dim_out, dim_out)
    return unit


def gate(unit, x):
    x = unit.fc(x)
    return x * torch.sigmoid(unit.cg.fc(x))


def block(dim_in, dim_out, stride):
    made = nn.Module()
    made.conv1 = nn.Conv2d(dim_in, dim_out, (1, 9), (1, stride), (0, 4), bias=False)
    made.conv2 = nn.Conv2d(dim_out, dim_out, (1, 9), 1, (0, 4), bias=False)
    made.bn1, made.bn2 = nn.BatchNorm2d(dim_out), nn.BatchNorm2d(dim_out)
    if stride != 1:
        made.downsample = nn.Sequential(nn.Conv2d(dim_in, dim_out, 1, (1, stride), bias=False),
                                        nn.BatchNorm2d(dim_out))
    return made


def head(dim, hidden, dim_out):
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim_out), nn.ReLU())


class Original(nn.Module):
    """As published, in eval mode: padding is convolved, and the maximum over words reads it."""

    def __init__(self, dim=16, video=18, words=10, width=1 / 16, recon=8, text=True):
        super().__init__()
        w = [int(n * width) for n in (128, 128, 256, 512, 1024)]
        net = self.DAVEnet = nn.Module()
        net.conv1, net.bn1 = nn.Conv2d(1, w[0], (40, 1), bias=False), nn.BatchNorm2d(w[0])
        for i in range(1, 5):
            setattr(net, f"layer{i}", nn.ModuleList(
                [block(w[i - 1], w[i], 2), block(w[i], w[i], 1)]))
        self.DAVEnet_projection = nn.Linear(w[-1], dim)
        self.GU_audio, self.GU_video = gated(w[-1], w[-1]), gated(video, dim)
        if text:
            self.text_pooling_caption = nn.Module()
            self.text_pooling_caption.fc = nn.Linear(words, dim)
            self.GU_text_captions = gated(dim, dim)
        if recon:
            self.recon_v, self.recon_a = head(dim, recon, video), head(dim, recon, w[-1])
            self.recon_t = head(dim, recon, dim)
        self.classification = nn.Linear(dim, 5, bias=False)
        for module in self.modules():  # statistics as after training
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 0, 0.3)
        self.eval()

    def audio(self, mel, n_frames):
        net = self.DAVEnet
        x = torch.relu(net.bn1(net.conv1(mel[:, None])))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for part in stage:
                y = torch.relu(part.bn1(part.conv1(x)))
                y = part.bn2(part.conv2(y))
                x = torch.relu(y + (part.downsample(x) if hasattr(part, "downsample") else x))
        n = (n_frames // 16).clamp_min(1)
        mean = torch.stack([row[:, 0, :k].mean(1) for row, k in zip(x, n, strict=True)])
        return self.DAVEnet_projection(gate(self.GU_audio, mean))

    def text(self, words):
        return gate(self.GU_text_captions,
                    torch.relu(self.text_pooling_caption.fc(words)).max(1)[0])

    def video(self, *streams):
        return gate(self.GU_video, torch.cat([F.normalize(s, dim=1) for s in streams], 1))


def original(**sizes):
    torch.manual_seed(0)
    return Original(**sizes)


def clips(n_frames, n_words, dims, word_dim=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    n_frames, n_words = torch.tensor(n_frames), torch.tensor(n_words)
    mel = torch.rand(len(n_frames), 40, int(n_frames.max()), generator=g) * -80
    words = torch.randn(len(n_words), int(n_words.max()), word_dim, generator=g)
    return {"video": {name: torch.rand(len(n_frames), d, generator=g) for name, d in dims.items()},
            "audio": mel, "n_frames": n_frames, "text": words,
            "text_mask": torch.arange(words.shape[1]) < n_words[:, None]}


@torch.inference_mode()
def differences(net, model, batch, padding=None, filled=None):
    """{modality: (largest difference, largest number of the original's)}; ``padding`` of the
    original, ``filled`` of ours."""
    ours, mel, words = model(fill_up(batch, **filled) if filled else batch)[0], [], []
    for i, (n, mask) in enumerate(zip(batch["n_frames"], batch["text_mask"], strict=True)):
        x, w = batch["audio"][i:i + 1, :, :n], batch["text"][i:i + 1, mask]
        if padding:  # zeros up to one length, of all clips
            x = F.pad(x, (0, padding["audio"] - x.shape[2]))
            w = F.pad(w, (0, 0, 0, padding["text"] - w.shape[1]))
        mel.append(net.audio(x, n[None]))
        words.append(net.text(w))
    theirs = {"audio": torch.cat(mel), "text": torch.cat(words),
              "video": net.video(*batch["video"].values())}
    return {m: (float((ours[m] - theirs[m]).abs().max()), float(theirs[m].abs().max()))
            for m in model.modalities}


DIMS = {"2d": 12, "3d": 6}
SLOW = (pytest.mark.slow,)


@pytest.mark.parametrize("padding", [
    {"audio": 224, "text": 6}, pytest.param(None, marks=pytest.mark.slow)])
def test_embeddings_are_the_originals(tmp_path, padding):
    net = original()
    torch.save(net.state_dict(), tmp_path / "x.pth")
    found = read_published(tmp_path / "x.pth")
    model = MCN(**found.fit(DIMS)).eval()
    model.load_state_dict(found.state)
    batch = clips([200, 160, 37, 16], [6, 1, 3, 2], DIMS)
    for name, (difference, largest) in differences(net, model, batch, padding, padding).items():
        assert difference <= 1e-5 and largest > 0.1, name
    apart = differences(net, model, batch, padding,
                        None if padding else {"audio": 224, "text": 6})
    assert apart["audio"][0] > 1e-3 and apart["text"][0] > 1e-3  # padding does matter


@pytest.mark.slow
@pytest.mark.parametrize("padding", [None, published.PADDING])
def test_full_width_embeddings_are_the_originals(tmp_path, padding):
    net = original(dim=1024, video=4096, words=300, width=1, recon=128)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    model = load_published(tmp_path / "x.pth")
    assert model.sizes["video_dims"] == {"2d": 2048, "3d": 2048} and not model.training
    batch = clips([1000, 505, 64], [20, 1, 7], model.sizes["video_dims"], 300)
    for name, (apart, _) in (differences(net, model, batch, published.PADDING).items()
                             if not padding else ()):
        print(f"{name}: a clip filled up is {apart:.2g} from the clip alone")
    for name, (difference, largest) in differences(net, model, batch, padding, padding).items():
        print(f"{name}: largest difference {difference:.2g} of {largest:.2g}")
        assert difference <= 1e-5 and difference <= 1e-4 * largest, name


# ------------------------------------------------------------------------- layouts and wrappers


def test_every_tensor_is_used_or_named(tmp_path, capsys):
    state = original().state_dict()
    torch.save({"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
                "epoch": 3}, tmp_path / "x.pth")
    found = read_published(tmp_path / "x.pth")
    assert found.sizes == {"modalities": "AVT", "embd_dim": 16, "word_dim": 10, "recon_dim": 8,
                           "audio_width": 1 / 16} and found.video_width == 18
    assert set(found.unused) == {"classification.weight", "optimizer.state.0.exp_avg"}
    assert found.state.keys() | {"classification.weight"} == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state.items())
    assert not found.missing and not found.not_read
    model = load_published(tmp_path / "x.pth", DIMS)
    assert model.sizes["modalities"] == "AVT" and model.sizes["video_dims"] == DIMS
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "classification.weight, optimizer.state.0.exp_avg" in line


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}},
    lambda s: {"model_state_dict": {f"module.model.{k}": v for k, v in s.items()}},
    lambda s: {"net": s, "loss": 0.5}])
@pytest.mark.parametrize("legacy", [True, False])
def test_prefixes_wrappers_and_the_legacy_format(tmp_path, wrap, legacy):
    state = original().state_dict()
    torch.save(wrap(state), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    found = read_published(tmp_path / "x.pth")
    assert found.unused == ["classification.weight"] and len(found.state) == len(state) - 1


@pytest.mark.slow
def test_avlnet_old_files_half_precision_and_some_heads(tmp_path):
    state = original(text=False, recon=0).state_dict()
    old = {k: v.half() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "x.pth")
    found = read_published(tmp_path / "x.pth")
    assert found.sizes["modalities"] == "AV" and found.sizes["recon_dim"] == 0
    counters = [name for name in found.state if name.endswith("num_batches_tracked")]
    assert found.missing == counters and len(counters) == 21
    assert found.state["GU_video.fc.weight"].dtype == torch.float32
    partly = {k: v for k, v in original().state_dict().items() if not k.startswith("recon_a")}
    torch.save(partly, tmp_path / "x.pth")
    assert {n.split(".")[0] for n in read_published(tmp_path / "x.pth").missing} == {"recon_a"}
    assert load_published(tmp_path / "x.pth", DIMS).recon_a is not None
    sound_free = {k: v for k, v in original(recon=0).state_dict().items() if "audio" not in k
                  and "DAVEnet" not in k}
    torch.save(sound_free, tmp_path / "x.pth")
    assert load_published(tmp_path / "x.pth", DIMS).sizes["modalities"] == "VT"


def change(name, value):
    return lambda state: state.__setitem__(name, value)


BROKEN = {
    "GU_video.cg.fc.bias is missing, expected (16,)": lambda s: s.pop("GU_video.cg.fc.bias"),
    r"GU_audio.fc.weight is (3, 64) torch.float32, expected (64, 64)":
        change("GU_audio.fc.weight", torch.zeros(3, 64)),
    "recon_t.2.bias is missing": lambda s: s.pop("recon_t.2.bias"),
    "recon_a.0.weight is (9, 16)": change("recon_a.0.weight", torch.zeros(9, 16)),
    "GU_text_captions.fc.bias has numbers that are not finite":
        change("GU_text_captions.fc.bias", torch.full((16,), torch.nan)),
    "is (16,) torch.int64": change("GU_text_captions.fc.bias", torch.zeros(16, dtype=torch.int64)),
    "DAVEnet's stages are [8, 8, 17, 32, 64] wide":
        change("DAVEnet.layer2.1.bn2.weight", torch.ones(17)),
    "the audio-text fused variant (GU_audio_text": change("GU_audio_text.fc_text.weight",
                                                          torch.ones(2)),
    "DAVEnet v2": change("DAVEnet.layer5.0.bn1.weight", torch.ones(2)),
    "DAVEnet_projection.weight is missing": lambda s: s.pop("DAVEnet_projection.weight"),
    "several models": change("net.GU_video.fc.weight", torch.ones(2, 2)),
    "no published model in it": lambda s: [s.pop(k) for k in list(s) if "classif" not in k],
}


@pytest.mark.parametrize("message", [pytest.param(m, marks=SLOW * (i > 0))
                                     for i, m in enumerate(BROKEN)])
def test_what_does_not_fit_is_named(tmp_path, message):
    state = original().state_dict()
    BROKEN[message](state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(SystemExit) as error:
        read_published(tmp_path / "x.pth")
    assert str(error.value).startswith(str(tmp_path / "x.pth")) and message in str(error.value)


def test_width_of_the_video_needs_streams(tmp_path):
    torch.save(original(text=False, recon=0).state_dict(), tmp_path / "x.pth")
    found = read_published(tmp_path / "x.pth")
    for given in (None, {"2d": 12}):
        with pytest.raises(SystemExit, match="GU_video takes 18 numbers.*video_dims"):
            found.fit(given)
    found.state["GU_video.fc.weight"] = torch.zeros(16, 2048)
    assert found.fit()["video_dims"] == {"2d": 2048}
    assert found.fit({"2d": 2048, "3d": 2048})["video_dims"] == {"2d": 2048}
    assert found.fit({"clip": 2048})["video_dims"] == {"clip": 2048}


# -------------------------------------------------------------------- hostile and damaged files


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


class Config:  # its module may not be there on the reader's machine
    def __init__(self):
        self.batch = 3


@pytest.mark.parametrize("legacy", [True, pytest.param(False, marks=SLOW)])
def test_more_than_tensors_is_tolerated_and_runs_nothing(tmp_path, monkeypatch, legacy):
    state = original(recon=0).state_dict()
    content = {"state_dict": state, "bomb": Bomb(tmp_path / "gone-off"), "config": Config(),
               "args": argparse.Namespace(lr=1e-3, names=["a"]), "score": np.float64(1.5),
               "rows": np.arange(3), "best": {"x": torch.ones(2)}}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    with monkeypatch.context() as patch:
        def no_imports(name, *args, real=builtins.__import__, **kwargs):
            assert not name.startswith("tests"), name
            return real(name, *args, **kwargs)
        patch.setattr(builtins, "__import__", no_imports)
        found = read_published(tmp_path / "x.pth")
    assert not (tmp_path / "gone-off").exists()
    assert len(found.state) == len(state) - 1
    assert {"posix.system", "argparse.Namespace", f"{__name__}.Config"} <= set(found.not_read)
    assert any(name.endswith("multiarray.scalar") for name in found.not_read)
    assert found.unused == ["classification.weight", "best.x"]
    assert all(torch.equal(value, state[name]) for name, value in found.state.items())


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [True, False])
def test_a_whole_pickled_module_is_read_without_its_class(tmp_path, legacy):
    net = original()
    torch.save({"net": net}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    found = read_published(tmp_path / "x.pth")
    assert found.unused == ["classification.weight"] and f"{__name__}.Original" in found.not_read
    assert found.state.keys() < net.state_dict().keys()
    for name, value in found.state.items():
        assert torch.equal(value, net.state_dict()[name]), name


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.slow
@pytest.mark.parametrize("value", [
    lambda file: Call(builtins.eval, f"open({str(file)!r}, 'w')"),
    lambda file: Call(getattr, Call(builtins.__import__, "os"), "system"),
    lambda file: OrderedDict({Bomb(file): [Bomb(file)]}),
    lambda file: {Bomb(file)}])
def test_hostile_values_do_nothing(tmp_path, value):
    torch.save({"state_dict": original(recon=0).state_dict(), "x": value(tmp_path / "gone-off")},
               tmp_path / "x.pth")
    read_published(tmp_path / "x.pth")
    assert not (tmp_path / "gone-off").exists()


def rewritten(source, target, change):
    """A zip of torch.save with entries changed by ``change(name, data) -> data``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))


@pytest.mark.slow
def test_damaged_files_are_an_error(tmp_path):
    path, bad = tmp_path / "x.pth", tmp_path / "bad.pth"
    for legacy in (False, True):
        torch.save({"s": original(recon=0).state_dict(), "a": argparse.Namespace()}, path,
                   _use_new_zipfile_serialization=not legacy)
        data = path.read_bytes()
        for cut in (0, 5, 100, len(data) // 2, len(data) - 5):
            bad.write_bytes(data[:cut])
            with pytest.raises(SystemExit, match="bad.pth"):
                read_published(bad)
    torch.save({"s": torch.arange(4.0), "a": argparse.Namespace()}, path)
    rewritten(path, bad, lambda name, data: data[:-4] if "/data/" in name else data)
    with pytest.raises(SystemExit, match="12 bytes"):
        read_published(bad)
    torch.save(original().state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    with pytest.raises(SystemExit, match="checksum"):
        read_published(bad)
    bad.write_bytes(b"\x80\x02" + b"]" * 10 + b".")
    with pytest.raises(SystemExit, match="bad.pth"):
        read_published(bad)
    bad.write_bytes(pickle.dumps({"x": Bomb(tmp_path / "gone-off")}))
    with pytest.raises(SystemExit, match="bad.pth"):
        read_published(bad)
    assert not (tmp_path / "gone-off").exists()
    with pytest.raises(SystemExit, match="no such file"):
        read_published(tmp_path / "gone.pth")


def test_paths_of_tensors():
    shared = {"w": torch.ones(1)}
    shared["again"] = shared  # circular
    deep = torch.ones(1)
    for _ in range(100):
        deep = [deep]
    assert inert.tensors({"a": shared, "b": shared, "deep": deep, 3: (torch.ones(1),)}).keys() == {
        "a.w", "3.0"}


# ------------------------------------------------------------------------------------- converter


@pytest.mark.slow
def test_converter_and_safetensors(tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "x.pth", tmp_path / "x.safetensors"
    torch.save({"state_dict": original().state_dict(), "args": argparse.Namespace()}, source)
    assert main([str(source)]) == 0 and not out.exists()
    text = capsys.readouterr().out
    assert all(part in text for part in (
        "audio video text", "embd_dim 16", "video 18", "classification.weight",
        "argparse.Namespace")), text
    assert "GU_video" in text and f"{18 * 16 + 16 + 16 * 16 + 16:,}" in text
    assert main([str(source), "--out", str(out)]) == 0
    first, second = read_published(source), read_published(out)
    assert not second.unused and not second.not_read and second.sizes == first.sizes
    assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())
    from safetensors import safe_open

    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == "x.pth" and metadata["source_sha256"] == first.sha256
    assert json.loads(metadata["sizes"])["video_width"] == 18
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["x.pth", "x.safetensors"]
    out.write_bytes(out.read_bytes()[:-10])
    with pytest.raises(SystemExit, match="x.safetensors: damaged"):
        read_published(out)

    def missing(name, *args, real=builtins.__import__, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SystemExit, match="pip install safetensors"):
        read_published(out)


# --------------------------------------------------------------------------------------- scripts

# Sizes are the file's.
FLAGS = [word for i, word in enumerate(SMALL)
         if not {SMALL[i - i % 2]} & {"--embd_dim", "--recon_dim", "--audio_width"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.save({"state_dict": original().state_dict(), "args": argparse.Namespace()},
               folder / "mcn.pth")
    torch.save(original(text=False, recon=0).state_dict(), folder / "avlnet.pth")
    rows = [f"{w} {' '.join(map(str, v))}" for w, v in zip(WORDS, np.eye(8, 10), strict=True)]
    (folder / "words.txt").write_text("\n".join(["8 10", *rows]) + "\n")
    (folder / "narrow.txt").write_text("1 3\nchop 1 2 3\n")
    return folder


def fails(message, *command, cwd):
    done = call(*command, cwd=cwd, check=False)
    assert done.returncode and message in done.stderr, done.stderr


@pytest.mark.slow
def test_stage_1_starts_from_the_file_and_resumes_without_it(files, store_path, tmp_path):
    shutil.copy(files / "mcn.pth", tmp_path)
    begin = ("train_stage1.py", "--pair", "VT", "--data", store_path, *FLAGS, "--init_published",
             "mcn.pth", "--word2vec", files / "words.txt")
    done = call(*begin, "--lr", 1e-30, "--max_steps", 1, cwd=tmp_path)
    assert "unused: classification.weight; not read: argparse.Namespace" in done.stdout
    content = torch.load(tmp_path / "runs/stage1-VT/checkpoint.pt", weights_only=True)
    state = original().state_dict()
    assert content["model"].keys() == {k for k in state if k.startswith(
        ("GU_video", "text_pooling", "GU_text", "recon_v", "recon_t"))}
    for name, value in content["model"].items():
        torch.testing.assert_close(value, state[name], msg=name)
    args = content["args"]
    assert (args["init_published"], args["embd_dim"], args["recon_dim"]) == ("mcn.pth", 16, 8)
    (tmp_path / "mcn.pth").unlink()
    again = call(*begin, "--lr", 1e-30, cwd=tmp_path)
    assert "going on at step 1" in again.stdout
    fails("--init_published mcn.pth: no such file", *begin, "--lr", 1e-30, "--no-resume",
          cwd=tmp_path)
    torch.save(original(recon=0).state_dict(), tmp_path / "mcn.pth")
    fails("--init_published is another file", *begin, "--lr", 1e-30, cwd=tmp_path)
    call("train_stage2.py", "--add", "A", "--init", "runs/stage1-VT", "--device", "cpu",
         "--max_steps", 1, cwd=tmp_path)  # a run like any other


@pytest.mark.slow
def test_flags_that_disagree_with_the_file_are_named(files, store_path, tmp_path):
    begin = ("train_stage1.py", "--data", store_path, *FLAGS, "--init_published")
    for flag, value, has in (("--embd_dim", 32, 16), ("--recon_dim", 4, 8),
                             ("--audio_width", 0.125, 0.0625)):
        fails(f"{flag} {value}: {files / 'mcn.pth'} has {has}", *begin, files / "mcn.pth",
              "--pair", "AV", flag, value, cwd=tmp_path)
    fails("no text in it, only AV", *begin, files / "avlnet.pth", "--pair", "VT", cwd=tmp_path)
    fails("give them with --word2vec", *begin, files / "mcn.pth", "--pair", "VT", cwd=tmp_path)
    fails("vectors of 3 numbers; the text encoder takes 10", *begin, files / "mcn.pth", "--pair",
          "VT", "--word2vec", files / "narrow.txt", cwd=tmp_path)
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))
    call(*begin, files / "avlnet.pth", "--pair", "AV", "--recon_dim", 4, "--audio_width", 0.0625,
         "--max_steps", 1, cwd=tmp_path)  # it has no heads: the flag's
    fails("--init_published None (now", "train_stage1.py", "--pair", "AV", "--data", store_path,
          *SMALL, "--out", "plain", "--init_published", files / "avlnet.pth",
          cwd=plain(tmp_path, store_path))


def plain(folder, store_path):
    call("train_stage1.py", "--pair", "AV", "--data", store_path, *SMALL, "--out", "plain",
         "--max_steps", 1, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["frozen", "finetune"])
def test_stage_2_adds_a_modality_to_published_encoders(files, store_path, tmp_path, how):
    shutil.copy(files / "avlnet.pth", tmp_path)
    begin = ("train_stage2.py", "--add", "T", "--init_published", "avlnet.pth", "--data",
             store_path, "--word2vec", files / "words.txt", "--stage1_encoders", how,
             *FLAGS)
    call(*begin, "--max_steps", 2, cwd=tmp_path)
    content = torch.load(tmp_path / "runs/stage2-AV_T/checkpoint.pt", weights_only=True)
    state = original(text=False, recon=0).state_dict()
    moved = [name for name, value in content["model"].items()
             if name in state and not torch.equal(value, state[name])]
    assert bool(moved) == (how == "finetune")
    assert (content["sizes"]["modalities"] == "AVT" and content["sizes"]["word_dim"] == 10
            and content["args"]["init_published"] == "avlnet.pth")
    (tmp_path / "avlnet.pth").unlink()
    assert "going on at step 2" in call(*begin, cwd=tmp_path).stdout
    fails("one start", *begin, "--init", "runs/stage1-AV", cwd=tmp_path)


@pytest.mark.slow
def test_evaluation_of_a_file(files, eval_path, tmp_path):
    begin = ("evaluate.py", "--youcook2", eval_path, "--device", "cpu", "--init_published")
    done = call(*begin, files / "mcn.pth", "--word2vec", files / "words.txt", cwd=tmp_path)
    assert "classification.weight" in done.stdout and "text->video+audio" in done.stdout
    (folder,) = (tmp_path / "runs").glob("published-mcn-*")
    result = json.loads((folder / "metrics.json").read_text())["youcook2"]
    assert result["n"] == 24 and result["checkpoint"] == str(files / "mcn.pth")
    fails("--word2vec data/word2vec.bin: no such file", *begin, files / "mcn.pth", cwd=tmp_path)
    fails("vectors of 3 numbers", *begin, files / "mcn.pth", "--word2vec", files / "narrow.txt",
          cwd=tmp_path)
    fails("in place of --run", *begin, files / "mcn.pth", "--run", "runs/x", cwd=tmp_path)
    call(*begin, files / "avlnet.pth", "--keep_embeddings", cwd=tmp_path)
    with np.load(*(tmp_path / "runs").glob("published-avlnet-*/youcook2.npz")) as file:
        kept = {name: file[name] for name in file.files}
    # The original, on the clips padded with zeros as it was evaluated.
    from mcn_ext.data import ClipReader, collate
    from mcn_ext.store import Store

    reader = ClipReader(Store(eval_path), video_streams=("2d", "3d"), audio=True, words=None,
                        max_words=20, audio_frames=5120)
    net, rows = original(text=False, recon=0), []
    with torch.inference_mode():
        for i in range(3):
            clip = collate([reader.read(i, [(0, 0)])])
            n = int(clip["n_frames"])
            mel = F.pad(clip["audio"][:, :, :n].float(), (0, published.PADDING["audio"] - n))
            rows.append(net.audio(mel, clip["n_frames"]))
    np.testing.assert_allclose(kept["embedding:audio"][:3], torch.cat(rows).half(), rtol=2e-3,
                               atol=2e-3)
