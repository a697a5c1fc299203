"""Pictures that go on from a picture: complete it, fill a hole, change what it shows. Same weights,
no training.

The lower half anew, four times:
$ python extras/edit.py photo.png --vq runs/vq/ckpt.pt --gpt runs/gpt/ckpt.pt --keep top --classes horse --count 4
A hole (white in mask.png), filled so that it fits what stands below it, too:
$ python extras/edit.py photo.png --pretrained L-256 --mask mask.png --classes 207 --particles 16

Codes are drawn row by row and see only what stands before them, so codes right of a hole and below
cannot guide it. With sequential Monte Carlo they do: P particles draw the hole, each given code
weighs them by the probability that the model gives it, and the likely ones are copied over the
others (Doucet, de Freitas and Gordon, 2001).
"""

# Shapes:  B images   P particles an image   T codes an image   c condition tokens   V codebook entries   H, W pixels
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import gpt
import sample
import vq
from nanollamagen import captions, data, noise


# ---- drawing what is not kept ------------------------------------------------------------------
@torch.no_grad()
def complete(
    model,
    cond,
    given,
    keep,
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
    """Codes (B, T) int64, one image for each condition: `given` where it is kept, drawn elsewhere.

    cond, mask   as sample.generate takes them; seeds, cfg_scale and the rest, too
    given, keep  (T,) int64 and bool, the picture's codes and which of them stay
    particles    P; with 1 each code follows from those before it alone, and with nothing kept the result is generate's

    Weights come from the model's distribution before top-k and top-p, else a given code that they
    exclude would leave no particle; it is guided and tempered as the draws are."""
    B, T, P, c = len(cond), len(given), particles, model.config.cond_tokens
    if keep.all():
        return given.repeat(B, 1)
    cond = cond.repeat_interleave(P, 0)
    mask = mask if mask is None else mask.repeat_interleave(P, 0)
    guided = cfg_scale > 1
    if guided:  # rows 0 .. BP-1 carry the condition, rows BP .. 2BP-1 none
        cond = torch.cat([cond, model.cls_embedding.uncond(cond)])
        mask = mask if mask is None else mask.repeat(2, 1)
    copies = 1 + guided
    seeds = torch.tensor([seed % 2**63 for seed in seeds], device=cond.device)
    noise_seeds = particle_seeds(seeds, P).flatten()  # (BP,)
    codes = given.repeat(B * P, 1)  # (BP, T)
    log_weights = torch.zeros(B, P, device=cond.device)

    # What is kept before the first hole is the same for all: it is fed at once, with the condition.
    first = int(keep.long().argmin())
    cache = model.new_cache(len(cond))
    x = torch.cat(
        [model.cls_embedding(cond), model.tok_embeddings(codes[:, :first]).repeat(copies, 1, 1)], 1
    )
    bar = data.progress(T - first, "codes", unit=" codes") if progress else None
    for i in range(first, T):
        logits = model.extend(x, 0 if i == first else c + i - 1, cache, mask)
        logits = logits[:, 0].float()
        if guided and not 0 <= cfg_interval < i - 1:
            logits = sample.guide(logits, cfg_scale)
        logits = logits[: B * P]  # (BP, V)
        if not keep[i]:
            gumbel = sample.gumbel_noise(noise_seeds, i, logits.shape[-1])
            filters = dict(temperature=temperature, top_k=top_k, top_p=top_p)
            codes[:, i] = sample.draw(logits, gumbel, **filters)
        elif P > 1:
            log_weights += (logits / max(temperature, 1e-5)).log_softmax(-1)[:, given[i]].view(B, P)
            rows = resample(log_weights, seeds, T + i)
            if rows is not None:
                codes = codes[rows]
                for n, layer in enumerate(cache):
                    cache[n] = layer[:, torch.cat([rows + half * B * P for half in range(copies)])]
        x = model.tok_embeddings(codes[:, i : i + 1]).repeat(copies, 1, 1)
        if bar:
            bar.update()
    # One particle an image, drawn by weight. Numbers T .. 2T - 1 were for resampling; 2T is fresh.
    chosen = (log_weights + sample.gumbel_noise(seeds, torch.full_like(seeds, 2 * T), P)).argmax(1)
    return codes.view(B, P, T)[torch.arange(B, device=codes.device), chosen]


def particle_seeds(seeds, P):
    """Seeds (B,) -> (B, P): an image's own for its first particle, hashes of it for the others."""
    others = noise.mix(noise.mix(seeds)[:, None] + torch.arange(1, P, device=seeds.device))
    return torch.cat([seeds[:, None], others], 1)


def resample(log_weights, seeds, number):
    """Which of the B * P particles go on, int64 (B * P,), None if all do; their log_weights (B, P)
    change in place.

    Where the effective number of particles 1 / sum(weights^2) is below P / 2, P of them are taken
    at even distances along the cumulative weights (systematic resampling): copies in place of
    unlikely ones, and all weigh the same again. What copies draw next differs, as noise belongs to
    the place in the batch."""
    B, P = log_weights.shape
    weights = log_weights.double().softmax(1)
    poor = 1 / weights.square().sum(1) < P / 2  # (B,)
    if not poor.any():
        return None
    gumbel = sample.gumbel_noise(seeds, torch.full_like(seeds, number), 1).double()
    uniform = (-(-gumbel).exp()).exp()  # (B, 1), back from Gumbel's
    places = (torch.arange(P, device=seeds.device) + uniform) / P
    taken = torch.searchsorted(weights.cumsum(1), places).clamp(max=P - 1)  # (B, P)
    taken = torch.where(poor[:, None], taken, torch.arange(P, device=seeds.device))
    log_weights[poor] = 0
    return (taken + P * torch.arange(B, device=seeds.device)[:, None]).flatten()


@torch.no_grad()
def log_probability(model, codes, cond, mask=None):
    """Nats that the model gives whole images, codes (B, T), without guidance: (B,)."""
    logits = model(codes[:, :-1], cond, mask).float()
    return logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0].sum(1)


# ---- pictures and masks ------------------------------------------------------------------------
def kept_pixels(name, side):
    """What --keep keeps of side x side pixels, bool (H, W): top, left, border, nothing, or a
    rectangle X,Y,W,H. Raises ValueError with one sentence."""
    keep, half, quarter = np.zeros((side, side), bool), side // 2, side // 4
    if name == "top":
        keep[:half] = True
    elif name == "left":
        keep[:, :half] = True
    elif name == "border":
        keep[:] = True
        keep[quarter : side - quarter, quarter : side - quarter] = False
    elif name != "nothing":
        try:
            x, y, w, h = (int(number) for number in name.split(","))
        except ValueError:
            raise ValueError(
                f"--keep {name}: give top, left, border, nothing or X,Y,W,H in pixels"
            ) from None
        if min(x, y) < 0 or min(w, h) < 1 or max(x + w, y + h) > side:
            raise ValueError(f"--keep {name} does not lie within {side} x {side} pixels")
        keep[y : y + h, x : x + w] = True
    return keep


def masked_pixels(path, photo, side):
    """What a mask file keeps, bool (H, W): all but white, cropped as the photo is. Raises
    OSError."""
    mask = data.open_image(path).resize(photo.size, Image.NEAREST)
    return np.array(data.center_crop(mask, side).convert("L")) < 128


def enlarge(cells, side):
    """Cells (h, w) as pixels (H, W, 1)."""
    times = side // len(cells)
    return cells.repeat(times, 0).repeat(times, 1)[..., None]


# ---- the command line --------------------------------------------------------------------------
def parse():
    """The command line: its parser, and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "photo", help="any image; its middle square is taken, at the size that the model draws"
    )
    p.add_argument(
        "--pretrained", choices=[*sample.PAPER_CFG, *sample.TEXT_FILES], help="released weights"
    )
    p.add_argument("--vq", help="tokenizer checkpoint")
    p.add_argument("--gpt", help="GPT checkpoint")
    p.add_argument(
        "--image-size",
        type=int,
        help="pixels a side that a released --gpt file is for (default: 256)",
    )
    p.add_argument(
        "--keep",
        help="top, left or border (half of the picture, or all but its middle), nothing, or the "
        "rectangle X,Y,W,H in pixels of what the model draws",
    )
    p.add_argument(
        "--mask", metavar="FILE", help="an image in place of --keep; what is white is drawn anew"
    )
    p.add_argument(
        "--classes", help="ids or names, separated by commas, a row each; none: without a class"
    )
    p.add_argument(
        "--prompt", action="append", default=[], help="a caption; may be given several times"
    )
    p.add_argument("--t5", help="encoder of captions, as in sample.py")
    p.add_argument("--count", type=int, default=4, help="pictures of each class or caption")
    p.add_argument(
        "--particles",
        type=int,
        default=1,
        help="particles an image (default: 1, where what comes after a hole does not guide it)",
    )
    p.add_argument(
        "--paste",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the photo's pixels back where whole codes were kept",
    )
    p.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i")
    p.add_argument(
        "--cfg-scale", type=float, help="guidance, 1 is none (default: 4; captions: 7.5)"
    )
    p.add_argument(
        "--cfg-interval",
        type=int,
        default=-1,
        help="guide the first code and this many + 1 more; -1: all",
    )
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-k", type=int, help="0 is all (default: 2000; captions: 1000)")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument(
        "--out", default="edit.png", help="PNG: the photo, what is kept of it, the results"
    )
    p.add_argument(
        "--device",
        type=data.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu (default: cuda where there is one)",
    )
    p.usage = (
        "python extras/edit.py PHOTO --vq CKPT --gpt CKPT --keep top ... (--help lists the flags)"
    )
    return p, p.parse_args()


def main():
    """Flags, models, the photo and what to keep of it, then the pictures."""
    parser, args = parse()
    check_flags(parser, args)
    device = torch.device(args.device)
    try:
        size = args.image_size or 256
        if args.pretrained:
            args.vq, args.gpt, size = sample.fetch_pretrained(args.pretrained)
        vq_model = vq.load_vq(args.vq, device)
        model = gpt.load_gpt(args.gpt, device, grid=size // vq_model.config.downsample)
        sample.check_pair(model, vq_model, args.gpt, args.vq, args.image_size)
        titles, cond = conditions(args, model, device)
        grid, side = model.config.grid, model.config.grid * vq_model.config.downsample
        photo = ImageOps.exif_transpose(data.open_image(args.photo))  # upright, as the mask
        keep = kept_pixels(args.keep, side) if args.keep else masked_pixels(args.mask, photo, side)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    captioned = model.config.caption_dim > 0
    settings = dict(
        cfg_scale=args.cfg_scale,
        cfg_interval=args.cfg_interval,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        particles=args.particles,
    )
    if args.cfg_scale is None:
        settings["cfg_scale"] = 7.5 if captioned else 4.0
    if args.top_k is None:
        settings["top_k"] = 1000 if captioned else 2000
    if device.type == "cuda":
        model = model.bfloat16()

    photo = data.center_crop(photo, side)
    cells = data.kept_cells(keep, grid)  # bool (h, w)
    with torch.no_grad():
        given = vq_model.encode(vq.to_tensor(photo)[None].to(device)).flatten()  # (T,)
    flat = torch.from_numpy(cells.flatten()).to(device)
    photo = np.array(photo)
    rows, head = [], ["photo", f"kept: {cells.mean():.0%}"]
    stays = enlarge(cells, side)
    masked = np.where(stays, photo, 127).astype(np.uint8)
    for row, title in enumerate(titles):
        batch = [x[[row] * args.count].to(device) for x in cond]
        seeds = [args.seed + row * args.count + i for i in range(args.count)]
        codes = complete(
            model, batch[0], given, flat, *batch[1:], seeds=seeds, progress=True, **settings
        )
        nats = log_probability(model, codes, *batch)
        print(
            f"{title}: log-probability of the whole image {nats.mean():.1f} nats on average "
            f"({', '.join(f'{n:.1f}' for n in nats.tolist())})"
        )
        pictures = sample.to_pixels(vq_model, codes)
        if args.paste:
            pictures = np.where(stays, photo, pictures)
        rows += [photo, masked, *pictures]
    above = [text for title in titles for text in head + [title] * args.count]
    data.save_grid(np.stack(rows), args.out, 2 + args.count, above)
    print(
        f"{args.out}: {len(titles)} x {args.count} pictures"
        + f", {args.particles} particles each" * (args.particles > 1)
    )


def conditions(args, model, device):
    """What is asked for: titles, a class or caption each, and [labels] or [features, mask]. Raises
    ValueError."""
    if model.config.caption_dim:
        if args.classes or not args.prompt:
            raise ValueError(f'{args.gpt} draws from captions, not classes: give --prompt "..."')
        return args.prompt, captions.encode_captions(args.prompt, args.t5, device, model)
    if args.prompt or not args.classes:
        raise ValueError(f"{args.gpt} draws from classes: give --classes, or --classes none")
    if args.classes == "none":
        return ["no class"], [torch.tensor([model.config.num_classes])]
    names = captions.class_names(model)
    labels = [captions.find_class(word, names) for word in args.classes.split(",")]
    return [names[label].split(",")[0] for label in labels], [torch.tensor(labels)]


def check_flags(parser, args):
    """Refuse, with one sentence, what can be seen from the flags alone."""
    data.within(
        parser,
        args,
        image_size=(1, 8192),
        count=(1, 1000),
        particles=(1, 2**16),
        seed=(0, 2**63 - 1),
        cfg_scale=(0, 1e6),
        cfg_interval=(-1, 1e9),
        temperature=(0, 1e6),
        top_k=(0, 1e9),
        top_p=(1e-9, 1),
    )
    if bool(args.pretrained) == bool(args.vq and args.gpt):
        parser.error("give --vq and --gpt, or --pretrained")
    if bool(args.keep) == bool(args.mask):
        parser.error("give --keep or --mask")
    if Path(args.out).suffix != ".png" or Path(args.out).is_dir():
        parser.error(f"--out {args.out}: give the name of a file that ends in .png")
    try:
        data.make_folder(Path(args.out).parent)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
