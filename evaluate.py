"""The numbers that papers report, without TensorFlow: IS, FID, sFID, precision and recall as ADM's
evaluator computes them (arXiv:2105.05233); a tokenizer's rFID, PSNR, SSIM and codebook usage as
LlamaGen's code does (arXiv:2406.06525).

$ python evaluate.py recon --vq runs/vq/ckpt.pt --data DIR --out recon.png      # a tokenizer, on one's own images
$ python evaluate.py stats DIR --size 256 --out ref.npz                         # a reference batch of one's own images
$ python evaluate.py ref.npz SAMPLES        # SAMPLES: an NPZ, a folder of images, or a folder of codes (then add --vq)
$ python evaluate.py VIRTUAL_imagenet256_labeled.npz samples.npz --pr-half --json scores.json    # the paper's Table 6
$ python evaluate.py clip --prompts prompts.txt --samples t2i.npz               # do images show what captions say?
$ torchrun --nproc_per_node=8 evaluate.py ref.npz SAMPLES                       # any of them, on several GPUs

The file in order: the metrics, sets of images, what is compared with what, commands, refusals.
"""

# Shapes:  B, N, M images   H, W pixels   D features   V codebook entries   T codes per image
import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps

import sample
import vq
from nanollamagen import captions, data, inception

RANK, WORLD = (
    int(os.environ.get("RANK", 0)),
    int(os.environ.get("WORLD_SIZE", 1)),
)  # set by torchrun


# ---- the metrics -------------------------------------------------------------------------------
def statistics(features):
    """float32 (N, D) -> mean (D,) float32 and sample covariance (D, D) float64, as ADM's evaluator
    has them."""
    if len(features) < 2:
        raise ValueError("statistics of a single image: a covariance needs at least two")
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): FID on pool, sFID on spatial
    features.

    The product has the eigenvalues of the symmetric r sigma2 r', where r' r = sigma1; so the trace
    of its root needs no matrix root, and singular covariances (fewer images than features) are no
    special case."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not mu1.shape * 2 == mu2.shape * 2 == sigma1.shape == sigma2.shape:
        raise ValueError(
            f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} do not match"
        )
    if not np.isfinite(sum(a.sum() for a in (mu1, sigma1, mu2, sigma2))):
        raise ValueError("the statistics of the features hold NaN or infinity")
    values, vectors = np.linalg.eigh(sigma1)
    r = np.sqrt(values.clip(0))[:, None] * vectors.T
    root = np.sqrt(np.linalg.eigvalsh(r @ sigma2 @ r.T).clip(0)).sum()
    return max(
        float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root), 0.0
    )


def inception_score(probs, split_size=5000):
    """exp(mean KL(p, mean p)) of class probabilities (N, classes), averaged over splits of 5000 in
    file order; a shorter last split counts as much (arXiv:1606.03498). 0 ln 0 is 0."""
    splits = [p.double() for p in torch.as_tensor(probs).split(split_size)]
    return np.mean(
        [(torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp() for p in splits]
    ).item()


def distances(u, v, half=False):
    """Squared distances (N, M) of rows u (N, D) and v (M, D), float32. half: every step rounded to
    float16, as in ADM's script unless that overflows; distances then fall on steps of 0.25 to 1,
    and many points just touch a manifold."""
    if half:
        a, b = u.half(), v.half()
        a_squares, b_squares = ((x * x).float().sum(1).half() for x in (a, b))
        d = a_squares[:, None] - 2 * (a.float() @ b.float().T).half() + b_squares
        if d.isfinite().all():
            return d.float().clamp_(min=0)
    return torch.addmm((u * u).sum(1)[:, None], u, v.T, alpha=-2).add_((v * v).sum(1)).clamp_(min=0)


def radii(x, k=3, half=False, block=10_000):
    """(N, D) -> (N,): the squared distance of each row to its k-th nearest neighbour."""
    result = []
    for rows in x.split(block):
        nearest = [
            distances(rows, others, half).topk(min(k + 1, len(others)), largest=False).values
            for others in x.split(block)
        ]
        result.append(
            torch.cat(nearest, 1).kthvalue(k + 1).values
        )  # k + 1, because each row is nearest to itself
    return torch.cat(result)


def precision_recall(ref, gen, k=3, half=False, block=10_000, device="cpu"):
    """Fraction of gen (M, D) in the manifold of ref (N, D), and of ref in that of gen
    (arXiv:1904.06991). A point is in a manifold when some member is at most that member's radius
    away. The distances exist block by block only."""
    if min(len(ref), len(gen)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images a side, got {len(ref)} and {len(gen)}"
        )
    ref, gen = (torch.as_tensor(x).to(device) for x in (ref, gen))
    ref_radii, gen_radii = (radii(x, k, half, block) for x in (ref, gen))
    ref_in, gen_in = (x.new_zeros(len(x)).bool() for x in (ref, gen))
    for i, j in itertools.product(range(0, len(ref), block), range(0, len(gen), block)):
        rows, columns = slice(i, i + block), slice(j, j + block)
        d = distances(ref[rows], gen[columns], half)
        gen_in[columns] |= (d <= ref_radii[rows, None]).any(0)
        ref_in[rows] |= (d <= gen_radii[columns]).any(1)
    return gen_in.double().mean().item(), ref_in.double().mean().item()


def psnr(x, y):
    """Images (B, 3, H, W) in [0, 1], twice -> (B,) float64 in dB; infinite for identical images."""
    return -10 * (x.double() - y.double()).square().mean((1, 2, 3)).log10()


def ssim(x, y, data_range, gaussian=False):
    """Structural similarity wherever the window fits: (B, 3, H, W) twice -> float64 (B, 3, H - 6, W
    - 6); its mean is the SSIM. The window is a flat 7x7 with sample covariance, as in scikit-image
    and LlamaGen; gaussian: 11x11 with population covariance, the original (Wang et al., 2004)."""
    if min(x.shape[-2:]) < 11:
        raise ValueError(
            f"SSIM needs images of at least 11x11 pixels, got {x.shape[-1]}x{x.shape[-2]}"
        )
    window = (
        torch.exp(-0.5 * (torch.arange(-5, 6) / 1.5).double() ** 2)
        if gaussian
        else torch.ones(7).double()
    )
    window = (window / window.sum()).to(x.device).expand(3, 1, -1)
    x, y, unbias = x.double(), y.double(), 1.0 if gaussian else 49 / 48

    def mean(a):
        return F.conv2d(F.conv2d(a, window[:, :, None], groups=3), window[..., None], groups=3)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = (
        (mean(a) - m) * unbias for a, m in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my))
    )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def code_usage(codes, V, queue=65_536):
    """Codes (N, T) -> usage: fraction of the V entries that occur; usage_queue: in 65,536 codes
    only, like the paper's queue in training (of random images, as a data set is sorted by class);
    perplexity: exp(entropy) of the codes."""
    share = np.bincount(codes.ravel(), minlength=V) / codes.size
    used = share[share > 0]
    images = np.random.default_rng(0).permutation(len(codes))[: -(-queue // codes.shape[1])]
    queued = codes[images].ravel()[:queue]
    return {
        "usage": len(used) / V,
        "usage_queue": len(np.unique(queued)) / V,
        "perplexity": np.exp(-(used * np.log(used)).sum()).item(),
    }


# ---- sets of images ----------------------------------------------------------------------------
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


class ImageSet(NamedTuple):
    """Images, wherever they are; none is in memory before it is read."""

    path: Path
    count: int
    shape: tuple  # (H, W, 3)
    read: callable  # indices -> as many uint8 (H, W, 3), fastest in rising order
    sha256: str  # of the file, or of a folder's file names and sizes
    stored: dict = {}  # the statistics that a reference brings, see STATISTICS
    labels: list = None  # (count,) class ids, if it has any
    of: str = ""  # of which images `stored` is


def open_npz(path):
    """An ADM batch: arr_0 uint8 (N, H, W, 3), perhaps statistics. Images are read one by one from
    within the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file.files:
                raise LookupError(
                    f"it holds {', '.join(file.files) or 'nothing'}, but no images under arr_0"
                )
            extra = {k: file[k] for k in (*STATISTICS, "labels", "of") if k in file.files}
        member = zipfile.ZipFile(path).open("arr_0.npy")
        np.lib.format.read_magic(member)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    except OSError:
        raise
    except Exception as error:  # whatever a truncated or pickled file makes NumPy stumble over
        raise ValueError(f"{path} is damaged, or no NPZ of plain arrays: {error}") from None
    if dtype != np.uint8 or shape[3:] != (3,) or 0 in shape or fortran:
        raise ValueError(
            f"arr_0 of {path} is {dtype} {shape}; it must be uint8 (N, H, W, 3), RGB from 0 to 255"
        )
    stored = {
        k: extra.get(k, np.empty(0)) for k in STATISTICS if "mu" in extra
    }  # ADM's rule: mu stands for all four
    for k, array in stored.items():
        if array.shape != STATISTICS[k]:
            raise ValueError(
                f"statistics in {path} are of another network: {k} is {array.shape}, not {STATISTICS[k]}"
            )
    start, n_bytes = member.tell(), int(np.prod(shape[1:]))

    def read(indices):
        images = []
        try:
            for i in indices:
                member.seek(start + i * n_bytes)
                images.append(np.frombuffer(member.read(n_bytes), np.uint8).reshape(shape[1:]))
        except Exception as error:
            raise ValueError(
                f"{path} is damaged: image {i} of {shape[0]:,} cannot be read ({error})"
            ) from None
        return images

    return ImageSet(
        path,
        shape[0],
        shape[1:],
        read,
        data.file_hash(path),
        stored,
        extra.get("labels"),
        str(extra.get("of", "unknown images")),
    )


def open_set(path, tokenizer=None, size=None, device="cpu"):
    """The ImageSet at a path: an NPZ; a folder of codes, the first crop of each image, decoded by
    `tokenizer`, a checkpoint's path; or all images below a folder by name. Decoded images are
    resized to `size` pixels, files centre-cropped. Raises OSError or ValueError with one
    sentence."""
    path = Path(path)
    if not path.exists():
        raise OSError(
            f"{path} does not exist"
            + (f"; it is at {ADM_URL}" if ADM_URL.endswith(path.name) else "")
        )
    if path.is_file():
        return open_npz(path)
    if (path / "codes.npy").exists():
        codes, labels, meta = data.load_codes(path)  # (N, A, T), (N,)
        model = tokenizer and vq.load_vq(tokenizer, device)
        if not model or vq.weights_hash(model) != meta["tokenizer"]:
            raise ValueError(
                f"{path} holds codes; --vq CKPT must name the tokenizer that made them"
            )

        def decode(indices):
            return sample.to_pixels(
                model, torch.from_numpy(codes[indices, 0].astype(np.int64)).to(device), size
            )

        sha256 = data.file_hash(path / "codes.npy")
        return ImageSet(path, len(codes), decode([0]).shape[1:], decode, sha256, labels=labels)
    files = data.list_images(path)
    if not files:
        raise ValueError(f"{path} holds no images")

    def load(i):
        image = data.open_image(files[i])
        return np.array(data.center_crop(image, size) if size else image)

    names = "\n".join(f"{os.path.relpath(f, path)} {os.path.getsize(f)}" for f in files).encode()
    return ImageSet(
        path,
        len(files),
        load(0).shape,
        partial(in_parallel, load),
        hashlib.sha256(names).hexdigest(),
    )


def in_parallel(function, items):
    """[function(item) for each item], on threads."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def over_all(count, function, what, batch_size):
    """function(indices of a batch) -> tensors, for all images, joined to arrays (count, ...) on
    process 0; None on others. Under torchrun each process takes a contiguous part. Nothing but the
    results grows with count."""
    mine = range(count * RANK // WORLD, count * (RANK + 1) // WORLD)
    results = []
    with data.progress(len(mine), what, RANK) as bar:
        for i in range(0, len(mine), batch_size):
            batch = mine[i : i + batch_size]
            results.append([x.cpu().numpy() for x in function(batch)])
            bar.update(len(batch))
    part = [
        np.concatenate(arrays) for arrays in zip(*results)
    ]  # [] where there are more processes than images
    parts = [part] * WORLD
    if WORLD > 1:
        dist.gather_object(part, parts if RANK == 0 else None)
    if RANK == 0:
        return [np.concatenate(arrays) for arrays in zip(*filter(None, parts))]


def measure(images, net, batch_size):
    """An ImageSet as {"pool": features (N, 2048), "mu", "sigma", "mu_s", "sigma_s": its statistics,
    the stored ones if there are any} on process 0; None on others."""

    def features(indices):
        batch = images.read(indices)
        if wrong := [image.shape for image in batch if image.shape != images.shape]:
            raise ValueError(
                f"{images.path} mixes images of {images.shape} and {wrong[0]}; --size N crops all of them"
            )
        return inception.features(
            net, torch.from_numpy(np.stack(batch)).to(net["fc.weight"].device)
        )

    arrays = over_all(images.count, features, f"features of {images.path.name}", batch_size)
    if RANK == 0:
        pool, spatial = arrays
        return {
            "pool": pool,
            **(images.stored or dict(zip(STATISTICS, statistics(pool) + statistics(spatial)))),
        }


def score(ref, gen, net, half=False):
    """The five numbers, from what measure() gave for each side. IS comes first, for it depends on
    the samples alone: if it matches a paper's and FID does not, the reference is wrong. ADM's
    classifier has no bias."""
    fc = net["fc.weight"]  # (1008, 2048)
    probs = (torch.from_numpy(gen["pool"]).to(fc.device) @ fc.T).softmax(-1).cpu()
    fid = frechet_distance(ref["mu"], ref["sigma"], gen["mu"], gen["sigma"])
    sfid = frechet_distance(ref["mu_s"], ref["sigma_s"], gen["mu_s"], gen["sigma_s"])
    precision, recall = precision_recall(ref["pool"], gen["pool"], half=half, device=fc.device)
    return {
        "IS": inception_score(probs),
        "FID": fid,
        "sFID": sfid,
        "precision": precision,
        "recall": recall,
    }


# ---- what is compared with what ----------------------------------------------------------------
ADM_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
ADM_SHA256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"


def describe(images):
    """An ImageSet in a few words: what its hash, its keys and its count tell."""
    if images.sha256 == ADM_SHA256:
        return "ADM's reference: statistics of ImageNet's training set, 10,000 images for precision and recall"
    stored = f"stored statistics of {images.of}, and " if images.stored else ""
    return f"{stored}{images.count:,} images of {images.shape[1]}x{images.shape[0]} pixels in {images.path}"


def cautions(ref, gen, net):
    """Sentences on why the scores of gen against ref may not be what they seem."""
    adm, labels = ref.sha256 == ADM_SHA256, gen.labels
    rebuilt = "recon" in gen.path.name.lower()
    validation = (
        re.search("(^|[^a-z])val", ref.path.name.lower()) or ref.count == 50_000 and not ref.stored
    )
    in_order = (
        labels is not None
        and gen.count > 5000
        and (np.diff(labels) >= 0).all()
        and labels[0] != labels[-1]
    )
    return [
        sentence
        for wrong, sentence in (
            (
                net["sha256"] != inception.SHA256,
                "unpublished Inception weights: compare only scores of this same file",
            ),
            (
                gen.count < 50_000,
                f"only {gen.count:,} samples: papers use 50,000; fewer give a higher FID and a lower IS",
            ),
            (
                ref.count < 10_000,
                f"only {ref.count:,} reference images: 10,000 are customary for precision and recall",
            ),
            (
                gen.stored,
                f"{gen.path} stores statistics, as references do: are the two files swapped?",
            ),
            (
                not adm and ADM_URL.endswith(ref.path.name),
                f"{ref.path} has the name of ADM's reference but other content",
            ),
            (
                rebuilt and not validation,
                "reconstructions belong against the same validation images: evaluate.py recon",
            ),
            (
                validation and not rebuilt,
                f"papers score samples against training-set statistics ({ADM_URL}), not validation",
            ),
            (
                gen.shape != ref.shape,
                f"{gen.shape[1]}-pixel samples against {ref.shape[1]}: papers resize samples first",
            ),
            (
                in_order,
                "samples are sorted by class: shuffle them, for IS takes 5,000 at a time in file order",
            ),
        )
        if wrong
    ]


def report(path, metrics, warnings, **more):
    """Print the numbers and the warnings; write both as JSON to `path`, if given, with what a
    repetition needs."""
    print("".join(f"{name:>14} {value:10.4f}\n" for name, value in metrics.items()), end="")
    print("".join(f"warning: {w}\n" for w in warnings), end="", file=sys.stderr)
    if path:
        more |= {
            "command": sys.argv,
            "python": sys.version,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        Path(f"{path}.tmp").write_text(
            json.dumps({"metrics": metrics, "warnings": warnings, **more}, indent=1)
        )
        os.replace(f"{path}.tmp", path)


# ---- commands ----------------------------------------------------------------------------------
def compare(args):
    """IS, FID, sFID, precision and recall of samples against a reference."""
    ref, gen = (
        open_set(path, args.vq, args.size, args.device) for path in (args.REF, args.SAMPLES)
    )
    net = inception.load(args.inception, args.device)
    if RANK == 0:
        print(f"comparing {describe(gen)}\n     with {describe(ref)}")
    sides = measure(ref, net, args.batch_size), measure(gen, net, args.batch_size)
    if RANK == 0:
        report(
            args.json,
            score(*sides, net, args.pr_half),
            cautions(ref, gen, net),
            pr_half=args.pr_half,
            inception=net["sha256"],
            reference=[describe(ref), ref.sha256],
            samples=[describe(gen), gen.sha256],
        )


def stats(args):
    """Write a reference batch: the statistics of all images, and up to --keep of them for precision
    and recall."""
    net, images = (
        inception.load(args.inception, args.device),
        open_set(args.IMAGES, args.vq, args.size, args.device),
    )
    measured = measure(images, net, args.batch_size)
    if RANK:
        return
    keep = (
        np.linspace(0, images.count - 1, min(args.keep, images.count)).round().astype(int).tolist()
    )  # evenly spread
    pixels = np.stack(images.read(keep))  # 10,000 of 256 pixels are 2 GB
    with open(f"{args.out}.tmp", "wb") as file:
        np.savez(file, arr_0=pixels, of=describe(images), **{k: measured[k] for k in STATISTICS})
    os.replace(f"{args.out}.tmp", args.out)
    print(
        f"{args.out}: statistics of {describe(images)}; {len(keep):,} of them are kept for precision and recall"
    )


def recon(args):
    """rFID, PSNR, SSIM, codebook usage and perplexity of a tokenizer, and a picture of good and bad
    cases.

    The reference of rFID is the same images, centre-cropped. SSIM takes a range of 2 for images in
    0..1, because LlamaGen's code does so and its published values need it; SSIM_standard is the
    original definition."""
    model, images = vq.load_vq(args.vq, args.device), data.open_images(args.data)
    size = args.image_size or model.image_size
    final = args.eval_size or size
    if size % model.config.downsample:
        raise ValueError(
            f"--image-size {size} is no multiple of {model.config.downsample}, a code's pixels"
        )
    net = inception.load(args.inception, args.device)

    def load(
        i,
    ):  # -> what the model sees (3, size, size) in [-1, 1], what is compared, uint8 (final, final, 3)
        image = images.load(i)
        return vq.to_tensor(data.center_crop(image, size)), torch.from_numpy(
            np.array(data.center_crop(image, final))
        )

    def reconstruct(
        indices,
    ):  # -> originals, results: uint8 (B, H, W, 3); qualities (B, 3); codes (B, T)
        x, truth = (
            torch.stack(tensors).to(args.device) for tensors in zip(*in_parallel(load, indices))
        )
        codes = model.encode(x)
        y = model.decode(codes)
        if final != size:
            x, y = (F.interpolate(z, (final, final), mode="bicubic") for z in (x, y))
        result = torch.from_numpy(vq.to_uint8(y)).to(args.device)
        x, y = (
            (x + 1) / 2,
            result.permute(0, 3, 1, 2) / 255,
        )  # y is rounded as a file would be, x is not
        quality = (
            psnr(x, y),
            ssim(x, y, 2.0).mean((1, 2, 3)),
            ssim(x, y, 1.0, gaussian=True).mean((1, 2, 3)),
        )
        return truth, result, torch.stack(quality, 1), codes.flatten(1)

    def judge(indices):
        truth, result, quality, codes = reconstruct(indices)
        return inception.features(net, truth)[0], inception.features(net, result)[0], quality, codes

    N = len(images)
    arrays = over_all(N, judge, "reconstructing", args.batch_size)
    if RANK:
        return
    real, rebuilt, quality, codes = arrays
    metrics = {
        "rFID": frechet_distance(*statistics(real), *statistics(rebuilt)),
        **dict(zip(("PSNR", "SSIM", "SSIM_standard"), quality.mean(0).tolist())),
        **code_usage(codes, model.config.codebook_size),
    }

    by_psnr = np.argsort(-quality[:, 0])
    shown = by_psnr[
        np.linspace(0, N - 1, min(12, N)).astype(int)
    ].tolist()  # evenly spread, the worst one included
    titles = [f"{quality[i, 0]:.1f} dB, SSIM {quality[i, 1]:.3f}" for i in shown]
    truth, result, _, _ = reconstruct(shown)
    data.save_grid(torch.cat([truth, result], 2).cpu().numpy(), args.out, min(4, N), titles)
    warnings = (
        [f"only {N:,} images: the paper has ImageNet's 50,000 of validation"] if N < 50_000 else []
    )
    report(
        args.json,
        metrics,
        warnings,
        images=N,
        data=args.data,
        image_size=size,
        eval_size=final,
        inception=net["sha256"],
        tokenizer=data.file_hash(args.vq),
    )
    print(
        f"{args.out}: originals, each with its reconstruction on the right, from the best PSNR to the worst"
    )


def clip(args):
    """100 x the mean cosine between captions and their images by CLIP (arXiv:2104.08718).

    A sample's label is the line of its caption; images without labels are in the order of the
    lines. The defaults are the official evaluation's: ViT-B/32, and "A photo depicts " before each
    caption."""
    images, prompts = open_set(args.samples, size=args.size), captions.read_prompts(args.prompts)
    lines = range(images.count) if images.labels is None else images.labels.tolist()
    if max(lines) >= len(prompts):
        raise ValueError(
            f"--prompts {args.prompts} has {len(prompts):,} captions, {args.samples} goes on to the "
            f"{max(lines) + 1:,}th"
        )
    model, tokenizer = captions.load_pretrained("--clip", args.clip, "CLIPModel", "AutoTokenizer")
    model, side = model.to(args.device).eval(), model.config.vision_config.image_size
    longest = model.config.text_config.max_position_embeddings
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(
        3, 1, 1
    )  # of the images that CLIP was trained on
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

    @torch.inference_mode()
    def judge(indices):
        crops = [
            ImageOps.fit(Image.fromarray(x), (side, side), Image.BICUBIC)
            for x in images.read(indices)
        ]
        pixels = (torch.stack([vq.to_tensor(crop) for crop in crops]) + 1) / 2
        words = tokenizer(
            [args.prefix + prompts[lines[i]] for i in indices],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        out = model(**words.to(args.device), pixel_values=((pixels - mean) / std).to(args.device))
        return [100 * F.cosine_similarity(out.image_embeds, out.text_embeds)]

    scores = over_all(images.count, judge, "CLIP", args.batch_size)
    if RANK == 0:
        report(
            args.json,
            {"CLIP score": scores[0].mean().item()},
            [],
            clip=args.clip,
            prefix=args.prefix,
            samples=images.sha256,
            prompts=data.file_hash(args.prompts),
        )


def parse():
    """The parser, and the flags of a command; without a command, it is `compare`."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True)
    for run in (compare, stats, recon, clip):
        c = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0])
        c.set_defaults(run=run)
        if run is compare:
            c.add_argument("REF", help="NPZ, folder of images, or codes folder (with --vq)")
            c.add_argument("SAMPLES", help="NPZ, folder of images, or codes folder (with --vq)")
            c.add_argument(
                "--pr-half",
                action="store_true",
                help="precision and recall in float16, as in published tables",
            )
        if run is stats:
            c.add_argument("IMAGES", help="NPZ, folder of images, or codes folder (with --vq)")
            c.add_argument(
                "--keep",
                type=int,
                default=10_000,
                help="images to store for precision and recall (default: 10000)",
            )
            c.add_argument("--out", default="ref.npz", help="NPZ to write (default: ref.npz)")
        if run is recon:
            c.add_argument(
                "--data", required=True, metavar="DIR", help="folder of class folders, or shapes:N"
            )
            c.add_argument(
                "--image-size",
                type=int,
                help="pixels a side that the model works at (default: as trained)",
            )
            c.add_argument(
                "--eval-size", type=int, help="pixels a side to measure at (default: --image-size)"
            )
            c.add_argument(
                "--out", default="recon.png", help="picture to write (default: recon.png)"
            )
        if run is clip:
            c.add_argument("--prompts", required=True, metavar="FILE", help="captions, one a line")
            c.add_argument(
                "--samples",
                required=True,
                help="NPZ of sample.py --prompts, or a folder sorted as the captions",
            )
            c.add_argument(
                "--clip",
                default="openai/clip-vit-base-patch32",
                help="CLIP's folder or name (default: %(default)s)",
            )
            c.add_argument(
                "--prefix",
                default="A photo depicts ",
                help="put before each caption (default: '%(default)s')",
            )
        if run is not clip:
            c.add_argument(
                "--vq", metavar="CKPT", required=run is recon, help="tokenizer checkpoint"
            )
            c.add_argument(
                "--inception",
                metavar="FILE",
                help="Inception weights (default: the published ones)",
            )
        if run is not recon:
            c.add_argument(
                "--size",
                type=int,
                help="crop images of folders, resize decoded or sampled ones: pixels a side",
            )
        if run is not stats:
            c.add_argument(
                "--json", metavar="FILE", help="write the numbers with all that a repetition needs"
            )
        c.add_argument(
            "--batch-size",
            type=int,
            default=64,
            help="images that go through the network together (default: 64)",
        )
        c.add_argument(
            "--device",
            type=data.device,
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="cuda or cpu (default: cuda where there is one)",
        )
    words = sys.argv[1:]
    args = p.parse_args(
        words if words and words[0] in (*commands.choices, "-h", "--help") else ["compare", *words]
    )
    p.usage = "python evaluate.py [stats|recon|clip] ... (--help lists the flags)"
    return p, args


def main():
    """Flags, devices, then the command."""
    parser, args = parse()
    try:
        check(parser, args)
        if (
            WORLD > 1
        ):  # they speak once, at the end: the fastest waits for the slowest, beyond gloo's half hour
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        args.run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


# ---- what a user can get wrong -----------------------------------------------------------------
def check(parser, args):
    """Refuse, with one sentence and before the work, flags that cannot work; make the folders of
    --out and --json."""
    data.within(
        parser,
        args,
        batch_size=(1, 1e5),
        keep=(4, 1e9),
        size=(1, 8192),
        image_size=(1, 8192),
        eval_size=(11, 8192),
    )
    for name in ("out", "json"):
        path = getattr(args, name, None)
        if path is not None:
            data.make_folder(Path(path).parent, f"--{name}")
            if Path(path).is_dir():
                raise OSError(f"--{name} {path}: give the name of a file, not of a folder")


if __name__ == "__main__":
    main()
