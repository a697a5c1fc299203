"""Train the image tokenizer (vq.py) with the losses of LlamaGen (arXiv:2406.06525, section 2.2).

A small one on pictures that are drawn on the fly, on a laptop's CPU:
$ python train_vq.py --data shapes --model VQ-demo --image-size 32 --batch-size 64 --lpips-weight 0 --max-steps 2000
The paper's tokenizer, one node with 8 GPUs (the defaults are its recipe; --resume goes on after a
stop):
$ torchrun --nproc_per_node=8 train_vq.py --data imagenet/train --model VQ-16 --image-size 256 --out runs/vq
On other data, from its weights and with the discriminator from the first step:
$ torchrun --nproc_per_node=8 train_vq.py --data DIR --init runs/vq/ckpt.pt --disc-start 0 --out runs/vq-tuned

Loss = L2 + LPIPS + codebook + commitment, and from --disc-start on also 0.5 x what a patch
discriminator says.
"""

# Shapes:  B images in a micro-batch   H, W pixels   C channels   h, w patches that the discriminator judges
import argparse
import math
import os
import random
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vq
from nanollamagen import data, lpips, runs


# ---- flags -------------------------------------------------------------------------------------
def parse(configs):
    """The command line: its parser, and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--data", required=True, help="a folder of class folders, or shapes (drawn on the fly)"
    )
    p.add_argument("--image-size", type=int, default=256, help="pixels a side")
    p.add_argument(
        "--init",
        metavar="CKPT",
        help="start from this tokenizer, and its discriminator if it is there",
    )
    p.add_argument("--out", default="runs/vq", help="run folder: ckpt.pt, log.jsonl, recon_*.png")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    # the model and its recipe
    p.add_argument(
        "--model",
        choices=configs,
        default=next(iter(configs)),
        help="named size, see VQ_CONFIGS in vq.py",
    )
    p.add_argument(
        "--codebook-size", type=int, help="entries of the codebook, if not the model's own"
    )
    p.add_argument(
        "--code-dim", type=int, help="numbers in an entry of the codebook, if not the model's own"
    )
    p.add_argument(
        "--batch-size", type=int, default=128, help="images per step, summed over processes"
    )
    p.add_argument(
        "--micro-batch",
        type=int,
        help="images that one process takes at once, if its share is too many",
    )
    p.add_argument("--epochs", type=float, default=40, help="passes over the data")
    p.add_argument("--max-steps", type=int, help="steps, instead of --epochs")
    p.add_argument("--lr", type=float, default=1e-4, help="AdamW's learning rate")
    p.add_argument(
        "--schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0"
    )
    p.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument(
        "--ema-decay",
        type=float,
        default=0.0,
        help="averaged weights, 0.9999 say; 0: none (the paper)",
    )
    p.add_argument(
        "--lpips-weight", type=float, default=1.0, help="0 trains without downloading VGG16"
    )
    p.add_argument(
        "--disc-weight",
        type=float,
        default=0.5,
        help="weight of the discriminator in both losses; 0: none",
    )
    p.add_argument(
        "--disc-start", type=int, default=20_000, help="step at which the discriminator comes in"
    )
    p.add_argument(
        "--entropy-weight",
        type=float,
        default=0.0,
        help="reward for sure choices that use all codes",
    )
    # what a run shows and keeps
    p.add_argument(
        "--sample-every", type=int, default=5000, help="steps between recon_*.png; 0: none"
    )
    p.add_argument("--log-every", type=int, default=100, help="steps")
    p.add_argument(
        "--tensorboard", action="store_true", help="write what log.jsonl gets for TensorBoard too"
    )
    p.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints")
    p.add_argument(
        "--keep",
        type=int,
        default=0,
        help="older checkpoints to keep beside the newest, as ckpt_STEP",
    )
    # the machine
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--workers", type=int, help="processes that decode images (default: 8 on GPU, 0 on CPU)"
    )
    p.add_argument(
        "--device",
        type=data.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu (default: cuda where there is one)",
    )
    p.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)"
    )
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the model",
    )
    p.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="compute each block again in the backward pass: less memory, a third more work",
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=10,
        help="minutes a process waits for the others before it ends",
    )
    args = p.parse_args()
    p.usage = "python train_vq.py --data shapes|DIR ... (--help lists the flags)"
    return p, args


# ---- losses ------------------------------------------------------------------------------------
class PatchGAN(nn.Module):
    """Judges overlapping patches: images (B, 3, H, W) -> scores (B, 1, h, w), large for real
    (arXiv:1611.07004). Batch statistics are each process's own, as in the paper's code, and with
    --micro-batch those of a micro-batch."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c_in, c, stride in (
            (width, 2 * width, 2),
            (2 * width, 4 * width, 2),
            (4 * width, 8 * width, 1),
        ):
            layers += [
                nn.Conv2d(c_in, c, 4, stride, 1, bias=False),
                nn.BatchNorm2d(c),
                nn.LeakyReLU(0.2),
            ]
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


def tokenizer_losses(args, x, recon, codebook, perceptual, disc):
    """What the tokenizer learns from, each with its weight: a dict of scalars whose sum is the
    loss. x and recon (B, 3, H, W), codebook the losses of the model's forward(); perceptual and disc may
    be None."""
    losses = {
        "rec": F.mse_loss(recon.float(), x),
        "vq": codebook["vq"],
        "commit": codebook["commit"],
    }
    if perceptual:
        losses["lpips"] = args.lpips_weight * perceptual(recon, x).mean()
    if args.entropy_weight:
        losses["entropy"] = args.entropy_weight * codebook["entropy"]
    if disc:  # reconstructions that it takes for real ones score high
        losses["adv"] = -args.disc_weight * disc(recon).mean()
    return losses


def add(terms, losses, parts):
    """Add the losses of one of so many equal parts of a batch to their means over the batch, for
    the log."""
    for name, loss in losses.items():
        terms[name] = terms.get(name, 0) + loss.detach().float() / parts


# ---- data --------------------------------------------------------------------------------------
class TrainCrops(torch.utils.data.Dataset):
    """(epoch, index) -> float32 (3, size, size) in [-1, 1]: ADM's random crop, mirrored half the
    time. The crop follows from (seed, epoch, index), so a resumed run sees exactly what an
    uninterrupted one would."""

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


def own_group(_):
    """For the loader's workers: torchrun signals a process and its group, and without them there is
    no last step."""
    os.setpgid(0, 0)


def batches(n, seed, start, rank, world, per_rank):
    """This process's share of every global batch, endlessly: lists of (epoch, index)."""
    pairs = vq.shuffled(n, seed, start)
    while True:
        batch = [next(pairs) for _ in range(per_rank * world)]
        yield batch[rank * per_rank : (rank + 1) * per_rank]


def pictures_to_watch(images, args):
    """Up to eight centre crops (n, 3, H, W), the same for a seed, less those that cannot be read.
    Raises ValueError if none can."""
    crops, problem = [], None
    for i in random.Random(args.seed).sample(range(len(images)), min(8, len(images))):
        try:
            crops.append(vq.to_tensor(data.center_crop(images.load(i), args.image_size)))
        except OSError as error:  # training will say so when it comes to this image
            problem = error
    if not crops:
        raise ValueError(f"--data {args.data}: none of the images tried can be read ({problem})")
    return torch.stack(crops)


# ---- training ----------------------------------------------------------------------------------
def main(tokenizer=vq.VQModel, configs=vq.VQ_CONFIGS):
    """Flags, devices, data, model, optimizers, loop; for a tokenizer and its named sizes: vq.py's,
    or those of a class that derives from it."""
    parser, args = parse(configs)

    # ---- devices, precision ---------------------------------------------------------------------
    # torchrun starts this script once for each GPU, and tells each process its number in these
    # variables
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_flags(parser, args, world)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bf16 = args.dtype == "bfloat16" if args.dtype else device.type == "cuda"
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=bf16
    )  # weights stay float32
    torch.manual_seed(args.seed)
    out, signals = Path(args.out), runs.catch_signals()

    def print0(text):
        if rank == 0:
            print(text, flush=True)

    # ---- data -----------------------------------------------------------------------------------
    # Images stay on disk, or are drawn when they are wanted. What does not go together is refused
    # at once, by check_files().
    try:
        given = {"codebook_size": args.codebook_size, "code_dim": args.code_dim}
        config = replace(
            configs[args.model],
            **{name: value for name, value in given.items() if value is not None},
        )
        images = data.open_images(args.data)
        resumed = data.read_checkpoint(out / "ckpt.pt") if args.resume else None
        init = vq.load_vq(args.init, tokenizer=tokenizer) if args.init and not resumed else None
        check_files(args, config, resumed, init)
        shown = pictures_to_watch(images, args)
        perceptual = lpips.load().to(device) if args.lpips_weight else None
        first, seen = (resumed["step"], resumed["images_seen"]) if resumed else (0, 0)
        board = runs.open_log(out, first, args.tensorboard) if rank == 0 else None
    except (OSError, ValueError) as error:
        parser.error(str(error))

    per_rank = args.batch_size // world  # images of a step that this process takes,
    micro = args.micro_batch or per_rank  # so many at a time
    max_steps = args.max_steps or math.ceil(args.epochs * len(images) / args.batch_size)
    workers = args.workers if args.workers is not None else 8 * (device.type == "cuda")
    loader = torch.utils.data.DataLoader(
        TrainCrops(images, args.image_size, args.seed),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=own_group,
        batch_sampler=batches(len(images), args.seed, seen, rank, world, per_rank),
    )

    # ---- model ----------------------------------------------------------------------------------
    if world > 1:  # the timeout: a process that waits for a dead one ends too
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=args.timeout)
        )
    model, disc = tokenizer(config).to(device), PatchGAN().to(device)
    if init:
        model.load_state_dict(init.state_dict())
        saved = data.read_checkpoint(
            args.init
        )  # own and official files name the discriminator differently,
        judge = saved.get("disc") or saved.get(
            "discriminator"
        )  # and released tokenizers came without theirs
        disc.load_state_dict(judge or disc.state_dict())
        init = saved = None  # lets go of their memory
    for block in model.modules():
        if args.checkpoint_activations and isinstance(block, (vq.ResBlock, vq.AttnBlock)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    forward = torch.compile(model) if args.compile else model
    if (
        world > 1
    ):  # averages the gradients over the processes; the usage queue is each process's own
        forward = DistributedDataParallel(
            forward, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )

    # ---- optimizers -----------------------------------------------------------------------------
    adamw = dict(lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    disc_optimizer = torch.optim.AdamW(disc.parameters(), **adamw)
    ema = (
        {name: value.clone() for name, value in model.state_dict().items()}
        if args.ema_decay
        else None
    )
    parts = {"model": model, "disc": disc, "optimizer": optimizer, "disc_optimizer": disc_optimizer}
    if resumed:
        for name, part in parts.items():
            part.load_state_dict(resumed[name])
        for name in ema or ():  # of a run that had no averages until now, they start here
            ema[name].copy_((resumed["ema"] or resumed["model"])[name])
        resumed = None  # lets go of its memory

    print0(
        f"torch {torch.__version__}, {world} process(es) on {device.type}, {'bfloat16' if bf16 else 'float32'}"
    )
    print0(
        f"{args.model}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.1f}M parameters, "
        f"{args.image_size} pixels -> {model.codes_per_image(args.image_size)} codes of {config.codebook_size:,}"
    )
    print0(
        f"{args.data}: {len(images):,} images; {max_steps:,} steps of {args.batch_size} images = "
        f"{max_steps * args.batch_size / len(images):.1f} epochs -> {out}"
    )
    if first:
        print0(f"resumed at step {first} from {out}/ckpt.pt")
    elif args.init:
        print0(
            f"the first weights are those of {args.init}"
            f"{' and its discriminator' if judge else ', which came without a discriminator: that one is new'}"
        )

    # ---- loop -----------------------------------------------------------------------------------
    def due(every):
        """Whether it is time for what happens every so many steps, and at the end."""
        return every > 0 and (step % every == 0 or step == max_steps)

    model.train()
    step, stop = first, False
    clock, clock_step = time.time(), first
    coming = iter(loader)  # its workers read ahead
    while step < max_steps and not stop:
        # 1. Learning rate of this step, and its images: which they are and how they are cropped
        #    follows from the step's
        #    number, so that a resumed run needs no stored random state.
        scale = min(1, (step + 1) / max(args.warmup_steps, 1))
        if args.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
        for group in optimizer.param_groups + disc_optimizer.param_groups:
            group.update(lr=args.lr * scale, weight_decay=args.weight_decay)
        batch = next(coming).to(device, non_blocking=True).split(micro)  # each (B, 3, H, W)

        # 2. Tokenizer: forward, losses and backward over the micro-batches; gradients sync on the
        #    last one. The
        #    discriminator only judges here, and comes late: at first it would win against anything.
        adversarial = args.disc_weight > 0 and step >= args.disc_start
        disc.requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        terms, restored = {}, []
        for i, x in enumerate(batch):
            if world > 1:
                forward.require_backward_grad_sync = i + 1 == len(batch)
            with autocast():
                recon, codebook = forward(x, args.entropy_weight > 0)
                losses = tokenizer_losses(
                    args, x, recon, codebook, perceptual, disc if adversarial else None
                )
            (sum(losses.values()) / len(batch)).backward()
            add(terms, losses, len(batch))
            restored.append(recon.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()

        # 3. Discriminator, on the same images. It is no part of DDP: its gradients are averaged
        #    here.
        if adversarial:
            disc.requires_grad_(True)
            disc_optimizer.zero_grad(set_to_none=True)
            for x, recon in zip(batch, restored):
                with autocast():
                    losses = {"disc": args.disc_weight * hinge(disc(x), disc(recon))}
                (losses["disc"] / len(batch)).backward()
                add(terms, losses, len(batch))
            for weight in disc.parameters() if world > 1 else ():
                dist.all_reduce(weight.grad)
                weight.grad /= world
            norm = norm + 0 * nn.utils.clip_grad_norm_(
                disc.parameters(), args.grad_clip
            )  # NaN where this one is
            disc_optimizer.step()

        # 4. Averaged weights. They follow quickly at first: with a decay of 0.9999 from the start,
        #    the random first
        #    weights would be among them for ten thousand steps.
        if ema:
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            weights = model.state_dict()
            names = [name for name, value in weights.items() if value.is_floating_point()]
            torch._foreach_lerp_(
                [ema[name] for name in names], [weights[name] for name in names], 1 - decay
            )
        step, seen = step + 1, seen + args.batch_size

        # 5. One line, a picture, a checkpoint; but first: is all well? To learn it, the CPU waits
        #    until a GPU has done
        #    all its work. So it asks rarely, though always before it shows or saves something.
        showing = any(map(due, (args.log_every, args.sample_every, args.save_every)))
        if showing or step % 10 == 0 or step == first + 1 or device.type == "cpu":
            finite, stop = runs.status(norm, bool(signals), world)
            if not finite:
                parser.exit(
                    2,
                    f"train_vq.py: the loss is not finite at step {step}; {out} holds the last good state. "
                    "A lower --lr or --dtype float32 may help\n" * (rank == 0),
                )
        if due(args.log_every) or step == first + 1 or stop:
            values = torch.stack([value.float() for value in terms.values()])
            if world > 1:
                dist.all_reduce(values)
            seconds = (time.time() - clock) / (step - clock_step)
            record = {
                "step": step,
                **dict(zip(terms, (values / world).tolist())),
                "usage": model.quantize.usage(),
                "lr": args.lr * scale,
                "norm": float(norm),
                "img_per_s": args.batch_size / seconds,
            }
            if rank == 0:
                runs.log(record, out, board)
                print_step(record, terms, seconds, max_steps)
            clock, clock_step = time.time(), step
        if rank == 0 and due(args.sample_every):
            picture(model, ema, shown.to(device), out / f"recon_{step:06d}.png")
        if rank == 0 and (due(args.save_every) or step == max_steps or stop):
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {
                "ema": ema,
                "step": step,
                "images_seen": seen,
                "config": asdict(config),
                "image_size": args.image_size,
                "args": vars(args),
            }
            try:
                data.save_checkpoint(state, out / "ckpt.pt", args.keep)
            except OSError as error:
                parser.exit(2, f"train_vq.py: {error}\n")
    print0(
        f"asked to stop: saved at step {step}; --resume goes on"
        if step < max_steps
        else f"done: {out}/ckpt.pt"
    )
    if dist.is_initialized() and device.type == "cuda":
        dist.destroy_process_group()
    elif (
        dist.is_initialized()
    ):  # gloo, when it is taken down in order, hangs in one of 30 runs (torch 2.13)
        os._exit(0)


# ---- what cannot be ----------------------------------------------------------------------------
def check_flags(parser, args, world):
    """Refuse, with one sentence, what can be seen from the flags alone."""
    data.within(
        parser,
        args,
        image_size=(1, 8192),
        codebook_size=(1, 2**20),
        code_dim=(1, 4096),
        seed=(0, 2**32),
        batch_size=(1, 2**20),
        micro_batch=(1, 2**20),
        epochs=(1e-6, 1e6),
        max_steps=(1, 1e9),
        lr=(0, 10),
        warmup_steps=(0, 1e9),
        weight_decay=(0, 10),
        grad_clip=(1e-9, 1e9),
        ema_decay=(0, 0.9999999),
        lpips_weight=(0, 1e6),
        disc_weight=(0, 1e6),
        disc_start=(0, 1e9),
        entropy_weight=(0, 1e6),
        sample_every=(0, 1e9),
        log_every=(1, 1e9),
        save_every=(0, 1e9),
        keep=(0, 1e6),
        workers=(0, 1024),
        timeout=(0.01, 1e6),
    )
    per_rank = args.batch_size // world
    if args.batch_size % world:
        parser.error(
            f"--batch-size {args.batch_size} does not split over {world} processes; "
            f"try --batch-size {max(per_rank, 1) * world}"
        )
    if args.micro_batch and per_rank % args.micro_batch:
        parser.error(
            f"--micro-batch {args.micro_batch} does not divide the {per_rank} images of each process"
        )
    if args.image_size < 24 and args.disc_weight:
        parser.error(
            f"--image-size {args.image_size}: the discriminator needs 24 pixels; or take --disc-weight 0"
        )
    if args.compile and args.checkpoint_activations:
        parser.error(
            "--compile does not go with --checkpoint-activations; --micro-batch saves memory too"
        )


def check_files(args, config, resumed, init):
    """Raise ValueError, with one sentence, if checkpoints and flags do not belong together."""
    down, file = config.downsample, f"{args.out}/ckpt.pt"
    if args.image_size % down:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of the downsampling {down}; "
            f"try --image-size {max(args.image_size // down, 1) * down}"
        )
    if not args.resume and Path(file).exists():
        raise ValueError(
            f"--out {args.out} holds a run; add --resume to go on with it, or choose another folder"
        )
    if args.resume and not (
        isinstance(resumed, dict) and {"config", "disc", "disc_optimizer"} <= resumed.keys()
    ):
        raise ValueError(f"--resume: {file} was not written by train_vq.py")
    if resumed and resumed["config"] != asdict(config):
        raise ValueError(f"--model {args.model} is not what {file} holds: {resumed['config']}")
    if init and init.config != config:
        raise ValueError(
            f"--model {args.model} is not what --init {args.init} holds: {asdict(init.config)}"
        )


# ---- what a run shows --------------------------------------------------------------------------
def print_step(record, terms, seconds, max_steps):
    """One line. Each loss has its own place, since a sum would hide a discriminator that has
    stalled."""
    print(
        f"step {record['step']:06d}/{max_steps} | "
        + " | ".join(f"{name} {record[name]:.4f}" for name in terms)
        + f" | usage {record['usage']:.1%} | lr {record['lr']:.1e} | {record['img_per_s']:,.0f} img/s"
        + f" | {(max_steps - record['step']) * seconds / 60:.1f} min left",
        flush=True,
    )


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
    except OSError as error:  # a full disk, say
        sys.exit(f"train_vq.py: {error}; the last checkpoint is untouched")
