"""LPIPS: how different two images look, by the features of a network that never changes.

net = lpips.load()                       # VGG16 and the weights of its layers, fetched once
net(a, b)                                # images (B, 3, H, W) in [-1, 1], twice -> (B,)
"""

# Shapes:  B images   C channels   H, W pixels
import torch
from torch import nn

from nanollamagen import files


class LPIPS(nn.Module):
    """Perceptual distance of image batches in [-1, 1] (arXiv:1801.03924, version 0.1 with VGG16).

    Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, divided by their length over
    channels, squared difference, weighted over channels, averaged over space, summed over the five.
    forward(a, b) -> (B,). The released training code also drops half of the channels at random
    before they are weighted; here none are."""

    TAPS = (3, 8, 15, 22, 29)  # the five ReLUs within `features`

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for c in (
            64,
            64,
            "pool",
            128,
            128,
            "pool",
            256,
            256,
            256,
            "pool",
            512,
            512,
            512,
            "pool",
            512,
            512,
            512,
        ):
            layers += (
                [nn.MaxPool2d(2)] if c == "pool" else [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
            )
            c_in = c_in if c == "pool" else c
        self.features = nn.Sequential(*layers)  # torchvision's names: features.0.weight ...
        self.lin = nn.ParameterList(
            nn.Parameter(torch.zeros(1, c, 1, 1)) for c in (64, 128, 256, 512, 512)
        )
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def load(self, vgg, lin):
        """Take the weights of torchvision's VGG16 file and of the published LPIPS file."""
        features = {
            k.removeprefix("features."): v for k, v in vgg.items() if k.startswith("features.")
        }
        self.features.load_state_dict(features)
        for i, weight in enumerate(self.lin):
            weight.copy_(lin[f"lin{i}.model.1.weight"])
        return self

    def forward(self, a, b):
        x = (torch.cat([a, b]) - self.shift) / self.scale  # (2B, 3, H, W): one pass for both
        total, weights = 0, iter(self.lin)
        for i, layer in enumerate(self.features):
            x = layer(x)  # (2B, C, H, W), then smaller
            if i in self.TAPS:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                of_a, of_b = unit.chunk(2)
                total = total + ((of_a - of_b).square() * next(weights)).sum(1).mean((1, 2))  # (B,)
        return total


def load():
    """LPIPS with its two weight files, downloaded once (528 MB and 7 KB). Raises OSError that says
    what to do."""
    github = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"
    names = {
        "vgg16-397923af.pth": (
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "397923af",
        ),
        "lpips_vgg_lin.pth": (
            f"{github}/vgg.pth",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        ),
    }
    try:
        paths = [
            files.download(url, files.cache_dir() / name, sha256)
            for name, (url, sha256) in names.items()
        ]
    except OSError as error:
        raise OSError(
            f"LPIPS needs {' and '.join(names)} in {files.cache_dir()}: {error}. Or train without it: "
            "--lpips-weight 0"
        ) from None
    return LPIPS().load(*(files.read_checkpoint(path) for path in paths))
