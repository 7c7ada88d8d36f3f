"""Features of captions, of a frozen text encoder, added to a store beside its texts.

    python -m mcn_ext.prepare caption_features data/howto100m.h5 --encoder all-MiniLM-L6-v2
    python -m mcn_ext.prepare caption_features data/howto100m.h5 clip=features.npy --model NAME

Each file of the store is copied, and the copy takes its place when it is complete.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mcn_ext.data.files import lock
from mcn_ext.data.store import Store, StoreError
from mcn_ext.data.store_file import CAPTIONS, checksum, text_made
from mcn_ext.data.store_writer import add_dataset
from mcn_ext.prepare import require

BLOCK = 2**14  # captions in memory at a time
TAKEN = sorted({*CAPTIONS, "offset", "words"})


def _open(file: Path, n_captions: int) -> np.ndarray:
    """Features made elsewhere (captions, dim) floats, of an .npz, or of an .npy, which stays on
    disk; StoreError for anything else, or another number of them."""
    require("NAME=FILE:", file)
    try:
        rows = np.load(file, mmap_mode="r")  # of numbers alone: it refuses objects
        if not isinstance(rows, np.ndarray):
            with rows as archive:
                rows = archive["features" if "features" in archive else "arr_0"]
    except Exception as error:  # damage makes zip, deflate, lzma and numpy raise a dozen types
        raise StoreError(
            f"{file}: not an .npy, nor an .npz with features or arr_0, or damaged ({error})"
        ) from error
    if rows.ndim != 2 or rows.dtype.kind != "f" or len(rows) != n_captions or not rows.shape[1]:
        raise StoreError(
            f"{file}: {rows.dtype} array of shape {rows.shape}; the store has {n_captions} "
            f"captions: expected floats ({n_captions}, width), one row for each caption, in the "
            "order of Store(PATH).texts() (mcn_ext.data.store)"
        )
    return rows


def _encoded(encoder, first: int, texts: list[str]) -> np.ndarray:
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    rows = encoder.encode(list(number))
    # A caption without text says nothing; zeros are left out of training.
    rows[[not text.strip() for text in number]] = 0
    return rows[[number[text] for text in texts]]


def _blocks(store: Store, first: int, rows_of: Callable, bar: tqdm) -> Iterator[np.ndarray]:
    """float16 rows of a store's captions, which are number ``first`` and following of all;
    StoreError for a value that is not finite in float16."""
    texts = store.texts()
    while said := list(islice(texts, BLOCK)):
        with np.errstate(over="ignore"):
            rows = np.asarray(rows_of(first, said), np.float16)
        if len(bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
            raise StoreError(
                f"features of caption {first + bad[0]}, {said[bad[0]]!r}, counted from 0: NaN, inf "
                "or beyond fp16 (65504); give numbers, or zeros to leave a caption out"
            )
        yield rows
        first += len(said)
        bar.update(len(said))


def prepare(
    store: Path,
    features: str | None = None,
    *,
    encoder: str | None = None,
    name: str | None = None,
    model: str | None = None,
    sha256: str | None = None,
    overwrite: bool = False,
) -> str:
    """Add ``caption/<name>`` to each file of a store that lacks it; returns a summary.

    features: NAME=FILE. StoreError or SystemExit, before a file is changed, for what does not fit,
    and for features of this name that are there and of another encoder or file.
    """
    if not (features or encoder) or features and (encoder or name) or encoder and (model or sha256):
        raise SystemExit(
            "give NAME=FILE (with --model, --sha256 of what made it) or --encoder (with --name)"
        )
    file = None
    if features:
        name, _, file = features.partition("=")
    elif not name:
        name = re.sub("[^A-Za-z0-9_.-]+", "-", Path(encoder).resolve().name)
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name) or name in TAKEN or file == "":
        raise SystemExit(
            f"{features or name}: features need a name of letters, digits, _ - and . alone, but "
            f"none of {', '.join(TAKEN)}: NAME=FILE, or --name NAME"
        )
    if not re.fullmatch("unknown|[0-9a-f]{64}", sha256 := (sha256 or "unknown").lower()):
        raise SystemExit(f"--sha256 {sha256}: expected 64 hex digits")
    require("STORE", store)
    with lock(store.resolve()):
        whole = Store(store)
        if file:
            rows = _open(Path(file), whole.n_captions)

            def rows_of(first: int, texts: list[str]) -> np.ndarray:
                return rows[first : first + len(texts)]

            dim, crc = rows.shape[1], 0
            with tqdm(total=whole.n_captions, unit="caption", desc="check") as bar:
                for block in _blocks(whole, 0, rows_of, bar):
                    crc = checksum(block, crc)
            attrs = {"model": model or "unknown", "features_crc32": np.uint32(crc)}
            if not model and sha256 == "unknown":
                text = "WARNING: without --model or --sha256, nothing tells whether other features"
                print(f"{text}, or what is typed, come from the same encoder", file=sys.stderr)
        else:
            from mcn_ext.data.sentence import SentenceEncoder  # of libraries that few have

            source = SentenceEncoder(encoder)
            rows_of, dim, sha256 = partial(_encoded, source), source.dim, source.sha256
            # A folder is to be found from anywhere, when a run needs it.
            attrs = {"model": str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder}
        attrs["weights_sha256"] = sha256
        _add(whole, name, dim, attrs, rows_of, overwrite)
    size = f"{whole.n_captions:,} captions x {dim}"
    return f"{store}: {size}, caption/{name}, by {attrs['model']}; train with --text {name}"


def _add(store: Store, name: str, dim: int, attrs: dict, rows_of: Callable, overwrite: bool):
    """Write the features to the files that lack them, or with ``overwrite`` have others."""
    made = text_made(dim, attrs)
    for shard in store.shards:
        there = shard.text_made.get(name, made)
        if there != made and not overwrite:
            raise StoreError(
                f"{shard.path}: caption/{name} is there with other values: width, model, SHA-256, "
                f"checksum of the file are {there}, now {made}; pass --overwrite to replace it, or "
                "choose another name"
            )
    first = 0  # not the bar's number, which stays 0 where progress is off
    with tqdm(total=store.n_captions, unit="caption", desc=name, mininterval=0.5) as bar:
        for shard in store.shards:
            n = int(shard.offsets["caption"][-1])
            if shard.text_made.get(name) == made:  # by an earlier run, which was interrupted
                bar.update(n)
                first += n
                continue
            # Of a link, what it points to is replaced.
            path = shard.path.resolve()
            need, free = path.stat().st_size + 2 * n * dim, shutil.disk_usage(path.parent).free
            if free < need:
                raise SystemExit(
                    f"{path}: its copy with caption/{name} takes {need:,} bytes, {free:,} are "
                    "free; make room and run the same command again"
                )
            blocks = _blocks(Store(path), first, rows_of, bar)
            add_dataset(path, f"caption/{name}", (n, dim), blocks, attrs)
            first += n
