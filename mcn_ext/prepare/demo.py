"""The demo data: a made-up cooking channel whose three modalities share concepts.

A clip shows, says and writes a few concepts (a verb and things it is done to). What differs is
noise: text drops or swaps the odd word; video is cluttered by its kitchen, may miss a concept, and
sometimes shows what the neighbouring clip talks about; audio has other voices, background noise,
missing words, and silent clips. Everything is drawn from one seed.

``shift`` misaligns the training videos: that share of their clips change places with a neighbour,
in sound or in picture; see :func:`shifted_order`.

Video and audio have a dial each: 0 is clean, 2 twice as noisy. A dial changes its own streams only:
contents, captions, times and the other modality stay as they are, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mcn_ext.data.files import lock
from mcn_ext.data.store import N_MELS, Store, StoreError, StoreWriter
from mcn_ext.modalities import modality_of
from mcn_ext.prepare.features import MEL_RATE
from mcn_ext.train.flags import NOISE

VERBS = "chop fry boil peel slice mix pour bake grate season whisk knead".split()
THINGS = (
    "onion carrot tomato garlic potato egg butter flour rice chicken salmon lemon basil "
    "cheese mushroom pepper ginger bean apple cream honey spinach bread noodle"
).split()
FILLER = "now we take the and some then just here with a little so next into you want to".split()
CONCEPTS = VERBS + THINGS
STREAMS = {
    "2d": {"dim": 128, "rate_hz": 1.0},
    "3d": {"dim": 64, "rate_hz": 1.5},
    "mel": {"dim": N_MELS, "rate_hz": MEL_RATE},
}
DIALS = {"seed": 0, "video_noise": 1.0, "audio_noise": 1.0, "videos": 256, "shift": 0.0}
SOURCE = "demo data (made up)"
N_EVAL = 400
FRAMES_PER_WORD = 24  # 0.24 s


def _flags(dials: dict) -> str:
    return " ".join(f"--{name} {value}" for name, value in dials.items())


def _source(dials: dict) -> str:
    """SOURCE and the flags that are not the default's."""
    changed = {name: value for name, value in dials.items() if value != DIALS[name]}
    return f"{SOURCE[:-1]}; {_flags(changed)})" if changed else SOURCE


def _chance(probability: float, level: float) -> float:
    """A probability turned up or down; something of a clip is left at any level."""
    return min(0.9, probability * level)


def _utterance(rng) -> np.ndarray:
    """Two formants gliding between three random heights: (FRAMES_PER_WORD, 40) in [0, 1]."""
    time, mel = np.linspace(0, 2, FRAMES_PER_WORD), np.arange(N_MELS)
    out = np.zeros((FRAMES_PER_WORD, N_MELS), np.float32)
    for low, high in ((2, 18), (16, 38)):
        track = np.interp(time, [0, 1, 2], rng.uniform(low, high, 3))
        out += np.exp(-((mel[None] - track[:, None]) ** 2) / 6.0)
    return np.clip(out, 0, 1) * np.hanning(FRAMES_PER_WORD + 2)[1:-1, None] ** 0.3


class _World:
    """What the concepts look and sound like; the same for training and evaluation."""

    def __init__(self, seed: int):
        rng = np.random.default_rng((seed, 1))
        self.look = {name: _looks(rng, len(CONCEPTS), name) for name in ("2d", "3d")}
        # 3D features know verbs (motion), 2D features know things.
        self.look["3d"][len(VERBS) :] *= 0.3
        self.look["2d"][: len(VERBS)] *= 0.3
        self.sound = {word: _utterance(rng) for word in [*CONCEPTS, *FILLER]}


def _looks(rng, n: int, stream: str) -> np.ndarray:
    """(n, dim) rows of features, most of them near 0."""
    return rng.gamma(0.4, 1.0, (n, STREAMS[stream]["dim"])).astype(np.float32)


class _Channel:
    """One video: a kitchen, a voice, a topic; makes its clips."""

    def __init__(self, world: _World, dials: dict, rng: np.random.Generator):
        self.world, self.dials, self.rng = world, dials, rng
        self.clutter = {name: _looks(rng, 1, name)[0] for name in ("2d", "3d")}
        self.pitch, self.tempo = int(rng.integers(-1, 2)), rng.uniform(0.85, 1.18)
        self.tilt = rng.normal(0, 3) * np.linspace(-1, 1, N_MELS)
        self.noise_db = rng.uniform(-66, -54)
        self.verbs = rng.choice(len(VERBS), 5, replace=False)
        self.things = len(VERBS) + rng.choice(len(THINGS), 9, replace=False)

    def concepts(self) -> list[int]:
        rng = self.rng
        things = rng.choice(self.things, rng.integers(1, 4), replace=False)
        return [int(rng.choice(self.verbs)), *map(int, things)]

    def caption(self, concepts: list[int]) -> list[str]:
        words: list[str] = []
        for concept in concepts:
            words += list(self.rng.choice(FILLER, self.rng.integers(0, 3)))
            if self.rng.random() < 0.96:
                words.append(CONCEPTS[concept])
        if self.rng.random() < 0.1:  # a name nobody has a vector for
            words.append("".join(self.rng.choice(list("bdfgklmnprstvz"), 7)))
        return words or [CONCEPTS[concepts[0]]]

    def frames(self, concepts: list[int], seconds: float, stream: str, level: float) -> np.ndarray:
        """Rows of a stream: each shows most of the clip's concepts over the kitchen's clutter."""
        n = max(1, round(seconds * STREAMS[stream]["rate_hz"]))
        shown = [c for c in concepts if self.rng.random() < 1 - _chance(0.1, level)] or concepts[:1]
        visible = self.rng.random((n, len(shown))) < 1 - _chance(0.3, level)
        visible[self.rng.integers(0, n, len(shown)), np.arange(len(shown))] = True
        rows = visible.astype(np.float32) @ self.world.look[stream][shown]
        rows = rows + 0.6 * level * self.clutter[stream]
        return np.maximum(rows + self.rng.normal(0, 0.35 * level, rows.shape), 0).astype(np.float16)

    def speech(self, words: list[str], seconds: float, level: float) -> np.ndarray:
        """(frames, 40) dB of the words in this channel's voice; words nobody knows are mumbled."""
        rng, n = self.rng, max(1, round(seconds * MEL_RATE))
        # Twice the noise is twice its amplitude: 6 dB; the words peak at -12.
        noise_db = self.noise_db + 20 * math.log10(max(level, 1e-6))
        mel = np.full((n, N_MELS), noise_db) + rng.normal(0, 4 * level, (n, N_MELS))
        position = rng.integers(0, 8)
        for word in words:
            pattern = self.world.sound.get(word)
            if pattern is None or rng.random() < _chance(0.06, level):
                continue
            length = max(6, round(FRAMES_PER_WORD / self.tempo * rng.uniform(0.9, 1.1)))
            paced = np.linspace(0, FRAMES_PER_WORD - 1, length).round().astype(int)
            pattern = np.roll(pattern[paced], self.pitch, 1)
            stop = min(n, position + length)
            if stop > position:
                loud = -78 + (66 + self.tilt) * pattern[: stop - position]
                mel[position:stop] = np.maximum(mel[position:stop], loud)
            position += length + rng.integers(0, 4)
        return np.clip(mel, -80, 0).astype(np.float16)

    def _turned(self, make: Callable[[float], np.ndarray], level: float) -> np.ndarray:
        """make(level); the generator is left as make(1) leaves it, so that all else stays."""
        before = self.rng.bit_generator.state
        rows = make(level)
        if level != 1:
            self.rng.bit_generator.state = before
            make(1.0)
        return rows

    def clip(
        self,
        concepts: list[int],
        words: list[str],
        seconds: float,
        silence: float,
        before: tuple[list[int], list[str]] | None = None,
    ) -> dict[str, np.ndarray]:
        """All streams of a clip; silence is the chance of it.

        With ``before``, the concepts and words of the clip before this one, it may show those, as
        people show things before they speak of them, or after; and beyond level 1 say those.
        """
        rng, audio, video = self.rng, self.dials["audio_noise"], self.dials["video_noise"]
        slip = rng.random() if before else 1.0
        silent = rng.random() < _chance(silence, audio)

        def speech(level: float) -> np.ndarray:
            late = before and level > 1 and rng.random() < _chance(0.12, level - 1)
            return self.speech(before[1] if late else words, seconds, level)

        def frames(stream: str, level: float) -> np.ndarray:
            shown = before[0] if slip < _chance(0.12, level) else concepts
            return self.frames(shown, seconds, stream, level)

        mel = self._turned(speech, audio)
        rows = {s: self._turned(partial(frames, s), video) for s in ("2d", "3d")}
        return rows | {"mel": np.full_like(mel, -80) if silent else mel}


def _writer(path: Path, dials: dict) -> StoreWriter:
    made = {"model": "made up", "tool": f"mcn_ext.prepare demo {_flags(dials)}"}
    streams = {name: spec | made for name, spec in STREAMS.items()}
    return StoreWriter(path, streams, _source(dials), overwrite=True)


def _seconds(rng, n_words: int) -> float:
    """Whole seconds, so that consecutive clips' rows line up with their time stamps."""
    return float(max(2, round(n_words * 0.3 + rng.uniform(0, 2.0))))


def shifted_order(n: int, share: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """In which order a video's n clips are seen ("video") and heard ("audio"), (n,) each.

    Disjoint pairs of neighbours, ``share`` of all clips on average, have changed places in one of
    the two, with equal chances.
    """
    # Rounded by chance, as a fixed rule would miss the share in short videos.
    n_pairs = min(n // 2, int(share * n / 2 + rng.random()))
    # Pairs and single clips in a row are n - n_pairs places; which of them hold a pair?
    places = np.sort(rng.choice(n - n_pairs, n_pairs, replace=False))
    order = {name: np.arange(n) for name in ("video", "audio")}
    for first in places + np.arange(n_pairs):
        order["video" if rng.random() < 0.5 else "audio"][first : first + 2] = first + 1, first
    return order


def _train(path: Path, world: _World, dials: dict) -> None:
    writer = _writer(path, dials)
    for video in range(dials["videos"]):
        rng = np.random.default_rng((dials["seed"], 2, video))
        channel = _Channel(world, dials, rng)
        contents = [channel.concepts() for _ in range(int(rng.integers(8, 15)))]
        clips, start, end, text, clock, before = [], [], [], [], 0.0, None
        for concepts in contents:
            words = channel.caption(concepts)
            # Even, as 1.5 rows a second are then whole rows.
            seconds = 2.0 * round(_seconds(rng, len(words)) / 2)
            clips.append(channel.clip(concepts, words, seconds, 0.06, before or (concepts, words)))
            before = concepts, words
            start.append(clock)
            end.append(clock + seconds - 0.05)  # a slice takes the row its end falls into
            text.append(" ".join(words))
            clock += seconds
        # A generator of its own: everything else stays as it is without a shift.
        order_rng = np.random.default_rng((dials["seed"], 4, video))
        order = shifted_order(len(clips), dials["shift"], order_rng)
        rows = {
            name: np.concatenate([clips[i][name] for i in order[modality_of(name)]])
            for name in STREAMS
        }
        writer.add(f"demo{video:07d}", rows, start, end, text)
    writer.close()


def _evaluation(path: Path, world: _World, dials: dict) -> None:
    """One clip per item, no two with the same concepts, of channels never seen in training."""
    writer, used, item = _writer(path, dials), set(), 0
    while len(used) < N_EVAL:
        rng = np.random.default_rng((dials["seed"], 3, item))
        channel = _Channel(world, dials, rng)
        item += 1
        for _ in range(4):
            concepts = channel.concepts()
            if len(used) == N_EVAL or frozenset(concepts) in used:
                continue
            used.add(frozenset(concepts))
            words = []
            for concept in concepts:  # each is named: else two captions could ask for the same
                words += [*rng.choice(FILLER, rng.integers(0, 3)), CONCEPTS[concept]]
            seconds = _seconds(rng, len(words))
            rows = channel.clip(concepts, words, seconds, 0.03)
            for name in ("2d", "3d"):
                rows[name] = rows[name].max(axis=0, keepdims=True)  # pooled, as YouCook2's are
            writer.add(f"eval{item:05d}_{len(used):03d}", rows, [0.0], [seconds], [" ".join(words)])
    writer.close()


def is_there(out: Path) -> bool:
    """Whether a demo data set is in ``out``, whatever its dials."""
    return (out / "train.h5").exists() and (out / "eval.h5").exists()


def prepare(out: Path, *, overwrite: bool = False, **dials) -> str:
    """Write ``out``/train.h5 and ``out``/eval.h5 unless they are there; returns a summary.

    dials: of ``DIALS``. Noise levels are 0 (clean) to 1000; 1 is the demo's. shift is 0 to 1. The
    stores' ``source`` and ``tool`` tell what they were made with; StoreError if what is there was
    made with something else.
    """
    dials = {name: type(value)(dials.get(name, value)) for name, value in DIALS.items()}
    for name, (low, high) in {"video_noise": NOISE, "audio_noise": NOISE, "shift": (0, 1)}.items():
        if not low <= dials[name] <= high:
            raise StoreError(f"--{name} {dials[name]} must be {low} to {high}")
    train, evaluation = out / "train.h5", out / "eval.h5"
    keep = lock(out, wait=True)  # two runs on a fresh clone: the second finds what the first made
    for path in (train, evaluation):
        if path.exists() and not overwrite and Store(path).source != _source(dials):
            raise StoreError(
                f"{path} is {Store(path).source}, asked for is {_flags(dials)}; pass --overwrite "
                "to replace it, or another --out"
            )
    if overwrite or not is_there(out):
        out.mkdir(parents=True, exist_ok=True)
        world = _World(dials["seed"])
        _train(train, world, dials)
        _evaluation(evaluation, world, dials)
    keep.close()
    store = Store(train)
    return (
        f"{out}: {store.source}, {len(store)} training videos with {store.n_captions} "
        f"captions, {len(Store(evaluation))} evaluation clips"
    )
