"""ResNet-152 (He et al. 2015, arXiv 1512.03385), the field's 2D features, under the parameter names
of torchvision, whose ``.pth`` files load unchanged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcn_ext.prepare.published import tensors

LAYERS = (3, 8, 36, 3)  # blocks in each of the four stages of the 152-layer net
DIM = 2048
SHORT_SIDE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]
WHERE = (
    "torchvision publishes ResNet-152 trained on ImageNet as "
    "https://download.pytorch.org/models/resnet152-394f9c45.pth (230 MiB)"
)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as everybody's "v1.5" has it), 1x1 to four times the width."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """Images (n, 3, h, w), normalised -> (n, 2048), averaged over space. ``fc`` is only kept."""

    def __init__(self, layers: tuple[int, ...] = LAYERS):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, blocks in enumerate(layers):
            width, rows = 64 * 2**stage, []
            for block in range(blocks):
                rows.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
                inputs = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*rows))
        self.fc = nn.Linear(DIM, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):  # 50 sums of equals would pass fp16's largest number
                nn.init.constant_(module.bn3.weight, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))


def crop(frame: Tensor) -> Tensor:
    """An RGB frame (h, w, 3) uint8 -> (224, 224, 3) uint8: short side to 256, antialiased, centre.

    Equal to Pillow's bilinear resize up to rounding (1 of 255), on any device.
    """
    short = min(frame.shape[:2])
    # Of a banner only the centre is resized: nothing else of it is used.
    frame = _centre(frame, [min(side, 4 * short) for side in frame.shape[:2]])
    size = [SHORT_SIDE * side // short for side in frame.shape[:2]]
    images = frame.permute(2, 0, 1)[None].float()
    image = F.interpolate(images, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return _centre(image, [CROP, CROP]).round().clamp(0, 255).to(torch.uint8)


def _centre(image: Tensor, size: list[int]) -> Tensor:
    """The centre (height, width, 3) of an image (h, w, 3)."""
    top, left = (round((n - m) / 2) for n, m in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


class Frames2D:
    """Cropped frames (n, 224, 224, 3) uint8 -> features (n, 2048) float32, on ``device``.

    ``weights``: a state dict of torchvision's names, or None for random ones. ``model`` and
    ``weights_sha256`` name what computes the features. SystemExit for other weights.
    """

    def __init__(self, weights: Path | None, device: torch.device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = ResNet()
        self.device, self.weights_sha256 = device, "none"
        self.model = "ResNet-152, RANDOM weights (seed 0)"
        if weights:
            self.model = f"ResNet-152, {weights.name}"
            self.weights_sha256 = load(net, weights)
        self.net = net.eval().to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Tensor:
        x = frames.to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, STD))
        return self.net(((x - mean) / std).contiguous(memory_format=torch.channels_last)).cpu()


def load(net: ResNet, path: Path) -> str:
    """Load a state dict of torchvision's names; its SHA-256. SystemExit says what is wrong."""
    if not path.is_file():
        raise SystemExit(f"--weights {path}: no such file; {WHERE}")
    try:
        net.load_state_dict(tensors(torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as error:  # torch, zip and pickle raise a dozen types for damage
        raise SystemExit(
            f"--weights {path}: not the weights of a ResNet-152 ({str(error)[:300]}); {WHERE}"
        ) from error
    return hashlib.sha256(path.read_bytes()).hexdigest()
