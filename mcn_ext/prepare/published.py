"""Published weights -> our model: what a file holds, what is used of it, what is not.

    python -m mcn_ext.published FILE                            # describe
    python -m mcn_ext.published FILE --out FILE.safetensors     # and convert

Reads state dicts of the published tri-modal k-means model, of AVLnet (audio and video) and of
AVLnet-Text, as .pth/.pt (zip or legacy) or .safetensors. Nothing that a file names is imported or
called.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mcn_ext.data.store import Store
from mcn_ext.data.unpickle import PLAIN
from mcn_ext.data.words import WordVectors, vectors_for
from mcn_ext.encoders import davenet_widths
from mcn_ext.model import MCN, MODALITIES, MODULES
from mcn_ext.train import checkpoint, flags, training
from mcn_ext.train.log import replace, say

WRAPPERS = {"state_dict", "model_state_dict", "model", "net", "module"}
STREAMS = {4096: {"2d": 2048, "3d": 2048}, 2048: {"2d": 2048}}
PADDING = {"audio": 5120, "text": 20}  # to which the published evaluation filled clips up
# Models that share names with ours, and would load in part, as nonsense.
OTHER_MODELS = {
    "GU_audio_text.": "the audio-text fused variant (GU_audio_text, tri_modal_fuse)",
    "nat_DAVEnet.": "the variant with a second DAVEnet for natural sound (nat_DAVEnet)",
    "DAVEnet.layer5.": "a model on DAVEnet v2, with a fifth stage (DAVEnet.layer5)",
    "video_encoder.": "a model with an encoder before GU_video (video_encoder, finetune_video)",
}
EXTRA = "needs safetensors: pip install safetensors, or pip install -e '.[published]'"


@dataclass
class Published:
    """What a file holds. ``state``: our names -> tensors, fp32 on the CPU; ``sizes``: arguments of
    MCN, but ``video_dims`` of :meth:`fit`; ``unused``, ``missing``, ``not_read``: names of tensors
    that the model has no use for, that it has and the file has not (heads start anew, counters at
    0), and of objects that only a placeholder was made for."""

    path: Path
    state: dict[str, Tensor]
    sizes: dict
    unused: list[str]
    missing: list[str]
    not_read: list[str]
    sha256: str

    @property
    def video_width(self) -> int:
        return self.state["GU_video.fc.weight"].shape[1] if "V" in self.sizes["modalities"] else 0

    def fit(self, video_dims: Mapping[str, int] | None = None) -> dict:
        """Arguments of MCN, video streams from ``video_dims`` where the width is not a published
        one; SystemExit if they do not add up to it."""
        width, usual = self.video_width, STREAMS.get(self.video_width)
        if not width:
            return self.sizes | {"video_dims": dict(video_dims or STREAMS[4096])}
        if usual and (video_dims is None or usual.items() <= video_dims.items()):
            return self.sizes | {"video_dims": dict(usual)}
        if video_dims is None or sum(video_dims.values()) != width:
            given = ", ".join(f"{k} {n}" for k, n in (video_dims or {}).items()) or "none"
            raise SystemExit(
                f"{self.path}: GU_video takes {width} numbers, a video's streams one after the "
                f"other; given: {given}. Give video_dims (or data) whose widths add up to it, such "
                f"as {usual or {'2d': width}}"
            )
        return self.sizes | {"video_dims": dict(video_dims)}

    def notice(self) -> str:
        """One line: what was read, and by name what was not used, not there, not read."""
        parts = [
            f"{self.path}: {self.sizes['modalities']}, {self.sizes['embd_dim']} wide, "
            f"{len(self.state)} tensors used"
        ]
        for what, names in (
            ("unused", self.unused),
            ("not in it", self.missing),
            ("not read", self.not_read),
        ):
            if names:
                parts.append(f"{what}: {_brief(names)}")
        return "; ".join(parts)


def _brief(names: Iterable[str]) -> str:
    """Names, of those that start alike only how many."""
    names = list(names)
    counts = Counter(name.partition(".")[0] for name in names)
    single = {name.partition(".")[0]: name for name in names}
    return ", ".join(single[head] if n == 1 else f"{head}.* ({n})" for head, n in counts.items())


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise SystemExit(f".safetensors {EXTRA}") from error
    return safetensors


def _content(path: Path) -> tuple[object, list[str]]:
    """(whatever the file holds, names of what became a placeholder)."""
    with open(path, "rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        library = _safetensors()
        try:
            return library.torch.load_file(path), []
        except (library.SafetensorError, ValueError, KeyError) as error:
            raise SystemExit(f"{path}: damaged, not a safetensors file ({error})") from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
                if bad := archive.testzip():
                    raise SystemExit(
                        f"{path}: damaged: the checksum of {bad} is wrong; get the file again"
                    )
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True), []
    except Exception as error:  # for damage, torch raises a dozen types
        raise SystemExit(
            f"{path}: damaged, or more than tensors and plain values in it ({_first_line(error)}). "
            "Nothing in it was run. Where its code is at hand, load it and save its state_dict() "
            "with torch.save"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _tensors(content: object, prefix: str = "") -> dict[str, Tensor]:
    """All tensors in dictionaries and lists, by their path ("state_dict.module.conv1.weight")."""
    if isinstance(content, Tensor):
        return {prefix: content.detach()}
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    found: dict[str, Tensor] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        found |= _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _find(path: Path, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the model's tensors without prefix, names of all others)."""
    anchors = [
        name
        for name in ("GU_video.fc.weight", "DAVEnet.conv1.weight", "GU_text_captions.fc.weight")
    ]
    prefixes = sorted(
        {name[: -len(anchor)] for name in found for anchor in anchors if name.endswith(anchor)}
    )
    prefixes = [
        p for p in prefixes if not p or (p.endswith(".") and set(p[:-1].split(".")) <= WRAPPERS)
    ]
    if len(prefixes) != 1:
        raise SystemExit(
            f"{path}: {'several models' if prefixes else 'no published model'} in it (looked for "
            f"{', '.join(anchors)}, also under {', '.join(sorted(WRAPPERS))}); it has "
            + (_brief(prefixes if prefixes else found) or "no tensors")
        )
    begin = len(prefixes[0])
    inside = {name[begin:]: t for name, t in found.items() if name.startswith(prefixes[0])}
    return inside, [name for name in found if not name.startswith(prefixes[0])]


def _sizes(path: Path, state: dict[str, Tensor]) -> tuple[dict, int]:
    """(arguments of MCN, width of the video)."""

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].ndim <= axis:
            shape = tuple(state[name].shape) if name in state else "missing"
            raise SystemExit(f"{path}: {name} is {shape}, which the model's sizes are taken from")
        return state[name].shape[axis]

    has = {
        letter: any(key.split(".")[0] in MODULES[name][:-1] for key in state)
        for letter, name in MODALITIES.items()
    }
    letters = "".join(letter for letter in "AVT" if has[letter])
    sizes = {
        "modalities": letters,
        "word_dim": 300,
        "audio_width": 1.0,
        "recon_dim": 0,
        "embd_dim": size(
            {
                "A": "DAVEnet_projection.weight",
                "V": "GU_video.fc.weight",
                "T": "GU_text_captions.fc.weight",
            }[letters[-1]],
            0,
        ),
    }
    heads = {
        name
        for name in ("recon_v", "recon_a", "recon_t")
        if any(key.startswith(f"{name}.") for key in state)
    }
    hidden = Counter(size(f"{name}.0.weight", 0) for name in sorted(heads))
    sizes["recon_dim"] = hidden.most_common(1)[0][0] if hidden else 0
    if has["T"]:
        sizes["word_dim"] = size("text_pooling_caption.fc.weight", 1)
    if has["A"]:
        widths = [
            size(f"DAVEnet.{n}.weight", 0)
            for n in ("bn1", *(f"layer{i}.1.bn2" for i in range(1, 5)))
        ]
        sizes["audio_width"] = widths[-1] / davenet_widths(1.0)[-1]
        if davenet_widths(sizes["audio_width"]) != widths:
            raise SystemExit(
                f"{path}: DAVEnet's stages are {widths} wide, expected "
                f"{davenet_widths(sizes['audio_width'])} of one that ends {widths[-1]} wide"
            )
    return sizes, size("GU_video.fc.weight", 1) if has["V"] else 0


def read_published(path) -> Published:
    """Every tensor of a file of published weights, used or named.

    SystemExit names the file, and the tensor with its shape and the expected one: for a missing
    tensor, another shape, numbers that are not finite, another model, a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"{path}: no such file of published weights")
    content, not_read = _content(path)
    if isinstance(content, dict) and "mcn_checkpoint" in content:
        raise SystemExit(
            f"{path}: a checkpoint of this program, not published weights; give its "
            "folder to train_stage2.py --init or evaluate.py --run"
        )
    state, unused = _find(path, _tensors(content))
    for prefix, description in OTHER_MODELS.items():
        if any(key.startswith(prefix) for key in state):
            raise SystemExit(
                f"{path}: {description}: another model, whose embeddings this one cannot compute"
            )
    sizes, video_width = _sizes(path, state)
    with torch.random.fork_rng(devices=[]):  # for its shapes; on "meta" this takes 4 s of imports
        expected = MCN(**sizes, video_dims={"all": video_width}).state_dict()
    heads = {key.split(".")[0] for key in expected if key.startswith("recon_")}
    heads -= {key.split(".")[0] for key in state}
    used, missing, wrong = {}, [], []
    for name, like in expected.items():
        value, shape = state.get(name), tuple(like.shape)
        if value is None:
            if name.endswith("num_batches_tracked"):  # files from before torch 0.4.1
                used[name] = torch.zeros_like(like)
            elif name.split(".")[0] not in heads:
                wrong.append(f"{name} is missing, expected {shape}")
            missing.append(name)
        elif (
            tuple(value.shape) != shape
            or value.layout != torch.strided
            or value.is_floating_point() != like.is_floating_point()
        ):
            wrong.append(
                f"{name} is {tuple(value.shape)} {value.dtype}, expected {shape} {like.dtype}"
            )
        elif not torch.isfinite(value).all():
            wrong.append(f"{name} has numbers that are not finite")
        else:
            used[name] = value.to(like.dtype).contiguous()
    if wrong:
        raise SystemExit(
            f"{path}: {'; '.join(wrong[:3])}"
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    unused = [name for name in state if name not in expected] + unused
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return Published(path, used, sizes, unused, missing, not_read, digest.hexdigest())


# ------------------------------------------------------------------------------ for the scripts


def start(args: argparse.Namespace, first: str, store: Store, folder: Path) -> dict:
    """What a stage begins with, as :func:`.checkpoint.load` gives it for a run: the tensors
    of the modalities ``first``. Fills in the sizes of ``args`` that were not given, and
    ``init_run_id``, by which a resumed run knows its file.

    SystemExit names the flag: for sizes given that are not the file's, modalities it lacks, text
    without --word2vec. A run that is resumed does not need the file again.
    """
    path = args.init_published
    kept = next(
        (
            folder / name
            for name in (checkpoint.LATEST, checkpoint.PREVIOUS)
            if (folder / name).exists()
        ),
        None,
    )
    if args.resume and kept is not None and not path.is_file():
        run = checkpoint.load(kept)
        if run["args"].get("init_published") == str(path):
            for name in flags.SIZES:
                if getattr(args, name) is None:
                    setattr(args, name, run["args"][name])
            args.init_run_id, args.init_step = run["args"]["init_run_id"], 0
            return run | {"model": {}}
    if not path.is_file():
        raise SystemExit(f"--init_published {path}: no such file")
    found = read_published(path)
    say(found.notice())
    lacking = [MODALITIES[m] for m in first if m not in found.sizes["modalities"]]
    if lacking:
        raise SystemExit(
            f"--init_published {path}: no {' and no '.join(lacking)} in it, only "
            f"{found.sizes['modalities']}"
        )
    sizes = found.fit(training.video_dims(store)) | {"modalities": first}
    if "T" in first and args.word2vec is None:
        raise SystemExit(
            f"--init_published {path}: its text encoder knows the word vectors it was "
            "trained on, GoogleNews' word2vec: give them with --word2vec"
        )
    same = {
        "embd_dim": lambda a, b: a == b,
        "recon_dim": lambda a, b: a == b or not b,
        "audio_width": lambda a, b: "A" not in first or davenet_widths(a) == davenet_widths(b),
    }
    for name in flags.SIZES:
        value, asked = sizes[name], getattr(args, name)
        if asked is not None and not same[name](asked, value):
            raise SystemExit(f"--{name} {asked}: {path} has {value:g}; leave the flag out")
        if asked is None:  # a file without heads, or without sound, does not say
            says = {"embd_dim": True, "recon_dim": value, "audio_width": "A" in first}[name]
            setattr(args, name, value if says else flags.PRESETS[args.preset][name])
    sizes["audio_width"] = args.audio_width
    args.init_run_id, args.init_step = found.sha256[:16], 0
    mine = tuple(f"{module}." for m in first for module in MODULES[MODALITIES[m]])
    return {
        "sizes": sizes,
        "complete": True,
        "step": 0,
        "run_id": args.init_run_id,
        "model": {key: value for key, value in found.state.items() if key.startswith(mine)},
    }


def check_words(args: argparse.Namespace, begin: dict, words) -> None:
    """SystemExit if a published text encoder cannot read vectors of ``words``' width."""
    if "T" in begin["sizes"]["modalities"] and words.dim != begin["sizes"]["word_dim"]:
        raise SystemExit(
            f"--word2vec {args.word2vec}: vectors of {words.dim} numbers; the text "
            f"encoder takes {begin['sizes']['word_dim']}"
        )


def for_evaluation(
    path: Path,
    word2vec: Path | None,
    store: Store,
    texts: Iterable[str] = (),
) -> tuple[Path, Path, dict, WordVectors | None]:
    """(runs/published-<name>-<hash>, which is made, ``path``, what :func:`.checkpoint.load`
    gives for a run, the words of the store and of ``texts``), by the published protocol."""
    word2vec, words = word2vec or flags.WORD2VEC, None
    found = read_published(path)
    say(found.notice())
    sizes = found.fit(training.video_dims(store))
    if "T" in sizes["modalities"]:
        if not word2vec.is_file():
            raise SystemExit(
                f"--word2vec {word2vec}: no such file; the text encoder of {path} "
                "needs the vectors it was trained on, GoogleNews' word2vec"
            )
        words = vectors_for(
            store, word2vec, store.path.with_name(store.path.name + ".words.npz"), texts
        )
        check_words(argparse.Namespace(word2vec=word2vec), {"sizes": sizes}, words)
    run = Path("runs") / f"published-{path.stem}-{found.sha256[:8]}"
    run.mkdir(parents=True, exist_ok=True)
    protocol = flags.PRESETS["paper"] | {
        "similarity": "dot",
        "temperature": 1.0,
        "demo": False,
        "word2vec": str(word2vec),
        "data": str(flags.DATA),
    }
    # Heads have no part in it, and a file may lack some.
    model = {key: value for key, value in found.state.items() if not key.startswith("recon_")}
    content = {
        "model": model,
        "sizes": sizes | {"recon_dim": 0},
        "args": protocol,
        "step": 0,
        "complete": True,
        "run_id": found.sha256,
        "padding": PADDING,
    }
    return run, path, content, words


# --------------------------------------------------------------------------- the command line


def describe(found: Published) -> str:
    """Modalities, sizes, parameters by module, and what was not used."""
    counts: Counter = Counter()
    for name, value in found.state.items():
        counts[name.split(".")[0]] += value.numel() if value.is_floating_point() else 0
    sizes = {key: value for key, value in found.sizes.items() if key != "modalities"}
    names = " ".join(MODALITIES[m] for m in found.sizes["modalities"])
    lines = [
        f"{found.path}: {names}",
        f"  sha256      {found.sha256}",
        "  sizes       "
        + ", ".join(f"{key} {value:g}" for key, value in sizes.items())
        + (f", video {found.video_width}" if found.video_width else ""),
    ]
    lines += [f"  {module:<22}{count:>12,}" for module, count in counts.items()]
    lines += [
        f"  {what + ':':<11} {_brief(names_) or 'nothing'}"
        for what, names_ in (
            ("unused", found.unused),
            ("not in it", found.missing),
            ("not read", found.not_read),
        )
    ]
    return "\n".join(lines)


def convert(found: Published, out: Path) -> None:
    """Write the used tensors as safetensors, whole or not at all, with where they are from."""
    library = _safetensors()
    metadata = {
        "format": "pt",
        "source": found.path.name,
        "source_sha256": found.sha256,
        "sizes": json.dumps(found.sizes | {"video_width": found.video_width}),
    }
    replace(out, lambda file: file.write(library.torch.save(found.state, metadata)))


def main(argv=None) -> int:
    parser = flags.Parser(
        prog="python -m mcn_ext.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=".pth, .pt or .safetensors")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write what is used as .safetensors (default: only describe)",
    )
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".safetensors":
        parser.error(f"--out {args.out}: a name that ends in .safetensors")
    found = read_published(args.file)
    print(describe(found))
    if args.out is not None:
        convert(found, args.out)
        print(f"written: {args.out}")
    return 0
