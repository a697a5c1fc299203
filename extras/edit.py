"""Edit a photo: complete it, fill a hole, change what it shows. Same weights, no training.

Regenerate the lower half, four times:
$ python extras/edit.py photo.png --vq runs/vq/ckpt.pt --gpt runs/gpt/ckpt.pt --keep top \
      --classes horse --count 4
Fill a hole (white in mask.png) so that it also fits what is below it:
$ python extras/edit.py photo.png --pretrained L-256 --mask mask.png --classes 207 --particles 16

Codes are sampled row by row and see only the codes before them. So codes to the right of a hole and
below it cannot guide it. With sequential Monte Carlo they do (Doucet, de Freitas and Gordon, 2001):
P particles fill the hole in different ways. At each kept code a particle gains weight by the
probability that the model gives this code, and likely particles are copied over unlikely ones.

The file in order: sampling what is not kept, photos and masks, flags, the command, argument checks.
"""

# Shapes:  B images   P particles per image   T codes per image   c condition tokens
#          V codebook entries   h, w rows and columns of codes   H, W pixels
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import gpt
import sample
import vq
from nanollamagen import captions, classes, data, files, flags, noise


# ---- sampling what is not kept -----------------------------------------------------------------
@torch.no_grad()
def complete(
    model,
    cond,
    photo_codes,
    kept,
    mask=None,
    *,
    particles=1,
    seeds,
    cfg_scale=1.0,
    cfg_interval=-1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    progress=False,
):
    """Codes (B, T) int64, one image per condition: the photo's where kept, sampled elsewhere.

    cond, mask, seeds and the settings are those of sample.generate
    photo_codes  (T,) int64
    kept         (T,) bool
    particles    P. With 1 each code follows from those before it alone, and with nothing kept the
                 result is that of sample.generate.

    Particles are weighed by the guided and tempered distribution, but before top-k and top-p: a
    kept code that these exclude would leave no particle."""
    B, T, P, c = len(cond), len(photo_codes), particles, model.config.cond_tokens
    if kept.all():
        return photo_codes.repeat(B, 1)
    cond = cond.repeat_interleave(P, 0)
    mask = None if mask is None else mask.repeat_interleave(P, 0)
    guided = cfg_scale > 1
    copies = 2 if guided else 1
    if guided:  # rows 0 .. BP - 1 have the condition, rows BP .. 2BP - 1 have none
        cond = torch.cat([cond, model.cls_embedding.uncond(cond)])
        mask = None if mask is None else mask.repeat(2, 1)
    seeds = torch.tensor([seed % 2**63 for seed in seeds], device=cond.device)
    noise_seeds = particle_seeds(seeds, P).flatten()  # (BP,)
    codes = photo_codes.repeat(B * P, 1)  # (BP, T)
    log_weights = torch.zeros(B, P, device=cond.device)

    # What is kept before the first hole is the same for all: it is fed at once, with the condition.
    first = int(kept.long().argmin())
    cache = model.new_cache(len(cond))
    before = model.tok_embeddings(codes[:, :first]).repeat(copies, 1, 1)
    x = torch.cat([model.cls_embedding(cond), before], 1)  # (copies * BP, c + first, C)
    bar = files.progress(T - first, "codes", rank=0 if progress else 1, unit=" codes")
    for i in range(first, T):
        logits = model.extend(x, 0 if i == first else c + i - 1, cache, mask)[:, 0].float()
        if guided and (cfg_interval < 0 or i <= cfg_interval + 1):
            logits = sample.guide(logits, cfg_scale)  # (BP, V)
        logits = logits[: B * P]
        if not kept[i]:
            gumbel = sample.gumbel_noise(noise_seeds, i, logits.shape[-1])
            codes[:, i] = sample.draw(logits, gumbel, temperature, top_k=top_k, top_p=top_p)
        elif P > 1:
            log_probs = (logits / max(temperature, 1e-5)).log_softmax(-1)
            log_weights += log_probs[:, photo_codes[i]].view(B, P)
            rows = resample(log_weights, seeds, T + i)
            if rows is not None:
                codes = codes[rows]
                rows = torch.cat([rows + copy * B * P for copy in range(copies)])
                for n, layer in enumerate(cache):  # one by one, to hold no second cache
                    cache[n] = layer[:, rows]
        x = model.tok_embeddings(codes[:, i : i + 1]).repeat(copies, 1, 1)
        bar.update()
    # One particle per image, chosen by weight. Resampling used the noise of T .. 2T - 1.
    chosen = (log_weights + sample.gumbel_noise(seeds, torch.full_like(seeds, 2 * T), P)).argmax(1)
    return codes.view(B, P, T)[torch.arange(B, device=codes.device), chosen]


def particle_seeds(seeds, P):
    """Seeds (B,) -> (B, P): an image's own for its first particle, hashes of it for the others."""
    others = noise.mix(noise.mix(seeds)[:, None] + torch.arange(1, P, device=seeds.device))
    return torch.cat([seeds[:, None], others], 1)


def resample(log_weights, seeds, number):
    """The B * P particles to continue with, int64 (B * P,), or None if all stay. Changes
    log_weights (B, P) in place.

    Where the effective sample size 1 / sum(weights^2) falls below P / 2, P particles are resampled
    by weight, at even distances along the cumulative weights (systematic resampling). Then all
    weigh the same again. Copies of a particle continue with different codes, because noise belongs
    to the place in the batch."""
    B, P = log_weights.shape
    weights = log_weights.double().softmax(1)
    poor = 1 / weights.square().sum(1) < P / 2  # (B,)
    if not poor.any():
        return None
    gumbel = sample.gumbel_noise(seeds, torch.full_like(seeds, number), 1).double()
    uniform = (-(-gumbel).exp()).exp()  # (B, 1)
    own = torch.arange(P, device=seeds.device)
    places = (own + uniform) / P
    taken = torch.searchsorted(weights.cumsum(1), places).clamp(max=P - 1)  # (B, P)
    taken = torch.where(poor[:, None], taken, own)
    log_weights[poor] = 0
    return (taken + P * torch.arange(B, device=seeds.device)[:, None]).flatten()


@torch.no_grad()
def log_probability(model, codes, cond, mask=None):
    """Nats that the model gives whole images, codes (B, T), without guidance: (B,)."""
    logits = model(codes[:, :-1], cond, mask).float()
    return logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0].sum(1)


# ---- photos and masks --------------------------------------------------------------------------
def kept_pixels(name, side):
    """What --keep keeps of side x side pixels, bool (H, W): top, left, border, nothing, or a
    rectangle X,Y,W,H. Raises ValueError for anything else."""
    kept = np.zeros((side, side), bool)
    half, quarter = side // 2, side // 4
    if name == "top":
        kept[:half] = True
    elif name == "left":
        kept[:, :half] = True
    elif name == "border":
        kept[:] = True
        kept[quarter : side - quarter, quarter : side - quarter] = False
    elif name != "nothing":
        try:
            x, y, w, h = (int(number) for number in name.split(","))
        except ValueError:
            raise ValueError(
                f"--keep {name}: give top, left, border, nothing or X,Y,W,H in pixels"
            ) from None
        if min(x, y) < 0 or min(w, h) < 1 or max(x + w, y + h) > side:
            raise ValueError(f"--keep {name} does not lie within {side} x {side} pixels")
        kept[y : y + h, x : x + w] = True
    return kept


def masked_pixels(path, photo, side):
    """What a mask file keeps, bool (H, W), cropped as the photo is: what is opaque, or if all of it
    is, what is not white. Raises OSError."""
    mask = data.open_image(path, mode="RGBA").resize(photo.size, Image.NEAREST)
    opaque = np.array(data.center_crop(mask.getchannel("A"), side)) > 127
    if mask.getextrema()[3] != (255, 255):
        return opaque
    return np.array(data.center_crop(mask.convert("RGB"), side).convert("L")) < 128


def enlarge(cells, side):
    """Cells (h, w) as pixels (H, W, 1)."""
    times = side // len(cells)
    return cells.repeat(times, 0).repeat(times, 1)[..., None]


# ---- flags -------------------------------------------------------------------------------------
def parse():
    """The parser and the flags of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = p.add_argument
    switch = argparse.BooleanOptionalAction
    released = [*sample.PAPER_CFG, *sample.TEXT_FILES]
    # fmt: off
    flag("photo", help="any image; its middle square is taken, at the model's size")
    flag("--pretrained", choices=released, help="released weights, fetched once")
    flag("--vq", help="tokenizer checkpoint")
    flag("--gpt", help="GPT checkpoint")
    flag("--image-size", type=flags.pixels, help="that a released --gpt file is for (default: 256)")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--keep", help="top, left or border (half of the picture, or all but its "
                       "middle), nothing, or the rectangle X,Y,W,H in pixels of the model's size")
    which.add_argument("--mask", metavar="FILE", help="an image whose transparent area is "
                       "regenerated, or its white if nothing is transparent")
    flag("--classes", help="ids or names, separated by commas, a row each; none: without a class")
    flag("--prompt", action="append", default=[], help="a caption; may be given several times")
    flag("--t5", help="encoder of captions, as in sample.py")
    flag("--count", type=flags.bounded(int, 1, 1000), default=4, help="images per class or caption")
    flag("--particles", type=flags.bounded(int, 1, 2**16), default=1,
         help="per image (default: 1, where what comes after a hole does not guide it)")
    flag("--paste", action=switch, default=True, help="put the photo's pixels back where kept")
    flag("--seed", type=flags.seed, default=0, help="that of image 0; image i adds i")
    for name, (for_classes, for_captions, least, most, what) in sample.SETTINGS.items():
        default = f"{for_classes:g}"
        if for_captions != for_classes:
            default += f"; captions: {for_captions:g}"
        flag("--" + name.replace("_", "-"), type=flags.bounded(type(for_classes), least, most),
             help=f"{what} (default: {default})")
    flag("--out", default="edit.png", help="PNG: the photo, what is kept of it, the results")
    flags.add_device(p, float64=True)
    # fmt: on
    p.usage = (
        "python extras/edit.py PHOTO --vq CKPT --gpt CKPT --keep top ... (--help lists the flags)"
    )
    return p, p.parse_args()


# ---- the command -------------------------------------------------------------------------------
def main():
    """Flags, models, the photo and what to keep of it, then the pictures."""
    parser, args = parse()
    device = torch.device(args.device)
    try:
        check(args)
        vq_model, model = load_models(args, device)
        titles, cond = conditions(args, model, device)
        grid, side = model.config.grid, model.config.grid * vq_model.config.downsample
        photo = data.open_image(args.photo)
        kept = kept_pixels(args.keep, side) if args.keep else masked_pixels(args.mask, photo, side)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    settings = {}
    for name, defaults in sample.SETTINGS.items():
        default = defaults[1 if model.config.caption_dim else 0]
        settings[name] = default if getattr(args, name) is None else getattr(args, name)

    photo = data.center_crop(photo, side)
    with torch.no_grad():
        photo_codes = vq_model.encode(vq.to_tensor(photo)[None].to(device)).flatten()  # (T,)
    photo = np.array(photo)  # (H, W, 3)
    cells = data.kept_cells(kept, grid)  # (h, w): a code is kept where all its pixels are
    stays = enlarge(cells, side)
    masked = np.where(stays, photo, 127).astype(np.uint8)
    pictures, above = [], []
    for row, title in enumerate(titles):
        batch = [x[[row] * args.count].to(device) for x in cond]
        seeds = [args.seed + row * args.count + i for i in range(args.count)]
        codes = complete(
            model,
            batch[0],
            photo_codes,
            torch.from_numpy(cells.flatten()).to(device),
            *batch[1:],
            particles=args.particles,
            seeds=seeds,
            progress=True,
            **settings,
        )
        nats = log_probability(model, codes, *batch)
        each = ", ".join(f"{n:.1f}" for n in nats.tolist())
        mean = f"{nats.mean():.1f} nats on average"
        print(f"{title}: log-probability of the whole image {mean} ({each})")
        edited = sample.to_pixels(vq_model, codes)
        if args.paste:
            edited = np.where(stays, photo, edited)
        pictures += [photo, masked, *edited]
        above += ["photo", f"kept: {cells.mean():.0%}"] + [title] * args.count
    data.save_grid(np.stack(pictures), args.out, 2 + args.count, above)
    print(f"{args.out}: {len(titles)} x {args.count} pictures, {args.particles} particles each")


def load_models(args, device):
    """The tokenizer and the GPT that the flags name. Raises OSError or ValueError."""
    size = args.image_size or 256
    if args.pretrained:
        args.vq, args.gpt, size = sample.fetch_pretrained(args.pretrained)
    vq_model = vq.load_vq(args.vq, device)
    model = gpt.load_gpt(args.gpt, device, grid=size // vq_model.config.downsample)
    sample.check_pair(model, vq_model, args.gpt, args.vq, args.image_size)
    return vq_model, model.to(getattr(torch, flags.best_dtype(device)))


def conditions(args, model, device):
    """What pictures are sampled from: titles, one per class or caption, and [labels] or [features,
    mask]. Raises OSError or ValueError."""
    if model.config.caption_dim:
        if args.classes or not args.prompt:
            raise ValueError(f'{args.gpt} is for captions, not classes: give --prompt "..."')
        return args.prompt, captions.encode_captions(args.prompt, args.t5, device, model)
    if args.prompt or not args.classes:
        raise ValueError(f"{args.gpt} is for classes: give --classes, or --classes none")
    if args.classes == "none":
        return ["no class"], [torch.tensor([model.config.num_classes])]
    names = classes.class_names(model)
    labels = [classes.find_class(word, names) for word in args.classes.split(",")]
    return [names[label].split(",")[0] for label in labels], [torch.tensor(labels)]


# ---- argument checks ---------------------------------------------------------------------------
def check(args):
    """Raise OSError or ValueError if flags do not fit together or --out cannot be written."""
    if bool(args.pretrained) == bool(args.vq and args.gpt):
        raise ValueError("give --vq and --gpt, or --pretrained")
    if Path(args.out).suffix != ".png" or Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: give the name of a file that ends in .png")
    files.make_folder(Path(args.out).parent)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
