"""What a study's data hold, and the FLOPs of training on them, by which runs of equal compute are
planned."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcn_ext.modalities import MODALITIES

BASELINE = "AVT"
WORDS, WORD_DIM = 20, 300  # of a caption


def clips_and_inputs(cell: dict, settings: argparse.Namespace) -> tuple[int, dict]:
    """Clips of an epoch, and MCN's arguments about what it reads."""
    from mcn_ext.data.clips import missing_inputs
    from mcn_ext.data.store import Store, StoreError
    from mcn_ext.data.store_file import same_encoder
    from mcn_ext.train.inputs import audio_streams

    audio, text = audio_streams(settings), settings.text
    try:
        stores = [Store(Path(cell[name])) for name in ("data", "youcook2")]
    except StoreError as error:
        raise SystemExit(str(error)) from None
    store = stores[0]
    inputs = {
        "video_dims": store.streams("V"),
        "audio_dims": {name: store.dims.get(name) for name in audio},
        "text": text,
        "word_dim": store.text_dims.get(text, WORD_DIM),
    }
    # What evaluation reads must be what training reads, and in the same widths.
    for sizes, store in zip((None, inputs | {"modalities": BASELINE}), stores, strict=True):
        if lack := missing_inputs(store, BASELINE, audio, text, sizes):
            raise SystemExit(f"{store.path}: {lack}")
    if text != "words" and same_encoder(*(store.text_model(text) for store in stores)) is False:
        raise SystemExit(
            f"{store.path}: its caption features {text!r} are of another encoder than those of "
            f"{stores[0].path}"
        )
    store = stores[0]
    videos, batch = int((store.caption_counts() > 0).sum()), settings.batch_size
    if videos < batch:
        raise SystemExit(
            f"--batch_size {batch}: {store.path} has {videos} videos with captions; use "
            f"--batch_size {videos} or less"
        )
    return videos // batch * batch * settings.n_pair, inputs


def training_flops(
    args: argparse.Namespace, inputs: dict, modalities: str, frozen: str = ""
) -> float:
    """FLOPs (a multiply-add counts 2) of the encoders' forward and backward pass for one clip of
    full length; those of the losses are small beside them. inputs: MCN's arguments about these."""
    import torch  # here: a study's --help answers at once
    from torch.utils.flop_counter import FlopCounterMode

    from mcn_ext.model import MCN

    model = MCN(
        modalities,
        **inputs,
        embd_dim=args.embd_dim,
        recon_dim=args.recon_dim if args.recon_weight else 0,
        audio_width=args.audio_width,
    )
    model.freeze(MODALITIES[letter].name for letter in frozen)
    model.train()
    n = 2  # BatchNorm needs more than one row
    streams = {
        modality: {name: torch.rand(n, dim) for name, dim in inputs[f"{modality}_dims"].items()}
        for modality in ("video", "audio")
    }
    tokens = WORDS if inputs["text"] == "words" else 1
    batch = {
        **streams,
        "audio": streams["audio"] or torch.rand(n, 40, args.audio_frames),
        "n_frames": torch.full((n,), args.audio_frames),
        "text": torch.rand(n, tokens, inputs["word_dim"]),
        "text_mask": torch.ones(n, tokens, dtype=torch.bool),
    }
    with FlopCounterMode(display=False) as counter:
        embeddings, errors = model(batch)
        outputs = [x for x in (*embeddings.values(), *errors.values()) if x.requires_grad]
        torch.stack([x.sum() for x in outputs]).sum().backward()
    return counter.get_total_flops() / n
