"""Inputs of fuzz.py: undamaged files of every format, ways to break them, and who reads them."""

import io
import json
import pickle
import pickletools
import re
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch

from mcn_ext.data import store_file
from mcn_ext.data.clips import ClipReader, TrainingClips, collate
from mcn_ext.data.store import Store, StoreError, StoreWriter, validate
from mcn_ext.data.words import WordVectors, vectors_for
from mcn_ext.prepare import howto100m, youcook2
from mcn_ext.prepare.unpickle import load_pickle

WORDS = "chop fry boil peel onion carrot egg rice".split()
STREAMS = {"2d": {"dim": 6, "rate_hz": 1.0}, "mel": {"dim": 40, "rate_hz": 100.0}}
RATES = {"2d": 1.0, "3d": 1.5, "mel": 100.0}
BASE = Path(tempfile.mkdtemp(prefix="fuzz-"))  # undamaged files, made by make_base


def make_base() -> None:
    """Undamaged files of every format."""
    from gensim.models import KeyedVectors

    rng = np.random.default_rng(0)
    writer = StoreWriter(BASE / "store.h5", STREAMS, "fuzz")
    for video in range(3):
        writer.add(
            f"v{video}",
            {"2d": rng.random((8, 6)) + 1, "mel": rng.random((800, 40)) * -80},
            [0, 2, 5],
            [2, 4, 8],
            [" ".join(rng.choice(WORDS, 3)) for _ in range(3)],
        )
    writer.close()
    with h5py.File(BASE / "store.h5") as new, h5py.File(BASE / "older.h5", "w") as old:
        old.attrs.update(new.attrs)
        for group in new:
            old.create_group(group).attrs.update(new[group].attrs)
            for name, data in new[group].items():
                old[group].create_dataset(name, data=data[:], dtype=data.dtype)
    howto = BASE / "howto"
    (howto / "csv").mkdir(parents=True)
    captions = {}
    for i in range(3):
        np.savez(howto / f"v{i}_2d.npz", features=rng.random((20, 6)).astype(np.float16))
        np.savez_compressed(howto / f"v{i}_3d.npz", features=rng.random((30, 6)))
        np.savez(howto / f"v{i}_spec.npz", arr_0=rng.random((40, 90)).astype(np.float32))
        captions[f"v{i}"] = {"start": [0.0, 5.0], "end": [3.0, 9.0], "text": ["chop", "fry egg"]}
        (howto / "csv" / f"v{i}.csv").write_text("start,end,text\n0,3,chop\n5,9,fry egg\n")
    (howto / "list.csv").write_text("path\nv0\nv1\nv2\n")
    for place in (howto, BASE):
        (place / "captions.pickle").write_bytes(pickle.dumps(captions))
    (howto / "captions.json").write_text(json.dumps(captions))
    (BASE / "youcook2.pkl").write_bytes(
        pickle.dumps(
            [
                {
                    "id": f"c{i}",
                    "caption": "fry",
                    "2d": rng.random(6).astype(np.float32),
                    "3d": rng.random(6),
                    "audio": torch.rand(40, 20 + i),
                }
                for i in range(4)
            ]
        )
    )
    keyed = KeyedVectors(5)
    keyed.add_vectors(WORDS, rng.normal(size=(8, 5)).astype(np.float32))
    keyed.save_word2vec_format(BASE / "v.bin", binary=True)
    keyed.save_word2vec_format(BASE / "v.txt", binary=False)
    keyed.save(str(BASE / "v.kv"))
    vectors_for(Store(BASE / "store.h5"), BASE / "v.bin", BASE / "cache.npz")


def mutate(data: bytes, rng) -> bytes:
    """Flips, cuts, splices, runs of zeros: what disks, copies and people do to files."""
    out, n = bytearray(data), max(1, len(data))
    for _ in range(int(rng.choice([1, 1, 1, 2, 8]))):
        a, b = sorted(int(x) for x in rng.integers(0, n, 2))
        match rng.integers(0, 8):
            case 0:
                del out[a:]
            case 1:
                out[a : a + 64] = out[b : b + 64]
            case 2:
                out[a : min(b, a + 256)] = bytes(min(b, a + 256) - a)
            case 3:  # a size, an address or a count
                value = (0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1)[int(rng.integers(0, 6))]
                out[a : a + 8] = struct.pack("<Q", value)
            case _:
                if a < len(out):
                    out[a] ^= int(rng.integers(1, 256))
    return bytes(out)


# ------------------------------------------------------------------------------------- stores


def read_all(path: Path) -> None:
    store = Store(path)
    reader = ClipReader(
        store,
        video_streams=tuple(n for n in store.dims if n != "mel"),
        audio="mel" in store.dims,
        words=WordVectors(WORDS, np.eye(8), "fuzz"),
        audio_frames=100,
    )
    store.ids(), list(store.texts())
    clips = TrainingClips(reader, n_pair=3, min_time=2.0, seed=0)
    items = [clips[0, i] for i in range(len(clips))]
    if items:
        batch = collate(items)
        assert all(torch.isfinite(v).all() for k, v in batch.items() if v.is_floating_point())


def use_store(path: Path) -> str:
    """Both the reader, as training does it, and the validator; either's error is an error."""
    errors = []
    for function in (read_all, validate):
        try:
            function(path)
        except StoreError as error:
            errors.append(error)
    return "error" if errors else "fine"


def reseal(data: bytes) -> bytes:
    """The seal that fits damaged bytes: malice, where the checksums agree."""
    begin, size = len(store_file._SEAL), store_file.SEAL_BYTES
    facts = json.loads((BASE / "store.h5").read_bytes()[begin + 8 : size])
    facts["size"] = len(data)
    for part in ("head", "tail"):
        facts[f"{part}_crc32"] = zlib.crc32(b"".join(data[a:b] for a, b in facts[part]))
    body = json.dumps(facts).encode().ljust(size - begin - 8)
    return store_file._SEAL + b"%08x" % zlib.crc32(body) + body + data[size:]


def store_damaged(folder: Path, rng) -> str:
    good = (BASE / "store.h5").read_bytes()
    bad = mutate(good, rng)
    (folder / "s.h5").write_bytes(bad)
    outcome = use_store(folder / "s.h5")
    assert outcome == "error" or bad == good, "damage was not found"
    return outcome


def store_forged(folder: Path, rng) -> str:
    good = (BASE / "store.h5").read_bytes()
    head = store_file.SEAL_BYTES
    (folder / "s.h5").write_bytes(reseal(good[:head] + mutate(good[head:], rng)))
    return use_store(folder / "s.h5")


def store_older(folder: Path, rng) -> str:
    (folder / "s.h5").write_bytes(mutate((BASE / "older.h5").read_bytes(), rng))
    return use_store(folder / "s.h5")


def store_structure(folder: Path, rng) -> str:
    """Edits a person or an attacker makes with HDF5's own tools."""
    path = folder / "s.h5"
    shutil.copy(BASE / "store.h5", path)
    with h5py.File(path, "r+", locking=False) as file:
        names = [f"{g}/{d}" for g in file for d in file[g]]
        name = str(rng.choice(names))
        data = file[name]
        n = data.shape[0]
        kind = int(rng.integers(0, 12))
        if kind < 4:  # another dataset in its place
            values = data[:]
            del file[name]
            match kind:
                case 0:
                    file[name] = h5py.ExternalLink(str(BASE / "store.h5"), name)
                case 1:
                    file[name] = h5py.SoftLink(str(rng.choice(names)))
                case 2:
                    dtype = rng.choice(["f8", "i4", "S3", "c8", "u1", "f4,i2"])
                    file.create_dataset(name, (n, 6), dtype)
                case 3:
                    shape = (int(rng.choice([0, 1, n, 10**6, 2**40])), *values.shape[1:])
                    how = [
                        {},
                        {"chunks": True},
                        {"chunks": True, "compression": "gzip"},
                        {"external": [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]},
                    ]
                    how = how[int(rng.integers(0, 4))]
                    dtype = h5py.string_dtype() if values.dtype == object else values.dtype
                    file.create_dataset(name, shape, dtype, **how)
        elif kind < 8 and data.dtype != object and n:
            pool = [-1, 0, 2**40, 7] if data.dtype.kind == "i" else [np.nan, -1, 1e30, np.inf, 0]
            with np.errstate(over="ignore"):
                data[int(rng.integers(0, n))] = np.array(rng.choice(pool)).astype(data.dtype)
        elif kind == 8:
            group = file[str(rng.choice(list(STREAMS)))]
            group.attrs["rate_hz"] = [np.nan, 0, -1, "x", [1, 2], 1e300][int(rng.integers(0, 6))]
        elif kind == 9 and n:
            text = rng.choice(["", "é" * 9999, "\ud83d"]) if data.dtype == object else None
            if text is not None:
                data[int(rng.integers(0, n))] = str(text).encode("utf-8", "surrogatepass")
        else:
            file.attrs[str(rng.choice(["format", "version", "source"]))] = [1, "x", [1, 2]][
                int(rng.integers(0, 3))
            ]
    store_file.seal(path)
    return use_store(path)


# -------------------------------------------------------------------------- pickles, converters

HOSTILE = [
    None,
    "",
    "x\0y",
    "\ud83d",
    -1.0,
    float("nan"),
    float("inf"),
    1e300,
    10**400,
    [],
    [[]],
    {},
    {"a": 1},
    b"\xff",
    True,
    np.ones(6),
    np.ones((2, 6), np.float32),
    np.float32(2),
    np.full(6, np.nan),
    np.zeros(0),
    torch.ones(6),
    torch.ones(40, 9),
    torch.ones(40, 0),
    np.full((40, 7), 1e30),
    np.arange(6),
    np.array(3.0),
    36000.0,
    10 * 3600.0,
]
_bomb = [0.5]
for _ in range(40):
    _bomb = [_bomb] * 10
HOSTILE.append(_bomb)
CODES = [op.code.encode("latin1") for op in pickletools.opcodes]
CRAFTED = [
    b"\x80\x04]r\xff\xff\xff\x7f.",
    b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f]N.",
    b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b".",
    b"\x80\x02\x82\x01.",
    b"P1\n.",
    b"\x80\x02NQ.",
    b"cbuiltins\nlist\n(" + b"(" * 999 + b"l" * 9,
    b"cnumpy\ndtype\n(S'O8'\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb.",
]


def mutate_pickle(data: bytes, rng) -> bytes:
    match rng.integers(0, 5):
        case 0:
            return CRAFTED[int(rng.integers(0, len(CRAFTED)))]
        case 1:  # an opcode where it does not belong
            at = int(rng.integers(0, len(data)))
            return data[:at] + CODES[int(rng.integers(0, len(CODES)))] + data[at:]
        case 2:  # a program of opcodes
            words = [CODES[int(i)] for i in rng.integers(0, len(CODES), 40)]
            return data[: int(rng.integers(0, 300))] + b"\1".join(words) + b"."
        case _:
            return mutate(data, rng)


def howto_value(rng):
    captions = pickle.loads((BASE / "captions.pickle").read_bytes())  # our own
    entry = captions[f"v{int(rng.integers(0, 3))}"]
    key = str(rng.choice(["start", "end", "text"]))
    value = HOSTILE[int(rng.integers(0, len(HOSTILE)))]
    if rng.random() < 0.3:
        entry[key] = value
    else:
        entry[key][int(rng.integers(0, len(entry[key])))] = value
    return captions


def npz(rng) -> bytes:
    """An .npz whose header promises what is not there."""
    out = io.BytesIO()
    np.savez(out, features=np.ones((20, 6), rng.choice(["f2", "f4", "f8", "i8", "?"])))
    data = out.getvalue()
    shape = rng.choice([b"(99999999999, 6)", b"(-1, 6)", b"(20, 6, 1)", b"(0, 6)", b"(((", b"20"])
    old = re.search(rb"\(20, 6\), }( *)", data)
    new = shape + b", }"
    return data.replace(old[0], new.ljust(len(old[0]))[: len(old[0])])


def run_howto(folder: Path, rng) -> str:
    source = folder / "in"
    shutil.copytree(BASE / "howto", source)
    captions = source / "captions.pickle"
    what = int(rng.integers(0, 6))
    if what == 0:
        captions.write_bytes(pickle.dumps(howto_value(rng)))
    elif what == 1:
        captions.write_bytes(mutate_pickle(captions.read_bytes(), rng))
    elif what == 2:
        captions = source / "captions.json"
        captions.write_bytes(
            mutate(captions.read_bytes(), rng) if rng.random() < 0.9 else b"[" * 10**5
        )
    elif what == 3:
        captions = source / "csv"
        file = captions / f"v{int(rng.integers(0, 3))}.csv"
        file.write_bytes(mutate(file.read_bytes(), rng))
    elif what == 4:
        file = source / "list.csv"
        file.write_bytes(
            mutate(file.read_bytes(), rng)
            + [b"", b"\n" + b"n" * 5000, b"\n\xff\xfe", b"\nv1", b'\n"' + b"q" * 200_000][
                int(rng.integers(0, 5))
            ]
        )
    else:
        files = sorted(source.glob("v*.npz"))
        file = files[int(rng.integers(0, len(files)))]
        file.write_bytes(npz(rng) if rng.random() < 0.4 else mutate(file.read_bytes(), rng))
    said = howto100m.prepare(
        source / "list.csv", source, None, captions, folder / "o.h5", rates=RATES, workers=1
    )
    validate(folder / "o.h5")
    return "fine" if "none skipped" in said else "skip"


def run_youcook2(folder: Path, rng) -> str:
    items = pickle.loads((BASE / "youcook2.pkl").read_bytes())  # our own
    if rng.random() < 0.5:
        item = items[int(rng.integers(0, len(items)))]
        item[str(rng.choice(["2d", "3d", "audio", "caption", "id"]))] = HOSTILE[
            int(rng.integers(0, len(HOSTILE)))
        ]
        data = pickle.dumps(items, protocol=int(rng.integers(0, 6)))
    else:
        data = mutate_pickle(pickle.dumps(items, protocol=int(rng.integers(0, 6))), rng)
    (folder / "y.pkl").write_bytes(data)
    said = youcook2.prepare(folder / "y.pkl", folder / "o.h5")
    validate(folder / "o.h5")
    return "fine" if "none skipped" in said else "skip"


def run_pickle(folder: Path, rng) -> str:
    value = {"a": np.arange(6.0), "t": torch.ones(2, 3), "s": ["x", None, 2.5], "n": np.float32(1)}
    data = pickle.dumps(value, protocol=int(rng.integers(0, 6)))
    (folder / "x.pkl").write_bytes(mutate_pickle(data, rng))
    load_pickle(folder / "x.pkl")
    return "fine"


def run_words(folder: Path, rng) -> str:
    name = str(rng.choice(["v.bin", "v.txt", "v.kv", "cache.npz"]))
    data = (BASE / name).read_bytes()
    (folder / name).write_bytes((mutate_pickle if name == "v.kv" else mutate)(data, rng))
    cache = folder / "cache.npz"
    source = BASE / "v.bin" if name == "cache.npz" else folder / name
    words = vectors_for(Store(BASE / "store.h5"), source, cache)
    assert len(words.words) == len(words.vectors) and np.isfinite(words.vectors).all()
    return "fine"


TARGETS = {
    "store, damaged": store_damaged,
    "store, structure": store_structure,
    "store, forged seal": store_forged,
    "store, older": store_older,
    "howto100m": run_howto,
    "youcook2": run_youcook2,
    "load_pickle": run_pickle,
    "word vectors": run_words,
}
