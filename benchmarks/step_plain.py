"""The published training step, written plainly from its description (Chen et al. 2021), to compare
with: spectrograms padded to one length, nn.Conv2d and nn.BatchNorm2d, dot products as N x N
matrices with an eye made on the host, mean squared errors, torch.optim.Adam.
"""

from itertools import combinations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mcn_ext.data.batch import to_device
from mcn_ext.encoders import GatedUnit, reconstruction_head

NAMES = ("video", "audio", "text")


class Block(nn.Module):
    def __init__(self, dim_in, dim_out, stride):
        super().__init__()

        def conv(a, b, width, step):
            layer = nn.Conv2d(a, b, (1, width), (1, step), (0, width // 2), bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(b))

        self.first, self.second = conv(dim_in, dim_out, 9, stride), conv(dim_out, dim_out, 9, 1)
        self.shortcut = (
            nn.Identity() if stride == 1 and dim_in == dim_out else conv(dim_in, dim_out, 1, stride)
        )

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Step:
    """A training step, part by part, of a subclass that has ``model``, ``optimizer``, ``table``
    (word vectors), ``autocast`` (makes the context of the encoders), ``embed`` and ``loss``."""

    def step(self, clock, batch):
        with clock("transfer"):
            batch = to_device(batch, self.table.device, self.table)
        ends, leaves = {}, {}
        for name in NAMES:
            with clock(f"{name} forward"), self.autocast():
                ends[name] = self.embed(name, batch)
            leaves[name] = [x.detach().requires_grad_() for x in ends[name]]
        with clock("losses"):
            rows, errors = ({name: leaf[i] for name, leaf in leaves.items()} for i in (0, 1))
            total = self.loss(rows, errors, batch)
            total.backward()
        for name, outputs in ends.items():
            with clock(f"{name} backward"):
                torch.autograd.backward(outputs, [leaf.grad for leaf in leaves[name]])
        with clock("optimiser"):
            self.finish(total)
            self.optimizer.zero_grad(set_to_none=True)

    def finish(self, total):
        self.optimizer.step()


class Plain(Step):
    """One stage, three modalities; losses run under ``autocast`` too, fp16 as published. Centroids
    are random: k-means is measured apart."""

    def __init__(self, args, dims, table, autocast):
        torch.manual_seed(0)
        self.args, self.table, self.autocast = args, table, autocast
        device, d = table.device, args.embd_dim
        widths = [max(1, round(w * args.audio_width)) for w in (128, 128, 256, 512, 1024)]
        blocks = [
            Block(a, b, s)
            for w, b in zip(widths, widths[1:], strict=False)
            for a, s in ((w, 2), (b, 1))
        ]
        self.davenet = nn.Sequential(
            nn.Conv2d(1, widths[0], (40, 1), bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            *blocks,
        )
        last, dim = widths[-1], sum(dims.values())
        self.gate = {
            "video": GatedUnit(dim, d),
            "audio": nn.Sequential(GatedUnit(last, last), nn.Linear(last, d)),
            "text": GatedUnit(d, d),
        }
        self.word = nn.Linear(300, d)
        self.heads = {
            name: reconstruction_head(d, args.recon_dim, width)
            for name, width in (("video", dim), ("audio", last), ("text", d))
        }
        self.model = nn.ModuleList(
            [self.davenet, self.word, *self.gate.values(), *self.heads.values()]
        ).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.centroids = F.normalize(torch.randn(args.cluster_size, d, device=device))

    def features(self, name, batch):
        if name == "video":
            return torch.cat([F.normalize(x, dim=1) for x in batch["video"].values()], 1)
        if name == "text":
            return F.relu(self.word(batch["text"])).amax(1)
        return self.davenet(batch["audio"][:, None]).mean(dim=(2, 3))

    def embed(self, name, batch):
        short = self.args.audio_frames - batch["audio"].shape[-1]
        features = self.features(name, batch | {"audio": F.pad(batch["audio"], (0, short))})
        x = self.gate[name](features)
        return x, F.mse_loss(self.heads[name](x), features.detach())

    def loss(self, rows, errors, batch):
        with self.autocast():
            labels = (sum(x.detach() for x in rows.values()) / 3 @ self.centroids.t()).argmax(1)
            total = self.args.recon_weight * sum(errors.values())
            total = total + sum(self.contrastive(*pair) for pair in combinations(rows.values(), 2))
            clusters = (F.cross_entropy(x @ self.centroids.t(), labels) for x in rows.values())
            return total + sum(clusters)

    @staticmethod
    def contrastive(x, y):
        s, target = x @ y.t(), torch.arange(len(x), device=x.device)
        s = s - 0.001 * torch.from_numpy(np.eye(len(s), dtype=np.float32)).to(x.device)
        return sum(F.nll_loss(F.log_softmax(z, 1), target) for z in (s, s.t()))
