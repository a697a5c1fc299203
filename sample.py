"""Sample images: classes or captions -> codes (gpt.py, guided, cached) -> pixels (vq.py).

Your own model, a row of pictures for each class:
$ python sample.py --vq runs/vq/ckpt.pt --gpt runs/gpt/ckpt.pt --classes 0,star --count 4
The officially released weights, fetched once:
$ python sample.py --pretrained L-256 --classes 207,"red fox" --out sample.png
From captions, which FLAN-T5 XL reads (`pip install transformers`):
$ python sample.py --pretrained t2i-256 --prompt "a red fox in the snow" --out fox.png
50,000 images for evaluate.py, with the paper's settings; after a stop the same command resumes:
$ torchrun --nproc_per_node=8 sample.py --pretrained L-256 --paper --num-samples 50000 --out 50k.npz
"""

# Shapes:  B images   T codes per image   c condition tokens   V codebook entries   C model width
#          H, W pixels   N images in a file
import argparse
import hashlib
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import gpt
import vq
from nanollamagen import captions, classes, data, fast, files, flags, noise, parts

# The settings of sampling. Flags, the HTTP API and vLLM's requests are made from this table. All
# but the guidance (cfg_scale, cfg_interval) are arguments of draw().
# fmt: off
SETTINGS = {  # default for classes, default for captions, smallest, largest, what it is
    "cfg_scale":    (4.0,  7.5,  0,    1000,  "guidance; up to 1 there is none"),
    "cfg_interval": (-1,   -1,   -1,   10**6, "k guides only the first k + 2 codes; -1: all"),
    "temperature":  (1.0,  1.0,  0,    2,     "0 takes the likeliest code, 2 is vLLM's limit"),
    "top_k":        (2000, 1000, 0,    10**6, "sample from the k likeliest codes; 0: all"),
    "top_p":        (1.0,  1.0,  1e-6, 1,     "sample from the likeliest codes that make up p"),
}
PAPER_CFG = {  # guidance of the best published FID
    "B-256": 2.0, "B-384": 2.25, "L-256": 1.75, "L-384": 2.0,
    "XL-384": 1.75, "XXL-384": 1.75, "3B-384": 1.65,
}
TEXT_FILES = {  # of the paper's two stages
    "t2i-256": "t2i_XL_stage1_256.pt", "t2i-512": "t2i_XL_stage2_512.pt",
}
# fmt: on


# ---- from logits to a code ---------------------------------------------------------------------
def filter_logits(logits, top_k=0, top_p=1.0):
    """Set unlikely entries of logits (..., V) to -inf.

    top_k keeps the k largest and all that equal the k-th (0 or more than V: all). top_p then keeps
    the most probable entries up to and including the one whose cumulative probability crosses p, at
    least one (1: all). Both may be columns (..., 1), top_k's on the CPU."""
    V = logits.shape[-1]
    if isinstance(top_k, torch.Tensor):
        top_k = top_k.where(top_k > 0, V).clamp(max=V)
        largest = logits.topk(int(top_k.max())).values
        smallest = largest.gather(-1, top_k.to(logits.device, non_blocking=True) - 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    elif 0 < top_k < V:
        smallest = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if isinstance(top_p, torch.Tensor):
        top_p = top_p.where(top_p < 1, torch.inf)  # a sum of all can be above 1
    if isinstance(top_p, torch.Tensor) or top_p < 1:
        ordered, order = logits.sort(descending=True)
        likelier = F.pad(ordered.softmax(-1).cumsum(-1), (1, -1))  # what comes before each entry
        remove = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier > top_p)
        logits = logits.masked_fill(remove, -torch.inf)
    return logits


def gumbel_noise(seeds, positions, vocab_size):
    """Gumbel noise for codes: float32 (..., V), finite, for seeds and positions, int64 that
    broadcast to (...). It is always the same for the same seed of an image, position (the code's
    number 0 .. T - 1) and entry of the codebook."""
    return noise.gumbel(noise.state(seeds, positions), vocab_size)


def draw(logits, gumbel, temperature=1.0, **filters):
    """Codes (...) int64 from logits (..., V) and gumbel_noise (..., V): the largest of logits /
    temperature + noise among those that filter_logits keeps. A temperature below 1e-5 takes the
    largest logit. Settings may be columns (..., 1), see filter_logits.

    By Gumbel's rule this samples from softmax(filter_logits(logits / temperature)). Unlike a walk
    along cumulative probabilities, it rarely changes with the last digits of the logits. So the
    same noise gives the same code on another device, in another batch and in vLLM."""
    each = isinstance(temperature, torch.Tensor)
    if not each and temperature < 1e-5:
        return logits.argmax(-1)
    kept = filter_logits(logits.float() / temperature, **filters)
    codes = (kept + gumbel).argmax(-1)
    return codes.where(temperature[..., 0] >= 1e-5, logits.argmax(-1)) if each else codes


# ---- decoding ----------------------------------------------------------------------------------
def add_uncond(model, cond, mask=None):
    """Conditions and mask of 2B rows for guidance: B with their condition, then B without."""
    cond = torch.cat([cond, model.cls_embedding.uncond(cond)])
    if mask is not None:
        mask = mask.repeat(2, 1)  # "no caption" is seen where the caption is
    return cond, mask


def guide(logits, cfg_scale):
    """Guided logits, float32 (B, ..., V), from (2B, ..., V), those with the condition first."""
    # In bfloat16 they would be rounded, and codes would tie: top-k keeps all that do.
    cond, uncond = logits.float().chunk(2)
    return uncond + (cond - uncond) * cfg_scale


@torch.no_grad()
def generate(
    model,
    cond,
    mask=None,
    *,
    cfg_scale=1.0,
    cfg_interval=-1,
    seeds=None,
    compiled=False,
    progress=False,
    **how,
):
    """Codes (B, T) int64 for a batch of conditions, one image each.

    cond          (B,) int64 class ids, or (B, c, D) features of captions, padded on the left
    mask          (B, c) bool, False where a caption is padded; None for classes
    cfg_scale     guidance: logits = uncond + (cond - uncond) * scale; up to 1 there is none
    cfg_interval  -1 guides every code; k >= 0 the first and the k + 1 after it, as released
    seeds         an int for each image, modulo 2^63 (default: random); the same seed gives the
                  same image in any batch
    compiled      torch.compile the model
    progress      show a bar over the T codes
    how           temperature, top_k and top_p, see draw"""
    B, T, c = len(cond), model.config.grid**2, model.config.cond_tokens
    if mask is not None and mask.shape[1] != c:
        raise ValueError(f"captions have {mask.shape[1]} positions; here they need all {c}")
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (B,)).tolist()
    seeds = torch.tensor([seed % 2**63 for seed in seeds], device=cond.device)  # (B,)
    guided = cfg_scale > 1
    if guided:
        cond, mask = add_uncond(model, cond, mask)
    extend = fast.compiled(model.extend) if compiled else model.extend

    def choose(logits, i):
        """Code i of each image, (B,), from the logits that predict it, (B or 2B, 1, V)."""
        logits = logits[:, 0]
        if guided:
            logits = guide(logits, cfg_scale)  # (B, V)
        return draw(logits, gumbel_noise(seeds, i, logits.shape[-1]), **how)

    def next_code(code, i):
        """Feed code i - 1 of each image, (B,), and choose code i. A GPU records this once: i is a
        tensor, and no shape depends on it."""
        x = model.tok_embeddings(code)[:, None]  # (B, 1, C)
        if guided:
            x = x.repeat(2, 1, 1)  # both halves see the same codes
        return choose(extend(x, c + i - 1, cache, mask), i)

    # Code 0 follows from the condition.
    codes = torch.zeros(B, T, dtype=torch.int64, device=cond.device)
    positions = c + T - 1  # the last code is never fed
    cache = model.new_cache(len(cond), positions=0)
    fast.grow(cache, c, positions)
    logits = model.extend(model.cls_embedding(cond), 0, cache, mask)
    codes[:, 0] = choose(logits, 0)

    # Every other code follows from the one before it and from what the cache holds.
    step = fast.Recorded(next_code, cache)
    bar = files.progress(T - 1, "codes", unit=" codes", rank=0 if progress else 1)
    for i in range(1, T):
        if guided and 0 <= cfg_interval < i - 1:  # the rows without condition are done
            guided = False
            cache[:] = [layer[:, :B].clone() for layer in cache]
            mask = None if mask is None else mask[:B]
        fast.grow(cache, c + i, positions)
        codes[:, i] = step(codes[:, i - 1], i)
        bar.update()
    bar.close()
    return codes


@torch.no_grad()
def to_pixels(vq_model, codes, size=None):
    """Codes (B, T) of square images -> uint8 (B, H, W, 3), resized (bicubic, before rounding) to
    `size` if there is one."""
    grid = int(codes.shape[1] ** 0.5)
    side = grid * vq_model.config.downsample
    few = max(1, 2**20 // side**2)  # a million pixels at once: 0.5 GB per tensor
    pixels = []
    for group in codes.view(-1, grid, grid).split(few):
        images = vq_model.decode(group)
        if size and size != side:
            images = F.interpolate(images, size=(size, size), mode="bicubic")
        pixels.append(vq.to_uint8(images))
    return np.concatenate(pixels)


# ---- many images, for metrics ------------------------------------------------------------------
CHUNK = 256  # images in one part file, whatever the batch size and the number of processes


def draw_pixels(model, vq_model, cond, seeds, size=None, **settings):
    """Images uint8 (B, H, W, 3) of cond = [labels] or [features, mask], image i from seeds[i]."""
    return to_pixels(vq_model, generate(model, *cond, seeds=seeds, **settings), size)


def write_npz(
    path,
    model,
    vq_model,
    num_samples,
    *,
    cond=None,
    seed=0,
    batch_size=32,
    size=None,
    draw=draw_pixels,
    **settings,
):
    """Write ADM's NPZ: arr_0 uint8 (N, H, W, 3) and labels int64 (N,). Image i is sampled from seed
    + i and condition i % n.

    cond      [features, mask] of n captions (captions.encode_captions), or [labels] of n classes;
              default: all classes. The label of an image is the number of its condition.
    settings  go to `draw`

    Under torchrun the processes share the work. A second start makes the parts that are missing
    in PATH.parts. Raises ValueError if these were begun with other settings."""
    if cond is None:
        if model.config.caption_dim:
            raise ValueError("the model is for captions: give --prompts FILE")
        cond = [torch.arange(model.config.num_classes)]
    path, folder = Path(path), Path(f"{path}.parts")
    device = next(model.parameters()).device
    decides = {
        "gpt": vq.weights_hash(model),
        "vq": vq.weights_hash(vq_model),
        "cond": hashlib.sha256(cond[0].float().numpy().tobytes()).hexdigest(),
        "seed": seed,
        "n": num_samples,
        "size": size,
        "batch_size": batch_size,
        **{name: value for name, value in settings.items() if name != "compiled"},
    }

    def sample_chunks(chunks, bar):
        for chunk in chunks:
            pixels = []
            for first in range(0, len(chunk), batch_size):
                ids = chunk[first : first + batch_size]
                batch = [x[[i % len(x) for i in ids]].to(device) for x in cond]
                seeds = [seed + i for i in ids]
                pixels.append(draw(model, vq_model, batch, seeds, size, **settings))
                bar.update(len(ids))
            yield {"pixels": np.concatenate(pixels)}

    part_files = parts.make("sample", folder, path, decides, num_samples, CHUNK, sample_chunks)
    if part_files:
        join(path, part_files, np.arange(num_samples) % len(cond[0]))
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{path}: {files.counted(num_samples, 'image')}")
    parts.wait([path])


def join(path, part_files, labels):
    """Write the parts and the labels as one NPZ, with one part in memory at a time."""
    shape = (len(labels), *next(parts.each(part_files, "pixels")).shape[1:])
    with zipfile.ZipFile(f"{path}.tmp", "w") as z:
        with z.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
            files.write_npy(f, np.uint8, shape, parts.each(part_files, "pixels"))
        with z.open(zipfile.ZipInfo("labels.npy"), "w") as f:
            files.write_npy(f, np.int64, labels.shape, [labels])
    os.replace(f"{path}.tmp", path)


# ---- the command line --------------------------------------------------------------------------
def add_flags(p):
    """Flags for the models, the conditions and the settings; extras/window.py has the same."""
    flag, released = p.add_argument, [*PAPER_CFG, *TEXT_FILES]
    # fmt: off
    flag("--pretrained", choices=released, help="released weights, by size and pixels")
    flag("--vq", help="tokenizer checkpoint")
    flag("--gpt", help="GPT checkpoint")
    flag("--image-size", type=flags.pixels, help="of a released --gpt file (default: 256)")
    flag("--classes", help="ids or names, with commas (default: the first ten, eight of ImageNet)")
    flag("--prompt", action="append", default=[], help="a caption; may be repeated")
    flag("--prompts", metavar="FILE", help="captions, one per line")
    flag("--t5", help="folder or Hugging Face name of the encoder of captions (default: the one "
         "that the GPT was trained with, google/flan-t5-xl for released ones)")
    flag("--resize", type=flags.pixels, help="side, in pixels, to resize the images to")
    flag("--seed", type=flags.seed, default=0, help="image i follows from seed + i")
    flags.add_device(p)
    flag("--dtype", choices=["float32", "bfloat16"],
         help="of the GPT (default: bfloat16 on a GPU that has it)")
    # fmt: on
    for name, (default, for_captions, smallest, largest, what) in SETTINGS.items():
        kind = flags.bounded(type(default), smallest, largest)
        words = f"{what} (default: {default}; captions: {for_captions})"
        flag("--" + name.replace("_", "-"), type=kind, help=words)


def parse():
    """The command line: its parser, and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(p)
    flag, number = p.add_argument, flags.at_least_one
    # fmt: off
    flag("--paper", action="store_true", help="the paper's evaluation: top-k 0, and its guidance "
         "of --pretrained (2 for others); give --resize 256 for 384-pixel models")
    flag("--count", type=number, default=1, help="images of each class or caption")
    flag("--per-class", type=number, dest="count", help=argparse.SUPPRESS)  # its old name
    flag("--num-samples", type=number, help="write this many images as NPZ, balanced over all "
         "classes or the captions")
    flag("--out", default="sample.png", help="PNG, or NPZ with --num-samples")
    flag("--batch-size", type=flags.batch, default=32, help="images sampled together")
    flag("--compile", action="store_true", help="torch.compile the GPT: takes minutes, on a GPU")
    # fmt: on
    p.usage = "python sample.py --vq CKPT --gpt CKPT ... (--help lists the flags)"
    return p, p.parse_args()


def main():
    """Flags, models, conditions, settings, then the images."""
    parser, args = parse()
    check_flags(parser, args)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the current device is where CUDA graphs are recorded
    try:
        files.make_folder(Path(args.out).parent)
        model, vq_model = load_models(args, device)
        titles, cond = conditions(args, model, device)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    captioned = model.config.caption_dim > 0
    settings = choose_settings(args, captioned, paper=args.paper)
    words = ", ".join(f"{name} {value}" for name, value in settings.items())
    args.dtype = args.dtype or flags.best_dtype(device)
    print(f"{args.gpt}: {words}, seed {args.seed}, {args.dtype}")

    if args.dtype == "bfloat16":
        model = model.bfloat16()
    if args.compile:
        from nanollamagen import runs  # takes two seconds

        settings["compiled"] = runs.can_compile(True, device)
    if device.type == "cpu" and not settings.get("compiled"):
        fast.pack(model)

    if args.num_samples:
        how = {"seed": args.seed, "batch_size": args.batch_size, "size": args.resize, **settings}
        cond = cond if captioned else None  # None: all classes
        try:
            write_npz(args.out, model, vq_model, args.num_samples, cond=cond, **how)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return

    began, pixels = time.time(), []
    rows = [row for row in range(len(titles)) for _ in range(args.count)]  # image i shows rows[i]
    for first in range(0, len(rows), args.batch_size):
        few = rows[first : first + args.batch_size]
        batch = [x[few].to(device) for x in cond]
        seeds = [args.seed + first + i for i in range(len(few))]
        codes = generate(model, *batch, seeds=seeds, progress=True, **settings)
        pixels.append(to_pixels(vq_model, codes, args.resize))
    columns = args.count if args.count > 1 else min(len(rows), 10)
    data.save_grid(np.concatenate(pixels), args.out, columns, [titles[row] for row in rows])
    rate = len(rows) / (time.time() - began)
    print(f"{args.out}: {files.counted(len(rows), 'image')}, {rate:.2f} images/s")


def fetch_pretrained(name):
    """Paths of a released tokenizer and GPT, fetched if missing, and the side of their images in
    pixels. name: as --pretrained takes it."""
    if name in TEXT_FILES:
        repository, kind, gpt_file = "peizesun/llamagen_t2i", "t2i", TEXT_FILES[name]
    else:
        repository, kind = "FoundationVision/LlamaGen", "c2i"
        gpt_file = f"c2i_{name.replace('-', '_')}.pt"
    vq_path = files.pretrained(f"vq_ds16_{kind}.pt", repository)
    return vq_path, files.pretrained(gpt_file, repository), int(name.split("-")[1])


def load_models(args, device):
    """The GPT and the tokenizer that the flags name. Raises OSError or ValueError."""
    size = args.image_size or 256
    if args.pretrained:
        args.vq, args.gpt, size = fetch_pretrained(args.pretrained)
    vq_model = vq.load_vq(args.vq, device)
    model = gpt.load_gpt(args.gpt, device, grid=size // vq_model.config.downsample)
    check_pair(model, vq_model, args.gpt, args.vq, args.image_size)
    return model, vq_model


def conditions(args, model, device):
    """What the flags ask for: titles, one for each class or caption, and [labels] or [features,
    mask]. Raises OSError or ValueError."""
    prompts = list(args.prompt)
    if args.prompts:
        prompts += captions.read_prompts(args.prompts)
    if model.config.caption_dim:
        if args.classes or not prompts:
            raise ValueError(f"{args.gpt} is for captions: give --prompt, not --classes")
        return prompts, captions.encode_captions(prompts, args.t5, device, model)
    if prompts:
        raise ValueError(f"{args.gpt} is for classes: give --classes, not --prompt")
    names = classes.class_names(model)
    if args.classes:
        labels = [classes.find_class(word, names) for word in args.classes.split(",")]
    elif len(names) == 1000:
        labels = [207, 360, 387, 974, 88, 979, 417, 279]
    else:
        labels = list(range(min(10, len(names))))
    return [names[label].split(",")[0] for label in labels], [torch.tensor(labels)]


def choose_settings(args, captioned, paper=False):
    """{name: value} for each of SETTINGS: the flag's value, or else the default. Defaults look
    good, those of the paper score best: guidance trades variety for clear pictures."""
    column = 1 if captioned else 0
    settings = {name: row[column] for name, row in SETTINGS.items()}
    if paper and not captioned:
        settings["cfg_scale"] = PAPER_CFG.get(args.pretrained, 2.0)
        settings["top_k"] = 0
    for name in SETTINGS:
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return settings


# ---- argument checks ---------------------------------------------------------------------------
def check_flags(parser, args):
    """Refuse flags that do not fit together."""
    if args.pretrained and (args.vq or args.gpt) or not (args.pretrained or args.vq and args.gpt):
        parser.error("give --vq and --gpt, or --pretrained")
    if args.pretrained and args.image_size:
        parser.error("--image-size does not go with --pretrained, whose names tell the pixels")
    if not args.num_samples and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("torchrun is for --num-samples; a picture takes one process")
    if args.num_samples and args.classes:
        parser.error("--num-samples samples all classes alike; leave out --classes")
    out, ending = Path(args.out), ".npz" if args.num_samples else ".png"
    if out.suffix != ending:
        parser.error(f"--out {out}: give a name that ends in {ending}")
    if out.is_dir() or (args.num_samples and out.exists()):
        parser.error(f"--out {out} exists; delete it or choose another name")


def check_pair(model, vq_model, gpt_path, vq_path, image_size=None):
    """Raise ValueError unless this GPT was trained on this tokenizer's codes, as far as the files
    tell, and makes images of this size."""
    ours, theirs = model.config.vocab_size, vq_model.config.codebook_size
    if ours != theirs:
        codes = f"{gpt_path} has {ours:,} codes, {vq_path} {theirs:,}"
        raise ValueError(f"{codes}: they do not belong together")
    if model.tokenizer and model.tokenizer != vq.weights_hash(vq_model):
        raise ValueError(f"{gpt_path} was trained on codes of another tokenizer than {vq_path}")
    if image_size:
        side = model.config.grid * vq_model.config.downsample
        if image_size != side:
            raise ValueError(f"--image-size {image_size}: {gpt_path} makes {side} x {side} pixels")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
