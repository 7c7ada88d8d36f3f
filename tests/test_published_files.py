"""Files of published weights: their layouts, what does not fit, what is hostile or damaged."""

import argparse
import os
import sys

import numpy as np
import pytest
import torch

from mcn_ext.model import load_published
from mcn_ext.prepare.published import read_published
from tests.test_published import DIMS, original


@pytest.fixture
def read(tmp_path):
    """Saves a value and reads it as published weights."""

    def save(content, legacy=False, pair=None):
        path = tmp_path / "x.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return read_published(path, DIMS, pair)

    return save


def test_every_tensor_is_used_or_named(read, tmp_path, capsys):
    state = original().state_dict()
    found = read({"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}})
    sizes = {"modalities": "AVT", "video_dims": DIMS, "embd_dim": 16, "word_dim": 10}
    assert found.sizes == sizes | {"recon_dim": 8, "audio_width": 1 / 16}
    assert found.unused == ["classification.weight", "optimizer.state.0.exp_avg"]
    assert found.state.keys() | {"classification.weight"} == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state.items())
    assert not found.missing
    load_published(tmp_path / "x.pth", DIMS)
    assert "classification.weight, optimizer.state.0.exp_avg" in capsys.readouterr().out


@pytest.mark.parametrize("legacy", [True, False])
def test_prefixes_wrappers_and_the_legacy_format(read, legacy):
    state = original().state_dict()
    for content in (
        {f"module.{name}": value for name, value in state.items()},
        {"state_dict": {f"net.{name}": value for name, value in state.items()}},
        {"model_state_dict": {f"module.model.{name}": value for name, value in state.items()}},
        {"net": state, "loss": 0.5},
        {f"_orig_mod.{name}": value for name, value in state.items()},
        {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        {f"_orig_mod.module.{name}": value for name, value in state.items()},
        {name.replace(".", "._orig_mod.", 1): value for name, value in state.items()},
        {f"_fsdp_wrapped_module.{name}": value for name, value in state.items()},
        {name.replace("fc.", "_checkpoint_wrapped_module.fc."): v for name, v in state.items()},
    ):
        found = read(content, legacy)
        assert found.unused == ["classification.weight"] and len(found.state) == len(state) - 1


def test_avlnet_old_files_half_precision_and_some_heads(read):
    state = original(text=False, recon=0).state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    found = read({name: state[name].half() for name in state if name not in counters})
    assert found.sizes["modalities"] == "AV" and found.sizes["recon_dim"] == 0
    assert found.missing == counters and len(counters) == 21
    assert found.state["GU_video.fc.weight"].dtype == torch.float32
    state = original().state_dict()
    partly = {name: value for name, value in state.items() if not name.startswith("recon_a")}
    found = read(partly)
    assert found.sizes["recon_dim"] == 0 and "recon_v.0.weight" in found.unused
    assert read(state, pair="AV").sizes["recon_dim"] == 8
    silent = {n: v for n, v in partly.items() if "audio" not in n and "DAVEnet" not in n}
    assert read(silent).sizes["modalities"] == "VT"


def put(name, value):
    return lambda state: state.__setitem__(name, value)


BROKEN = {
    "GU_video.cg.fc.bias is missing, expected (16,)": lambda s: s.pop("GU_video.cg.fc.bias"),
    "GU_audio.fc.weight is (3, 64) torch.float32, expected (64, 64)": put(
        "GU_audio.fc.weight", torch.zeros(3, 64)
    ),
    "recon_t.2.bias is missing": lambda s: s.pop("recon_t.2.bias"),
    "GU_text_captions.fc.bias has numbers that are not finite": put(
        "GU_text_captions.fc.bias", torch.full((16,), torch.nan)
    ),
    "is (16,) torch.int64": put("GU_text_captions.fc.bias", torch.zeros(16, dtype=torch.int64)),
    "DAVEnet.layer2.1.bn2.weight is (17,)": put("DAVEnet.layer2.1.bn2.weight", torch.ones(17)),
    "the audio-text fused variant (GU_audio_text": put("GU_audio_text.fc_text", torch.ones(2)),
    "DAVEnet v2": put("DAVEnet.layer5.0.bn1.weight", torch.ones(2)),
    "several models": put("net.GU_video.fc.weight", torch.ones(2, 2)),
    "GU_video takes 20 numbers": put("GU_video.fc.weight", torch.zeros(16, 20)),
    "no published model in it": lambda s: [s.pop(k) for k in list(s) if "classif" not in k],
    "a checkpoint of this program": put("mcn_checkpoint", 1),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_fit_is_named(read, message):
    state = original().state_dict()
    BROKEN[message](state)
    with pytest.raises(SystemExit) as error:
        read(state)
    assert "x.pth: " in str(error.value) and message in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch gone-off",)


@pytest.mark.parametrize("legacy", [True, False])
def test_settings_beside_the_weights(read, legacy):
    state = original(recon=0).state_dict()
    content = {"state_dict": state, "args": argparse.Namespace(lr=1e-3, names=["a"])}
    content |= {"score": np.float64(1.5), "best": {"x": torch.ones(2)}}
    found = read(content, legacy)
    assert found.unused == ["classification.weight", "best.x"]
    assert len(found.state) == len(state) - 1


@pytest.mark.parametrize("legacy", [True, False])
def test_nothing_in_a_file_is_executed(read, tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    state = original(recon=0).state_dict()
    for value in (Bomb(), {"x": [Bomb()]}, original()):
        with pytest.raises(SystemExit, match="Nothing in it was run"):
            read({"state_dict": state, "x": value}, legacy)
    assert not (tmp_path / "gone-off").exists()


def test_damaged_files_are_an_error(tmp_path):
    bad = tmp_path / "bad.pth"
    for legacy in (False, True):
        torch.save(original().state_dict(), bad, _use_new_zipfile_serialization=not legacy)
        data = bytearray(bad.read_bytes())
        for cut in (0, 5, 100, len(data) // 2, len(data) - 5):
            bad.write_bytes(data[:cut])
            with pytest.raises(SystemExit, match="bad.pth"):
                read_published(bad)
        if not legacy:
            data[len(data) // 2] ^= 1
            bad.write_bytes(data)
            with pytest.raises(SystemExit, match="checksum"):
                read_published(bad)
    with pytest.raises(SystemExit, match="no such file"):
        read_published(tmp_path / "gone.pth")


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    state, path = original().state_dict(), tmp_path / "x.safetensors"
    safetensors.save_file(state, path)
    found = read_published(path, DIMS)
    assert all(torch.equal(value, state[name]) for name, value in found.state.items())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SystemExit, match="x.safetensors: damaged"):
        read_published(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match="pip install safetensors"):
        read_published(path)
