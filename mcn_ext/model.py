"""MCN: a batch -> one embedding per modality, and how well each is reconstructed from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcn_ext.encoders import GatedUnit, ResDAVEnet, SentenceMaxPool, reconstruction_head
from mcn_ext.modalities import BY_NAME, MODALITIES


class MCN(nn.Module):
    """Video, audio and text encoders into one space; only the modalities asked for exist.

    Args:
        modalities: letters of :data:`.MODALITIES`.
        video_dims, audio_dims: stream name -> width, in the order the streams are concatenated.
            Without audio_dims the sound is encoded by DAVEnet.
        text: what its tokens are: "words", or the name of captions' features.
        word_dim, embd_dim, recon_dim: widths of tokens, joint space, reconstruction heads (0:
            none).
        audio_width: 1.0 is the published DAVEnet (1024 channels at the end).
        checkpoint_activations: see :class:`.ResDAVEnet`.
    """

    def __init__(
        self,
        modalities: str = "AVT",
        *,
        video_dims: Mapping[str, int] | None = None,
        audio_dims: Mapping[str, int] | None = None,
        text: str = "words",
        word_dim: int = 300,
        embd_dim: int = 6144,
        recon_dim: int = 1024,
        audio_width: float = 1.0,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        video_dims = dict(video_dims or {"2d": 2048, "3d": 2048})
        # Saved in every checkpoint: MCN(**sizes) builds the same model again.
        self.sizes = dict(
            modalities=modalities,
            video_dims=video_dims,
            audio_dims=dict(audio_dims or {}),
            text=text,
            word_dim=word_dim,
            embd_dim=embd_dim,
            recon_dim=recon_dim,
            audio_width=audio_width,
        )
        self.modalities = [MODALITIES[letter].name for letter in modalities]
        self.frozen: list[str] = []

        def head(dim):
            return reconstruction_head(embd_dim, recon_dim, dim) if recon_dim else None

        if "video" in self.modalities:
            dim = sum(video_dims.values())
            self.GU_video = GatedUnit(dim, embd_dim)
            self.recon_v = head(dim)
        if "audio" in self.modalities and audio_dims:
            dim = sum(audio_dims.values())
            self.DAVEnet = self.DAVEnet_projection = None
            self.GU_audio = GatedUnit(dim, embd_dim)
            self.recon_a = head(dim)
        elif "audio" in self.modalities:
            self.DAVEnet = ResDAVEnet(audio_width, checkpoint_activations)
            # Gated at DAVEnet's width, then projected: 36 times fewer weights than gating at 6144.
            self.GU_audio = GatedUnit(self.DAVEnet.dim, self.DAVEnet.dim)
            self.DAVEnet_projection = nn.Linear(self.DAVEnet.dim, embd_dim)
            self.recon_a = head(self.DAVEnet.dim)
        if "text" in self.modalities:
            self.text_pooling_caption = SentenceMaxPool(word_dim, embd_dim)
            self.GU_text_captions = GatedUnit(embd_dim, embd_dim)
            self.recon_t = head(embd_dim)

    def freeze(self, modalities) -> None:
        """Fix encoders, in ``train()`` too: no gradients, BatchNorm in eval, no reconstruction."""
        self.frozen = list(modalities)
        for module in self._frozen_modules():
            module.requires_grad_(False)
        # Puts the frozen modules in eval mode now, not only at the next call of train().
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        names = [name for modality in self.frozen for name in BY_NAME[modality].modules]
        # Without a reconstruction loss there are no heads, with audio features no DAVEnet.
        return [module for name in names if (module := getattr(self, name)) is not None]

    def _video(self, batch) -> tuple[Tensor, Tensor]:
        features = concatenate(batch["video"], self.sizes["video_dims"])
        return features, self.GU_video(features)

    def _audio(self, batch) -> tuple[Tensor, Tensor]:
        if self.DAVEnet is None:
            features = concatenate(batch["audio"], self.sizes["audio_dims"])
            return features, self.GU_audio(features)
        features = self.DAVEnet(batch["audio"], batch["n_frames"], batch.get("heard"))
        return features, self.DAVEnet_projection(self.GU_audio(features))

    def _text(self, batch) -> tuple[Tensor, Tensor]:
        tokens = batch["text"]
        if self.sizes["text"] != "words":  # word vectors are taken as they are, as published
            tokens = F.normalize(tokens.float(), dim=2, eps=1e-6)
        features = self.text_pooling_caption(tokens, batch["text_mask"])
        return features, self.GU_text_captions(features)

    def encode(self, modality: str, batch: Mapping) -> tuple[Tensor, Tensor]:
        """(features before projection (B, F), embedding (B, embd_dim)) of one modality."""
        return getattr(self, f"_{modality}")(batch)

    def embed(self, modality: str, batch: Mapping) -> tuple[Tensor, Tensor | None]:
        """(embedding (B, embd_dim), reconstruction MSE (B,) fp32 or None) of one modality."""
        features, embedding = self.encode(modality, batch)
        # The head is the last module of a modality, see modalities.py.
        head = getattr(self, BY_NAME[modality].modules[-1])
        if head is None or modality in self.frozen:
            return embedding, None
        # In fp32: under autocast a difference below 1e-4 would be 0 once it is squared in fp16.
        return embedding, (head(embedding).float() - features.detach().float()).square().mean(dim=1)

    def forward(self, batch: Mapping) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embed a batch.

        batch: ``video`` {stream: (B, dim)} maxima over the clip's time; ``audio`` likewise, or, for
        DAVEnet, (B, 40, T) dB with ``n_frames`` (B,) int64, which are averaged, and, where more are
        convolved (see :func:`.fill_up`), ``heard`` (B,), both best on the host; ``text`` (B,
        tokens, word_dim) with ``text_mask`` (B, tokens).
        Only the model's modalities are read.

        Returns ({modality: embedding (B, embd_dim)}, {modality: reconstruction MSE (B,) fp32}); the
        second has the trained modalities only, and none when recon_dim is 0. The target is
        detached: shrinking it would otherwise lower the loss.
        """
        embeddings, errors = {}, {}
        for name in self.modalities:
            # No graph through a frozen encoder, so its activations are not kept for backward.
            with torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.frozen):
                embeddings[name], error = self.embed(name, batch)
            if error is not None:
                errors[name] = error
        return embeddings, errors


def concatenate(streams: Mapping[str, Tensor], names) -> Tensor:
    """The streams (B, dim) side by side, each at unit length, so that none dominates by its scale.

    An empty clip is a zero row, not 0 / 0: eps is above fp16's smallest number.
    """
    rows = [F.normalize(streams[name].float(), dim=1, eps=1e-6) for name in names]
    return torch.cat(rows, dim=1)


def load_published(path, video_dims: Mapping[str, int] | None = None) -> MCN:
    """The model of a file of published weights, in eval mode, on the CPU, sizes as in the file.

    video_dims: stream name -> width, needed where the file's video is neither 4096 wide (2d and 3d,
    2048 each) nor 2048 (2d). Prints what was used and what was not. SystemExit: see
    :func:`mcn_ext.prepare.published.read_published`.
    """
    from mcn_ext.prepare import published  # which needs this module

    found = published.read_published(path, video_dims)
    print(found.notice())
    model = MCN(**found.sizes)
    model.load_state_dict(found.state)
    return model.eval()
