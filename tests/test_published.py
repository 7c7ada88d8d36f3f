"""Published weights: embeddings equal an independent model's; all three scripts start from them."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mcn_ext.data.batch import fill_up
from mcn_ext.model import MCN, load_published
from mcn_ext.prepare import published
from mcn_ext.prepare.published import read_published
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


@pytest.mark.parametrize(
    "padding", [{"audio": 224, "text": 6}, pytest.param(None, marks=pytest.mark.slow)]
)
def test_embeddings_are_the_originals(tmp_path, padding):
    net = original()
    torch.save(net.state_dict(), tmp_path / "x.pth")
    found = read_published(tmp_path / "x.pth")
    model = MCN(**found.fit(DIMS)).eval()
    model.load_state_dict(found.state)
    batch = clips([200, 160, 37, 16], [6, 1, 3, 2], DIMS)
    for name, (difference, largest) in differences(net, model, batch, padding, padding).items():
        assert difference <= 1e-5 and largest > 0.1, name
    apart = differences(net, model, batch, padding, None if padding else {"audio": 224, "text": 6})
    assert apart["audio"][0] > 1e-3 and apart["text"][0] > 1e-3  # padding does matter


@pytest.mark.slow
@pytest.mark.parametrize("padding", [None, published.PADDING])
def test_full_width_embeddings_are_the_originals(tmp_path, padding):
    net = original(dim=1024, video=4096, words=300, width=1, recon=128)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    model = load_published(tmp_path / "x.pth")
    assert model.sizes["video_dims"] == {"2d": 2048, "3d": 2048} and not model.training
    batch = clips([1000, 505, 64], [20, 1, 7], model.sizes["video_dims"], 300)
    for name, (apart, _) in (
        differences(net, model, batch, published.PADDING).items() if not padding else ()
    ):
        print(f"{name}: a clip filled up is {apart:.2g} from the clip alone")
    for name, (difference, largest) in differences(net, model, batch, padding, padding).items():
        print(f"{name}: largest difference {difference:.2g} of {largest:.2g}")
        assert difference <= 1e-5 and difference <= 1e-4 * largest, name


# --------------------------------------------------------------------------------------- scripts

# Sizes are the file's.
FLAGS = [
    word
    for i, word in enumerate(SMALL)
    if not {SMALL[i - i % 2]} & {"--embd_dim", "--recon_dim", "--audio_width"}
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.save(
        {"state_dict": original().state_dict(), "args": argparse.Namespace()}, folder / "mcn.pth"
    )
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
    begin = (
        "train_stage1.py",
        "--pair",
        "VT",
        "--data",
        store_path,
        *FLAGS,
        "--init_published",
        "mcn.pth",
        "--word2vec",
        files / "words.txt",
    )
    done = call(*begin, "--lr", 1e-30, "--max_steps", 1, cwd=tmp_path)
    assert "unused: classification.weight" in done.stdout
    content = torch.load(tmp_path / "runs/stage1-VT/checkpoint.pt", weights_only=True)
    state = original().state_dict()
    assert content["model"].keys() == {
        k
        for k in state
        if k.startswith(("GU_video", "text_pooling", "GU_text", "recon_v", "recon_t"))
    }
    for name, value in content["model"].items():
        torch.testing.assert_close(value, state[name], msg=name)
    args = content["args"]
    assert (args["init_published"], args["embd_dim"], args["recon_dim"]) == ("mcn.pth", 16, 8)
    (tmp_path / "mcn.pth").unlink()
    again = call(*begin, "--lr", 1e-30, cwd=tmp_path)
    assert "going on at step 1" in again.stdout
    fails(
        "--init_published mcn.pth: no such file", *begin, "--lr", 1e-30, "--no-resume", cwd=tmp_path
    )
    torch.save(original(recon=0).state_dict(), tmp_path / "mcn.pth")
    fails("--init_published is another file", *begin, "--lr", 1e-30, cwd=tmp_path)
    call(
        "train_stage2.py",
        "--add",
        "A",
        "--init",
        "runs/stage1-VT",
        "--device",
        "cpu",
        "--max_steps",
        1,
        cwd=tmp_path,
    )  # a run like any other


@pytest.mark.slow
def test_flags_that_disagree_with_the_file_are_named(files, store_path, tmp_path):
    begin = ("train_stage1.py", "--data", store_path, *FLAGS, "--init_published")
    for flag, value, has in (
        ("--embd_dim", 32, 16),
        ("--recon_dim", 4, 8),
        ("--audio_width", 0.125, 0.0625),
    ):
        fails(
            f"{flag} {value}: {files / 'mcn.pth'} has {has}",
            *begin,
            files / "mcn.pth",
            "--pair",
            "AV",
            flag,
            value,
            cwd=tmp_path,
        )
    fails("no text in it, only AV", *begin, files / "avlnet.pth", "--pair", "VT", cwd=tmp_path)
    fails("give them with --word2vec", *begin, files / "mcn.pth", "--pair", "VT", cwd=tmp_path)
    fails(
        "vectors of 3 numbers; the text encoder takes 10",
        *begin,
        files / "mcn.pth",
        "--pair",
        "VT",
        "--word2vec",
        files / "narrow.txt",
        cwd=tmp_path,
    )
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))
    call(
        *begin,
        files / "avlnet.pth",
        "--pair",
        "AV",
        "--recon_dim",
        4,
        "--audio_width",
        0.0625,
        "--max_steps",
        1,
        cwd=tmp_path,
    )  # it has no heads: the flag's
    fails(
        "--init_published None (now",
        "train_stage1.py",
        "--pair",
        "AV",
        "--data",
        store_path,
        *SMALL,
        "--out",
        "plain",
        "--init_published",
        files / "avlnet.pth",
        cwd=plain(tmp_path, store_path),
    )


def plain(folder, store_path):
    call(
        "train_stage1.py",
        "--pair",
        "AV",
        "--data",
        store_path,
        *SMALL,
        "--out",
        "plain",
        "--max_steps",
        1,
        cwd=folder,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["frozen", "finetune"])
def test_stage_2_adds_a_modality_to_published_encoders(files, store_path, tmp_path, how):
    shutil.copy(files / "avlnet.pth", tmp_path)
    begin = (
        "train_stage2.py",
        "--add",
        "T",
        "--init_published",
        "avlnet.pth",
        "--data",
        store_path,
        "--word2vec",
        files / "words.txt",
        "--stage1_encoders",
        how,
        *FLAGS,
    )
    call(*begin, "--max_steps", 2, cwd=tmp_path)
    content = torch.load(tmp_path / "runs/stage2-AV_T/checkpoint.pt", weights_only=True)
    state = original(text=False, recon=0).state_dict()
    moved = [
        name
        for name, value in content["model"].items()
        if name in state and not torch.equal(value, state[name])
    ]
    assert bool(moved) == (how == "finetune")
    assert (
        content["sizes"]["modalities"] == "AVT"
        and content["sizes"]["word_dim"] == 10
        and content["args"]["init_published"] == "avlnet.pth"
    )
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
    fails(
        "vectors of 3 numbers",
        *begin,
        files / "mcn.pth",
        "--word2vec",
        files / "narrow.txt",
        cwd=tmp_path,
    )
    fails("in place of --run", *begin, files / "mcn.pth", "--run", "runs/x", cwd=tmp_path)
    call(*begin, files / "avlnet.pth", "--keep_embeddings", cwd=tmp_path)
    with np.load(*(tmp_path / "runs").glob("published-avlnet-*/youcook2.npz")) as file:
        kept = {name: file[name] for name in file.files}
    # The original, on the clips padded with zeros as it was evaluated.
    from mcn_ext.data.clips import ClipReader, collate
    from mcn_ext.data.store import Store

    reader = ClipReader(
        Store(eval_path),
        video_streams=("2d", "3d"),
        audio=True,
        words=None,
        max_words=20,
        audio_frames=5120,
    )
    net, rows = original(text=False, recon=0), []
    with torch.inference_mode():
        for i in range(3):
            clip = collate([reader.read(i, [(0, 0)])])
            n = int(clip["n_frames"])
            mel = F.pad(clip["audio"][:, :, :n].float(), (0, published.PADDING["audio"] - n))
            rows.append(net.audio(mel, clip["n_frames"]))
    np.testing.assert_allclose(
        kept["embedding:audio"][:3], torch.cat(rows).half(), rtol=2e-3, atol=2e-3
    )
