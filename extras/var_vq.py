"""VAR's tokenizer (arXiv:2404.02905, section 3.2): an image as ever finer grids of codes, each of
what is left over.

extras/train_var.py trains it, in train_vq.py's own loop; extras/var.py draws with it.
"""

# Shapes:  B images   S scales, the s-th a grid of p x p codes   L codes of an image, the sum of all p * p
#          h, w the latent grid, as the last scale   V codebook entries   D code dimension
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import vq

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # 680 codes
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # 2,240 codes


@dataclass
class ScaleVQConfig(vq.VQConfig):
    """What fixes the shapes of a tokenizer. The defaults are VAR's as released (109M
    parameters)."""

    ch: int = 160
    z_channels: int = 32
    codebook_size: int = 4096
    code_dim: int = 32
    scales: tuple = (
        SCALES_256  # rows (= columns) of codes at each scale; the last one is the latent grid
    )


TOKENIZERS = {
    "VAR-256": ScaleVQConfig(),
    "VAR-512": ScaleVQConfig(scales=SCALES_512),
    "VAR-demo": ScaleVQConfig(
        ch=32,
        ch_mult=(1, 1, 2),
        res_blocks=1,
        z_channels=64,
        codebook_size=256,
        code_dim=8,
        scales=(1, 2, 3, 4, 6),
    ),  # for 24 pixels
    "VAR-32": ScaleVQConfig(
        ch=32,
        ch_mult=(1, 1, 2),
        res_blocks=1,
        z_channels=64,
        codebook_size=512,
        code_dim=16,
        scales=(1, 2, 3, 4, 6, 8),
    ),  # for 32 pixels
}


class ScaleQuantizer(nn.Module):
    """Latents as a sum of S upsampled grids of codes, coarse to fine; each scale quantizes what the
    ones before it left over (paper, algorithms 1 and 2)."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        nn.init.uniform_(
            self.embedding.weight, -(config.code_dim**-0.5) / 36, config.code_dim**-0.5 / 36
        )
        # four convolutions, φ, mend what upsampling blurs; neighbouring scales share one
        convs = nn.ModuleList(
            nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1) for _ in range(4)
        )
        self.quant_resi = nn.ModuleDict({"qresi_ls": convs})
        self.register_buffer(
            "ema_vocab_hit_SV", torch.zeros(len(config.scales), config.codebook_size)
        )
        self.visits, self.positions = (
            0,
            0,
        )  # scales counted in training; B * h * w of the last batch
        self.use(config.scales)

    def use(self, scales):
        """Set the scales. No weight depends on them, so the released tokenizer serves 256 and 512
        pixels."""
        self.scales = tuple(scales)
        # Which φ a scale takes: the nearest of four ticks. For ten scales, two lie half-way between
        # ticks, and the rounding of NumPy's float64 decides; float32 or exact arithmetic would
        # change half of all codes.
        ticks, last = np.linspace(1 / 12, 11 / 12, 4), max(len(scales) - 1, 1)
        self.phi = [int(np.argmin(np.abs(ticks - s / last))) for s in range(len(scales))]

    def shrink(self, f, s):
        """Latents (B, D, h, w) at the size of scale s: (B, D, p, p)."""
        return (
            f
            if s == len(self.scales) - 1
            else F.interpolate(f, (self.scales[s], self.scales[s]), mode="area")
        )

    def embed(self, codes, s):
        """Codes (B, p * p) of scale s -> their entries (B, D, p, p)."""
        return self.embedding(codes).transpose(1, 2).unflatten(2, (self.scales[s], self.scales[s]))

    def grow(self, entries, s):
        """What entries (B, D, p, p) of scale s add to the latents: (B, D, h, w), upsampled, then
        half mended by φ."""
        side = self.scales[-1]
        if s < len(self.scales) - 1:
            entries = F.interpolate(entries, (side, side), mode="bicubic")
        return 0.5 * entries + 0.5 * self.quant_resi.qresi_ls[self.phi[s]](entries)

    def nearest(self, z):
        """Vectors (B, D, p, p) -> codes (B, p * p) of the nearest entries: plain distance, not
        vq.py's cosine. In chunks, because all B * p * p * V distances at once would fill
        gigabytes."""
        rows, book = z.flatten(2).transpose(1, 2).flatten(0, 1), self.embedding.weight.detach()
        squares = book.square().sum(1)  # of the row's own square every entry has the same
        chunk = max(1, 2**24 // len(book))
        codes = [
            torch.addmm(squares, part, book.T, alpha=-2).argmin(1) for part in rows.split(chunk)
        ]
        return torch.cat(codes).view(len(z), -1)

    def forward(self, f, entropy=False):
        """f (B, D, h, w) float32 -> quantized (B, D, h, w), losses {vq, commit, entropy}, codes (B,
        L).

        Gradients pass straight through. The losses are means over the scales: every partial sum is
        drawn to f. `entropy` is vq.py's; here it is always 0."""
        if f.shape[2:] != (self.scales[-1], self.scales[-1]):
            raise ValueError(
                f"the scales {self.scales} do not end at the latent grid, {f.shape[2]} x {f.shape[3]}"
            )
        rest, f_hat, codes, S = f.detach(), torch.zeros_like(f), [], len(self.scales)
        losses = dict.fromkeys(("vq", "commit", "entropy"), f.new_zeros(()))
        for s in range(S):
            codes.append(self.nearest(self.shrink(rest, s)))
            grown = self.grow(self.embed(codes[-1], s), s)
            f_hat, rest = f_hat + grown, rest - grown.detach()
            losses["vq"] = losses["vq"] + F.mse_loss(f_hat, f.detach()) / S
            losses["commit"] = losses["commit"] + 0.25 * F.mse_loss(f_hat.detach(), f) / S
        if self.training:
            self.count(codes, f)
            # few scales leave a φ out; DDP waits for the gradient of every parameter, so it gets
            # one of zeros
            idle = [conv for i, conv in enumerate(self.quant_resi.qresi_ls) if i not in self.phi]
            losses["vq"] = losses["vq"] + 0 * sum(
                q.sum() for conv in idle for q in conv.parameters()
            )
        return f + (f_hat - f).detach(), losses, torch.cat(codes, 1)

    @torch.no_grad()
    def count(self, codes, f):
        """Follow how often each scale takes each entry, by a moving average over (scale) visits as
        the official one."""
        self.positions = f.numel() // f.shape[1]
        self.visits = self.visits or 100 * bool(
            self.ema_vocab_hit_SV.any()
        )  # goes on, when resumed, as after 100
        for hits, some in zip(self.ema_vocab_hit_SV, codes):
            decay = 0 if self.visits == 0 else 0.9 if self.visits < 100 else 0.99
            hits.lerp_(torch.bincount(some.flatten(), minlength=len(hits)).float(), 1 - decay)
            self.visits += 1

    def usage_of_scales(self):
        """Fraction of the codebook that each scale uses (S,): entries hit at least 0.08 times as
        often as they would be by B * h * w even draws. A coarse scale has few positions and cannot
        use all. Counts this process's images."""
        return (
            (self.ema_vocab_hit_SV >= 0.08 * self.positions / len(self.embedding.weight))
            .float()
            .mean(1)
        )

    def usage(self):
        """Fraction of the codebook that some scale uses."""
        used = self.ema_vocab_hit_SV >= 0.08 * self.positions / len(self.embedding.weight)
        return float(used.any(0).float().mean())

    def sums(self, codes):
        """Codes (B, L) -> the latents after each scale in turn, (B, D, h, w) each."""
        f_hat = 0
        for s, some in enumerate(codes.split([p * p for p in self.scales], dim=1)):
            f_hat = f_hat + self.grow(self.embed(some, s), s)
            yield f_hat

    @torch.no_grad()
    def teacher_input(self, codes):
        """Codes (B, L) -> what the transformer reads (B, L - 1, D): at the positions of each scale
        but the first, the sum of all scales before it, shrunk to its size."""
        sums = list(self.sums(codes))[:-1]
        return torch.cat(
            [self.shrink(f_hat, s).flatten(2) for s, f_hat in enumerate(sums, 1)], 2
        ).transpose(1, 2)


class ScaleVQ(vq.VQModel):
    """vq.py's encoder and decoder around the quantizer above; train_vq.py's loop trains it as any
    other tokenizer."""

    config_class, multi_scale, released_config = ScaleVQConfig, True, TOKENIZERS["VAR-256"]

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
        """Config and weights, under our names, of the released file: blocks have other names there,
        and q, k and v of an attention block stand in one tensor there."""
        out = {}
        for name, value in state.items():
            if ".qkv." in name:
                out |= {
                    released_name(name).replace("qkv", part): x
                    for part, x in zip("qkv", value.chunk(3))
                }
            else:
                out[released_name(name)] = value
        return cls.released_config, out


class ScaleVQ512(ScaleVQ):
    """The same with the released file read for 512 pixels."""

    released_config = TOKENIZERS["VAR-512"]


def released_name(name):
    """A name of the released tokenizer -> ours."""
    words = (
        name.replace(".block.", ".res.")
        .replace("mid.block_1", "mid.0")
        .replace("mid.attn_1", "mid.1")
        .replace("mid.block_2", "mid.2")
        .split(".")
    )
    if words[1] in ("down", "up"):  # the decoder's levels are numbered from the finest one there
        words[2] = words[2] if words[1] == "down" else str(4 - int(words[2]))
        words[1] = "conv_blocks"
    return ".".join(words)


def load_tokenizer(path, device="cpu", scales=None):
    """A tokenizer from a released file or one of train_var.py's, as vq.load_vq. scales: those of
    the transformer that it is for; the released tokenizer takes either set of released ones. Raises
    OSError or ValueError with one sentence."""
    model = vq.load_vq(path, device, ScaleVQ)
    own, scales = model.config.scales, scales or model.config.scales
    if scales != own and not {own, scales} <= {SCALES_256, SCALES_512}:
        raise ValueError(
            f"{path} has the scales {own}, but the transformer {scales}; they do not belong together"
        )
    model.quantize.use(scales)
    return model
