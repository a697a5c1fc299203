"""The image tokenizer of LlamaGen (arXiv:2406.06525, section 2.2): pixels -> integer codes ->
pixels.

$ python vq.py encode --ckpt runs/vq/ckpt.pt --data shapes --out codes          # every image of a data set as codes
$ python vq.py encode --ckpt runs/vq/ckpt.pt --data DIR --out codes --ten-crop --crop-range 1.1 1.05
$ torchrun --nproc_per_node=8 vq.py encode --pretrained VQ-16 --data imagenet/train --out codes --ten-crop
$ python vq.py reconstruct --ckpt runs/vq/ckpt.pt --out recon.png a.jpg b.jpg    # originals above reconstructions

The file in order: model, checkpoints, pixels, codes on disk, commands.
"""

# Shapes:  B images   H, W pixels   h, w latent grid   T codes = h * w   V codebook entries   D code dimension
#          C channels   A crops per image   N images in a data set
import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from nanollamagen import data
from nanollamagen.data import shuffled as shuffled


# ---- model -------------------------------------------------------------------------------------
@dataclass
class VQConfig:
    """What fixes the shapes of a tokenizer. The defaults are VQ-16 as released (downsampling 16,
    72M parameters)."""

    ch: int = 128  # channels at full resolution
    ch_mult: tuple = (
        1,
        1,
        2,
        2,
        4,
    )  # channel factor per level; every level but the last halves H and W
    res_blocks: int = 2  # residual blocks per level (the decoder has one more)
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


def norm(channels):
    """Group norm as in every block; 1e-6 is part of the released weights' arithmetic."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def silu(x):
    """x * sigmoid(x) of a fresh tensor; in place where no gradient will ask for it, which spares
    memory traffic."""
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
    """Single-head self-attention over all positions of the coarsest level, with a residual
    connection."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, C, h, w = x.shape
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)  # each (B, C, h, w)
        q, k, v = (
            t.view(B, 1, C, h * w).transpose(2, 3) for t in (q, k, v)
        )  # each (B, 1, T, C): one head
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, T, C)
        return x + self.proj_out(y.transpose(2, 3).reshape(B, C, h, w))


def downsample(c):
    """Halve H and W. Zeros are padded right and below only, as the released weights expect."""
    return nn.Sequential(
        OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))
    )


def upsample(c):
    """Double H and W: nearest neighbour, then a convolution."""
    return nn.Sequential(
        OrderedDict(up=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1))
    )


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention on the coarsest level, then a
    change of size."""

    def __init__(self, c_in, c_out, blocks, attn, resample=None):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attn else 0))
        self.resample = resample and resample.__name__
        if resample:
            self.add_module(
                self.resample, resample(c_out)
            )  # the released names: "downsample" and "upsample"

    def forward(self, x):
        for i, res in enumerate(self.res):
            x = res(x)
            x = self.attn[i](x) if self.attn else x
        return getattr(self, self.resample)(x) if self.resample else x


def middle(c):
    """The three blocks between the levels and the latents."""
    return nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, z_channels, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.Sequential(
            *(
                Level(
                    widths[i - 1] if i else config.ch,
                    c,
                    config.res_blocks,
                    i == last,
                    downsample if i < last else None,
                )
                for i, c in enumerate(widths)
            )
        )
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = (
            norm(widths[-1]),
            nn.Conv2d(widths[-1], config.z_channels, 3, padding=1),
        )

    def forward(self, x):
        x = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, H, W); the encoder mirrored, with one more residual block per
    level."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.Sequential(
            *(
                Level(
                    widths[max(i - 1, 0)],
                    c,
                    config.res_blocks + 1,
                    i == 0,
                    upsample if i < last else None,
                )
                for i, c in enumerate(widths)
            )
        )
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """Nearest entry of a learned codebook, both sides on the unit sphere (paper, section 2.2)."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight.uniform_(-1, 1), dim=-1))
        self.register_buffer(
            "codebook_used", torch.zeros(65536, dtype=torch.int32)
        )  # the last 65,536 training codes

    def codebook(self):
        """(V, D), unit length."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, z):
        """Unit vectors (n, D) -> int64 (n,). On the sphere the nearest entry is the largest dot
        product; it is taken in chunks, because all n * V products at once would fill gigabytes."""
        codebook = self.codebook()
        chunk = max(1, 2**24 // len(codebook))
        return torch.cat([(part @ codebook.T).argmax(-1) for part in z.split(chunk)])

    def usage(self):
        """Fraction of the codebook that occurs among the last 65,536 training codes (unfilled
        places count as 0)."""
        return self.codebook_used.unique().numel() / len(self.embedding.weight)

    def forward(self, z, entropy=False):
        """z (B, D, h, w) -> quantized (B, D, h, w), losses {vq, commit, entropy}, codes (B, h, w).

        Gradients pass the quantizer straight through. `vq` pulls codes to latents, `commit` latents
        to codes (with the paper's weight 0.25). `entropy` (arXiv:2310.05737) rewards sure choices
        that use all codes; it needs all B*h*w * V distances, so it is 0 unless asked for."""
        B, D, h, w = z.shape
        z = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, D), dim=-1)  # (B*h*w, D)
        codes = self.nearest(z.detach())
        quantized = F.normalize(F.embedding(codes, self.embedding.weight).float(), dim=-1)
        losses = {
            "vq": F.mse_loss(quantized, z.detach()),
            "commit": 0.25 * F.mse_loss(z, quantized.detach()),
            "entropy": z.new_zeros(()),
        }
        if entropy:
            logits = (2 * z @ self.codebook().T - 2) / 0.01  # -(squared distance) / temperature
            p = logits.softmax(-1)
            mean = p.mean(0)
            losses["entropy"] = (mean * (mean + 1e-5).log()).sum() - (
                p * logits.log_softmax(-1)
            ).sum(-1).mean()
        if self.training:
            self.codebook_used.copy_(
                torch.cat([self.codebook_used, codes.int()])[-len(self.codebook_used) :]
            )
        quantized = z + (quantized - z).detach()
        return quantized.view(B, h, w, D).permute(0, 3, 1, 2), losses, codes.view(B, h, w)


class VQModel(nn.Module):
    """Encoder, quantizer and decoder. Parameter names are those of the released checkpoints."""

    config_class, multi_scale = VQConfig, False  # VAR's tokenizer, in extras/, sets others

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder, self.quantize = (
            Encoder(config),
            Decoder(config),
            Quantizer(config),
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.to(
            memory_format=torch.channels_last
        )  # encoding is a sixth faster so, on two CPU cores

    def codes_per_image(self, image_size):
        """T, the codes of one image of image_size x image_size pixels."""
        return (image_size // self.config.downsample) ** 2

    def latents(self, images):
        """(B, 3, H, W) in [-1, 1], H and W multiples of the downsampling -> (B, D, h, w) float32,
        not normalised."""
        step = self.config.downsample
        if images.shape[-2] % step or images.shape[-1] % step:
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels do not divide by {step}"
            )
        return self.quant_conv(self.encoder(images)).float()

    def forward(self, images, entropy=False):
        """Images (B, 3, H, W) -> (reconstruction (B, 3, H, W), losses: dict of scalars vq, commit,
        entropy)."""
        z = self.latents(images)
        with torch.autocast(
            images.device.type, enabled=False
        ):  # bf16 would confuse neighbouring codes
            quantized, losses, _ = self.quantize(z, entropy)
        return self.decoder(self.post_quant_conv(quantized)), losses

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, h, w) int64 in [0, V)."""
        z = self.latents(images)
        B, D, h, w = z.shape
        return self.quantize.nearest(
            F.normalize(z.permute(0, 2, 3, 1).reshape(-1, D), dim=-1)
        ).view(B, h, w)

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, h, w) -> images (B, 3, H, W), about [-1, 1], not clamped."""
        z = F.embedding(codes, self.quantize.codebook()).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(z))


# ---- checkpoints -------------------------------------------------------------------------------
def load_vq(path, device="cpu", tokenizer=VQModel):
    """A tokenizer in eval mode, float32, from a released file or one of train_vq.py's (its averaged
    weights if it has them); `image_size` of the result is the side it was trained at, in pixels.
    `tokenizer` is the class to build, for tokenizers that derive from VQModel.

    Raises OSError or ValueError with one sentence for a file that is missing, damaged or not a
    tokenizer."""
    checkpoint = data.read_checkpoint(path)
    state = data.weights_of(checkpoint, path)
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
    else:  # released files: the number of levels tells VQ-16 from VQ-8
        levels = 1 + max(
            int(k.split(".")[2]) for k in state if k.startswith("encoder.conv_blocks.")
        )
        config = VQ_CONFIGS["VQ-16" if levels == 5 else "VQ-8"]
    model = tokenizer(config)
    state = {**dict(model.named_buffers()), **state}  # some files lack the queue of used codes
    data.load_weights(model, state, path)
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
    """Float images (B, 3, H, W) -> uint8 array (B, H, W, 3): clamp(127.5 x + 128), truncated, as
    the paper's code."""
    return (
        (127.5 * images.detach().float() + 128)
        .clamp(0, 255)
        .byte()
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )


# ---- codes on disk -----------------------------------------------------------------------------
BLOCK = 64  # images whose codes `encode` writes as one file until all are joined


def encode(args, tokenizer=VQModel):
    """Write the folder --out: codes.npy uint16 (N, A, T), labels.npy int32 (N,) or captions.jsonl,
    meta.json.

    No two processes ever write one file, for two nodes that write to the same pages of one lose
    each other's work on NFS. Each process of a torchrun makes every world-th block of images, and
    the first joins them at the end. A second start makes the blocks that are missing. meta.json is
    written last: where it is, the folder is complete."""
    rank, world, device = (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        args.device,
    )
    images, model, out = (
        data.open_images(args.data),
        load_vq(args.ckpt, device, tokenizer),
        Path(args.out),
    )
    size, step = args.image_size or model.image_size, model.config.downsample
    ranges = args.crop_range if args.ten_crop else []
    check(args, images, model, size, ranges)
    A = 10 * len(ranges) or (1 if images.captions else 2)
    crops = "centre" if images.captions else "centre and its mirror image"
    meta = {
        "classes": list(images.classes),
        "captions": bool(images.captions),
        "image_size": size,
        "h": size // step,
        "w": size // step,
        "codes": model.codes_per_image(size),
        "codebook_size": model.config.codebook_size,
        "crops": {"ten_crop_ranges": ranges} if ranges else crops,
        "tokenizer": weights_hash(model),
        "data": args.data,
        "images": len(images),
    }
    if begun_before(out, meta, rank):
        return
    if world > 1:  # a day: one process may have all the slow images, and the others wait for it
        dist.init_process_group("gloo", timeout=timedelta(days=1))

    blocks = [
        range(start, min(start + BLOCK, len(images))) for start in range(0, len(images), BLOCK)
    ]
    parts = [out / "parts" / f"{block.start:09d}.npz" for block in blocks]
    todo = [block for block, part in list(zip(blocks, parts))[rank::world] if not part.exists()]
    loader = torch.utils.data.DataLoader(
        data.Crops(images, size, ranges),
        batch_sampler=todo,
        collate_fn=list,
        num_workers=args.workers,
    )
    with data.progress(
        sum(map(len, todo)), "encode" + f" (process 1 of {world})" * (world > 1), rank
    ) as bar:
        for block, codes in one_late(loader, model, device, args.batch_size):
            part = parts[block[0][0] // BLOCK]
            states = [data.DONE if isinstance(found, np.ndarray) else found for _, found in block]
            codes = codes.reshape(-1, A, meta["codes"]).astype(
                np.uint16
            )  # of those images that are DONE
            np.savez(f"{part}.tmp.npz", codes=codes, states=np.array(states, np.uint8))
            os.replace(f"{part}.tmp.npz", part)
            bar.update(len(block))
    if world > 1:
        dist.barrier()
    if rank == 0:
        join(out, parts, images, meta, A)
    if world > 1:  # gloo, when it is taken down in order, hangs in one of 30 runs (torch 2.13)
        os._exit(0)


def one_late(loader, model, device, batch_size):
    """(block, its codes as an array) for each block of data.Crops. While a GPU works on one, the
    codes of the one before come back and are written; if each was waited for, the GPU would idle in
    between."""
    cuda, before = torch.device(device).type == "cuda", None
    for block in itertools.chain(loader, [[]]):  # the empty one brings the last
        crops = [
            found for _, found in block if isinstance(found, np.ndarray)
        ]  # of those that could be used
        codes, ready = torch.zeros(0), None
        if crops:
            pixels = torch.from_numpy(np.concatenate(crops))  # (crops, H, W, 3) uint8
            pixels = (
                (pixels.pin_memory() if cuda else pixels)
                .to(device, non_blocking=True)
                .permute(0, 3, 1, 2)
            )
            codes = torch.cat(
                [model.encode(batch.float() / 127.5 - 1) for batch in pixels.split(batch_size)]
            )
            codes = codes.to("cpu", non_blocking=True)
            ready = torch.cuda.current_stream(device).record_event() if cuda else None
        if before:
            done, its_codes, its_event = before
            if its_event:
                its_event.synchronize()
            yield done, its_codes.numpy()
        before = block, codes, ready


def begun_before(out, meta, rank):
    """Begin the folder, or go on with it; True if it is complete. Raises ValueError if its settings
    were others."""
    settings, begun, finished = json.loads(json.dumps(meta)), out / "begun.json", out / "meta.json"
    for file, what in (finished, "made"), (begun, "begun"):
        there = json.loads(file.read_text()) if file.exists() else dict(settings)
        there.setdefault("codes", meta["h"] * meta["w"])  # which older folders do not say
        if {name: there.get(name) for name in settings} != settings:
            raise ValueError(
                f"--out {out} was {what} with other settings; choose another folder or delete it"
            )
        if what == "made" and file.exists():
            shutil.rmtree(
                out / "parts", ignore_errors=True
            )  # of a run that was killed in its last moment
            if rank == 0:
                print(
                    f"{out} is complete: {there['images'] - len(there['skipped']):,} images. Nothing to do."
                )
            return True
    data.make_folder(out / "parts")
    if rank == 0 and not begun.exists():
        (out / "begun.tmp").write_text(json.dumps(meta))
        os.replace(out / "begun.tmp", begun)
    return False


def join(out, parts, images, meta, A):
    """Complete a fully encoded folder: codes of the images that could be used, their labels or
    captions, meta.json."""
    for _ in range(120):  # files of another node can take a minute to be seen here (NFS)
        if all(part.exists() for part in parts):
            break
        time.sleep(1)
    states = np.concatenate([np.load(part, allow_pickle=False)["states"] for part in parts])
    keep, skipped = np.flatnonzero(states == data.DONE), np.flatnonzero(states != data.DONE)
    counts = {why: (states == state).sum() for state, why in data.SKIPPED.items()}
    counts = ", ".join(f"{count:,} {why}" for why, count in counts.items() if count)
    if not len(keep):
        shutil.rmtree(out / "parts")
        raise ValueError(
            f"none of the {len(images)} images could be used ({counts}); nothing was written"
        )
    rows = (np.load(part, allow_pickle=False)["codes"] for part in parts)
    with open(out / "codes.npy", "wb") as f:
        data.write_npy(f, np.uint16, (len(keep), A, meta["codes"]), rows)
    if images.captions:
        with open(out / "captions.jsonl", "w", encoding="utf8") as f:
            f.writelines(json.dumps(images.captions[i], ensure_ascii=False) + "\n" for i in keep)
    else:
        np.save(out / "labels.npy", np.array(images.labels, dtype=np.int32)[keep])
    meta["skipped"] = {str(images.places[i]): data.SKIPPED[states[i]] for i in skipped}
    (out / "meta.tmp").write_text(json.dumps(meta, indent=1))
    os.replace(out / "meta.tmp", out / "meta.json")
    shutil.rmtree(out / "parts")
    (out / "begun.json").unlink()
    print(
        f"{out}: {len(keep):,} images x {A} crop{'s' * (A > 1)} x {meta['codes']} codes"
        + (f"; left out: {counts}; meta.json names them" if counts else ""),
        flush=True,
    )


def check(args, images, model, size, ranges):
    """Raise ValueError, with one sentence, if tokenizer, images and flags do not belong
    together."""
    step, V = model.config.downsample, model.config.codebook_size
    if size % step:
        raise ValueError(
            f"--image-size {size} is not a multiple of the tokenizer's {step}; "
            f"try {max(size // step, 1) * step}"
        )
    if V > 2**16:
        raise ValueError(
            f"{args.ckpt}: codes.npy holds uint16, but the codebook has {V:,} entries (more than 65,536)"
        )
    if images.captions and ranges:
        raise ValueError("--ten-crop would cut away what captions name; leave it out")


# ---- commands ----------------------------------------------------------------------------------
PRETRAINED = {
    "VQ-16": ("vq_ds16_c2i.pt",),
    "VQ-8": ("vq_ds8_c2i.pt",),
    "VQ-16-text": ("vq_ds16_t2i.pt", "peizesun/llamagen_t2i"),
}  # file, repository if not the usual one


def reconstruct(args):
    """Write a picture with the originals above what is left of them after encoding and decoding."""
    model = load_vq(args.ckpt, args.device)
    size = args.image_size or model.image_size
    originals = torch.stack(
        [to_tensor(data.center_crop(data.open_image(path), size)) for path in args.images]
    )
    originals = originals.to(args.device)
    results = torch.cat([model.decode(model.encode(image[None])) for image in originals])
    data.save_grid(
        np.concatenate([to_uint8(originals), to_uint8(results)]), args.out, columns=len(originals)
    )
    print(f"{args.out}: originals above, reconstructions below")


def main():
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    enc = commands.add_parser("encode", help="write every image of a data set as codes")
    rec = commands.add_parser(
        "reconstruct", help="write a picture of images and their reconstructions"
    )
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    for c in (enc, rec):
        weights = c.add_mutually_exclusive_group(required=True)
        weights.add_argument(
            "--ckpt", help="tokenizer checkpoint: train_vq.py's or a released file"
        )
        weights.add_argument(
            "--pretrained",
            choices=PRETRAINED,
            help="fetch a released tokenizer instead; VQ-16-text goes with the models for captions",
        )
        c.add_argument(
            "--image-size", type=int, help="pixels a side (default: as the tokenizer was trained)"
        )
        c.add_argument(
            "--device",
            type=data.device,
            default=device,
            help="cuda or cpu (default: cuda where there is one)",
        )
    enc.add_argument(
        "--data",
        required=True,
        help="a folder of class folders, or shapes, or shapes:N for N of them",
    )
    enc.add_argument("--out", default="codes", help="folder to write (default: codes)")
    enc.add_argument(
        "--ten-crop", action="store_true", help="ten crops an image, as the paper, not two"
    )
    enc.add_argument(
        "--crop-range",
        type=float,
        nargs="+",
        default=[1.1],
        metavar="R",
        help="ten crops are cut from R times the image size; several R give ten each (default: 1.1)",
    )
    enc.add_argument(
        "--batch-size",
        type=int,
        default=64 if device == "cpu" else 100,
        help="crops that go through the encoder together (default: 64 on CPU, 100 on GPU)",
    )
    enc.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that decode images",
    )
    rec.add_argument("--out", default="recon.png", help="PNG to write (default: recon.png)")
    rec.add_argument("images", nargs="+", metavar="IMAGE")
    args = p.parse_args()
    p.usage = "python vq.py encode|reconstruct ... (--help lists the flags)"
    data.within(p, args, image_size=(1, 8192))
    if args.command == "encode":
        data.within(p, args, crop_range=(1, 8), batch_size=(1, 2**20), workers=(0, 1024))
    try:
        if args.pretrained:
            args.ckpt = data.pretrained(*PRETRAINED[args.pretrained])
        {"encode": encode, "reconstruct": reconstruct}[args.command](args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit(
            "\nstopped; the same command goes on from here" if args.command == "encode" else 130
        )


if __name__ == "__main__":
    main()
