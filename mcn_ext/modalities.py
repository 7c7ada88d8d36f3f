"""The one table of modalities: what a letter of --pair and --add stands for, everywhere."""

from __future__ import annotations

from typing import NamedTuple


class Modality(NamedTuple):
    """One row of the table.

    letter: in flags and names of run folders. name: in batches, logs and directions of retrieval.
    modules: its modules in :class:`mcn_ext.model.MCN`, by the published parameter names, the
    reconstruction head last.
    streams: of a store, that only it reads. Text reads captions; video reads every other stream.
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


def streams_of(letter: str, dims: dict[str, int]) -> dict[str, int]:
    """Those of a store's streams (name -> width) that a modality reads, in the store's order."""
    if letter == "V":
        taken = {stream for row in MODALITIES.values() for stream in row.streams}
        return {name: dim for name, dim in dims.items() if name not in taken}
    return {name: dim for name, dim in dims.items() if name in MODALITIES[letter].streams}
