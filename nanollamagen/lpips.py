"""LPIPS: how different two images look, by the features of a network that never changes.

net = lpips.load()                       # VGG16 and the weights of its layers, downloaded once
net(a, b)                                # images (B, 3, H, W) in [-1, 1], twice -> (B,)
"""

# Shapes:  B images   C channels   H, W pixels
import torch
from torch import nn

from nanollamagen import files

# VGG16's convolutions: five groups of (channels, how many). Between groups, H and W are halved.
GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class LPIPS(nn.Module):
    """Perceptual distance of image batches in [-1, 1] (arXiv:1801.03924, version 0.1 with VGG16).

    Features at the end of each group (relu1_2 to relu5_3), divided by their length over channels,
    squared difference, weighted over channels, averaged over space, summed over the groups.
    forward(a, b) -> (B,). No channels are dropped, unlike in the released training code."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        self.last = []  # numbers of the layers that end a group
        for c, convolutions in GROUPS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
                c_in = c
            self.last.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # torchvision's names: features.0.weight ...
        self.lin = nn.ParameterList(nn.Parameter(torch.zeros(1, c, 1, 1)) for c, _ in GROUPS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def load(self, vgg, lin):
        """Take the weights of torchvision's VGG16 file and of the published LPIPS file."""
        prefix = "features."
        vgg = {name.removeprefix(prefix): x for name, x in vgg.items() if name.startswith(prefix)}
        self.features.load_state_dict(vgg)
        for i, weight in enumerate(self.lin):
            weight.copy_(lin[f"lin{i}.model.1.weight"])
        return self

    def forward(self, a, b):
        x = (torch.cat([a, b]) - self.shift) / self.scale  # (2B, 3, H, W): one pass for both
        total, weights = 0, iter(self.lin)
        for i, layer in enumerate(self.features):
            x = layer(x)  # (2B, C, H, W), smaller in each group
            if i in self.last:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                of_a, of_b = unit.chunk(2)  # each (B, C, H, W)
                total = total + ((of_a - of_b).square() * next(weights)).sum(1).mean((1, 2))  # (B,)
        return total


VGG = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG}"
VGG_SHA256 = "397923af"
LIN = "lpips_vgg_lin.pth"
LIN_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
LIN_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


def load():
    """LPIPS with its two weight files, downloaded once (528 MB and 7 KB). Raises OSError."""
    cache = files.cache_dir()
    try:
        vgg = files.download(VGG_URL, cache / VGG, VGG_SHA256)
        lin = files.download(LIN_URL, cache / LIN, LIN_SHA256)
    except OSError as error:
        needs = f"LPIPS needs {VGG} and {LIN} in {cache}: {error}"
        raise OSError(f"{needs}. Or train without it: --lpips-weight 0") from None
    return LPIPS().load(files.read_checkpoint(vgg), files.read_checkpoint(lin))
