"""The table of modalities: a letter for flags, a name for batches, modules, a colour."""

from __future__ import annotations

from typing import NamedTuple


class Modality(NamedTuple):
    """One row of the table.

    ``modules``: names of its modules in :class:`mcn_ext.model.MCN`, the reconstruction head last;
    they are the published parameter names.
    """

    letter: str
    name: str
    modules: tuple[str, ...]
    colour: str


MODALITIES = {
    row.letter: row
    for row in (
        Modality("A", "audio", ("DAVEnet", "GU_audio", "DAVEnet_projection", "recon_a"), "C1"),
        Modality("V", "video", ("GU_video", "recon_v"), "C0"),
        Modality("T", "text", ("text_pooling_caption", "GU_text_captions", "recon_t"), "C2"),
    )
}
PAIRS = ("AV", "VT", "AT", "AVT")  # what stage 1 can align, as run folders are named
