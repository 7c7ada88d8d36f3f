"""Published weights -> a run folder, which the scripts take like any other run.

    python -m mcn_ext.prepare published mcn.pth --out runs/published-mcn
    python evaluate.py --youcook2 --run runs/published-mcn

Reads state dicts of the published tri-modal k-means model, of AVLnet (audio and video) and of
AVLnet-Text, as .pth/.pt (zip or legacy) or .safetensors. Nothing that a file names is imported or
called.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mcn_ext.data.store import Store, StoreError
from mcn_ext.data.unpickle import PLAIN
from mcn_ext.data.words import WordVectors, tokenize, vectors_of
from mcn_ext.modalities import MODALITIES
from mcn_ext.model import MCN
from mcn_ext.prepare import require
from mcn_ext.train import checkpoint, flags
from mcn_ext.train.log import write_text

WRAPPERS = {"state_dict", "model_state_dict", "model", "net"}  # around a state dict
# Parts of names that torch.compile, DistributedDataParallel, FSDP and checkpointing add.
ADDED = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The last layer of each modality's encoder, as wide as the joint space.
LAST = {"A": "DAVEnet_projection.bias", "V": "GU_video.fc.bias", "T": "GU_text_captions.fc.bias"}
STREAMS = {4096: {"2d": 2048, "3d": 2048}, 2048: {"2d": 2048}}
DAVENET_WIDTH = 1024  # channels of the published audio encoder
PADDING = {"audio": 5120, "text": 20}  # the published evaluation pads clips to these lengths
# Models that share names with ours, and would load in part, as nonsense.
OTHER_MODELS = {
    "GU_audio_text.": "the audio-text fused variant (GU_audio_text, tri_modal_fuse)",
    "nat_DAVEnet.": "the variant with a second DAVEnet for natural sound (nat_DAVEnet)",
    "DAVEnet.layer5.": "a model on DAVEnet v2, with a fifth stage (DAVEnet.layer5)",
    "video_encoder.": "a model with an encoder before GU_video (video_encoder, finetune_video)",
}


@dataclass
class Published:
    """What a file holds. ``state``: our names -> tensors, fp32 on the CPU. ``sizes``: arguments of
    MCN. ``unused``, ``missing``: names of tensors that the model has no use for, and that the file
    lacks (counters, which start at 0)."""

    path: Path
    state: dict[str, Tensor]
    sizes: dict
    unused: list[str]
    missing: list[str]
    sha256: str

    def notice(self) -> str:
        """What was read, and by name what was not used and not there."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items())
        n = sum(value.numel() for value in self.state.values())
        return "\n".join(
            [
                f"{self.path}: {sizes}; {len(self.state)} tensors used, {n:,} numbers",
                f"  unused:     {_brief(self.unused)}",
                f"  not in it:  {_brief(self.missing)}",
            ]
        )


def _brief(names: Iterable[str]) -> str:
    """Names; of those with the same first part only how many."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    shown = (few[0] if len(few) == 1 else f"{head}.* ({len(few)})" for head, few in groups.items())
    return ", ".join(shown) or "nothing"


# --------------------------------------------------------------------------------- reading a file


def _load(path: Path) -> object:
    """Whatever the file holds: tensors and plain values, in dictionaries."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file of published weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
                if bad := archive.testzip():
                    raise ValueError(f"the checksum of {bad} is wrong; get the file again")
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise SystemExit(f"{path}: needs safetensors: pip install safetensors") from error
    except Exception as error:  # torch, zip, pickle and safetensors raise a dozen types for damage
        reason = str(error).strip().replace("\n", " ")[-400:]
        raise SystemExit(
            f"{path}: damaged, or more than tensors and plain values ({reason}). Nothing in it was "
            "run. If you trust the file, save its state_dict() alone with torch.save"
        ) from error


def tensors(content: object, at: str = "") -> dict[str, Tensor]:
    """All tensors in nested dictionaries, by their path without WRAPPERS before it, and ADDED."""
    if isinstance(content, Tensor):
        return {at: content.detach()}
    found: dict[str, Tensor] = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        parts = [part for part in f"{at}.{key}".split(".") if part and part not in ADDED]
        while parts and parts[0] in WRAPPERS:
            parts = parts[1:]
        for inner, tensor in tensors(value, ".".join(parts)).items():
            if inner in found:
                raise ValueError(f"several models in it: two tensors are {inner}")
            found[inner] = tensor
    return found


def _sizes(state: dict[str, Tensor], video_dims: Mapping[str, int] | None) -> dict:
    """Arguments of MCN, from the tensors' shapes."""

    def size(name: str, axis: int) -> int:
        if name not in state:
            raise ValueError(f"{name} is missing, from which the model's sizes are taken")
        return state[name].shape[axis]

    modules = {name.split(".")[0] for name in state}
    letters = "".join(m for m in "AVT" if modules & set(MODALITIES[m].modules[:-1]))
    if not letters:
        raise ValueError(f"no published model in it; it has {_brief(state)}")
    sizes = {
        "modalities": letters,
        "video_dims": dict(video_dims or STREAMS[4096]),
        "word_dim": size("text_pooling_caption.fc.weight", 1) if "T" in letters else 300,
        "embd_dim": size(LAST[letters[-1]], 0),
        "recon_dim": 0,
        "audio_width": 1.0,
    }
    heads = [MODALITIES[m].modules[-1] for m in letters]
    if modules.issuperset(heads):  # else all heads start anew
        sizes["recon_dim"] = size(f"{heads[0]}.0.weight", 0)
    if "A" in letters:
        sizes["audio_width"] = size("DAVEnet.layer4.1.bn2.weight", 0) / DAVENET_WIDTH
    if "V" in letters:
        width = size("GU_video.fc.weight", 1)
        usual = STREAMS.get(width, {})
        if usual and (not video_dims or usual.items() <= video_dims.items()):
            sizes["video_dims"] = usual
        elif sum((video_dims or {}).values()) != width:
            raise ValueError(
                f"GU_video takes {width} numbers, a video's streams one after the other; given: "
                f"{video_dims}. Give --data (or video_dims) with streams whose widths add up to it"
            )
    return sizes


def _fit(state: dict[str, Tensor], sizes: dict) -> tuple[dict[str, Tensor], list[str]]:
    """(the model's tensors, names of those that the file lacks); ValueError for what does not
    fit."""
    with torch.random.fork_rng(devices=[]):
        expected = MCN(**sizes).state_dict()
    used, missing, wrong = {}, [], []
    for name, like in expected.items():
        value, shape = state.get(name), tuple(like.shape)
        if value is None and name.endswith("num_batches_tracked"):  # files older than torch 0.4.1
            used[name] = torch.zeros_like(like)
            missing.append(name)
        elif value is None:
            wrong.append(f"{name} is missing, expected {shape}")
        elif value.shape != shape or value.is_floating_point() != like.is_floating_point():
            found = f"{tuple(value.shape)} {value.dtype}"
            wrong.append(f"{name} is {found}, expected {shape} {like.dtype}")
        elif not torch.isfinite(value).all():
            wrong.append(f"{name} has numbers that are not finite")
        else:
            used[name] = value.to(like.dtype).contiguous()
    if wrong:
        more = f"; and {len(wrong) - 3} more" if wrong[3:] else ""
        raise ValueError("; ".join(wrong[:3]) + more)
    return used, missing


def read_published(
    path, video_dims: Mapping[str, int] | None = None, pair: str | None = None
) -> Published:
    """Every tensor of a file of published weights, used or named.

    video_dims: {stream: width}, needed where the file's video is neither 4096 wide (2d and 3d, 2048
    each) nor 2048 (2d). pair: letters of modalities; others are left out.

    SystemExit names the file, and the tensor with its shape and the expected one: for a missing
    tensor, another shape, numbers that are not finite, another model, a damaged file.
    """
    path = Path(path)
    content = _load(path)
    if isinstance(content, dict) and "mcn_checkpoint" in content:
        raise SystemExit(
            f"{path}: a checkpoint of this program, not published weights; give its "
            "folder to train_stage2.py --init or evaluate.py --run"
        )
    try:
        state = tensors(content)
        for prefix, description in OTHER_MODELS.items():
            if any(name.startswith(prefix) for name in state):
                raise ValueError(f"{description}: another model; its embeddings would be wrong")
        asked = state
        if pair:
            modules = [module for m in pair for module in MODALITIES[m].modules]
            asked = {name: t for name, t in state.items() if name.split(".")[0] in modules}
        sizes = _sizes(asked, video_dims)
        if lacking := [MODALITIES[m].name for m in pair or "" if m not in sizes["modalities"]]:
            raise ValueError(f"--pair {pair}: no {' and no '.join(lacking)} in it")
        used, missing = _fit(asked, sizes)
    except (ValueError, IndexError) as error:  # IndexError: a tensor of fewer axes
        raise SystemExit(f"{path}: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    unused = [name for name in state if name not in used]
    return Published(path, used, sizes, unused, missing, digest)


# ----------------------------------------------------------------------------------- a run folder


def _open_stores(data: list[Path] | None) -> list[Store]:
    paths = data or [path for path in (flags.DATA, *flags.STORES.values()) if path.exists()]
    try:
        return [Store(path) for path in paths]
    except StoreError as error:
        raise SystemExit(f"--data {error}") from None


def _words(word2vec: Path, stores: list[Store], dim: int) -> WordVectors:
    """Vectors of the words of all captions of the stores."""
    if not stores:
        raise SystemExit(
            "--data: the text encoder needs the vectors of the words it will meet; give the stores "
            "that it will be trained or evaluated on"
        )
    require("--word2vec: the text encoder needs the vectors it was trained on;", word2vec)
    seen = {word for store in stores for text in store.texts() for word in tokenize(text)}
    words = vectors_of(seen, word2vec, ", ".join(str(store.path) for store in stores))
    if words.dim != dim:
        raise SystemExit(
            f"--word2vec {word2vec}: vectors of {words.dim} numbers; the text encoder takes {dim}"
        )
    return words


def prepare(
    file: Path,
    out: Path,
    *,
    data: list[Path] | None = None,
    word2vec: Path | None = None,
    pair: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write the run folder ``out``: checkpoint.pt, args.json, and words.npz if there is text.

    Its settings are those of the published training and evaluation: the dot product at temperature
    1, clips padded to PADDING. Returns the summary that is printed.
    """
    checkpoint.lock(out)
    if (out / checkpoint.LATEST).exists() and not overwrite:
        raise SystemExit(f"{out} holds a run; pass --overwrite to replace it, or another --out")
    stores = _open_stores(data)
    dims = stores[0].streams("V") if stores else None
    found = read_published(file, dims, pair)
    sizes, words = found.sizes, None
    has_text = "T" in sizes["modalities"]
    word2vec = word2vec or flags.WORD2VEC
    if has_text:
        words = _words(word2vec, stores, sizes["word_dim"])
    run_id = found.sha256[:16]
    args = {
        "pair": sizes["modalities"],
        "init_published": str(file),
        "init_run_id": run_id,
        "data": str(stores[0].path if stores else flags.DATA),
        "word2vec": str(word2vec) if has_text else None,
        "preset": "paper",
        "demo": False,
        "epochs": 0,
        "embd_dim": sizes["embd_dim"],
        "recon_dim": sizes["recon_dim"] or 1024,
        "audio_width": sizes["audio_width"],
        "audio_frames": 1000,
        "min_time": 10.0,
        "max_words": PADDING["text"],
        "similarity": "dot",
        "temperature": 1.0,
        "seed": 0,
    }
    out.mkdir(parents=True, exist_ok=True)
    if words:
        words.save(out / "words.npz")
    write_text(out / "args.json", json.dumps(args, indent=1) + "\n")
    content = {"args": args, "sizes": sizes, "step": 0, "complete": True, "run_id": run_id}
    content |= {"mcn_checkpoint": checkpoint.FORMAT, "model": found.state, "padding": PADDING}
    checkpoint.write(out / checkpoint.LATEST, content)  # last: without it there is no run
    return (
        f"{found.notice()}\n{out}: a run of {len(found.state)} tensors. Next: python evaluate.py "
        f"--youcook2 --run {out}, or python train_stage2.py --init {out}"
    )
