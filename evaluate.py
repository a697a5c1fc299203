"""The numbers that papers report, without TensorFlow.

IS, FID, sFID, precision and recall are those of ADM's evaluator (arXiv:2105.05233). A tokenizer's
rFID, PSNR, SSIM and codebook usage are those of LlamaGen's code (arXiv:2406.06525).

A tokenizer, on your own images:
$ python evaluate.py recon --vq runs/vq/ckpt.pt --data DIR --out recon.png
A reference batch of your own images, then samples against it. SAMPLES is an NPZ or a folder of
images:
$ python evaluate.py stats DIR --size 256 --out ref.npz
$ python evaluate.py ref.npz SAMPLES
The paper's Table 6, on several GPUs:
$ torchrun --nproc_per_node=8 evaluate.py VIRTUAL_imagenet256_labeled.npz samples.npz --pr-half
Do images show what their captions say?
$ python evaluate.py clip --prompts prompts.txt --samples t2i.npz --json scores.json
"""

# Shapes:  B, N, M images   H, W pixels   D features   V codebook entries   T codes per image
import argparse
import itertools
import json
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import vq
from nanollamagen import captions, clip, data, files, flags, image_sets, inception

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))


# ---- the metrics -------------------------------------------------------------------------------
def statistics(features):
    """float32 (N, D) -> mean (D,) float32 and sample covariance (D, D) float64, as in ADM's
    evaluator."""
    if len(features) < 2:
        raise ValueError("statistics of a single image: a covariance needs at least two")
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): FID on pool features, sFID on
    spatial ones."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    D = mu1.size
    if not (mu1.shape == mu2.shape == (D,) and sigma1.shape == sigma2.shape == (D, D)):
        shapes = f"{mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}"
        raise ValueError(f"means and covariances do not match: {shapes}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics of the features hold NaN or infinity")

    # sigma1 sigma2 has the eigenvalues of the symmetric r sigma2 r', where r' r = sigma1. So its
    # root's trace needs no matrix root, and covariances may be singular (fewer images than D).
    values, vectors = np.linalg.eigh(sigma1)
    r = np.sqrt(values.clip(0))[:, None] * vectors.T
    root_trace = np.sqrt(np.linalg.eigvalsh(r @ sigma2 @ r.T).clip(0)).sum()
    squares = ((mu1 - mu2) ** 2).sum()
    distance = squares + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace
    return max(float(distance), 0.0)


def inception_score(probs, split_size=5000):
    """exp(mean KL(p, mean p)) of class probabilities (N, classes), averaged over splits of 5000 in
    file order. A shorter last split counts as much (arXiv:1606.03498). 0 ln 0 is 0."""
    scores = []
    for p in torch.as_tensor(probs).split(split_size):
        p = p.double()
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    return np.mean(scores).item()


def distances(u, v, half=False):
    """Squared distances (N, M) between rows of u (N, D) and v (M, D), float32.

    half rounds every step to float16, as ADM's script does unless that overflows. Distances then
    fall on steps of 0.25 to 1, and many points just touch a manifold."""
    if half:
        a, b = u.half(), v.half()
        a_squares = (a * a).float().sum(1).half()
        b_squares = (b * b).float().sum(1).half()
        d = a_squares[:, None] - 2 * (a.float() @ b.float().T).half() + b_squares
        if d.isfinite().all():
            return d.float().clamp_(min=0)
    u_squares, v_squares = (u * u).sum(1), (v * v).sum(1)
    return torch.addmm(u_squares[:, None], u, v.T, alpha=-2).add_(v_squares).clamp_(min=0)


def radii(x, k=3, half=False, block=10_000):
    """(N, D) -> (N,): the squared distance of each row to its k-th nearest neighbour."""
    k += 1  # each row is nearest to itself
    result = []
    for rows in x.split(block):
        nearest = []
        for others in x.split(block):
            d = distances(rows, others, half)
            nearest.append(d.topk(min(k, len(others)), largest=False).values)
        result.append(torch.cat(nearest, 1).kthvalue(k).values)
    return torch.cat(result)


def precision_recall(ref, gen, k=3, half=False, block=10_000, device="cpu"):
    """Fraction of gen (M, D) in the manifold of ref (N, D), and of ref in that of gen
    (arXiv:1904.06991). A point is in a manifold if some member is at most that member's radius
    away. Only one block of the distances is in memory at a time."""
    N, M = len(ref), len(gen)
    if min(N, M) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images per side, got {N} and {M}"
        )
    ref, gen = torch.as_tensor(ref).to(device), torch.as_tensor(gen).to(device)
    ref_radii, gen_radii = radii(ref, k, half, block), radii(gen, k, half, block)
    ref_in = torch.zeros(N, dtype=torch.bool, device=device)
    gen_in = torch.zeros(M, dtype=torch.bool, device=device)
    for i, j in itertools.product(range(0, N, block), range(0, M, block)):
        rows, columns = slice(i, i + block), slice(j, j + block)
        d = distances(ref[rows], gen[columns], half)  # up to (block, block)
        gen_in[columns] |= (d <= ref_radii[rows, None]).any(0)
        ref_in[rows] |= (d <= gen_radii[columns]).any(1)
    return gen_in.double().mean().item(), ref_in.double().mean().item()


def psnr(x, y):
    """Images (B, 3, H, W) in [0, 1], twice -> (B,) float64 in dB; infinite for identical images."""
    return -10 * (x.double() - y.double()).square().mean((1, 2, 3)).log10()


def ssim(x, y, data_range, gaussian=False):
    """Structural similarity wherever the window fits: (B, 3, H, W) twice -> float64 (B, 3, H - 6,
    W - 6). Its mean is the SSIM.

    The window is a flat 7x7 with sample covariance, as in scikit-image and LlamaGen. gaussian takes
    an 11x11 one with population covariance, the original (Wang et al., 2004)."""
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, got {tuple(x.shape[-2:])}")
    x, y = x.double(), y.double()
    if gaussian:
        window, unbias = torch.exp(-0.5 * (torch.arange(-5, 6) / 1.5).double() ** 2), 1.0
    else:
        window, unbias = torch.ones(7).double(), 49 / 48
    window = (window / window.sum()).to(x.device).expand(3, 1, -1)  # (3, 1, 7 or 11)

    def mean(a):
        columns = F.conv2d(a, window[:, :, None], groups=3)
        return F.conv2d(columns, window[..., None], groups=3)

    mx, my = mean(x), mean(y)
    vx = (mean(x * x) - mx * mx) * unbias
    vy = (mean(y * y) - my * my) * unbias
    vxy = (mean(x * y) - mx * my) * unbias
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def code_usage(codes, V, queue=65_536):
    """Codes (N, T) -> how much of the codebook they use.

    usage        fraction of the V entries that occur
    usage_queue  the same in 65,536 codes only, like the paper's queue in training; these are of
                 random images, because a data set is sorted by class
    perplexity   exp(entropy) of the codes"""
    share = np.bincount(codes.ravel(), minlength=V) / codes.size
    used = share[share > 0]
    n_images = math.ceil(queue / codes.shape[1])
    images = np.random.default_rng(0).permutation(len(codes))[:n_images]
    queued = codes[images].ravel()[:queue]
    return {
        "usage": len(used) / V,
        "usage_queue": len(np.unique(queued)) / V,
        "perplexity": np.exp(-(used * np.log(used)).sum()).item(),
    }


# ---- features of a set of images ---------------------------------------------------------------
def measure(images, net, batch_size):
    """An ImageSet as {"pool": features (N, 2048), "mu", "sigma", "mu_s", "sigma_s": its statistics,
    the stored ones if there are any} on process 0; None on others."""

    def features(indices):
        batch = images.read(indices)
        for image in batch:
            if image.shape != images.shape:
                raise ValueError(
                    f"{images.path} mixes images of {images.shape} and {image.shape}; "
                    "--size N crops all of them"
                )
        pixels = torch.from_numpy(np.stack(batch)).to(net["fc.weight"].device)
        return inception.features(net, pixels)

    arrays = image_sets.over_all(
        images.count, features, f"features of {images.path.name}", batch_size
    )
    if RANK > 0:
        return None
    pool, spatial = arrays
    if images.stored:
        return {"pool": pool, **images.stored}
    (mu, sigma), (mu_s, sigma_s) = statistics(pool), statistics(spatial)
    return {"pool": pool, "mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}


def score(ref, gen, net, half=False):
    """The five numbers, from what measure() gave for each side. IS comes first because it depends
    on the samples alone: if it matches a paper's and FID does not, the reference is wrong."""
    fc = net["fc.weight"]  # (1008, 2048); ADM's classifier has no bias
    probs = (torch.from_numpy(gen["pool"]).to(fc.device) @ fc.T).softmax(-1).cpu()
    precision, recall = precision_recall(ref["pool"], gen["pool"], half=half, device=fc.device)
    return {
        "IS": inception_score(probs),
        "FID": frechet_distance(ref["mu"], ref["sigma"], gen["mu"], gen["sigma"]),
        "sFID": frechet_distance(ref["mu_s"], ref["sigma_s"], gen["mu_s"], gen["sigma_s"]),
        "precision": precision,
        "recall": recall,
    }


def cautions(ref, gen, net):
    """Why the scores of gen against ref may not be what they seem: a list of sentences."""
    changes = np.diff(gen.labels) if gen.labels is not None and gen.count > 5000 else np.zeros(1)
    # fmt: off
    rules = (
        (net["sha256"] != inception.SHA256,
         "unpublished Inception weights: compare only scores of this same file"),
        (gen.count < 50_000,
         f"only {gen.count:,} samples: papers use 50,000; fewer give a higher FID and a lower IS"),
        (ref.count < 10_000,
         f"only {ref.count:,} reference images: 10,000 are usual for precision and recall"),
        (gen.stored,
         f"{gen.path} stores statistics, as references do: are the two files swapped?"),
        (ref.count == 50_000 and not ref.stored,
         "50,000 reference images without statistics, as many as ImageNet's validation set has: "
         f"papers score samples against training-set statistics ({image_sets.ADM_URL})"),
        (gen.shape != ref.shape,
         f"{gen.shape[1]}-pixel samples against {ref.shape[1]}: papers resize samples first"),
        ((changes >= 0).all() and changes.any(),
         "samples are sorted by class: shuffle them, "
         "because IS takes 5,000 at a time in file order"),
    )
    # fmt: on
    return [sentence for applies, sentence in rules if applies]


def report(path, metrics, warnings):
    """Print the numbers and the warnings. If `path` is given, write both as JSON, with the command
    and the versions."""
    for name, value in metrics.items():
        print(f"{name:>14} {value:10.4f}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if path:
        content = {"metrics": metrics, "warnings": warnings, "command": sys.argv}
        content |= {"python": sys.version, "torch": torch.__version__, "numpy": np.__version__}
        Path(f"{path}.tmp").write_text(json.dumps(content, indent=1))
        os.replace(f"{path}.tmp", path)


# ---- commands ----------------------------------------------------------------------------------
def compare(args):
    """IS, FID, sFID, precision and recall of samples against a reference."""
    ref = image_sets.open_set(args.REF, args.size)
    gen = image_sets.open_set(args.SAMPLES, args.size)
    net = inception.load(args.inception, args.device)
    if RANK == 0:
        print(f"comparing {image_sets.describe(gen)}\n     with {image_sets.describe(ref)}")
    ref_side = measure(ref, net, args.batch_size)
    gen_side = measure(gen, net, args.batch_size)
    if RANK == 0:
        metrics = score(ref_side, gen_side, net, args.pr_half)
        report(args.json, metrics, cautions(ref, gen, net))


def stats(args):
    """Write a reference batch: the statistics of all images, and up to --keep of them for precision
    and recall."""
    net = inception.load(args.inception, args.device)
    images = image_sets.open_set(args.IMAGES, args.size)
    measured = measure(images, net, args.batch_size)
    if RANK > 0:
        return
    spread = np.linspace(0, images.count - 1, min(args.keep, images.count))
    keep = spread.round().astype(int).tolist()
    pixels = np.stack(images.read(keep))  # 10,000 of 256 pixels are 2 GB
    del measured["pool"]
    of = image_sets.describe(images)
    with open(f"{args.out}.tmp", "wb") as file:
        np.savez(file, arr_0=pixels, of=of, **measured)
    os.replace(f"{args.out}.tmp", args.out)
    print(
        f"{args.out}: statistics of {of}; {len(keep):,} of them are kept for precision and recall"
    )


QUALITIES = ("PSNR", "SSIM", "SSIM_standard")


def quality_of(x, y):
    """Originals and results (B, 3, H, W) in [0, 1] -> the three QUALITIES of each, (B, 3).

    SSIM takes a range of 2 here, because LlamaGen's code does and its published values need it.
    SSIM_standard is the original definition."""
    llamagen = ssim(x, y, 2.0).mean((1, 2, 3))
    standard = ssim(x, y, 1.0, gaussian=True).mean((1, 2, 3))
    return torch.stack([psnr(x, y), llamagen, standard], 1)


def recon(args):
    """rFID, PSNR, SSIM, codebook usage and perplexity of a tokenizer, and a picture of good and bad
    cases. The reference of rFID is the same images, centre-cropped."""
    model, images = vq.load_vq(args.vq, args.device), data.open_images(args.data, unlabelled=True)
    size = args.image_size or model.image_size
    final = args.eval_size or size
    if size % model.config.downsample:
        raise ValueError(f"--image-size {size} is no multiple of {model.config.downsample}")
    net = inception.load(args.inception, args.device)

    def load(i):
        """What the model sees, (3, size, size), and what is compared, uint8 (final, final, 3)."""
        image = images.load(i)
        truth = torch.from_numpy(np.array(data.center_crop(image, final)))
        return vq.to_tensor(data.center_crop(image, size)), truth

    def reconstruct(indices):
        """Originals and results, uint8 (B, H, W, 3); qualities (B, 3); codes (B, T)."""
        x, truth = zip(*image_sets.in_parallel(load, indices))
        x, truth = torch.stack(x).to(args.device), torch.stack(truth).to(args.device)
        codes = model.encode(x)  # (B, h, w)
        y = model.decode(codes)
        if final != size:
            x = F.interpolate(x, (final, final), mode="bicubic")
            y = F.interpolate(y, (final, final), mode="bicubic")
        result = torch.from_numpy(vq.to_uint8(y)).to(args.device)
        y = result.permute(0, 3, 1, 2) / 255  # rounded as a file would be; x is not
        return truth, result, quality_of((x + 1) / 2, y), codes.flatten(1)

    def judge(indices):
        truth, result, quality, codes = reconstruct(indices)
        real, rebuilt = inception.features(net, truth)[0], inception.features(net, result)[0]
        return real, rebuilt, quality, codes

    N = len(images)
    arrays = image_sets.over_all(N, judge, "reconstructing", args.batch_size)
    if RANK > 0:
        return
    real, rebuilt, quality, codes = arrays
    metrics = {"rFID": frechet_distance(*statistics(real), *statistics(rebuilt))}
    metrics |= dict(zip(QUALITIES, quality.mean(0).tolist()))
    metrics |= code_usage(codes, model.config.codebook_size)

    best_first = np.argsort(-quality[:, 0])
    shown = best_first[np.linspace(0, N - 1, min(12, N)).astype(int)].tolist()
    titles = [f"{quality[i, 0]:.1f} dB, SSIM {quality[i, 1]:.3f}" for i in shown]
    truth, result, _, _ = reconstruct(shown)
    pairs = torch.cat([truth, result], 2).cpu().numpy()  # side by side
    data.save_grid(pairs, args.out, min(4, N), titles)
    warnings = []
    if N < 50_000:
        warnings.append(f"only {N:,} images: the paper has ImageNet's 50,000 of validation")
    report(args.json, metrics, warnings)
    print(f"{args.out}: originals and their reconstructions, from the best PSNR to the worst")


def clip_score(args):
    """100 x the mean cosine between captions and their images by CLIP.

    A sample's label is the line of its caption. Images without labels are in the order of the
    lines. The defaults are the official evaluation's: ViT-B/32, and "A photo depicts " before each
    caption."""
    images = image_sets.open_set(args.samples, args.size)
    prompts = captions.read_prompts(args.prompts)
    lines = range(images.count) if images.labels is None else images.labels.tolist()
    if max(lines) >= len(prompts):
        raise ValueError(
            f"--prompts {args.prompts} has {len(prompts):,} captions, "
            f"but {args.samples} needs {max(lines) + 1:,}"
        )
    net = clip.load(args.clip, args.device)

    def judge(indices):
        texts = [args.prefix + prompts[lines[i]] for i in indices]
        return [clip.scores(net, images.read(indices), texts)]

    arrays = image_sets.over_all(images.count, judge, "CLIP", args.batch_size)
    if RANK == 0:
        report(args.json, {"CLIP score": arrays[0].mean().item()}, [])


# ---- flags -------------------------------------------------------------------------------------
def parse():
    """The parser, and the flags of a command. Without a command it is `compare`."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True)
    images = "NPZ, or folder of images"
    # fmt: off
    c = commands.add_parser("compare", help="IS, FID, sFID, precision and recall")
    c.set_defaults(run=compare)
    flag = c.add_argument
    flag("REF", help=images)
    flag("SAMPLES", help=images)
    flag("--pr-half", action="store_true", help="float16 distances, as published tables")

    c = commands.add_parser("stats", help="write a reference batch of your own images")
    c.set_defaults(run=stats)
    flag = c.add_argument
    flag("IMAGES", help=images)
    flag("--keep", type=flags.bounded(int, 4, 10**9), default=10_000,
         help="images to store for precision and recall (default: 10000)")
    flag("--out", default="ref.npz", help="NPZ to write (default: ref.npz)")

    c = commands.add_parser("recon", help="rFID, PSNR, SSIM and codebook usage of a tokenizer")
    c.set_defaults(run=recon)
    flag = c.add_argument
    flag("--vq", metavar="CKPT", required=True, help="tokenizer checkpoint")
    flag("--data", required=True, help="class folders, .jsonl, .tar, or shapes:N")
    flag("--image-size", type=flags.pixels,
         help="pixels per side that the model works at (default: as it was trained)")
    flag("--eval-size", type=flags.bounded(int, 11, 8192),
         help="pixels per side to measure at (default: --image-size)")
    flag("--out", default="recon.png", help="picture to write (default: recon.png)")

    c = commands.add_parser("clip", help="CLIP score of images and their captions")
    c.set_defaults(run=clip_score)
    flag = c.add_argument
    flag("--prompts", metavar="FILE", required=True, help="captions, one per line")
    flag("--samples", required=True,
         help="NPZ of sample.py --prompts, or a folder sorted as the captions")
    flag("--clip", default="openai/clip-vit-base-patch32",
         help="CLIP's folder or name (default: %(default)s)")
    flag("--prefix", default="A photo depicts ",
         help="text before each caption (default: '%(default)s')")
    # fmt: on

    for name, c in commands.choices.items():
        flag = c.add_argument
        if name != "recon":
            flag("--size", type=flags.pixels, help="pixels per side: files are cropped to it")
        if name != "clip":
            flag("--inception", metavar="FILE", help="Inception weights (default: published ones)")
        if name != "stats":
            flag("--json", metavar="FILE", help="file for the numbers, command and versions")
        flag("--batch-size", type=flags.batch, default=64, help="images per batch (default: 64)")
        flags.add_device(c, float64=True)
    words = sys.argv[1:]
    if not words or words[0] not in (*commands.choices, "-h", "--help"):
        words = ["compare", *words]
    args = p.parse_args(words)
    p.usage = "python evaluate.py [stats|recon|clip] ... (--help lists the flags)"
    return p, args


def main():
    """Flags, processes, then the command."""
    parser, args = parse()
    try:
        check_written(args)
        if WORLD > 1:
            # Processes meet once, at the end. The fastest waits for the slowest, and that may take
            # longer than gloo's half hour.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        args.run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def check_written(args):
    """Make the folders of --out and --json. Raises OSError if a file cannot be written there."""
    for name in ("out", "json"):
        path = getattr(args, name, None)
        if path is not None:
            files.make_folder(Path(path).parent, f"--{name}")
            if Path(path).is_dir():
                raise OSError(f"--{name} {path}: give the name of a file, not of a folder")


if __name__ == "__main__":
    main()
