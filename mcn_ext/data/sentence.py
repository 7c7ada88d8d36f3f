"""Sentence encoders of sentence-transformers, frozen: a text -> one unit vector."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import torch

_LOADING = logging.getLogger("transformers.modeling_utils")
# In the order in which transformers looks for them: the first that is there is loaded.
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
# The same weights for other libraries, which would be downloaded in vain.
_OTHERS = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot"]


def _library():
    """sentence-transformers, made quiet. SystemExit if it is missing, or too old to be safe."""
    try:
        import sentence_transformers
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        version = sentence_transformers.__version__
        if int(version.split(".")[0]) < 6:
            raise ImportError(f"{version} may run code that it finds in a model's folder")
    except ImportError as error:
        raise SystemExit(
            "a sentence encoder needs sentence-transformers: pip install sentence-transformers (or "
            f"pip install -e '.[sentence]'), 6 or newer ({error})"
        ) from error
    disable_progress_bar()
    disable_progress_bars()
    for name in ("sentence_transformers", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _LOADING.setLevel(logging.WARNING)  # for _refuse_missing, which lets none through
    return sentence_transformers


def _refuse_missing(record: logging.LogRecord) -> bool:
    """Make transformers' report of missing weights, which it fills in at random, an error."""
    missing = re.findall(r"^(\S.*?) +\|.*MISSING", record.getMessage(), re.MULTILINE)
    # Sentence encoders make no use of the pooler, which some therefore lack.
    if lost := [name for name in missing if "pooler." not in name]:
        raise ValueError(f"its files lack some of its weights, such as {lost[0]}")
    return False


def _weights(folder: Path) -> list[Path]:
    """The files of weights that are loaded from a model's folder; ValueError if there is none."""
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text()) if listed.exists() else [{"path": ""}]
    paths = []
    for part in sorted({folder / module["path"] for module in modules}):
        paths += next((found for glob in _WEIGHTS if (found := sorted(part.glob(glob)))), [])
    if not paths:
        raise ValueError(f"no model.safetensors or pytorch_model.bin in {folder}")
    return paths


class SentenceEncoder:
    """``name``: a folder, or a name on huggingface.co, which is downloaded once. ``device``: where
    it runs (default: a GPU if any). ``dim``: width of its vectors; ``sha256``: hex digest of its
    files of weights.

    No code of the model is run, and pickles are read with weights_only. SystemExit if it cannot be
    loaded, or weights are missing, which would be random numbers.
    """

    def __init__(self, name: str, device: torch.device | str | None = None):
        self.name, library = name, _library()
        try:
            folder = Path(name)
            if not folder.is_dir():
                from huggingface_hub import snapshot_download

                # As sentence-transformers does: a name without an owner is one of theirs.
                repository = name if "/" in name else f"sentence-transformers/{name}"
                folder = Path(snapshot_download(repository, ignore_patterns=_OTHERS))
            digest = hashlib.sha256()
            for path in _weights(folder):
                digest.update(path.read_bytes())
            self.sha256 = digest.hexdigest()
            _LOADING.addFilter(_refuse_missing)
            # fork_rng: to load an encoder must not change the numbers that a run draws.
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._model = library.SentenceTransformer(
                    str(folder),
                    device=str(device or ("cuda" if torch.cuda.is_available() else "cpu")),
                    trust_remote_code=False,
                    local_files_only=True,
                    # In half precision, as some are stored, a text's vector depends on its batch.
                    model_kwargs={"dtype": torch.float32},
                )
            onion, dogs = self.encode(["chop the onion", "two dogs bark"])
            # Where there is no tokenizer, the library makes one up that knows no word.
            if np.allclose(onion, dogs, atol=1e-4):
                raise ValueError("it gives unlike texts the same vector; is its tokenizer there?")
        except Exception as error:  # huggingface_hub, transformers and json raise a dozen types
            # The first sentence: what follows may advise to let the model's code run.
            reason = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
            raise SystemExit(
                f"{name}: not a sentence encoder that can be loaded ({reason}); give a folder with "
                "config.json, a tokenizer and model.safetensors, or a name on huggingface.co, such "
                "as all-MiniLM-L6-v2, which needs a connection the first time"
            ) from error
        finally:
            _LOADING.removeFilter(_refuse_missing)
        self.dim = len(onion)

    def encode(self, texts: list[str], progress: bool = False) -> np.ndarray:
        """Unit vectors (n, dim) float32 of texts; ``progress``: with a bar."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        vectors = self._model.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=progress
        )
        return np.asarray(vectors, np.float32)
