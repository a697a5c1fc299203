"""The image tokenizer of LlamaGen (arXiv:2406.06525, section 2.2): pixels -> codes -> pixels.

An encoder turns every 16 x 16 pixels into a vector of 8 numbers. The quantizer replaces it by the
nearest of 16,384 learned vectors, whose number is the code. The decoder turns these into pixels.

Every image of a data set as codes, which train_gpt.py reads:
$ python vq.py encode --vq runs/vq/ckpt.pt --data shapes --out codes
$ torchrun --nproc_per_node=8 vq.py encode --pretrained VQ-16 --data imagenet/train --ten-crop
A picture with originals above reconstructions:
$ python vq.py reconstruct --vq runs/vq/ckpt.pt --out recon.png a.jpg b.jpg

The file in order: quantizer, encoder and decoder, the tokenizer, checkpoints, pixels, commands.
"""

# Shapes:  B images   H, W pixels   h, w latent grid   T codes = h * w   C channels
#          V codebook entries   D code dimension
import argparse
import hashlib
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nanollamagen import data, encoding, files, flags
from nanollamagen.data import shuffled as shuffled  # the training scripts take it from here


@dataclass
class VQConfig:
    """What decides a tokenizer's shapes. The defaults are VQ-16 as released, 72M parameters."""

    ch: int = 128  # channels at full resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)  # channel factor per level; all but the last halve H and W
    res_blocks: int = 2  # residual blocks per level; the decoder has one more
    z_channels: int = 256  # channels of the encoder's output, before the projection to D
    codebook_size: int = 16384  # V
    code_dim: int = 8  # D; a small D keeps the whole codebook in use (paper, table 2a)

    @property
    def downsample(self):
        """Pixels per code along each side."""
        return 2 ** (len(self.ch_mult) - 1)


VQ_CONFIGS = {
    "VQ-16": VQConfig(),
    "VQ-8": VQConfig(ch_mult=(1, 2, 2, 4)),
    "VQ-demo": VQConfig(ch=32, ch_mult=(1, 1, 2), res_blocks=1, z_channels=64, codebook_size=256),
}


# ---- quantizer ---------------------------------------------------------------------------------
def unit_vectors(z):
    """Latents (B, D, h, w) -> (B*h*w, D), every vector scaled to length 1."""
    return F.normalize(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), dim=-1)


class Quantizer(nn.Module):
    """Nearest entry of a learned codebook, both sides on the unit sphere (paper, section 2.2)."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight.uniform_(-1, 1), dim=-1))
        last_codes = torch.zeros(65536, dtype=torch.int32)  # seen in training, for usage()
        self.register_buffer("codebook_used", last_codes)

    def codebook(self):
        """(V, D), unit length."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, z):
        """Unit vectors (n, D) -> int64 (n,). On the sphere the nearest entry is the one with the
        largest dot product. All n * V products at once would fill gigabytes, so z is split."""
        codebook = self.codebook()
        chunk = max(1, 2**24 // len(codebook))
        return torch.cat([(some @ codebook.T).argmax(-1) for some in z.split(chunk)])

    def usage(self):
        """Fraction of the codebook that occurs among the last 65,536 training codes. Before there
        are so many, the rest counts as code 0."""
        return self.codebook_used.unique().numel() / len(self.embedding.weight)

    def forward(self, z, entropy=False):
        """z (B, D, h, w) -> quantized (B, D, h, w), losses {vq, commit, entropy}, codes (B, h, w).

        Gradients pass the quantizer straight through. `vq` pulls codes to latents, `commit` pulls
        latents to codes (with the paper's weight 0.25). `entropy` (arXiv:2310.05737) rewards sure
        choices that use all codes. It needs all B*h*w * V distances, so it is 0 unless asked for.
        """
        B, D, h, w = z.shape
        z = unit_vectors(z)  # (B*h*w, D)
        codes = self.nearest(z.detach())
        quantized = F.normalize(F.embedding(codes, self.embedding.weight).float(), dim=-1)
        losses = {
            "vq": F.mse_loss(quantized, z.detach()),
            "commit": 0.25 * F.mse_loss(z, quantized.detach()),
            "entropy": self.entropy(z) if entropy else z.new_zeros(()),
        }
        if self.training:
            used = torch.cat([self.codebook_used, codes.int()])
            self.codebook_used.copy_(used[-len(self.codebook_used) :])
        quantized = z + (quantized - z).detach()  # the values of quantized, the gradient of z
        return quantized.view(B, h, w, D).permute(0, 3, 1, 2), losses, codes.view(B, h, w)

    def entropy(self, z):
        """Unit vectors (n, D) -> the mean entropy of each choice less the entropy of the mean."""
        logits = (2 * z @ self.codebook().T - 2) / 0.01  # -(squared distance) / temperature
        p = logits.softmax(-1)  # (n, V)
        mean = p.mean(0)
        entropy_of_each = -(p * logits.log_softmax(-1)).sum(-1).mean()
        entropy_of_mean = -(mean * (mean + 1e-5).log()).sum()
        return entropy_of_each - entropy_of_mean


# ---- encoder and decoder -----------------------------------------------------------------------
def norm(channels):
    """The group norm of every block; 1e-6 is part of the released weights' arithmetic."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def silu(x):
    """x * sigmoid(x). Without gradients it overwrites x, which saves memory traffic."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, h, w = x.shape
        y = self.norm(x)
        qkv = self.q(y), self.k(y), self.v(y)  # each (B, C, h, w)
        q, k, v = (t.view(B, 1, C, h * w).transpose(2, 3) for t in qkv)  # each (B, 1, T, C)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, T, C)
        return x + self.proj_out(y.transpose(2, 3).reshape(B, C, h, w))


class Downsample(nn.Module):
    """Halve H and W. Zeros are padded right and below only, as the released weights expect."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if there is any, then a change of
    size. The encoder sets `downsample` and the decoder `upsample`, in all levels but their last."""

    def __init__(self, c_in, c_out, blocks, attention):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for i in range(blocks if attention else 0))
        self.downsample = nn.Identity()
        self.upsample = nn.Identity()

    def forward(self, x):
        for i, res in enumerate(self.res):
            x = res(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def middle(c):
    """The three blocks between the levels and the latents."""
    return nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, z_channels, h, w). The last and coarsest level has attention."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.Sequential()
        c_in = config.ch
        for i, c in enumerate(widths):
            level = Level(c_in, c, config.res_blocks, attention=i == last)
            if i < last:
                level.downsample = Downsample(c)
            self.conv_blocks.append(level)
            c_in = c
        self.mid = middle(c_in)
        self.norm_out = norm(c_in)
        self.conv_out = nn.Conv2d(c_in, config.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, H, W). The encoder mirrored, with one more block each."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        last = len(widths) - 1
        c_in = widths[0]
        self.conv_in = nn.Conv2d(config.z_channels, c_in, 3, padding=1)
        self.mid = middle(c_in)
        self.conv_blocks = nn.Sequential()
        for i, c in enumerate(widths):
            level = Level(c_in, c, config.res_blocks + 1, attention=i == 0)
            if i < last:
                level.upsample = Upsample(c)
            self.conv_blocks.append(level)
            c_in = c
        self.norm_out = norm(c_in)
        self.conv_out = nn.Conv2d(c_in, 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(silu(self.norm_out(x)))


# ---- the tokenizer -----------------------------------------------------------------------------
class VQModel(nn.Module):
    """Encoder, quantizer and decoder. Parameter names are those of the released checkpoints."""

    config_class, multi_scale = VQConfig, False  # VAR's tokenizer, in extras/, sets others

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.to(memory_format=torch.channels_last)  # encodes a sixth faster on two CPU cores

    def codes_per_image(self, image_size):
        """T, the codes of one image of image_size x image_size pixels."""
        return (image_size // self.config.downsample) ** 2

    def latents(self, images):
        """(B, 3, H, W) in [-1, 1], H and W multiples of the downsampling -> (B, D, h, w) float32,
        not normalised."""
        step, (H, W) = self.config.downsample, images.shape[-2:]
        if H % step or W % step:
            raise ValueError(f"images of {H}x{W} pixels do not divide by {step}")
        return self.quant_conv(self.encoder(images)).float()

    def forward(self, images, entropy=False):
        """Images (B, 3, H, W) -> (reconstruction (B, 3, H, W), losses: dict of scalars vq, commit,
        entropy)."""
        z = self.latents(images)
        with torch.autocast(images.device.type, enabled=False):  # bf16 confuses close codes
            quantized, losses, _ = self.quantize(z, entropy)
        return self.decoder(self.post_quant_conv(quantized)), losses

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, h, w) int64 in [0, V)."""
        z = self.latents(images)
        B, D, h, w = z.shape
        return self.quantize.nearest(unit_vectors(z)).view(B, h, w)

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, h, w) -> images (B, 3, H, W), about [-1, 1], not clamped."""
        z = F.embedding(codes, self.quantize.codebook()).permute(0, 3, 1, 2)  # (B, D, h, w)
        return self.decoder(self.post_quant_conv(z))


# ---- checkpoints -------------------------------------------------------------------------------
PRETRAINED = {  # file, repository if not the usual one; VQ-16-text goes with the caption models
    "VQ-16": ("vq_ds16_c2i.pt",),
    "VQ-8": ("vq_ds8_c2i.pt",),
    "VQ-16-text": ("vq_ds16_t2i.pt", "peizesun/llamagen_t2i"),
}


def load_vq(path, device="cpu", tokenizer=VQModel):
    """A tokenizer in eval mode, float32, from a released file or one of train_vq.py's (its averaged
    weights if it has them). `image_size` of the result is the side it was trained at, in pixels.
    `tokenizer` is the class to build, for tokenizers that derive from VQModel.

    Raises OSError or ValueError for a file that is missing, damaged or not a tokenizer."""
    checkpoint = files.read_checkpoint(path)
    state = files.weights_of(checkpoint, path)
    if "quantize.embedding.weight" not in state:
        raise ValueError(
            f"{path} is not a tokenizer checkpoint (no quantize.embedding.weight); is it the GPT?"
        )
    multi_scale = "quantize.quant_resi.qresi_ls.0.weight" in state
    if multi_scale != tokenizer.multi_scale:
        whose = "VAR: extras/var.py reads it" if multi_scale else "LlamaGen: vq.py reads it"
        raise ValueError(f"{path} is a tokenizer of {whose}")

    if "config" in checkpoint:
        config = tokenizer.config_class(**checkpoint["config"])
    elif multi_scale:
        config, state = tokenizer.released(state)
    else:  # released files do not say: VQ-16 has five levels, VQ-8 has four
        five_levels = any(name.startswith("encoder.conv_blocks.4.") for name in state)
        config = VQ_CONFIGS["VQ-16" if five_levels else "VQ-8"]
    model = tokenizer(config)
    buffers = dict(model.named_buffers())  # some files lack codebook_used
    files.load_weights(model, {**buffers, **state}, path)
    model.image_size = checkpoint.get("image_size", 256)
    return model.to(device).eval()


def weights_hash(model):
    """SHA-256 of a model's parameters; tells which tokenizer made a folder of codes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().to_dense().cpu().float().numpy().tobytes())
    return digest.hexdigest()


# ---- pixels ------------------------------------------------------------------------------------
def to_tensor(image):
    """RGB image -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(images):
    """Float images (B, 3, H, W) -> uint8 array (B, H, W, 3): clamp(127.5 x + 128), truncated, as in
    the paper's code."""
    pixels = (127.5 * images.detach().float() + 128).clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


# ---- commands ----------------------------------------------------------------------------------
def encode(args, tokenizer=VQModel):
    """Write every image of --data as codes to the folder --out, see encoding.write. `tokenizer` is
    as in load_vq."""
    images = data.open_images(args.data)
    model = load_vq(args.vq, args.device, tokenizer)
    size, step = args.image_size or model.image_size, model.config.downsample
    if size % step:
        fits = max(size // step, 1) * step
        raise ValueError(
            f"--image-size {size} is not a multiple of the tokenizer's {step}; try {fits}"
        )
    crops = encoding.Crops(images, size, ranges=args.crop_range if args.ten_crop else [])
    meta = {
        **crops.meta,
        "image_size": size,
        "h": size // step,
        "w": size // step,
        "codes": model.codes_per_image(size),  # T
        "codebook_size": model.config.codebook_size,
        "tokenizer": weights_hash(model),
        "data": args.data,
    }
    encoding.write(args.out, crops, model.encode, meta, args.device, args.batch_size, args.workers)


def reconstruct(args):
    """Write a picture with the originals above what is left of them after encoding and decoding."""
    model = load_vq(args.vq, args.device)
    size = args.image_size or model.image_size
    crops = [data.center_crop(data.open_image(path), size) for path in args.images]
    originals = torch.stack([to_tensor(crop) for crop in crops]).to(args.device)
    results = torch.cat([model.decode(model.encode(image[None])) for image in originals])
    rows = np.concatenate([to_uint8(originals), to_uint8(results)])
    data.save_grid(rows, args.out, columns=len(originals))
    print(f"{args.out}: originals above, reconstructions below")


def parse():
    """The command line: its parser, and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    enc = commands.add_parser("encode", help="write every image of a data set as codes")
    rec = commands.add_parser("reconstruct", help="write images above their reconstructions")
    for c in (enc, rec):
        weights = c.add_mutually_exclusive_group(required=True)
        weights.add_argument("--vq", help="tokenizer checkpoint: train_vq.py's or a released file")
        weights.add_argument("--ckpt", dest="vq", help=argparse.SUPPRESS)  # the old name of --vq
        weights.add_argument(
            "--pretrained", choices=PRETRAINED, help="a released tokenizer, fetched once"
        )
        c.add_argument("--image-size", type=flags.pixels, help="in pixels (default: as trained)")
        flags.add_device(c)
    enc.add_argument("--data", required=True, help="class folders, .jsonl, .tar, or shapes:N")
    enc.add_argument("--out", default="codes", help="folder to write (default: codes)")
    enc.add_argument("--ten-crop", action="store_true", help="ten crops per image, as in the paper")
    enc.add_argument(
        "--crop-range",
        type=flags.bounded(float, 1, 8),
        nargs="+",
        default=[1.1],
        metavar="R",
        help="ten crops are cut from R times the image size, for each R (default: 1.1)",
    )
    enc.add_argument(
        "--batch-size",
        type=flags.batch,
        default=64 if flags.best_device() == "cpu" else 100,
        help="crops that go through the encoder together (default: 64 on CPU, 100 on GPU)",
    )
    enc.add_argument(
        "--workers",
        type=flags.bounded(int, 0, 1024),
        default=min(8, os.cpu_count() or 1),
        help="processes that decode images",
    )
    rec.add_argument("--out", default="recon.png", help="PNG to write (default: recon.png)")
    rec.add_argument("images", nargs="+", metavar="IMAGE", help="files")
    return p, p.parse_args()


def main():
    """The command line."""
    parser, args = parse()
    try:
        if args.pretrained:
            args.vq = files.pretrained(*PRETRAINED[args.pretrained])
        if args.command == "encode":
            encode(args)
        else:
            reconstruct(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        if args.command == "encode":
            print("\nstopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
