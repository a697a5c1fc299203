"""Train the image tokenizer (vq.py) with the losses of LlamaGen (arXiv:2406.06525, section 2.1).

A small one on pictures that are drawn on the fly, on a laptop's CPU:
$ python train_vq.py --data shapes --model VQ-demo --image-size 32 --batch-size 64 --lpips-weight 0 --max-steps 2000
The paper's tokenizer, one node with 8 GPUs (the defaults are its recipe; --resume goes on after a stop):
$ torchrun --nproc_per_node=8 train_vq.py --data imagenet/train --model VQ-16 --image-size 256 --out runs/vq
On other data, from its weights and with the discriminator from the first step:
$ torchrun --nproc_per_node=8 train_vq.py --data DIR --init runs/vq/ckpt.pt --disc-start 0 --out runs/vq-tuned

Loss = L2 + LPIPS + codebook + commitment, and from --disc-start on also 0.5 x what a patch discriminator says.
"""
# Shapes:  B images   H, W pixels
import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import vq


# ---- losses ---------------------------------------------------------------------------------------------------------
class LPIPS(nn.Module):
    """Perceptual distance of image batches in [-1, 1] (arXiv:1801.03924, version 0.1 with VGG16).

    Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, divided by their length over channels, squared
    difference, weighted over channels, averaged over space, summed over the five. forward(a, b) -> (B,)."""

    TAPS = (3, 8, 15, 22, 29)                                             # the five ReLUs within `features`

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for c in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512):
            layers += [nn.MaxPool2d(2)] if c == "pool" else [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
            c_in = c_in if c == "pool" else c
        self.features = nn.Sequential(*layers)                            # torchvision's names: features.0.weight ...
        self.lin = nn.ParameterList(nn.Parameter(torch.zeros(1, c, 1, 1)) for c in (64, 128, 256, 512, 512))
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def load(self, vgg, lin):
        """Take the weights of torchvision's VGG16 file and of the published LPIPS file."""
        features = {k.removeprefix("features."): v for k, v in vgg.items() if k.startswith("features.")}
        self.features.load_state_dict(features)
        for i, weight in enumerate(self.lin):
            weight.copy_(lin[f"lin{i}.model.1.weight"])
        return self

    def forward(self, a, b):
        x, total, taps = (torch.cat([a, b]) - self.shift) / self.scale, 0, iter(self.lin)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                fa, fb = unit.chunk(2)
                total = total + ((fa - fb).square() * next(taps)).sum(1).mean((1, 2))
        return total


def load_lpips():
    """LPIPS with its two weight files, downloaded once (528 MB and 7 KB). Raises OSError that says what to do."""
    github = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"
    files = {"vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
             "lpips_vgg_lin.pth": (f"{github}/vgg.pth",
                                   "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")}
    try:
        paths = [data.download(url, data.cache_dir() / name, sha256) for name, (url, sha256) in files.items()]
    except OSError as error:
        raise OSError(f"LPIPS needs {' and '.join(files)} in {data.cache_dir()}: {error}. Or train without it: "
                      "--lpips-weight 0") from None
    return LPIPS().load(*(data.read_checkpoint(path) for path in paths))


class PatchGAN(nn.Module):
    """Judges overlapping patches: images (B, 3, H, W) -> scores (B, 1, h, w), large for real (arXiv:1611.07004).
    Batch statistics are each process's own, as in the paper's code."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c_in, c, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)):
            layers += [nn.Conv2d(c_in, c, 4, stride, 1, bias=False), nn.BatchNorm2d(c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, images):
        return self.main(images)


def hinge(real, fake):
    """Discriminator loss: scores of real images are pushed above 1, of reconstructions below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# ---- data -----------------------------------------------------------------------------------------------------------
class TrainCrops(torch.utils.data.Dataset):
    """(epoch, index) -> float32 (3, size, size) in [-1, 1]: ADM's random crop, mirrored half the time. The crop follows
    from (seed, epoch, index), so a resumed run sees exactly what an uninterrupted one would."""

    def __init__(self, images, size, seed):
        self.images, self.size, self.seed, self.warned = images, size, seed, set()

    def __getitem__(self, key):
        rng = random.Random(f"{self.seed}/{key}")
        index = key[1]
        for _ in range(100):
            try:
                image = data.random_crop(self.images.load(index), self.size, rng)
                image = image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
                return vq.to_tensor(image)
            except OSError as error:
                if index not in self.warned:
                    print(f"warning: unreadable, another image is taken: {error}", file=sys.stderr)
                self.warned.add(index)
                index = rng.randrange(len(self.images))
        raise ValueError("100 unreadable images in a row")


def batches(n, seed, start, rank, world, per_rank):
    """This process's share of every global batch, endlessly: lists of (epoch, index)."""
    pairs = vq.shuffled(n, seed, start)
    while True:
        batch = [next(pairs) for _ in range(per_rank * world)]
        yield batch[rank * per_rank:(rank + 1) * per_rank]


def main(tokenizer=vq.VQModel, configs=vq.VQ_CONFIGS):
    """Flags, set-up, loop, for a tokenizer and its named sizes: vq.py's, or those of a class that derives from it."""
    # ---- flags ------------------------------------------------------------------------------------------------------
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="a folder of class folders, or shapes (drawn on the fly)")
    p.add_argument("--out", default="runs/vq", help="run folder: ckpt.pt, log.jsonl, recon_*.png")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--init", metavar="CKPT", help="start from this tokenizer, and its discriminator if it is there")
    p.add_argument("--model", choices=configs, default=next(iter(configs)), help="named size, see VQ_CONFIGS in vq.py")
    p.add_argument("--codebook-size", type=int, help="entries of the codebook, if not the model's own")
    p.add_argument("--code-dim", type=int, help="numbers in an entry of the codebook, if not the model's own")
    p.add_argument("--image-size", type=int, default=256, help="pixels a side")
    p.add_argument("--batch-size", type=int, default=128, help="images per step, summed over processes")
    p.add_argument("--epochs", type=float, default=40, help="passes over the data")
    p.add_argument("--max-steps", type=int, help="steps, instead of --epochs")
    p.add_argument("--lr", type=float, default=1e-4, help="AdamW's learning rate")
    p.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    p.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--ema-decay", type=float, default=0.9999, help="averaged weights for use after training; 0: none")
    p.add_argument("--lpips-weight", type=float, default=1.0, help="0 trains without downloading VGG16")
    p.add_argument("--disc-weight", type=float, default=0.5, help="weight of the discriminator's verdict; 0: none")
    p.add_argument("--disc-start", type=int, default=20_000, help="step at which the discriminator comes in")
    p.add_argument("--entropy-weight", type=float, default=0.0, help="reward for sure choices that use all codes")
    p.add_argument("--log-every", type=int, default=100, help="steps")
    p.add_argument("--sample-every", type=int, default=5000, help="steps between recon_*.png; 0: none")
    p.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, help="processes that decode images (default: 8 on GPU, 0 on CPU)")
    p.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")
    args = p.parse_args()
    p.usage = "python train_vq.py --data shapes|DIR ... (--help lists the flags)"

    # ---- devices, seed, precision -----------------------------------------------------------------------------------
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    bf16 = args.dtype == "bfloat16" if args.dtype else device.type == "cuda"
    workers = args.workers if args.workers is not None else 8 * (device.type == "cuda")
    torch.manual_seed(args.seed)
    out, config = Path(args.out), configs[args.model]
    own = {"codebook_size": args.codebook_size, "code_dim": args.code_dim}
    config = replace(config, **{k: v for k, v in own.items() if v})
    down, side = config.downsample, args.image_size // config.downsample

    def say(text):
        if rank == 0:
            print(text, flush=True)

    # ---- data, model, resume: everything a user can get wrong is found here -----------------------------------------
    try:
        if args.batch_size % world:
            raise ValueError(f"--batch-size {args.batch_size} does not split over {world} processes; "
                             f"try --batch-size {max(args.batch_size // world, 1) * world}")
        if args.image_size % down:
            raise ValueError(f"--image-size {args.image_size} is not a multiple of the downsampling {down}; "
                             f"try --image-size {max(side, 1) * down}")
        if args.image_size < 24 and args.disc_weight:
            raise ValueError(f"--image-size {args.image_size}: the discriminator needs 24 pixels; --disc-weight 0 "
                             "trains without it")
        if not args.resume and (out / "ckpt.pt").exists():
            raise ValueError(f"--out {out} holds a run; add --resume to go on with it, or choose another folder")
        images = data.open_images(args.data)
        lpips = load_lpips() if args.lpips_weight else None
        resumed = data.read_checkpoint(out / "ckpt.pt") if args.resume else None
        if resumed and resumed["config"] != asdict(config):
            raise ValueError(f"--model {args.model} is not what {out}/ckpt.pt holds: {resumed['config']}")
        init = vq.load_vq(args.init, tokenizer=tokenizer) if args.init and not resumed else None
        if init and init.config != config:
            raise ValueError(f"--model {args.model} is not what --init {args.init} holds: {asdict(init.config)}")
    except (OSError, ValueError) as error:
        p.error(str(error))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    model, disc = tokenizer(config).to(device), PatchGAN().to(device)
    if init:
        model.load_state_dict(init.state_dict())
        saved = data.read_checkpoint(args.init)   # own and official files name the discriminator differently
        disc.load_state_dict(saved.get("disc") or saved.get("discriminator") or disc.state_dict())
    lpips = lpips.to(device) if lpips else None
    adamw = dict(lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw, fused=True)
    disc_optimizer = torch.optim.AdamW(disc.parameters(), **adamw, fused=True)
    first, seen = 0, 0
    if resumed:
        model.load_state_dict(resumed["model"])
        disc.load_state_dict(resumed["disc"])
        optimizer.load_state_dict(resumed["optimizer"])
        disc_optimizer.load_state_dict(resumed["disc_optimizer"])
        first, seen = resumed["step"], resumed["images_seen"]
    ema = None
    if args.ema_decay:
        ema = {k: v.clone() for k, v in model.state_dict().items()}
        if resumed and resumed["ema"]:
            ema = {k: v.to(device) for k, v in resumed["ema"].items()}
    forward = torch.compile(model) if args.compile else model
    if world > 1:   # buffers are left alone: the usage queue is each process's own
        forward = DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None,
                                          broadcast_buffers=False)
    per_rank = args.batch_size // world
    loader = torch.utils.data.DataLoader(
        TrainCrops(images, args.image_size, args.seed), num_workers=workers, pin_memory=device.type == "cuda",
        batch_sampler=batches(len(images), args.seed, seen, rank, world, per_rank))
    max_steps = args.max_steps or math.ceil(args.epochs * len(images) / args.batch_size)
    shown = torch.stack([vq.to_tensor(data.center_crop(images.load(i), args.image_size)) for i in
                         random.Random(args.seed).sample(range(len(images)), min(8, len(images)))]).to(device) \
        if rank == 0 and args.sample_every else None

    say(f"torch {torch.__version__}, {world} process(es) on {device.type}, {'bfloat16' if bf16 else 'float32'}")
    say(f"{args.model}: {sum(q.numel() for q in model.parameters()) / 1e6:.1f}M parameters, {args.image_size} pixels "
        f"-> {side} x {side} codes of {config.codebook_size:,}")
    say(f"{args.data}: {len(images):,} images; {max_steps:,} steps of "
        f"{args.batch_size} images = {max_steps * args.batch_size / len(images):.1f} epochs -> {out}")
    if init:
        say(f"starting from {args.init}{' and its discriminator' if saved.keys() & {'disc', 'discriminator'} else ''}")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)

    def save():
        state = {"model": model.state_dict(), "ema": ema, "disc": disc.state_dict(),
                 "optimizer": optimizer.state_dict(), "disc_optimizer": disc_optimizer.state_dict(), "step": step,
                 "images_seen": seen, "config": asdict(config), "image_size": args.image_size, "args": vars(args)}
        data.save_checkpoint(state, out / "ckpt.pt")

    # ---- loop -------------------------------------------------------------------------------------------------------
    model.train()
    step, clock, clock_step = first, time.time(), first
    for batch in loader:
        if step >= max_steps:
            break
        # 1. learning rate of this step
        scale = min(1, (step + 1) / max(args.warmup_steps, 1))
        if args.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
        for group in optimizer.param_groups + disc_optimizer.param_groups:
            group["lr"] = args.lr * scale

        # 2. tokenizer: forward, losses, backward
        x = batch.to(device, non_blocking=True)
        adversarial = args.disc_weight > 0 and step >= args.disc_start
        disc.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            recon, losses = forward(x, args.entropy_weight > 0)
            terms = {"rec": F.mse_loss(recon.float(), x), "vq": losses["vq"], "commit": losses["commit"]}
            if lpips:
                terms["lpips"] = args.lpips_weight * lpips(recon, x).mean()
            if args.entropy_weight:
                terms["entropy"] = args.entropy_weight * losses["entropy"]
            if adversarial:
                terms["adv"] = -args.disc_weight * disc(recon).mean()
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        if not torch.isfinite(norm):
            values = {k: float(v.detach()) for k, v in terms.items()}
            sys.exit(stopped(rank, f"the loss is not finite at step {step}: {values}; {out}/ckpt.pt is the last good "
                             "state. A lower --lr or --dtype float32 may help"))
        optimizer.step()

        # 3. discriminator, on the same images
        if adversarial:
            disc.requires_grad_(True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                terms["disc"] = hinge(disc(x), disc(recon.detach()))
            disc_optimizer.zero_grad(set_to_none=True)
            terms["disc"].backward()
            for q in disc.parameters() if world > 1 else ():
                dist.all_reduce(q.grad)
                q.grad /= world
            nn.utils.clip_grad_norm_(disc.parameters(), args.grad_clip)
            disc_optimizer.step()

        # 4. averaged weights: the decay grows with the step, so that early ones are soon forgotten
        if ema:
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    if value.is_floating_point():
                        ema[name].lerp_(value, 1 - decay)
        step, seen = step + 1, seen + args.batch_size

        # 5. one line, a picture, a checkpoint
        if step % args.log_every == 0 or step in (first + 1, max_steps):
            values = torch.stack([v.detach().float() for v in terms.values()])
            if world > 1:
                dist.all_reduce(values)
            dt, clock_now = (time.time() - clock) / (step - clock_step), time.time()
            record = {"step": step, **dict(zip(terms, (values / world).tolist())), "usage": model.quantize.usage(),
                      "lr": args.lr * scale, "norm": float(norm), "img_per_s": args.batch_size / dt}
            clock, clock_step = clock_now, step
            if rank == 0:
                with open(out / "log.jsonl", "a") as f:
                    f.write(json.dumps(record) + "\n")
            say(f"step {step:06d}/{max_steps} | " + " | ".join(f"{k} {record[k]:.4f}" for k in terms)
                + f" | usage {record['usage']:.1%} | lr {record['lr']:.1e} | {record['img_per_s']:,.0f} img/s | "
                f"{(max_steps - step) * dt / 60:.1f} min left")
        if shown is not None and (step % args.sample_every == 0 or step == max_steps):
            picture(model, ema, shown, out / f"recon_{step:06d}.png")
        if rank == 0 and (step % args.save_every == 0 or step == max_steps):
            try:
                save()
            except OSError as error:
                sys.exit(stopped(rank, str(error)))
    if world > 1:
        dist.destroy_process_group()
    say(f"done: {out}/ckpt.pt")


def stopped(rank, text):
    """Print why a run ends early (once) and return its exit code."""
    if rank == 0:
        print(f"train_vq.py: {text}", file=sys.stderr)
    return 2


@torch.no_grad()
def picture(model, ema, images, path):
    """Write images above their reconstructions, with the averaged weights where there are some."""
    shadow = type(model)(model.config).to(images.device).eval()
    shadow.load_state_dict(ema or model.state_dict())
    both = np.concatenate([vq.to_uint8(images), vq.to_uint8(shadow.decode(shadow.encode(images)))])
    data.save_grid(both, path, columns=len(images))
    print(f"{path}: originals above, reconstructions below", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
