"""Files of published weights: layouts, what does not fit, what is hostile or damaged; converter."""

import argparse
import builtins
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from mcn_ext.model import load_published
from mcn_ext.prepare.published import main, read_published
from tests.test_published import DIMS, original

SLOW = (pytest.mark.slow,)

# ------------------------------------------------------------------------- layouts and wrappers


def test_every_tensor_is_used_or_named(tmp_path, capsys):
    state = original().state_dict()
    torch.save(
        {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3},
        tmp_path / "x.pth",
    )
    found = read_published(tmp_path / "x.pth")
    assert (
        found.sizes
        == {
            "modalities": "AVT",
            "embd_dim": 16,
            "word_dim": 10,
            "recon_dim": 8,
            "audio_width": 1 / 16,
        }
        and found.video_width == 18
    )
    assert set(found.unused) == {"classification.weight", "optimizer.state.0.exp_avg"}
    assert found.state.keys() | {"classification.weight"} == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state.items())
    assert not found.missing and not found.not_read
    model = load_published(tmp_path / "x.pth", DIMS)
    assert model.sizes["modalities"] == "AVT" and model.sizes["video_dims"] == DIMS
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "classification.weight, optimizer.state.0.exp_avg" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}},
        lambda s: {"model_state_dict": {f"module.model.{k}": v for k, v in s.items()}},
        lambda s: {"net": s, "loss": 0.5},
    ],
)
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
    sound_free = {
        k: v
        for k, v in original(recon=0).state_dict().items()
        if "audio" not in k and "DAVEnet" not in k
    }
    torch.save(sound_free, tmp_path / "x.pth")
    assert load_published(tmp_path / "x.pth", DIMS).sizes["modalities"] == "VT"


def change(name, value):
    return lambda state: state.__setitem__(name, value)


BROKEN = {
    "GU_video.cg.fc.bias is missing, expected (16,)": lambda s: s.pop("GU_video.cg.fc.bias"),
    r"GU_audio.fc.weight is (3, 64) torch.float32, expected (64, 64)": change(
        "GU_audio.fc.weight", torch.zeros(3, 64)
    ),
    "recon_t.2.bias is missing": lambda s: s.pop("recon_t.2.bias"),
    "recon_a.0.weight is (9, 16)": change("recon_a.0.weight", torch.zeros(9, 16)),
    "GU_text_captions.fc.bias has numbers that are not finite": change(
        "GU_text_captions.fc.bias", torch.full((16,), torch.nan)
    ),
    "is (16,) torch.int64": change("GU_text_captions.fc.bias", torch.zeros(16, dtype=torch.int64)),
    "DAVEnet's stages are [8, 8, 17, 32, 64] wide": change(
        "DAVEnet.layer2.1.bn2.weight", torch.ones(17)
    ),
    "the audio-text fused variant (GU_audio_text": change(
        "GU_audio_text.fc_text.weight", torch.ones(2)
    ),
    "DAVEnet v2": change("DAVEnet.layer5.0.bn1.weight", torch.ones(2)),
    "DAVEnet_projection.weight is missing": lambda s: s.pop("DAVEnet_projection.weight"),
    "several models": change("net.GU_video.fc.weight", torch.ones(2, 2)),
    "no published model in it": lambda s: [s.pop(k) for k in list(s) if "classif" not in k],
}


@pytest.mark.parametrize(
    "message", [pytest.param(m, marks=SLOW * (i > 0)) for i, m in enumerate(BROKEN)]
)
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
def test_plain_values_are_read_and_classes_refused(tmp_path, legacy):
    path, state = tmp_path / "x.pth", original(recon=0).state_dict()
    args, best = argparse.Namespace(lr=1e-3, names=["a"]), {"x": torch.ones(2)}
    content = {"state_dict": state, "args": args, "score": np.float64(1.5), "best": [best]}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read_published(path)
    assert found.unused == ["classification.weight", "best.0.x"]
    assert all(torch.equal(value, state[name]) for name, value in found.state.items())
    for value in (Config(), original(recon=0)):
        torch.save(content | {"x": value}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(SystemExit, match="x.pth: damaged, or more than .* save its state_dict"):
            read_published(path)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.slow
@pytest.mark.parametrize(
    "value",
    [
        lambda file: Call(builtins.eval, f"open({str(file)!r}, 'w')"),
        lambda file: Call(getattr, Call(builtins.__import__, "os"), "system"),
        lambda file: OrderedDict({Bomb(file): [Bomb(file)]}),
        lambda file: {Bomb(file)},
        lambda file: Bomb(file),
    ],
)
def test_hostile_values_do_nothing(tmp_path, value):
    torch.save(
        {"state_dict": original(recon=0).state_dict(), "x": value(tmp_path / "gone-off")},
        tmp_path / "x.pth",
    )
    with pytest.raises(SystemExit, match="x.pth"):
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
        torch.save(
            {"s": original(recon=0).state_dict(), "a": argparse.Namespace()},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        data = path.read_bytes()
        for cut in (0, 5, 100, len(data) // 2, len(data) - 5):
            bad.write_bytes(data[:cut])
            with pytest.raises(SystemExit, match="bad.pth"):
                read_published(bad)
    torch.save({"s": torch.arange(4.0), "a": argparse.Namespace()}, path)
    rewritten(path, bad, lambda name, data: data[:-4] if "/data/" in name else data)
    with pytest.raises(SystemExit, match="bad.pth"):
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


# ------------------------------------------------------------------------------------- converter


@pytest.mark.slow
def test_converter_and_safetensors(tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "x.pth", tmp_path / "x.safetensors"
    torch.save({"state_dict": original().state_dict(), "args": argparse.Namespace()}, source)
    assert main([str(source)]) == 0 and not out.exists()
    text = capsys.readouterr().out
    assert all(
        part in text
        for part in (
            "audio video text",
            "embd_dim 16",
            "video 18",
            "classification.weight",
        )
    ), text
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
