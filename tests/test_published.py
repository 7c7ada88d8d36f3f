"""Published weights: embeddings equal an independent model's; the scripts take them as a run."""

import argparse
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mcn_ext.data.batch import fill_up
from mcn_ext.model import load_published
from mcn_ext.prepare.__main__ import main as prepare
from mcn_ext.prepare.published import PADDING
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
        made.downsample = nn.Sequential(
            nn.Conv2d(dim_in, dim_out, 1, (1, stride), bias=False), nn.BatchNorm2d(dim_out)
        )
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
            setattr(
                net, f"layer{i}", nn.ModuleList([block(w[i - 1], w[i], 2), block(w[i], w[i], 1)])
            )
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
        return gate(
            self.GU_text_captions, torch.relu(self.text_pooling_caption.fc(words)).max(1)[0]
        )

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
    return {
        "video": {name: torch.rand(len(n_frames), d, generator=g) for name, d in dims.items()},
        "audio": mel,
        "n_frames": n_frames,
        "text": words,
        "text_mask": torch.arange(words.shape[1]) < n_words[:, None],
    }


@torch.inference_mode()
def differences(net, model, batch, padding=None, filled=None):
    """{modality: (largest difference, largest number of the original's)}; ``padding`` of the
    original, ``filled`` of ours."""
    ours, mel, words = model(fill_up(batch, **filled) if filled else batch)[0], [], []
    for i, (n, mask) in enumerate(zip(batch["n_frames"], batch["text_mask"], strict=True)):
        x, w = batch["audio"][i : i + 1, :, :n], batch["text"][i : i + 1, mask]
        if padding:  # zeros up to one length, of all clips
            x = F.pad(x, (0, padding["audio"] - x.shape[2]))
            w = F.pad(w, (0, 0, 0, padding["text"] - w.shape[1]))
        mel.append(net.audio(x, n[None]))
        words.append(net.text(w))
    theirs = {
        "audio": torch.cat(mel),
        "text": torch.cat(words),
        "video": net.video(*batch["video"].values()),
    }
    return {
        m: (float((ours[m] - theirs[m]).abs().max()), float(theirs[m].abs().max()))
        for m in model.modalities
    }


DIMS = {"2d": 12, "3d": 6}
SMALL_NET = dict(video=18, words=10)
FULL_WIDTH = dict(dim=1024, video=4096, words=300, width=1, recon=128)


@pytest.mark.parametrize(
    "sizes,dims,n_frames,padding",
    [
        (SMALL_NET, DIMS, [200, 160, 37, 16], {"audio": 224, "text": 6}),
        pytest.param(SMALL_NET, DIMS, [200, 160, 37, 16], None, marks=pytest.mark.slow),
        pytest.param(FULL_WIDTH, None, [1000, 505, 64, 16], PADDING, marks=pytest.mark.slow),
    ],
)
def test_embeddings_are_the_originals(tmp_path, sizes, dims, n_frames, padding):
    """To 1e-6, each clip alone, or padded with zeros as the published evaluation is."""
    net = original(**sizes)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    model = load_published(tmp_path / "x.pth", dims)
    assert not model.training
    batch = clips(n_frames, [6, 1, 3, 2], model.sizes["video_dims"], sizes["words"])
    for name, (difference, largest) in differences(net, model, batch, padding, padding).items():
        print(f"{name}: largest difference {difference:.2g} of {largest:.2g}")
        assert difference <= 1e-6 and largest > 0.02, name
    apart = differences(net, model, batch, padding, None if padding else {"audio": 224, "text": 6})
    assert apart["audio"][0] > 1e-3 and apart["text"][0] > 1e-3  # padding does matter


# --------------------------------------------------------------------------------------- scripts


@pytest.fixture
def begin(tmp_path, store_path, monkeypatch):
    """A folder with files of weights and words; converts as the command line does."""
    monkeypatch.chdir(tmp_path)
    state = original().state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1e-3)}, "mcn.pth")
    torch.save(original(text=False, recon=0).state_dict(), "avlnet.pth")
    rows = [f"{w} {' '.join(map(str, v))}" for w, v in zip(WORDS, np.eye(8, 10), strict=True)]
    (tmp_path / "words.txt").write_text("\n".join(["8 10", *rows]) + "\n")
    (tmp_path / "narrow.txt").write_text("1 3\nchop 1 2 3\n")

    def convert(*words, data=store_path, word2vec="words.txt"):
        words = [*words, "--data", data, "--word2vec", word2vec]
        return prepare(["published", *map(str, words)])

    return convert


def test_a_run_folder(begin, tmp_path, capsys):
    pytest.importorskip("gensim")  # reads words.txt
    assert begin("mcn.pth", "--out", "run") == 0
    said = capsys.readouterr().out
    assert "modalities AVT" in said and "unused:     classification.weight" in said
    assert "not in it:  nothing" in said
    content = torch.load("run/checkpoint.pt", weights_only=True)
    state = original().state_dict()
    del state["classification.weight"]
    assert content["model"].keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in content["model"].items())
    assert content["complete"] and content["padding"] == PADDING
    args = json.loads((tmp_path / "run/args.json").read_text())
    assert args == content["args"] and args["similarity"] == "dot" and args["embd_dim"] == 16
    with pytest.raises(SystemExit, match="run holds a run; pass --overwrite"):
        begin("mcn.pth", "--out", "run")
    assert begin("mcn.pth", "--out", "run", "--overwrite", "--pair", "AV") == 0
    content = torch.load("run/checkpoint.pt", weights_only=True)
    assert content["sizes"]["modalities"] == "AV" and "GU_text_captions.fc.weight" not in content
    with pytest.raises(SystemExit, match="vectors of 3 numbers; the text encoder takes 10"):
        begin("mcn.pth", "--out", "new", word2vec="narrow.txt")
    with pytest.raises(SystemExit, match="--pair VT: no text in it"):
        begin("avlnet.pth", "--out", "new", "--pair", "VT")
    with pytest.raises(SystemExit, match="none.h5: no such"):
        begin("mcn.pth", "--out", "new", data="none.h5")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["frozen", "finetune"])
def test_stage_2_adds_a_modality_to_published_encoders(begin, store_path, tmp_path, how):
    begin("avlnet.pth", "--out", "runs/avlnet")
    at = [i for i, word in enumerate(SMALL) if word in ("--embd_dim", "--recon_dim")]
    at += [SMALL.index("--audio_width"), SMALL.index("--preset")]  # sizes are the run's
    small = [word for i, word in enumerate(SMALL) if not {i, i - 1} & {*at}]
    command = ["train_stage2.py", "--add", "T", "--init", "runs/avlnet", "--word2vec", "words.txt"]
    command += ["--stage1_encoders", how, *small]
    call(*command, "--max_steps", 2, cwd=tmp_path)
    content = torch.load("runs/stage2-AV_T/checkpoint.pt", weights_only=True)
    state = original(text=False, recon=0).state_dict()
    both = content["model"].keys() & state.keys()
    assert all(torch.equal(content["model"][n], state[n]) for n in both) == (how == "frozen")
    assert content["sizes"]["modalities"] == "AVT" and content["sizes"]["word_dim"] == 10
    assert content["args"]["similarity"] == "dot"
    (tmp_path / "avlnet.pth").unlink()
    assert "resumed, step 2" in call(*command, cwd=tmp_path).stdout


@pytest.mark.slow
def test_evaluation_and_search(begin, eval_path, store_path, tmp_path):
    from mcn_ext.data.clips import ClipReader, collate
    from mcn_ext.data.store import Store
    from mcn_ext.evaluation.search import main as search

    begin("mcn.pth", "--out", "mcn")  # it knows the words of another store; others are looked up
    evaluate = ["evaluate.py", "--youcook2", eval_path, "--device", "cpu", "--run", "mcn"]
    assert "dot" in call(*evaluate, "--keep_embeddings", cwd=tmp_path).stdout
    assert json.loads((tmp_path / "mcn/metrics.json").read_text())["youcook2"]["n"] == 24
    with np.load("mcn/youcook2.npz") as file:
        kept = file["embedding:audio"][:3]
    # The original, on the clips padded with zeros as it was evaluated.
    store, read = Store(eval_path), dict(words=None, max_words=20, audio_frames=5120)
    reader = ClipReader(store, "AV", video_streams=("2d", "3d"), **read)
    net, rows = original(), []
    with torch.inference_mode():
        for i in range(3):
            clip = collate([reader.read(i, [(0, 0)])])
            n = int(clip["n_frames"])
            mel = F.pad(clip["audio"][:, :, :n].float(), (0, PADDING["audio"] - n))
            rows.append(net.audio(mel, clip["n_frames"]))
    np.testing.assert_allclose(kept, torch.cat(rows).half(), rtol=2e-3, atol=2e-3)
    words = ["--store", store_path, "--run", "mcn", "--window", 4, "--device", "cpu", "chop it"]
    assert search([str(word) for word in words]) == 0
