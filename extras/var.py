"""VAR beside LlamaGen (arXiv:2404.02905): an image as ever finer grids of codes, and a whole grid
predicted at once.

Your own model (extras/train_var.py makes one), a row of pictures for each class:
$ python extras/var.py sample --vq runs/var-vq/ckpt.pt --var runs/var/ckpt.pt --count 4 --out sample.png
The released weights, fetched once; d16, d20, d24 and d30 draw 256 pixels, d36 draws 512:
$ python extras/var.py sample --pretrained d16 --classes 207,"red fox" --out sample.png
50,000 images for the metrics of evaluate.py, with the paper's settings (interrupted, it goes on
where it ended):
$ torchrun --nproc_per_node=8 extras/var.py sample --pretrained d16 --paper --num-samples 50000 --out samples.npz
Draw the inside of a box anew, or all around it; the model was never trained for that:
$ python extras/var.py edit --pretrained d16 --box 0.25,0.25,0.75,0.75 --out edit.png photo.png
A picture with its first scale, its first two, and so on:
$ python extras/var.py reconstruct --vq runs/var-vq/ckpt.pt --out scales.png photo.png

The tokenizer is in var_vq.py. This file in order: transformer, checkpoints, sampling, commands.
"""

# Shapes:  B images   S scales, the s-th a grid of p x p codes   L codes of an image, the sum of all p * p
#          h, w the latent grid, as the last scale   V codebook entries   D code dimension   C width   n heads
import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
from var_vq import SCALES_256, SCALES_512, ScaleVQ, ScaleVQ512, load_tokenizer

import sample
import vq
from nanollamagen import captions, data


# ---- transformer -------------------------------------------------------------------------------
@dataclass
class VARConfig:
    """What fixes the shapes of a transformer; depth does most: C = 64 * depth, n = depth."""

    depth: int = 16
    scales: tuple = SCALES_256
    vocab_size: int = 4096  # V
    code_dim: int = 32  # D
    num_classes: int = 1000  # id num_classes stands for "no class"
    shared_adaln: bool = False  # one modulation for all blocks, and an offset for each
    class_dropout: float = 0.1  # how often training replaces the class by "no class"


VAR_CONFIGS = {
    **{f"d{depth}": VARConfig(depth) for depth in (16, 20, 24, 30)},  # 310M, 601M, 1.0B, 2.0B
    "d36": VARConfig(36, SCALES_512, shared_adaln=True),  # 2.4B, 512 pixels
    "demo": VARConfig(3),
}  # 2.1M, for laptops


def modulation(C, parts):
    """adaLN: the class vector -> so many scales, shifts and gates of width C."""
    return nn.Sequential(nn.SiLU(), nn.Linear(C, parts * C))


class Attention(nn.Module):
    """Self-attention between unit queries and keys, with a learned temperature for each head."""

    def __init__(self, C, n):
        super().__init__()
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, n, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(C, 3 * C, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("zero_k_bias", torch.zeros(C))
        self.proj = nn.Linear(C, C)

    def forward(self, x, mask, cache=None, start=0):
        B, L, C = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = (
            F.linear(x, self.mat_qkv.weight, bias).view(B, L, 3, -1, 64).permute(2, 0, 3, 1, 4)
        )  # (B, n, L, 64)
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=math.log(100)).exp()
        k = F.normalize(k, dim=-1)
        if cache is not None:  # (2, B, n, positions, 64)
            cache[0, :, :, start : start + L], cache[1, :, :, start : start + L] = k, v
            k, v = cache[:, :, :, : start + L]
        q, k = q.type_as(v), k.type_as(v)  # under autocast they are float32
        y = F.scaled_dot_product_attention(
            q, k, v, None if mask is None else mask.type_as(v), scale=1.0
        )
        return self.proj(y.transpose(1, 2).reshape(B, L, C))


class Block(nn.Module):
    """Attention, then feed-forward. The class scales and shifts the input of each and gates its
    output (adaLN)."""

    def __init__(self, config, drop):
        super().__init__()
        C, self.drop = 64 * config.depth, drop
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, C))
        else:
            self.ada_lin = modulation(C, 6)
        self.attn = Attention(C, config.depth)
        self.ffn = nn.ModuleDict({"fc1": nn.Linear(C, 4 * C), "fc2": nn.Linear(4 * C, C)})

    def thin(self, y):
        """Drop path: in training, leave the branch y out for a fraction of the images; the others
        make up for it."""
        if not self.training or not self.drop:
            return y
        return y * (torch.rand(len(y), 1, 1, device=y.device) >= self.drop) / (1 - self.drop)

    def forward(self, x, cond, mask=None, cache=None, start=0):
        C = x.shape[-1]
        six = cond + self.ada_gss if cond.dim() == 4 else self.ada_lin(cond).view(-1, 1, 6, C)
        gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)  # each (B, 1, C)
        y = F.layer_norm(x, (C,), eps=1e-6) * (1 + scale1) + shift1
        x = x + self.thin(self.attn(y, mask, cache, start) * gate1)
        y = F.layer_norm(x, (C,), eps=1e-6) * (1 + scale2) + shift2
        return x + self.thin(self.ffn.fc2(F.gelu(self.ffn.fc1(y), approximate="tanh")) * gate2)


class VAR(nn.Module):
    """The transformer; names, buffers included, are those of the released checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config, C, L = config, 64 * config.depth, sum(p * p for p in config.scales)
        self.pos_start, self.pos_1LC = (
            nn.Parameter(torch.zeros(1, 1, C)),
            nn.Parameter(torch.zeros(1, L, C)),
        )
        level = torch.cat([torch.full((p * p,), s) for s, p in enumerate(config.scales)])
        self.register_buffer("lvl_1L", level[None])
        # within a scale everybody sees everybody, and all scales before it
        unseen = torch.zeros(L, L).masked_fill(level[:, None] < level, -torch.inf)
        self.register_buffer("attn_bias_for_masking", unseen[None, None])
        self.word_embed, self.class_emb = (
            nn.Linear(config.code_dim, C),
            nn.Embedding(config.num_classes + 1, C),
        )
        self.lvl_embed = nn.Embedding(len(config.scales), C)
        if config.shared_adaln:
            self.shared_ada_lin = modulation(C, 6)
        drops = torch.linspace(0, 0.1 * config.depth / 24, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, drop) for drop in drops)
        self.head_nm, self.head = (
            nn.ModuleDict({"ada_lin": modulation(C, 2)}),
            nn.Linear(C, config.vocab_size),
        )

    def place(self, x, start=0):
        """Add to x (B, l, C) what tells positions start .. start + l - 1 and their scales."""
        some = slice(start, start + x.shape[1])
        return x + (self.lvl_embed(self.lvl_1L[:, some]) + self.pos_1LC[:, some])

    def run(self, x, cond, mask=None, cache=None, start=0):
        """The blocks and the head: x (B, l, C), class vectors cond (B, C) -> logits (B, l, V)
        float32."""
        shared = (
            self.shared_ada_lin(cond).view(len(cond), 1, 6, -1)
            if self.config.shared_adaln
            else cond
        )
        for i, block in enumerate(self.blocks):
            x = block(x, shared, mask, None if cache is None else cache[i], start)
        scale, shift = self.head_nm.ada_lin(cond).view(len(cond), 1, 2, -1).unbind(2)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).float()

    def forward(self, inputs, labels):
        """Teacher-forced logits: inputs (B, L - 1, D) of ScaleQuantizer.teacher_input, labels (B,)
        int64 in [0, num_classes] -> (B, L, V) float32; logits[:, i] predicts code i from the class
        and the scales before it."""
        if self.training:  # the official code drops classes in evaluation, too
            drop = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
            labels = torch.where(drop, self.config.num_classes, labels)
        cond = self.class_emb(labels)
        x = torch.cat([cond[:, None] + self.pos_start, self.word_embed(inputs)], 1)
        return self.run(self.place(x), cond, self.attn_bias_for_masking)


@torch.no_grad()
def init_weights(model, gate):
    """Give a transformer the weights of an untrained one, in place. Blocks add little at first:
    `gate` of it."""
    C, depth = 64 * model.config.depth, model.config.depth
    for name, q in model.named_parameters():
        if name.endswith("bias"):
            q.zero_()
        elif not name.endswith("scale_mul_1H11"):
            q.normal_(0, C**-0.5 if name.endswith("ada_gss") else (3 * C) ** -0.5)
    model.head.weight *= 0.02
    model.head_nm.ada_lin[1].weight *= 0.5
    for block in model.blocks:
        block.attn.proj.weight /= (2 * depth) ** 0.5
        block.ffn.fc2.weight /= (2 * depth) ** 0.5
        six = (
            block.ada_gss[0, 0]
            if model.config.shared_adaln
            else block.ada_lin[1].weight.view(6, C, C)
        )
        six[:2] *= gate  # the two gates; then scales and shifts
        six[2:] *= 0.5


# ---- checkpoints -------------------------------------------------------------------------------
def load_var(path, device="cpu"):
    """A transformer in eval mode, float32, from a released file, one of the official training code,
    or one of train_var.py's; `classes` and `tokenizer` (the hash of its weights) are told where
    known. Raises OSError or ValueError with one sentence."""
    checkpoint = data.read_checkpoint(path)
    state = data.weights_of(checkpoint, path)
    state = state.get("trainer", {}).get(
        "var_wo_ddp", state
    )  # the official training code's wrapper
    if "tok_embeddings.weight" in state:
        raise ValueError(
            f"{path} is LlamaGen's GPT, not VAR's transformer; sample.py draws from it"
        )
    if "pos_1LC" not in state:
        raise ValueError(f"{path} is not a checkpoint of VAR's transformer (no pos_1LC)")
    if "config" in checkpoint:
        config = VARConfig(**checkpoint["config"])
    else:  # all sizes tell themselves by their shapes
        by_length = {sum(p * p for p in scales): scales for scales in (SCALES_256, SCALES_512)}
        if state["pos_1LC"].shape[1] not in by_length:
            raise ValueError(
                f"{path} is for {state['pos_1LC'].shape[1]} codes an image; released files are for 680 or "
                "2240"
            )
        config = VARConfig(
            state["pos_1LC"].shape[2] // 64,
            by_length[state["pos_1LC"].shape[1]],
            *state["head.weight"].shape[:1],
            state["word_embed.weight"].shape[1],
            len(state["class_emb.weight"]) - 1,
            "shared_ada_lin.1.weight" in state,
        )
    with torch.device("meta"):
        model = VAR(config)
    data.load_weights(model, state, path, assign=True)
    model.classes, model.tokenizer = checkpoint.get("classes"), checkpoint.get("tokenizer")
    return model.float().to(device).eval()


# ---- sampling ----------------------------------------------------------------------------------
@torch.no_grad()
def draw_scales(
    model,
    quantizer,
    labels,
    seeds,
    *,
    cfg_scale=4.0,
    top_k=900,
    top_p=0.95,
    more_smooth=False,
    keep=None,
    bf16=False,
):
    """Draw one scale after the other; yields (codes (B, p * p), the sum of all scales so far (B, D,
    h, w)).

    labels       (B,) int64 in [0, num_classes], the last being "no class"
    seeds        (B,) int64; image i follows from seeds[i], whatever the batch (see sample.gumbel_noise)
    cfg_scale    guidance, which grows over the scales: logits = (1 + t) given - t without, t = cfg_scale * s / (S - 1)
    more_smooth  mixes entries in place of drawing one: nicer to look at, worse by FID. The codes are then not what
                 the sums are made of.
    keep         (codes (B, L), bool (L,)): entries of these codes stand where True, whatever was drawn there
    """
    scales, S, B, V = (
        model.config.scales,
        len(model.config.scales),
        len(labels),
        model.config.vocab_size,
    )
    guided = cfg_scale != 0
    rows = (
        torch.cat([labels, torch.full_like(labels, model.config.num_classes)]) if guided else labels
    )
    cond, start = model.class_emb(rows), 0
    x = cond[:, None] + model.pos_start
    cache = x.new_zeros(
        len(model.blocks),
        2,
        len(rows),
        model.config.depth,
        sum(p * p for p in scales),
        64,
        dtype=torch.bfloat16 if bf16 else None,
    )  # as autocast would make of it; d36's is 48 GB
    f_hat = x.new_zeros(B, model.config.code_dim, scales[-1], scales[-1])
    for s, p in enumerate(scales):
        ratio, some = s / max(S - 1, 1), slice(start, start + p * p)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = model.run(
                model.place(x, start), cond, None, cache, start
            )  # (2B or B, p * p, V)
        if guided:
            given, without = logits.chunk(2)
            logits = (1 + cfg_scale * ratio) * given - cfg_scale * ratio * without
        logits = sample.filter_logits(logits, top_k, top_p)
        noise = sample.gumbel_noise(
            seeds[:, None], torch.arange(some.start, some.stop, device=x.device), V
        )
        codes = sample.draw(logits, noise)
        entries = quantizer.embed(codes, s)  # (B, D, p, p)
        if more_smooth:
            temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
            entries = soft_entries(
                logits * (1 + ratio), noise, temperature, quantizer.embedding.weight
            )
            entries = entries.transpose(1, 2).unflatten(2, (p, p))
        if keep:
            entries = torch.where(
                keep[1][some].view(p, p), quantizer.embed(keep[0][:, some], s), entries
            )
        f_hat = f_hat + quantizer.grow(entries, s)
        yield codes, f_hat
        start += p * p
        if s + 1 < S:
            x = model.word_embed(quantizer.shrink(f_hat, s + 1).flatten(2).transpose(1, 2)).repeat(
                1 + guided, 1, 1
            )


def soft_entries(logits, noise, temperature, codebook):
    """Logits and noise (B, l, V) -> the mean entry under softmax((logits + noise) / temperature):
    (B, l, D)."""
    return ((logits + noise) / temperature).softmax(-1) @ codebook


def draw_pixels(model, tokenizer, given, seeds, size=None, **settings):
    """Images uint8 (B, H, W, 3), bicubically resized to `size` if given, of the classes given =
    [labels (B,)]."""
    labels, seeds = given[0], torch.tensor(list(seeds), device=given[0].device)
    *_, (_, f_hat) = draw_scales(model, tokenizer.quantize, labels, seeds, **settings)
    images = tokenizer.to_images(f_hat)
    return vq.to_uint8(F.interpolate(images, size=(size, size), mode="bicubic") if size else images)


def kept(box, scales, outside=False):
    """Which codes an edit keeps: bool (L,).

    box is (top, left, bottom, right) as fractions of the image; what is inside is drawn anew, or
    what is outside. The one code of the first scale, which says what the picture is like as a
    whole, is always kept. Raises ValueError for a box that is empty or not within the image."""
    top, left, bottom, right = box
    name, side = f"--box {','.join(map(str, box))}", scales[-1]
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(
            f"{name}: top, left, bottom, right as fractions of the image, from 0 to 1, the first two "
            "below the last two"
        )
    rows, columns = (
        slice(round(top * side), round(bottom * side)),
        slice(round(left * side), round(right * side)),
    )
    mask = torch.zeros(1, 1, side, side) if outside else torch.ones(1, 1, side, side)
    mask[..., rows, columns] = 1 - mask[..., rows, columns]
    if not mask[..., rows, columns].numel():
        raise ValueError(f"{name} is empty on the grid of {side} x {side} codes")
    grids = [F.interpolate(mask, (p, p), mode="bilinear").flatten() > 0.5 for p in scales]
    grids[0][:] = True
    return torch.cat(grids)


# ---- commands ----------------------------------------------------------------------------------
def load_pair(args):
    """The transformer and the tokenizer that the flags name. Raises OSError or ValueError with one
    sentence."""
    if args.pretrained:
        args.var = data.pretrained(f"var_{args.pretrained}.pth", "FoundationVision/var")
        args.vq = data.pretrained("vae_ch160v4096z32.pth", "FoundationVision/var")
    if not (args.vq and args.var):
        raise ValueError("give --vq and --var, or --pretrained")
    model = load_var(args.var, args.device)
    tokenizer = load_tokenizer(args.vq, args.device, model.config.scales)
    sample.check_pair(model, tokenizer, args.var, args.vq)
    known = (
        captions.imagenet_classes()
        if model.config.num_classes == 1000
        else range(model.config.num_classes)
    )
    model.classes = model.classes or [str(name) for name in known]
    return model, tokenizer


def settings_of(args, cfg_scale, more_smooth):
    """What the flags say about drawing, with these defaults."""
    return dict(
        cfg_scale=cfg_scale if args.cfg_scale is None else args.cfg_scale,
        top_k=args.top_k,
        top_p=args.top_p,
        more_smooth=more_smooth if args.more_smooth is None else args.more_smooth,
        bf16=(args.dtype or ("bfloat16" if "cuda" in args.device else "float32")) == "bfloat16",
    )


def draw(args):
    """`sample`: a PNG with --count images of each class, or an NPZ for the metrics."""
    model, tokenizer = load_pair(args)
    settings, names = settings_of(args, cfg_scale=4.0, more_smooth=False), model.classes
    if args.paper:
        settings |= dict(cfg_scale=1.5, top_k=900, top_p=0.96, more_smooth=False)
    if Path(args.out).suffix != (".npz" if args.num_samples else ".png"):
        raise ValueError(
            f"--out {args.out}: give a name that ends in {'.npz' if args.num_samples else '.png'}"
        )
    print(f"{args.var}: {', '.join(f'{k} {v}' for k, v in settings.items())}, seed {args.seed}")
    if args.num_samples:
        if Path(args.out).exists():
            raise ValueError(f"--out {args.out} exists; delete it or choose another name")
        return sample.write_npz(
            args.out,
            model,
            tokenizer,
            args.num_samples,
            cond=[torch.arange(len(names))],
            seed=args.seed,
            batch_size=args.batch_size,
            size=args.resize,
            draw=draw_pixels,
            **settings,
        )
    few = args.classes.split(",") if args.classes else map(str, range(min(10, len(names))))
    labels = torch.tensor([captions.find_class(text, names) for text in few]).repeat_interleave(
        args.count
    )
    pixels = []
    for part in torch.arange(len(labels)).split(args.batch_size):
        seeds = (args.seed + part).tolist()
        pixels.append(
            draw_pixels(
                model, tokenizer, [labels[part].to(args.device)], seeds, args.resize, **settings
            )
        )
    titles = [names[label].split(",")[0] for label in labels]
    data.save_grid(
        np.concatenate(pixels), args.out, args.count if args.count > 1 else len(labels), titles
    )
    print(f"{args.out}: {len(labels)} images")


def edit(args):
    """`edit`: each picture, the part of it that is kept, and --count ways to go on from that."""
    model, tokenizer = load_pair(args)
    settings, scales = settings_of(args, cfg_scale=3.0, more_smooth=True), model.config.scales
    side, labels = scales[-1] * tokenizer.config.downsample, [model.config.num_classes]  # no class
    if args.classes:
        labels = [captions.find_class(text, model.classes) for text in args.classes.split(",")]
    if len(labels) not in (1, len(args.images)):
        raise ValueError(
            f"--classes: {len(labels)} classes for {len(args.images)} pictures; give one, or one for each"
        )
    try:
        box = [float(edge) for edge in args.box.split(",")]
        y0, x0, y1, x1 = box
    except ValueError:
        raise ValueError(f"--box {args.box}: four numbers, as 0.25,0.25,0.75,0.75") from None
    keep = kept(box, scales, args.outside).to(args.device)
    # the codes of the last scale are blocks of pixels, which are greyed where they are to be drawn
    finest = keep[-(scales[-1] ** 2) :].view(1, 1, scales[-1], scales[-1])
    stays = F.interpolate(finest.float(), (side, side))[0, 0, :, :, None].cpu().numpy() > 0
    pixels = []
    for path, label in zip(args.images, labels * len(args.images)):
        image = data.open_image(path)
        if image.size != (side, side):
            raise ValueError(
                f"{path} has {image.width} x {image.height} pixels; the model edits images of {side} x "
                f"{side}"
            )
        given = vq.to_tensor(image)[None].to(args.device)
        codes = tokenizer.encode(given).expand(args.count, -1)
        wanted, seeds = (
            torch.full((args.count,), label, device=args.device),
            range(args.seed, args.seed + args.count),
        )
        new = draw_pixels(model, tokenizer, [wanted], seeds, keep=(codes, keep), **settings)
        original = vq.to_uint8(given)
        pixels += [original, np.where(stays, original, 160).astype(np.uint8), new]
    titles = ["given", "kept"] + ["drawn"] * args.count
    data.save_grid(np.concatenate(pixels), args.out, len(titles), titles * len(args.images))
    print(f"{args.out}: given, kept, and {args.count} drawn from it")


def reconstruct(args):
    """`reconstruct`: each picture, then its first scale decoded alone, its first two, and so on."""
    tokenizer = load_tokenizer(
        args.vq or data.pretrained("vae_ch160v4096z32.pth", "FoundationVision/var"), args.device
    )
    scales = tokenizer.quantize.scales
    side, pixels = scales[-1] * tokenizer.config.downsample, []
    for path in args.images:
        image = vq.to_tensor(data.center_crop(data.open_image(path), side))[None].to(args.device)
        with torch.no_grad():
            sums = torch.cat(list(tokenizer.quantize.sums(tokenizer.encode(image))))
            pixels += [vq.to_uint8(image), vq.to_uint8(tokenizer.to_images(sums))]
    titles = ["given", "1 x 1"] + [f"+ {p} x {p}" for p in scales[1:]]
    data.save_grid(np.concatenate(pixels), args.out, len(titles), titles * len(args.images))
    print(f"{args.out}: {', '.join(titles)}")


def encode(args):
    """`encode`: a data set as codes, in vq.py's way and format; vq.encode reads args.data,
    args.out, args.image_size, args.ten_crop, args.crop_range, args.batch_size, args.workers and
    args.device."""
    args.vq = args.vq or data.pretrained("vae_ch160v4096z32.pth", "FoundationVision/var")
    vq.encode(args, ScaleVQ512 if args.image_size == 512 else ScaleVQ)


def main():
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    for name, what in (
        ("sample", "draw images of classes"),
        ("edit", "draw a part of pictures anew"),
        ("reconstruct", "show what each scale adds"),
        ("encode", "write a data set as codes"),
    ):
        c = commands.add_parser(name, help=what)
        c.add_argument(
            "--vq", help="tokenizer checkpoint (reconstruct, encode: default is the released one)"
        )
        c.add_argument(
            "--device",
            type=data.device,
            default=device,
            help="cuda or cpu (default: cuda if there is one)",
        )
        if name in ("sample", "edit"):
            c.add_argument("--var", help="checkpoint of the transformer")
            c.add_argument(
                "--pretrained",
                choices=[size for size in VAR_CONFIGS if size != "demo"],
                help="released weights; they are fetched when they are not here yet",
            )
            c.add_argument(
                "--classes", help="ids or names, separated by commas (edit: one, or one a picture)"
            )
            c.add_argument(
                "--count",
                type=int,
                default=1 if name == "sample" else 4,
                help="images of each class or picture",
            )
            c.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i")
            c.add_argument(
                "--cfg-scale", type=float, help="guidance, 0 is none (default: 4; edit: 3)"
            )
            c.add_argument(
                "--top-k", type=int, default=900, help="draw from the k likeliest codes, 0 is all"
            )
            c.add_argument(
                "--top-p",
                type=float,
                default=0.95,
                help="draw from the likeliest codes that make up p",
            )
            c.add_argument(
                "--more-smooth",
                action=argparse.BooleanOptionalAction,
                help="mix entries: nicer, worse FID",
            )
            c.add_argument(
                "--dtype",
                choices=["float32", "bfloat16"],
                help="arithmetic (default: bfloat16 on GPU)",
            )
    sampling, editing, showing, encoding = commands.choices.values()
    sampling.add_argument(
        "--num-samples", type=int, help="write so many images, balanced over the classes, as NPZ"
    )
    sampling.add_argument("--batch-size", type=int, default=32, help="images drawn together")
    sampling.add_argument(
        "--paper", action="store_true", help="the paper's settings for FID: 1.5, 900, 0.96"
    )
    sampling.add_argument("--resize", type=int, help="pixels a side to resize the images to")
    sampling.add_argument("--out", default="sample.png", help="PNG, or NPZ with --num-samples")
    editing.add_argument(
        "--box", required=True, help="top, left, bottom, right as fractions of the picture"
    )
    editing.add_argument(
        "--outside", action="store_true", help="keep what is in the box, draw all around it"
    )
    for c, name in ((editing, "edit.png"), (showing, "scales.png")):
        c.add_argument("--out", default=name, help=f"PNG to write (default: {name})")
        c.add_argument("images", nargs="+", metavar="IMAGE")
    encoding.add_argument(
        "--data", required=True, help="a folder of class folders, or shapes, or shapes:N"
    )
    encoding.add_argument("--out", default="codes", help="folder to write (default: codes)")
    encoding.add_argument(
        "--image-size", type=int, help="pixels a side (default: as the tokenizer was trained)"
    )
    encoding.add_argument("--ten-crop", action="store_true", help="ten crops an image, not two")
    encoding.add_argument(
        "--crop-range",
        type=float,
        nargs="+",
        default=[1.125],
        metavar="R",
        help="ten crops are cut from R times the image size (default: 1.125, 288 for 256 pixels)",
    )
    encoding.add_argument(
        "--batch-size", type=int, default=64, help="crops that go through the encoder together"
    )
    encoding.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that read images",
    )
    args = p.parse_args()
    p.usage = f"python extras/var.py {args.command} ... (--help lists the flags)"
    ranges = dict(
        cfg_scale=(0, 1e3),
        top_k=(0, 2**20),
        top_p=(1e-9, 1),
        count=(1, 1e6),
        seed=(0, 2**62),
        num_samples=(1, 1e9),
        batch_size=(1, 2**20),
        resize=(1, 8192),
        image_size=(1, 8192),
        crop_range=(1, 100),
        workers=(0, 1024),
    )
    data.within(p, args, **{name: limits for name, limits in ranges.items() if name in args})
    try:
        {"sample": draw, "edit": edit, "reconstruct": reconstruct, "encode": encode}[args.command](
            args
        )
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
