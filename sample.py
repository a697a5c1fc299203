"""Sample images: classes or captions -> codes (gpt.py, guided, cached) -> pixels (vq.py).

Your own model, a row of pictures for each class:
$ python sample.py --vq runs/vq/ckpt.pt --gpt runs/gpt/ckpt.pt --classes 0,star --per-class 4 --out sample.png
The officially released weights, fetched once:
$ python sample.py --pretrained L-256 --classes 207,"red fox" --out sample.png
From captions, which FLAN-T5 XL reads (`pip install transformers`):
$ python sample.py --pretrained t2i-256 --prompt "a red fox in the snow" --prompt "a bowl of cherries, oil on canvas"
50,000 images for the metrics of evaluate.py, with the paper's settings (interrupted, it goes on
where it ended):
$ torchrun --nproc_per_node=8 sample.py --pretrained L-256 --paper --num-samples 50000 --out samples.npz
"""

# Shapes:  B images   T codes per image   V codebook entries   H, W pixels   N images in a file
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
from nanollamagen import captions, data, files, parts

PAPER_CFG = {
    "B-256": 2.0,
    "B-384": 2.25,
    "L-256": 1.75,
    "L-384": 2.0,
    "XL-384": 1.75,
    "XXL-384": 1.75,
    "3B-384": 1.65,
}  # guidance of the best published FID
TEXT_FILES = {
    "t2i-256": "t2i_XL_stage1_256.pt",
    "t2i-512": "t2i_XL_stage2_512.pt",
}  # of the paper's two stages


SETTINGS = {  # default for classes and for captions, least, most, what it is
    "cfg_scale": (4.0, 7.5, 0, 1000, "guidance, 1 is none"),
    "cfg_interval": (-1, -1, -1, 10**6, "guide the first code and this many + 1 more; -1: all"),
    "temperature": (1.0, 1.0, 0, 2, "0 takes the likeliest code, 2 is vLLM's limit"),
    "top_k": (2000, 1000, 0, 10**6, "sample from the k likeliest codes; 0: all"),
    "top_p": (1.0, 1.0, 1e-6, 1, "sample from the likeliest codes that make up p"),
}


# ---- from logits to codes ----------------------------------------------------------------------
def filter_logits(logits, top_k=0, top_p=1.0):
    """Set unlikely entries of logits (..., V) to -inf.

    top_k keeps the k largest and all that equal the k-th (0 or more than V: all). top_p then keeps
    the most probable entries up to and including the one whose cumulative probability crosses p, at
    least one (1: all)."""
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = F.pad(
            ordered.softmax(-1).cumsum(-1), (1, -1)
        )  # probability of everything more likely
        remove = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(remove, -torch.inf)
    return logits


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (..., V) -> what is sampled from, float32 (..., V). A temperature below 1e-5 counts as
    1e-5."""
    return filter_logits(logits.float() / max(temperature, 1e-5), top_k, top_p).softmax(-1)


GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as int64


def mix(x):
    """One number of splitmix64 for every state in x, int64; a bijection that turns one changed bit
    into 32 on average.

    Integer products wrap in torch as they do in C, so that a CPU and a GPU agree to the last bit
    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). `>>` copies the
    sign in int64: the masks undo it."""
    x = x + GOLDEN
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= (x >> shift).bitwise_and_((1 << 64 - shift) - 1)  # in place: V numbers each
        x *= factor - (1 << 64)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def gumbel_noise(seeds, positions, vocab_size):
    """Gumbel noise for codes: float32 (..., V), finite, always the same for the same (seed,
    position, code).

    seeds, positions   int64 of shapes that broadcast to (...): the images' seeds, the codes' numbers 0 .. T - 1
    vocab_size         V

    A hash in place of a generator has no state: the noise of any positions, in any order, on any
    device."""
    state = mix(mix(seeds) + positions)[..., None]
    hashed = mix(state + GOLDEN * torch.arange(vocab_size, device=state.device))
    uniform = (
        (hashed >> 24).bitwise_and_((1 << 40) - 1).float().add_(0.5).mul_(2.0**-40)
    )  # finest near 0, where
    uniform.clamp_(max=1 - 2.0**-24)  # noise is large; and never rounded to 1
    return uniform.neg_().log1p_().neg_().log_().neg_()  # -log(-log(1 - uniform))


def draw(logits, noise, temperature=1.0, top_k=0, top_p=1.0):
    """Codes (...) int64 from logits (..., V) and gumbel_noise (..., V): the largest of logits /
    temperature + noise among those that the filters keep. A temperature below 1e-5 takes the
    largest logit.

    By Gumbel's rule that is a draw from probabilities(logits, temperature, top_k, top_p). Walking
    along the cumulative probabilities up to a uniform number would be one, too; but there a small
    change anywhere in the logits moves everything behind it, while a largest value rarely changes
    hands. So the same noise gives the same code from logits that differ in the last digits (another
    batch, device or engine), and mostly from the logits of another context, which is why codes can
    be guessed ahead (`--window`)."""
    if temperature < 1e-5:
        return logits.argmax(-1)
    return (filter_logits(logits.float() / temperature, top_k, top_p) + noise).argmax(-1)


# ---- decoding ----------------------------------------------------------------------------------
def guide(logits, numbers, guided, cfg_scale, cfg_interval=-1):
    """Guided logits, float32 (B, L, V), for codes `numbers` (B, L): from (2B, L, V), those with the
    condition first, or as they are where nothing is guided. cfg_scale and cfg_interval as in
    generate."""
    logits = (
        logits.float()
    )  # in bfloat16 guidance would be rounded, and codes would tie: top-k keeps all that do
    if not guided:
        return logits
    given, without = logits.chunk(2)
    logits = without + (given - without) * cfg_scale
    return (
        logits
        if cfg_interval < 0
        else torch.where(numbers[..., None] <= cfg_interval + 1, logits, given)
    )


def decode_step(model, extend, codes, final, seeds, cache, mask, window, guidance, filters):
    """Make at least one more code of every image final, in place. No shape and no address depends
    on how far it is.

    extend  model.extend, compiled or not
    codes   (B, T) int64: of image b the first final[b] codes are drawn, the others are guesses
    final   (B,) int64, each at least 1
    cache   of B rows, or of 2B where images are guided; it holds what stands before the last final code

    That code and the W - 1 guesses after it are fed at once, and the code after each of them is
    drawn. The first of these is final, as it would have been alone. If it is what was guessed, then
    what was fed next was right and the second is final, too, and so on. The others are better
    guesses for the next step (Jacobi iteration; with noise that is fixed for each code: Teng et
    al., arXiv:2410.01699). The cache of wrong guesses is overwritten before it is read. An image
    that is done computes its last codes again, until all are."""
    B, T = codes.shape
    copies = cache[0].shape[1] // B
    first = final.clamp(max=T - window)[:, None]  # (B, 1), number of the first drawn here
    numbers = first + torch.arange(window, device=codes.device)  # (B, W)
    x = model.tok_embeddings(codes.gather(1, numbers - 1)).repeat(copies, 1, 1)
    position = (first - 1 + model.config.cond_tokens).repeat(
        copies, 1
    )  # both halves see the same codes
    logits = extend(x, position, cache, mask, last=window)
    guesses = codes.gather(1, numbers)
    noise = gumbel_noise(seeds[:, None], numbers, logits.shape[-1])
    drawn = draw(guide(logits, numbers, copies == 2, *guidance), noise, *filters)
    drawn = torch.where(numbers < final[:, None], guesses, drawn)
    right = (
        (drawn == guesses)[:, :-1].long().cumprod(1).sum(1)
    )  # guesses before the first wrong one
    codes.scatter_(1, numbers, drawn)
    final.copy_(first[:, 0] + 1 + right)


def record(step):
    """A step as a CUDA graph: one launch in place of a thousand. What cannot be recorded is run as
    it is."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # other threads may pin memory meanwhile
            step()
    except RuntimeError as error:
        print(
            f"warning: steps are not recorded as a CUDA graph ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return step
    return graph.replay


@torch.no_grad()
def generate(
    model,
    cond,
    mask=None,
    *,
    cfg_scale=1.0,
    cfg_interval=-1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seeds=None,
    window=1,
    compiled=False,
    progress=False,
    trace=None,
):
    """Codes for a batch of conditions, one image each.

    cond          (B,) int64 class ids on the model's device, or (B, c, D) features of captions, padded on the left
    mask          (B, c) bool, False where a caption is padded; None for classes
    cfg_scale     classifier-free guidance: logits = uncond + (cond - uncond) * scale; up to 1 there is none
    cfg_interval  -1 guides every code; k >= 0 the first and the k + 1 after it (as the released code counts)
    seeds         an int for each image, whose codes then do not depend on the batch it is in; they count modulo 2^63.
                  None: fresh ones from torch's own generator
    window        codes that are computed at once: the same codes in fewer steps, each of which does more
    compiled      torch.compile what a step does in the model (the hash of the noise crashed inductor on a CPU)
    progress      show a bar over the T steps
    trace         a list to which each step appends (final, codes), see decode_step
    returns       (B, T) int64
    """
    B, T, c = len(cond), model.config.grid**2, model.config.cond_tokens
    if mask is not None and mask.shape[1] != c:
        raise ValueError(
            f"captions are padded to {mask.shape[1]} positions; here they need all {c}"
        )
    guidance, filters = (cfg_scale, cfg_interval), (temperature, top_k, top_p)
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (B,)).tolist()
    seeds = torch.tensor([seed % 2**63 for seed in seeds], device=cond.device)
    window = min(window, T - 1)
    guided = cfg_scale > 1
    if guided:  # rows 0 .. B-1 carry the condition, rows B .. 2B-1 none
        cond = torch.cat([cond, model.cls_embedding.uncond(cond)])
        mask = (
            mask if mask is None else mask.repeat(2, 1)
        )  # "no caption" is seen where the caption is
    final = torch.ones_like(seeds)
    codes = torch.zeros(B, T, dtype=torch.int64, device=cond.device)

    # Attention reads the whole cache, used or not. So the cache grows in a few steps: little is
    # read for nothing, and the shapes that a GPU records rarely change.
    most = c + T - 1
    block = max(64, -(-most // 256) * 64)
    cache = model.new_cache(len(cond), min(-(-c // block) * block, most))
    logits = model.extend(model.cls_embedding(cond), 0, cache, mask)
    noise = gumbel_noise(seeds[:, None], codes[:, :1], logits.shape[-1])  # for code 0
    codes[:, :1] = draw(guide(logits, codes[:, :1], guided, *guidance), noise, *filters)

    extend = (
        torch.compile(model.extend, dynamic=False, fullgraph=True) if compiled else model.extend
    )

    def advance():
        decode_step(model, extend, codes, final, seeds, cache, mask, window, guidance, filters)

    step, recorded = advance, False
    least = greatest = 1  # codes that are final in every image, in any image
    bar = data.progress(T, "codes", unit=" codes") if progress else None
    while least < T:
        if (
            guided and 0 <= cfg_interval < least - 1
        ):  # the unconditional rows are not needed any more
            cache = [layer[:, :B].clone() for layer in cache]
            guided, mask = False, mask if mask is None else mask[:B]
            step, recorded = advance, False
        needed = c + min(greatest, T - window) + window - 1  # positions, this step's included
        room = cache[0].shape[3]
        if needed > room:
            more = min(-(-needed // block) * block, most) - room
            for i, layer in enumerate(cache):  # one after the other, to hold no second cache
                cache[i] = F.pad(layer, (0, 0, 0, more))
            step, recorded = advance, False
        step()
        if cond.is_cuda and not recorded:  # once it has run, all that it calls is warmed up
            step, recorded = record(advance), True
        before = least
        if window == 1:
            least = greatest = least + 1  # as is known without waiting for a GPU
        else:
            least, greatest = (int(n) for n in final.aminmax())
        if bar:
            bar.update(least - before)
        if trace is not None:
            trace.append((final.clone(), codes.clone()))
    return codes


class PackedLinear(torch.nn.Module):
    """A linear layer whose weights oneDNN has laid out for products with few rows, two to three
    times as fast."""

    def __init__(self, linear):
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def pack(model):
    """Make the linear layers of a GPT faster on a CPU, in place; afterwards it can only draw. Each
    layer's own weights are freed at once, so that nothing is in memory twice. Where these operators
    are missing nothing changes."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear) and child.weight.device.type == "cpu":
                try:
                    setattr(parent, name, PackedLinear(child))
                except (AttributeError, RuntimeError):  # a build without oneDNN
                    return model
    return model


@torch.no_grad()
def to_pixels(vq_model, codes, size=None):
    """Codes (B, T) of square images -> uint8 (B, H, W, 3), resized (bicubic, before rounding) to
    `size` if given."""
    grid = int(codes.shape[1] ** 0.5)
    side, pixels = grid * vq_model.config.downsample, []
    for group in codes.view(-1, grid, grid).split(
        max(1, 2**20 // side**2)
    ):  # a million pixels: 0.5 GB a tensor
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

    Under torchrun the processes share the work; the file is the same whatever their number. A
    second start makes the parts that are missing in PATH.parts. Raises ValueError if these were
    begun with other settings."""
    if cond is None:
        if model.config.caption_dim:
            raise ValueError(
                "the model draws from captions, not classes; sample.py takes them from --prompts FILE"
            )
        cond = [torch.arange(model.config.num_classes)]
    path, folder = Path(path), Path(f"{path}.parts")
    if path.exists() and parts.processes()[0] == 0:
        raise ValueError(f"{path} exists; delete it or choose another name")
    device = next(model.parameters()).device
    used = {name: value for name, value in settings.items() if name not in ("window", "compiled")}
    decides = {
        "gpt": vq.weights_hash(model),
        "vq": vq.weights_hash(vq_model),
        "cond": hashlib.sha256(cond[0].float().numpy().tobytes()).hexdigest(),
        "seed": seed,
        "n": num_samples,
        "size": size,
        "batch_size": batch_size,
        **used,
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
        print(f"{path}: {num_samples:,} images")
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
def parse():
    """The command line: its parser, and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # models
    p.add_argument(
        "--pretrained",
        choices=[*PAPER_CFG, *TEXT_FILES],
        help="released weights, by size and pixels",
    )
    p.add_argument("--vq", help="tokenizer checkpoint")
    p.add_argument("--gpt", help="GPT checkpoint")
    p.add_argument(
        "--image-size",
        type=int,
        help="pixels a side that a released --gpt file is for (default: 256)",
    )
    # what to draw
    p.add_argument(
        "--classes",
        help="ids or names, separated by commas (default: eight of ImageNet, or the first ten)",
    )
    p.add_argument(
        "--prompt", action="append", default=[], help="a caption; may be given several times"
    )
    p.add_argument("--prompts", metavar="FILE", help="captions, one a line")
    p.add_argument(
        "--t5",
        help="folder or Hugging Face name of the encoder of captions (default: the one that the GPT "
        "was trained with, google/flan-t5-xl for released ones)",
    )
    p.add_argument("--per-class", type=int, default=1, help="images of each class or caption")
    p.add_argument(
        "--num-samples",
        type=int,
        help="write so many images, balanced over all classes or the given captions, as NPZ",
    )
    p.add_argument("--out", default="sample.png", help="PNG, or NPZ with --num-samples")
    p.add_argument(
        "--titles",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write classes or captions above images",
    )
    p.add_argument("--resize", type=int, help="pixels a side to resize the images to")
    # how
    p.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i")
    p.add_argument(
        "--cfg-scale",
        type=float,
        help="guidance, 1 is none (default: 4, good to look at; captions: 7.5)",
    )
    p.add_argument(
        "--cfg-interval",
        type=int,
        default=-1,
        help="guide the first code and this many + 1 more; -1: all",
    )
    p.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest code (default: 1)"
    )
    p.add_argument(
        "--top-k",
        type=int,
        help="sample from the k likeliest codes, 0 is all (default: 2000; captions: 1000)",
    )
    p.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest codes that make up p"
    )
    p.add_argument(
        "--paper",
        action="store_true",
        help="the paper's evaluation: top-k 0, and its --cfg-scale for "
        "--pretrained (2 for others); give --resize 256 for 384-pixel models",
    )
    # how fast
    p.add_argument("--batch-size", type=int, default=32, help="images sampled together")
    p.add_argument(
        "--window",
        type=int,
        default=1,
        help="codes of an image computed at once: the same picture in "
        "fewer steps, each of which does more; faster for few images (default: 1)",
    )
    p.add_argument(
        "--compile", action="store_true", help="torch.compile the model: for many images on a GPU"
    )
    p.add_argument(
        "--device",
        type=data.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu (default: cuda where there is one)",
    )
    p.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the GPT (default: bfloat16 on GPU)"
    )
    p.usage = "python sample.py --vq CKPT --gpt CKPT ... (--help lists the flags)"
    return p, p.parse_args()


def main():
    """Flags, device, models, what to draw, then the images."""
    parser, args = parse()
    check_flags(parser, args)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # the current device is where CUDA graphs are recorded
    try:
        size = args.image_size or 256
        if args.pretrained:
            args.vq, args.gpt, size = fetch_pretrained(args.pretrained)
        vq_model = vq.load_vq(args.vq, device)
        model = gpt.load_gpt(args.gpt, device, grid=size // vq_model.config.downsample)
        check_pair(model, vq_model, args.gpt, args.vq, args.image_size)
        titles, given = conditions(args, model, device)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    # Settings that are good to look at differ from those that score best: guidance trades variety
    # for clear pictures.
    captioned = model.config.caption_dim > 0
    cfg_scale, top_k = (7.5, 1000) if captioned else (4.0, 2000)
    if args.paper and not captioned:
        cfg_scale, top_k = PAPER_CFG.get(args.pretrained, 2.0), 0
    settings = dict(
        cfg_scale=cfg_scale if args.cfg_scale is None else args.cfg_scale,
        cfg_interval=args.cfg_interval,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=top_k if args.top_k is None else args.top_k,
    )
    print(
        f"{args.gpt}: {', '.join(f'{name} {value}' for name, value in settings.items())}, seed {args.seed}"
    )

    if (args.dtype or ("bfloat16" if on_gpu else "float32")) == "bfloat16":
        model = model.bfloat16()
    compiled = args.compile and can_compile(device)
    if not on_gpu and not compiled:
        pack(model)
    settings.update(window=args.window, compiled=compiled)

    if args.num_samples:
        try:
            write_npz(
                args.out,
                model,
                vq_model,
                args.num_samples,
                cond=given if captioned else None,
                seed=args.seed,
                batch_size=args.batch_size,
                size=args.resize,
                **settings,
            )
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return
    rows = [row for row in range(len(titles)) for _ in range(args.per_class)]
    began, pixels, steps, codes = time.time(), [], 0, 0
    for first in range(0, len(rows), args.batch_size):
        batch = [x[rows[first : first + args.batch_size]].to(device) for x in given]
        seeds, trace = range(args.seed + first, args.seed + first + len(batch[0])), []
        drawn = generate(model, *batch, seeds=seeds, progress=True, trace=trace, **settings)
        pixels.append(to_pixels(vq_model, drawn, args.resize))
        steps, codes = steps + 1 + len(trace), codes + drawn.shape[1]
    columns = args.per_class if args.per_class > 1 else min(len(rows), 10)
    data.save_grid(
        np.concatenate(pixels),
        args.out,
        columns,
        [titles[row] for row in rows] if args.titles else None,
    )
    print(
        f"{args.out}: {len(rows)} images, {len(rows) / (time.time() - began):.2f} images/s; "
        f"{codes} codes in {steps} steps"
    )


def fetch_pretrained(name):
    """Released weights by size and pixels, as --pretrained takes them: paths of the tokenizer and
    of the GPT, and the pixels a side. They are fetched when they are not here yet."""
    files, where = (
        ("vq_ds16_c2i.pt", f"c2i_{name.replace('-', '_')}.pt"),
        "FoundationVision/LlamaGen",
    )
    if name in TEXT_FILES:
        files, where = ("vq_ds16_t2i.pt", TEXT_FILES[name]), "peizesun/llamagen_t2i"
    return *(data.pretrained(file, where) for file in files), int(name.split("-")[1])


def conditions(args, model, device):
    """What the flags ask for: titles, one for each class or caption, and [labels] or [features,
    mask]. Raises OSError or ValueError with one sentence."""
    prompts = args.prompt + (captions.read_prompts(args.prompts) if args.prompts else [])
    if model.config.caption_dim:
        if args.classes or not prompts:
            raise ValueError(
                f'{args.gpt} draws from captions, not classes: give --prompt "..." or --prompts FILE'
            )
        return prompts, captions.encode_captions(prompts, args.t5, device, model)
    if prompts:
        raise ValueError(
            f"{args.gpt} draws from classes, not captions: give --classes, not --prompt"
        )
    names = captions.class_names(model)
    labels = (
        [207, 360, 387, 974, 88, 979, 417, 279]
        if len(names) == 1000
        else list(range(min(10, len(names))))
    )
    if args.classes:
        labels = [captions.find_class(word, names) for word in args.classes.split(",")]
    return [names[label].split(",")[0] for label in labels], [torch.tensor(labels)]


def can_compile(device):
    """Whether torch.compile works here; it needs a compiler and Python's headers, which slim images
    lack."""
    torch._dynamo.config.recompile_limit = (
        64  # for each length of the cache, guided or not, and the last batch's size
    )
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds
        print(f"warning: --compile is left out ({str(error).splitlines()[0]})", file=sys.stderr)
        return False
    return True


def check_flags(parser, args):
    """Refuse, with one sentence, what can be seen from the flags alone."""
    data.within(
        parser,
        args,
        image_size=(1, 8192),
        per_class=(1, 1e6),
        num_samples=(1, 1e9),
        resize=(1, 8192),
        seed=(0, 2**63 - 1),
        cfg_scale=(0, 1e6),
        cfg_interval=(-1, 1e9),
        temperature=(0, 1e6),
        top_k=(0, 1e9),
        top_p=(1e-9, 1),
        batch_size=(1, 2**20),
        window=(1, 1e6),
    )
    if bool(args.pretrained) == bool(args.vq and args.gpt):
        parser.error("give --vq and --gpt, or --pretrained")
    if args.pretrained and args.image_size:
        parser.error("--image-size does not go with --pretrained, whose names tell the pixels")
    if not args.num_samples and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("torchrun is for --num-samples; a picture takes one process")
    if args.num_samples and args.classes:
        parser.error("--num-samples draws all classes alike; leave out --classes")
    out, ending = Path(args.out), ".npz" if args.num_samples else ".png"
    if out.suffix != ending:
        parser.error(f"--out {out}: give a name that ends in {ending}")
    if out.is_dir() or args.num_samples and out.exists():
        parser.error(f"--out {out} exists; delete it or choose another name")
    try:
        data.make_folder(out.parent)
    except OSError as error:
        parser.error(str(error))


def check_pair(model, vq_model, gpt_path, vq_path, image_size=None):
    """Raise ValueError unless this GPT was trained on this tokenizer's codes, as far as the files
    tell, and draws images of this size."""
    if model.config.vocab_size != vq_model.config.codebook_size:
        raise ValueError(
            f"{gpt_path} predicts {model.config.vocab_size:,} codes, but {vq_path} has "
            f"{vq_model.config.codebook_size:,}; they do not belong together"
        )
    if model.tokenizer and model.tokenizer != vq.weights_hash(vq_model):
        raise ValueError(f"{gpt_path} was trained on codes of another tokenizer than {vq_path}")
    if image_size and image_size != (side := model.config.grid * vq_model.config.downsample):
        raise ValueError(
            f"--image-size {image_size}: with this tokenizer {gpt_path} draws {side} pixels a side"
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
