"""VAR alongside LlamaGen (arXiv:2404.02905): an image as ever finer grids of codes, and a whole
grid predicted at once.

Your own model (extras/train_var.py makes one), a row of pictures for each class:
$ python extras/var.py sample --vq runs/var-vq/ckpt.pt --var runs/var/ckpt.pt --count 4
The released weights, fetched once; d16, d20, d24 and d30 sample 256 pixels, d36 samples 512:
$ python extras/var.py sample --pretrained d16 --classes 207,"red fox" --out sample.png
50,000 images for the metrics of evaluate.py, with the paper's settings. After a stop, the same
command continues:
$ torchrun --nproc_per_node=8 extras/var.py sample --pretrained d16 --paper --num-samples 50000 \
      --out samples.npz
Regenerate the inside of a box, or everything around it; the model was never trained for that:
$ python extras/var.py edit --pretrained d16 --box 0.25,0.25,0.75,0.75 --out edit.png photo.png
A picture with its first scale, its first two, and so on:
$ python extras/var.py reconstruct --vq runs/var-vq/ckpt.pt --out scales.png photo.png

The tokenizer is in var_vq.py, the transformer in var_model.py. The file in order: sampling, flags,
commands.
"""

# Shapes:  B images   S scales, the s-th a grid of p x p codes   L codes per image, the sum of all
#          p * p   h, w the latent grid, which is the last scale   V codebook entries
#          D code dimension   H, W pixels
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
from var_model import VAR_CONFIGS, load_var
from var_vq import ScaleVQ, ScaleVQ512, load_tokenizer

import sample
import vq
from nanollamagen import classes, data, files, flags

PAPER = dict(var_cfg=1.5, top_k=900, top_p=0.96, more_smooth=False)  # settings of the best FID
RELEASED_TOKENIZER = ("vae_ch160v4096z32.pth", "FoundationVision/var")


# ---- sampling ----------------------------------------------------------------------------------
@torch.no_grad()
def sample_scales(
    model,
    quantizer,
    labels,
    seeds,
    *,
    var_cfg=4.0,
    top_k=900,
    top_p=0.95,
    more_smooth=False,
    photo_codes=None,
    kept=None,
    bf16=False,
):
    """Sample scale after scale. Yields the codes (B, p * p) and the sum so far (B, D, h, w).

    labels       (B,) int64 in [0, num_classes]; num_classes is "no class"
    seeds        (B,) int64; image i follows from seeds[i], whatever the batch (sample.gumbel_noise)
    var_cfg      guidance t, which grows from 0 at the first scale to var_cfg at the last:
                 logits = (1 + t) with the class - t without
    more_smooth  mix codebook entries instead of taking the code's: nicer pictures, worse FID
    photo_codes  (B, L) and kept (L,) bool, for edits: where kept is True, the sums take the photo's
                 codes, whatever was sampled there
    """
    config, scales = model.config, model.config.scales
    guided = var_cfg != 0
    rows = labels
    if guided:  # rows 0 .. B - 1 have the class, rows B .. 2B - 1 have none
        rows = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    copies = len(rows) // len(labels)
    cond = model.class_emb(rows)  # (B or 2B, C)
    cache = model.new_cache(len(rows), torch.bfloat16 if bf16 else None)
    x = cond[:, None] + model.pos_start  # what the first scale reads
    f_hat = x.new_zeros(len(labels), config.code_dim, scales[-1], scales[-1])
    start = 0
    for s, p in enumerate(scales):
        end = start + p * p
        progress = s / max(len(scales) - 1, 1)  # from 0 to 1

        # 1. Logits of all codes of this scale.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            x = model.add_positions(x, start)
            logits = model.run(x, cond, None, cache, start)  # (B or 2B, p * p, V)
        if guided:
            t = var_cfg * progress
            with_class, without = logits.chunk(2)
            logits = (1 + t) * with_class - t * without

        # 2. A code at each place, and its entry of the codebook.
        logits = sample.filter_logits(logits, top_k, top_p)
        numbers = torch.arange(start, end, device=x.device)
        noise = sample.gumbel_noise(seeds[:, None], numbers, config.vocab_size)
        codes = sample.draw(logits, noise)  # (B, p * p)
        entries = quantizer.embed(codes, s)  # (B, D, p, p)
        if more_smooth:
            temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
            sharpened = logits * (1 + progress)
            mixed = soft_entries(sharpened, noise, temperature, quantizer.embedding.weight)
            entries = mixed.transpose(1, 2).unflatten(2, (p, p))
        if kept is not None:
            photo_entries = quantizer.embed(photo_codes[:, start:end], s)
            entries = torch.where(kept[start:end].view(p, p), photo_entries, entries)

        # 3. Add them to the sum. Shrunk to the size of the next scale, it is what that one reads.
        f_hat = f_hat + quantizer.grow(entries, s)
        yield codes, f_hat
        if s + 1 < len(scales):
            shrunk = quantizer.shrink(f_hat, s + 1).flatten(2).transpose(1, 2)
            x = model.word_embed(shrunk).repeat(copies, 1, 1)
        start = end


def soft_entries(logits, noise, temperature, codebook):
    """The mean entry under softmax((logits + noise) / temperature), which are (B, l, V): (B, l,
    D)."""
    return ((logits + noise) / temperature).softmax(-1) @ codebook


def sample_pixels(model, tokenizer, cond, seeds, size=None, **settings):
    """Images uint8 (B, H, W, 3) of cond = [labels], image i from seeds[i], resized to `size`
    (bicubic, before rounding)."""
    (labels,) = cond
    seeds = torch.tensor([seed % 2**63 for seed in seeds], device=labels.device)
    *_, (_, f_hat) = sample_scales(model, tokenizer.quantize, labels, seeds, **settings)
    images = tokenizer.to_images(f_hat)
    if size:
        images = F.interpolate(images, size=(size, size), mode="bicubic")
    return vq.to_uint8(images)


def kept_codes(box, scales, outside=False):
    """Which codes an edit keeps: bool (L,). Raises ValueError for a box without a code.

    box is (top, left, bottom, right) as fractions of the image. What is inside is regenerated, or
    with `outside` what is around it. The one code of the first scale says what the picture is like
    as a whole, and is always kept."""
    top, left, bottom, right = box
    side = scales[-1]
    rows = slice(round(top * side), round(bottom * side))
    columns = slice(round(left * side), round(right * side))
    inside = torch.zeros(1, 1, side, side)
    inside[..., rows, columns] = 1
    if not inside.any():
        raise ValueError(f"--box {box} is empty on the grid of {side} x {side} codes; enlarge it")
    kept = inside if outside else 1 - inside
    grids = [F.interpolate(kept, (p, p), mode="bilinear").flatten() > 0.5 for p in scales]
    grids[0][:] = True
    return torch.cat(grids)


# ---- flags -------------------------------------------------------------------------------------
def box(text):
    """A type for --box: four fractions of the image, the first two below the last two."""
    try:
        top, left, bottom, right = (float(edge) for edge in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: give four numbers, as 0.25,0.25,0.75,0.75"
        ) from None
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise argparse.ArgumentTypeError(
            f"{text}: give top, left, bottom, right as fractions of the image, from 0 to 1, the "
            "first two below the last two"
        )
    return top, left, bottom, right


def add_sampling_flags(flag, count, var_cfg, more_smooth):
    """The flags that `sample` and `edit` share, with the defaults of one of them."""
    released = [name for name in VAR_CONFIGS if name != "demo"]
    switch = argparse.BooleanOptionalAction
    # fmt: off
    flag("--var", help="checkpoint of the transformer")
    flag("--pretrained", choices=released, help="released weights, fetched once")
    flag("--classes", help="ids or names, separated by commas (edit: one, or one per picture)")
    flag("--count", type=flags.at_least_one, default=count, help="images per class or picture")
    flag("--seed", type=flags.seed, default=0, help="that of image 0; image i adds i")
    flag("--var-cfg", type=flags.weight, default=var_cfg,
         help=f"guidance at the last scale, 0 is none (default: {var_cfg:g})")
    flag("--cfg-scale", dest="var_cfg", type=flags.weight, help=argparse.SUPPRESS)  # its old name
    flag("--top-k", type=flags.count, default=900, help="sample from the k likeliest codes; 0: all")
    flag("--top-p", type=flags.bounded(float, 1e-6, 1), default=0.95,
         help="sample from the likeliest codes that make up p")
    flag("--more-smooth", action=switch, default=more_smooth,
         help="mix codebook entries: nicer pictures, worse FID")
    flag("--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)")
    # fmt: on


def parse():
    """The parser of the command that was asked for, and its flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sample", help="sample images of classes")
    editing = commands.add_parser("edit", help="regenerate a part of pictures")
    showing = commands.add_parser("reconstruct", help="show what each scale adds")
    encoding = commands.add_parser("encode", help="write a data set as codes")
    add_sampling_flags(sampling.add_argument, count=1, var_cfg=4.0, more_smooth=False)
    add_sampling_flags(editing.add_argument, count=4, var_cfg=3.0, more_smooth=True)
    # fmt: off
    flag = sampling.add_argument
    flag("--num-samples", type=flags.at_least_one,
         help="write so many images, balanced over the classes, as NPZ")
    flag("--batch-size", type=flags.batch, default=32, help="images sampled together")
    flag("--paper", action="store_true", help="the paper's settings for FID: 1.5, 900, 0.96")
    flag("--resize", type=flags.pixels, help="resize the images to this side")
    flag("--out", default="sample.png", help="PNG, or NPZ with --num-samples")

    flag = editing.add_argument
    flag("--box", type=box, required=True, help="top, left, bottom, right as fractions")
    flag("--outside", action="store_true", help="keep what is in the box, regenerate the rest")
    for c, name in ((editing, "edit.png"), (showing, "scales.png")):
        c.add_argument("--out", default=name, help=f"PNG to write (default: {name})")
        c.add_argument("images", nargs="+", metavar="IMAGE", help="files")

    flag = encoding.add_argument
    flag("--data", required=True, help="class folders, .jsonl or .tar with captions, or shapes:N")
    flag("--out", default="codes", help="folder to write (default: codes)")
    flag("--image-size", type=flags.pixels, help="of a side (default: as the tokenizer's training)")
    flag("--ten-crop", action="store_true", help="ten crops per image instead of two")
    flag("--crop-range", type=flags.bounded(float, 1, 8), nargs="+", default=[1.125], metavar="R",
         help="ten crops are cut from R times the image size (default: 1.125: 288 for 256 pixels)")
    flag("--batch-size", type=flags.batch, default=64, help="crops encoded together")
    flag("--workers", type=flags.bounded(int, 0, 1024), default=min(8, os.cpu_count() or 1),
         help="processes that read images")
    # fmt: on
    for name, c in commands.choices.items():
        c.usage = f"python extras/var.py {name} ... (--help lists the flags)"
        c.add_argument(
            "--vq", help="tokenizer checkpoint (reconstruct, encode: default is the released one)"
        )
        flags.add_device(c)
    args = p.parse_args()
    return commands.choices[args.command], args


# ---- commands ----------------------------------------------------------------------------------
def main():
    """Run the command. Each function below is one."""
    parser, args = parse()
    run = {"sample": sample_classes, "edit": edit, "reconstruct": reconstruct, "encode": encode}
    try:
        run[args.command](args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def load_pair(args):
    """The transformer and the tokenizer that the flags name. Raises OSError or ValueError."""
    if args.pretrained:
        args.var = files.pretrained(f"var_{args.pretrained}.pth", "FoundationVision/var")
        args.vq = files.pretrained(*RELEASED_TOKENIZER)
    if not (args.vq and args.var):
        raise ValueError("give --vq and --var, or --pretrained")
    model = load_var(args.var, args.device)
    tokenizer = load_tokenizer(args.vq, args.device, model.config.scales)
    sample.check_pair(model, tokenizer, args.var, args.vq)
    return model, tokenizer


def settings_of(args):
    """What the flags say about sampling."""
    settings = dict(
        var_cfg=args.var_cfg, top_k=args.top_k, top_p=args.top_p, more_smooth=args.more_smooth
    )
    settings["bf16"] = (args.dtype or flags.best_dtype(args.device)) == "bfloat16"
    return settings


def sample_classes(args):
    """`sample`: a PNG with --count images of each class, or an NPZ for the metrics."""
    ending = ".npz" if args.num_samples else ".png"
    if Path(args.out).suffix != ending:
        raise ValueError(f"--out {args.out}: give a name that ends in {ending}")
    if args.num_samples and Path(args.out).exists():
        raise ValueError(f"--out {args.out} exists; delete it or choose another name")
    model, tokenizer = load_pair(args)
    settings = settings_of(args)
    if args.paper:
        settings |= PAPER
    listed = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"{args.var}: {listed}, seed {args.seed}")
    names = classes.class_names(model)
    if args.num_samples:
        sample.write_npz(
            args.out,
            model,
            tokenizer,
            args.num_samples,
            cond=[torch.arange(len(names))],
            seed=args.seed,
            batch_size=args.batch_size,
            size=args.resize,
            draw=sample_pixels,
            **settings,
        )
        return

    labels = range(min(10, len(names)))
    if args.classes:
        labels = [classes.find_class(word, names) for word in args.classes.split(",")]
    labels = torch.tensor(labels).repeat_interleave(args.count)
    pixels = []
    for first in range(0, len(labels), args.batch_size):
        batch = labels[first : first + args.batch_size].to(args.device)
        seeds = range(args.seed + first, args.seed + first + len(batch))
        pixels.append(sample_pixels(model, tokenizer, [batch], seeds, args.resize, **settings))
    titles = [names[label].split(",")[0] for label in labels]
    columns = args.count if args.count > 1 else len(labels)
    data.save_grid(np.concatenate(pixels), args.out, columns, titles)
    print(f"{args.out}: {len(labels)} images")


def edit(args):
    """`edit`: for each picture a row of the picture, what is kept of it, and --count edits."""
    model, tokenizer = load_pair(args)
    scales, downsample = model.config.scales, tokenizer.config.downsample
    grid, side = scales[-1], scales[-1] * downsample
    labels = [model.config.num_classes]  # no class
    if args.classes:
        names = classes.class_names(model)
        labels = [classes.find_class(word, names) for word in args.classes.split(",")]
    if len(labels) not in (1, len(args.images)):
        raise ValueError(
            f"--classes: {len(labels)} classes for {len(args.images)} pictures; "
            "give one, or one for each"
        )
    if len(labels) == 1:
        labels = labels * len(args.images)
    kept = kept_codes(args.box, scales, args.outside)
    # a code of the last scale is a block of pixels; those to be regenerated are shown in grey
    blocks = kept[-grid * grid :].view(grid, grid).numpy()
    stays = blocks.repeat(downsample, 0).repeat(downsample, 1)[..., None]  # (H, W, 1)

    pixels = []
    for path, label in zip(args.images, labels):
        image = data.open_image(path)
        if image.size != (side, side):
            raise ValueError(
                f"{path} has {image.width} x {image.height} pixels; the model edits images of "
                f"{side} x {side}"
            )
        photo = vq.to_tensor(image)[None].to(args.device)  # (1, 3, H, W)
        edited = sample_pixels(
            model,
            tokenizer,
            [torch.full((args.count,), label, device=args.device)],
            range(args.seed, args.seed + args.count),
            photo_codes=tokenizer.encode(photo).expand(args.count, -1),
            kept=kept.to(args.device),
            **settings_of(args),
        )
        original = vq.to_uint8(photo)
        masked = np.where(stays, original, 160).astype(np.uint8)
        pixels += [original, masked, edited]
    titles = ["photo", "kept"] + ["edited"] * args.count
    data.save_grid(np.concatenate(pixels), args.out, len(titles), titles * len(args.images))
    print(f"{args.out}: photo, what is kept of it, and {args.count} edits")


@torch.no_grad()
def reconstruct(args):
    """`reconstruct`: each picture, then its first scale decoded alone, its first two, and so on."""
    path = args.vq or files.pretrained(*RELEASED_TOKENIZER)
    tokenizer = load_tokenizer(path, args.device)
    scales = tokenizer.quantize.scales
    side = scales[-1] * tokenizer.config.downsample
    pixels = []
    for path in args.images:
        image = data.center_crop(data.open_image(path), side)
        photo = vq.to_tensor(image)[None].to(args.device)  # (1, 3, H, W)
        sums = list(tokenizer.quantize.sums(tokenizer.encode(photo)))
        decoded = tokenizer.to_images(torch.cat(sums))  # (S, 3, H, W)
        pixels += [vq.to_uint8(photo), vq.to_uint8(decoded)]
    titles = ["photo", "1 x 1"] + [f"+ {p} x {p}" for p in scales[1:]]
    data.save_grid(np.concatenate(pixels), args.out, len(titles), titles * len(args.images))
    print(f"{args.out}: {', '.join(titles)}")


def encode(args):
    """`encode`: a data set as codes, as `vq.py encode` does it, whose flags these are."""
    args.vq = args.vq or files.pretrained(*RELEASED_TOKENIZER)
    vq.encode(args, ScaleVQ512 if args.image_size == 512 else ScaleVQ)


if __name__ == "__main__":
    main()
