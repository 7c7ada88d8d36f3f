"""FLOPs of training, by which runs of equal compute are planned."""

from __future__ import annotations

import argparse

from mcn_ext.modalities import MODALITIES

WORDS, WORD_DIM = 20, 300  # of a caption


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
