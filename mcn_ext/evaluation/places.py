"""Places in a store's videos: windows embedded once, compared with a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.data.store import Store
from mcn_ext.evaluation.metrics import check_finite
from mcn_ext.evaluation.moments import windows
from mcn_ext.evaluation.retrieval import Clips, similarity
from mcn_ext.reference import unit_rows
from mcn_ext.train.log import replace

BLOCK = 2**14  # windows


class Places:
    """Windows of a store's videos: ``video`` (n,), from ``begin`` to ``stop`` (n,) s, ``clips``:
    their embeddings, fp16 and of unit length where the run compares by cosine."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.video, self.begin, self.stop = arrays["video"], arrays["begin"], arrays["stop"]
        names = [name.split(":")[1] for name in arrays if name.startswith("embedding:")]
        self.clips: Clips = (
            {m: torch.from_numpy(arrays[f"embedding:{m}"]) for m in names},
            {m: torch.from_numpy(arrays[f"valid:{m}"]) for m in names},
        )

    def __len__(self) -> int:
        return len(self.video)

    @classmethod
    def of(
        cls, embedder, store: Store, window: float, stride: float, path: Path, key: str
    ) -> Places:
        """Read from ``path`` where they were made with the same ``key``, else made and kept."""
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as file:
                    if str(file["key"]) == key:
                        return cls(dict(file))
            except Exception as error:  # damage makes zip and numpy raise a dozen types
                print(f"{path}: damaged ({error}), made again", file=sys.stderr)
        parts: dict[str, list[np.ndarray]] = {}
        for video in tqdm(range(len(store)), desc="embed", unit="video", mininterval=0.5):
            if not (seconds := store.seconds(video)):
                continue
            places = windows(seconds, [window], stride)
            embeddings, valid = embedder.stretches(store, video, places[:, 0], places[:, 1])
            new = {
                "video": np.full(len(places), video),
                "begin": places[:, 0],
                "stop": places[:, 1],
            }
            for m, x in embeddings.items():
                # Of any length, embeddings may lie beyond fp16.
                rows = unit_rows(x).half() if embedder.args["similarity"] == "cosine" else x
                check_finite(rows)
                new |= {f"embedding:{m}": rows.numpy(), f"valid:{m}": valid[m].numpy()}
            for name, values in new.items():
                parts.setdefault(name, []).append(values)
        if not parts:
            raise SystemExit(f"--store {store.path}: no video in it has features")
        arrays = {name: np.concatenate(values) for name, values in parts.items()}
        try:
            replace(path, lambda file: np.savez(file, key=np.array(key), **arrays))
        except SystemExit as error:  # a full disk: slower next time, nothing else
            print(f"{error}; the windows are embedded again next time", file=sys.stderr)
        return cls(arrays)

    def score(self, sentence: Clips, kind: str) -> dict[str, np.ndarray]:
        """{"total", and each modality's part of it: (n,)} similarity with one embedded sentence."""

        def block(m: str, lo: int) -> Clips:  # in fp32 a block at a time
            return (
                {m: self.clips[0][m][lo : lo + BLOCK].float()},
                {m: self.clips[1][m][lo : lo + BLOCK]},
            )

        parts = {
            m: torch.cat(
                [
                    similarity(sentence, block(m, lo), f"text->{m}", kind)[0]
                    for lo in range(0, len(self), BLOCK)
                ]
            )
            for m in self.clips[0]
        }
        return {name: x.numpy() for name, x in [("total", sum(parts.values())), *parts.items()]}

    def best(self, total: np.ndarray, top: int) -> list[int]:
        """Numbers of the best windows; one that overlaps a better one by half or more is left out,
        as is one with nothing in it."""
        usable = torch.stack(list(self.clips[1].values())).any(dim=0).numpy()
        chosen: list[int] = []
        for i in np.argsort(-np.where(usable, total, -np.inf), kind="stable"):
            if len(chosen) == top or not usable[i]:
                break
            if all(
                self.video[i] != self.video[j]
                or min(self.stop[i], self.stop[j]) - max(self.begin[i], self.begin[j])
                < (self.stop[i] - self.begin[i]) / 2
                for j in chosen
            ):
                chosen.append(int(i))
        return chosen

    def describe(
        self, store: Store, names: list[str], chosen: list[int], scores: dict[str, np.ndarray]
    ) -> list[dict]:
        """Windows for people: video, start, end, score and its parts, the words spoken there."""
        found = []
        for i in chosen:
            said = spoken(store, int(self.video[i]), self.begin[i], self.stop[i])
            parts = {
                m: round(float(scores[m][i]), 4) if self.clips[1][m][i] else None
                for m in self.clips[0]
            }
            found.append(
                {
                    "video": names[self.video[i]],
                    "start": round(float(self.begin[i]), 2),
                    "end": round(float(self.stop[i]), 2),
                    "score": round(float(scores["total"][i]), 4),
                    "of": parts,
                    "words": " ".join(text for _, _, text in said),
                }
            )
        return found


def spoken(store: Store, video: int, begin: float, stop: float) -> list[tuple[float, float, str]]:
    """Captions (start s, end s, text) of a video that reach into a stretch of it."""
    _, start, end = store.caption_times(video)
    return [
        (float(lo), float(hi), text)
        for lo, hi, text in zip(start, end, store.caption_texts(video), strict=True)
        if lo < stop and hi > begin
    ]
