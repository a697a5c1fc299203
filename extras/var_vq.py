"""VAR's tokenizer (arXiv:2404.02905, section 3.2): an image as ever finer grids of codes, each of
what the coarser ones left over.

extras/train_var.py trains it, in train_vq.py's own loop; extras/var.py samples with it. The file in
order: sizes, quantizer, tokenizer, released files.
"""

# Shapes:  B images   S scales, the s-th a grid of p x p codes   L codes per image, the sum of all
#          p * p   h, w the latent grid, which is the last scale   V codebook entries
#          D code dimension
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import vq

# ---- sizes -------------------------------------------------------------------------------------
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # 680 codes
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # 2,240 codes


@dataclass
class ScaleVQConfig(vq.VQConfig):
    """What fixes the shapes of a tokenizer. The defaults are VAR's as released, 109M parameters."""

    ch: int = 160
    z_channels: int = 32
    codebook_size: int = 4096
    code_dim: int = 32
    scales: tuple = SCALES_256  # rows = columns of codes at each; the last is the latent grid


SMALL = dict(ch=32, ch_mult=(1, 1, 2), res_blocks=1, z_channels=64)  # 0.9M, for laptops
TOKENIZERS = {
    "VAR-256": ScaleVQConfig(),
    "VAR-512": ScaleVQConfig(scales=SCALES_512),
    "VAR-demo": ScaleVQConfig(**SMALL, codebook_size=256, code_dim=8, scales=(1, 2, 3, 4, 6)),
    "VAR-32": ScaleVQConfig(**SMALL, codebook_size=512, code_dim=16, scales=(1, 2, 3, 4, 6, 8)),
}  # VAR-demo is for 24 pixels, VAR-32 for 32


# ---- quantizer ---------------------------------------------------------------------------------
class ScaleQuantizer(nn.Module):
    """Latents as a sum of S upsampled grids of codes, coarse to fine; each scale quantizes what the
    ones before it left over (paper, algorithms 1 and 2)."""

    def __init__(self, config):
        super().__init__()
        V, D = config.codebook_size, config.code_dim
        self.embedding = nn.Embedding(V, D)
        nn.init.uniform_(self.embedding.weight, -(D**-0.5) / 36, D**-0.5 / 36)
        # four convolutions, φ, sharpen what upsampling blurs; neighbouring scales share one
        convs = nn.ModuleList(nn.Conv2d(D, D, 3, padding=1) for _ in range(4))
        self.quant_resi = nn.ModuleDict({"qresi_ls": convs})
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.scales), V))
        self.visits = 0  # scales counted in training
        self.positions = 0  # B * h * w of the last batch
        self.use(config.scales)

    def use(self, scales):
        """Set the scales. No weight depends on them, so the released tokenizer works for 256
        and 512 pixels."""
        self.scales = tuple(scales)
        # Which φ a scale takes: the nearest of four ticks. Two of ten scales lie half-way between
        # ticks, where the rounding of NumPy's float64 decides. Float32 or exact arithmetic would
        # change half of all codes.
        ticks = np.linspace(1 / 12, 11 / 12, 4)
        last = max(len(scales) - 1, 1)
        self.phi = [int(np.argmin(np.abs(ticks - s / last))) for s in range(len(scales))]

    def shrink(self, f, s):
        """Latents (B, D, h, w) at the size of scale s: (B, D, p, p)."""
        if s == len(self.scales) - 1:
            return f
        p = self.scales[s]
        return F.interpolate(f, (p, p), mode="area")

    def embed(self, codes, s):
        """Codes (B, p * p) of scale s -> their entries (B, D, p, p)."""
        p = self.scales[s]
        return self.embedding(codes).transpose(1, 2).unflatten(2, (p, p))

    def grow(self, entries, s):
        """What entries (B, D, p, p) of scale s add to the latents: (B, D, h, w). They are
        upsampled, then half of them goes through φ."""
        side = self.scales[-1]
        if s < len(self.scales) - 1:
            entries = F.interpolate(entries, (side, side), mode="bicubic")
        phi = self.quant_resi.qresi_ls[self.phi[s]]
        return 0.5 * entries + 0.5 * phi(entries)

    def nearest(self, z):
        """Vectors (B, D, p, p) -> codes (B, p * p) of the nearest entries: plain distance, not
        vq.py's cosine."""
        rows = z.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * p * p, D)
        book = self.embedding.weight.detach()
        squares = book.square().sum(1)  # the row's own square is the same for every entry
        chunk = max(1, 2**24 // len(book))  # all B * p * p * V distances would fill gigabytes
        codes = [
            torch.addmm(squares, some, book.T, alpha=-2).argmin(1) for some in rows.split(chunk)
        ]
        return torch.cat(codes).view(len(z), -1)

    def forward(self, f, entropy=False):
        """f (B, D, h, w) float32 -> quantized (B, D, h, w), losses {vq, commit, entropy}, codes
        (B, L).

        Gradients pass straight through. The losses are means over the scales, because every partial
        sum is pulled to f. `entropy` is vq.py's; here it is always 0."""
        S, side = len(self.scales), self.scales[-1]
        if f.shape[2:] != (side, side):
            raise ValueError(
                f"the scales {self.scales} do not end at the latent grid, "
                f"{f.shape[2]} x {f.shape[3]}"
            )
        rest = f.detach()  # what the scales so far left over
        f_hat = torch.zeros_like(f)  # their sum
        codes = []
        losses = dict.fromkeys(("vq", "commit", "entropy"), f.new_zeros(()))
        for s in range(S):
            codes.append(self.nearest(self.shrink(rest, s)))
            grown = self.grow(self.embed(codes[-1], s), s)
            f_hat = f_hat + grown
            rest = rest - grown.detach()
            losses["vq"] = losses["vq"] + F.mse_loss(f_hat, f.detach()) / S
            losses["commit"] = losses["commit"] + 0.25 * F.mse_loss(f_hat.detach(), f) / S
        if self.training:
            self.count(codes, f)
            # Few scales leave a φ out. DDP waits for the gradient of every parameter, so those of
            # an idle φ get zeros.
            for i, conv in enumerate(self.quant_resi.qresi_ls):
                if i not in self.phi:
                    losses["vq"] = losses["vq"] + 0 * (conv.weight.sum() + conv.bias.sum())
        return f + (f_hat - f).detach(), losses, torch.cat(codes, 1)

    @torch.no_grad()
    def count(self, codes, f):
        """Follow how often each scale takes each entry, by the official moving average over visits
        of scales."""
        self.positions = f.numel() // f.shape[1]
        if self.visits == 0 and self.ema_vocab_hit_SV.any():  # a resumed run has had a hundred
            self.visits = 100
        for hits, codes_of_scale in zip(self.ema_vocab_hit_SV, codes):
            decay = 0 if self.visits == 0 else 0.9 if self.visits < 100 else 0.99
            counts = torch.bincount(codes_of_scale.flatten(), minlength=len(hits)).float()
            hits.lerp_(counts, 1 - decay)
            self.visits += 1

    def used(self):
        """Which entries each scale uses, bool (S, V): those hit at least 0.08 times as often as if
        all B * h * w positions took each entry equally. A coarse scale has few positions and cannot
        use all. Counts this process's images."""
        return self.ema_vocab_hit_SV >= 0.08 * self.positions / len(self.embedding.weight)

    def usage(self):
        """Fraction of the codebook that some scale uses."""
        return float(self.used().any(0).float().mean())

    def sums(self, codes):
        """Codes (B, L) -> the latents after each scale in turn, (B, D, h, w) each."""
        f_hat = 0
        for s, codes_of_scale in enumerate(codes.split([p * p for p in self.scales], dim=1)):
            f_hat = f_hat + self.grow(self.embed(codes_of_scale, s), s)
            yield f_hat

    @torch.no_grad()
    def teacher_input(self, codes):
        """Codes (B, L) -> what the transformer reads (B, L - 1, D): at the positions of each scale
        but the first, the sum of all scales before it, shrunk to its size."""
        sums = list(self.sums(codes))[:-1]
        shrunk = [self.shrink(f_hat, s).flatten(2) for s, f_hat in enumerate(sums, 1)]
        return torch.cat(shrunk, 2).transpose(1, 2)


# ---- tokenizer ---------------------------------------------------------------------------------
class ScaleVQ(vq.VQModel):
    """vq.py's encoder and decoder around the quantizer above. train_vq.py's loop trains it like any
    other tokenizer."""

    config_class = ScaleVQConfig
    multi_scale = True
    released_config = TOKENIZERS["VAR-256"]

    def __init__(self, config):
        super().__init__(config)
        self.quantize = ScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 3, padding=1)

    def codes_per_image(self, image_size):
        """L, the codes of one image. Raises ValueError where the scales do not end at its latent
        grid."""
        scales, side = self.quantize.scales, image_size // self.config.downsample
        if scales[-1] != side:
            raise ValueError(
                f"the scales {','.join(map(str, scales))} do not end at {side}, the latent grid of "
                f"{image_size} pixels; they are for {scales[-1] * self.config.downsample} pixels"
            )
        return sum(p * p for p in scales)

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, L) int64 in [0, V), scale after scale, each
        row by row."""
        return self.quantize(self.latents(images))[2]

    @torch.no_grad()
    def to_images(self, f_hat):
        """Sums of scales (B, D, h, w) -> images (B, 3, H, W), clamped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)

    def decode(self, codes):
        """Codes (B, L) -> images (B, 3, H, W) in [-1, 1]."""
        return self.to_images(list(self.quantize.sums(codes))[-1])

    @classmethod
    def released(cls, state):
        """Config and weights, under our names, of the released file. Its blocks have other names,
        and it keeps q, k and v of an attention block in one tensor."""
        weights = {}
        for name, value in state.items():
            ours = our_name(name)
            if ".qkv." in name:
                for part, third in zip("qkv", value.chunk(3)):
                    weights[ours.replace("qkv", part)] = third
            else:
                weights[ours] = value
        return cls.released_config, weights


class ScaleVQ512(ScaleVQ):
    """The same with the released file read for 512 pixels."""

    released_config = TOKENIZERS["VAR-512"]


# ---- released files ----------------------------------------------------------------------------
def our_name(name):
    """A name of the released tokenizer -> ours."""
    for theirs, ours in (
        (".block.", ".res."),
        ("mid.block_1", "mid.0"),
        ("mid.attn_1", "mid.1"),
        ("mid.block_2", "mid.2"),
    ):
        name = name.replace(theirs, ours)
    words = name.split(".")
    if words[1] == "down":
        words[1] = "conv_blocks"
    elif words[1] == "up":  # the decoder's levels are numbered from the finest one there
        words[1:3] = ["conv_blocks", str(4 - int(words[2]))]
    return ".".join(words)


def load_tokenizer(path, device="cpu", scales=None):
    """A tokenizer from a released file or one of train_var.py's, as vq.load_vq. `scales` are those
    of the transformer that it is for; the released tokenizer takes either set of released ones.
    Raises OSError or ValueError that names the file."""
    model = vq.load_vq(path, device, ScaleVQ)
    own = model.config.scales
    scales = scales or own
    if scales != own and not {own, scales} <= {SCALES_256, SCALES_512}:
        raise ValueError(
            f"{path} has the scales {own}, but the transformer {scales}; "
            "they do not belong together"
        )
    model.quantize.use(scales)
    return model
