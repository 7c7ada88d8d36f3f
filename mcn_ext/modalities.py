"""The one table of modalities: what a letter of --pair and --add stands for, everywhere."""

from __future__ import annotations

from typing import NamedTuple


class Modality(NamedTuple):
    """One row of the table.

    letter: in flags and names of run folders. name: in batches, logs and directions of retrieval.
    modules: its modules in :class:`mcn_ext.model.MCN`, by the published parameter names, the
    reconstruction head last.
    streams: of a store, that are its own where the store does not say: see :func:`modality_of`.
    colour: in figures.
    """

    letter: str
    name: str
    modules: tuple[str, ...]
    streams: tuple[str, ...]
    colour: str


MODALITIES = {
    row.letter: row
    for row in (  # in the order in which results list them
        Modality("V", "video", ("GU_video", "recon_v"), (), "tab:blue"),
        Modality(
            "A",
            "audio",
            ("DAVEnet", "GU_audio", "DAVEnet_projection", "recon_a"),
            ("mel",),
            "tab:orange",
        ),
        Modality(
            "T", "text", ("text_pooling_caption", "GU_text_captions", "recon_t"), (), "tab:green"
        ),
    )
}
BY_NAME = {row.name: row for row in MODALITIES.values()}
PAIRS = ("AV", "VT", "AT", "AVT")  # what stage 1 can align, as run folders are named


def modality_of(stream: str) -> str:
    """Name of the modality of a store's stream without an attribute ``modality``: what the table
    does not name is video."""
    return next((row.name for row in MODALITIES.values() if stream in row.streams), "video")
