r"""Train the image tokenizer (vq.py) with the losses of LlamaGen (arXiv:2406.06525, section 2.2):
L2 + LPIPS + codebook + commitment, and from --disc-start on 0.5 x what a patch discriminator says.

A small one on shapes drawn on the fly, on a laptop's CPU:
$ python train_vq.py --data shapes --model VQ-demo --image-size 32 --batch-size 64 \
      --lpips-weight 0 --max-steps 2000
The paper's tokenizer on 8 GPUs (the defaults are its recipe; add --resume after a stop):
$ torchrun --nproc_per_node=8 train_vq.py --data imagenet/train
On other data, from its weights and with the discriminator from the first step:
$ torchrun --nproc_per_node=8 train_vq.py --data DIR --init runs/vq/ckpt.pt --disc-start 0 \
      --out runs/vq-tuned
"""

# Shapes:  B images in a micro-batch   H, W pixels   h, w patches that the discriminator judges
import argparse
import copy
import math
import os
import random
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vq
from nanollamagen import data, files, flags, lpips, runs

GRAD_CLIP = 1.0  # largest norm of the gradient, for the tokenizer and the discriminator each


# ---- flags ---------------------------------------------------------------------------------------
def parse(configs):
    """The parser and the flags of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = p.add_argument
    one, switch = flags.at_least_one, argparse.BooleanOptionalAction
    size, named = flags.bounded(int, 1, 2**16), next(iter(configs))
    # fmt: off
    flag("--data", required=True, help="class folders, .jsonl or .tar with captions, shapes")
    flag("--image-size", type=flags.pixels, default=256, help="pixels of a side")
    flag("--init", metavar="CKPT", help="start from this tokenizer, and its discriminator if any")
    flag("--out", default="runs/vq", help="run folder: ckpt.pt, log.jsonl, recon_*.png")
    flag("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    # the model and its recipe
    flag("--model", choices=configs, default=named, help="size, see VQ_CONFIGS in vq.py")
    flag("--codebook-size", type=size, help="entries of the codebook (default: the model's)")
    flag("--code-dim", type=size, help="numbers in an entry of it (default: the model's)")
    flag("--batch-size", type=flags.batch, default=128, help="images per step, over all processes")
    flag("--micro-batch", type=flags.batch, help="images a process takes at once")
    flag("--epochs", type=flags.positive, default=40, help="passes over the images")
    flag("--max-steps", type=one, help="steps, instead of --epochs")
    flag("--lr", type=flags.positive, default=1e-4, help="AdamW's, at any batch size")
    flag("--schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    flag("--warmup-steps", type=flags.count, default=0, help="steps of linear warm-up")
    flag("--weight-decay", type=flags.weight, default=0.05, help="of all weights")
    flag("--ema-decay", type=flags.fraction, default=0.0, help="of averaged weights; 0: none")
    flag("--lpips-weight", type=flags.weight, default=1.0, help="0: VGG16 is not downloaded")
    flag("--disc-weight", type=flags.weight, default=0.5, help="of adversarial losses; 0: none")
    flag("--disc-start", type=flags.count, default=20_000, help="the discriminator's first step")
    # what a run shows and keeps
    flag("--log-every", type=one, default=100, help="steps between lines")
    flag("--save-every", type=one, default=5000, help="steps between checkpoints and pictures")
    flag("--keep", type=flags.count, default=0, help="older checkpoints to keep, as ckpt_STEP")
    # the machine
    flag("--seed", type=flags.seed, default=0, help="of weights, order and crops")
    flag("--workers", type=flags.count, help="processes that read images (default: GPU 8, CPU 0)")
    flags.add_device(p)
    flag("--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)")
    flag("--compile", action=switch, default=False, help="torch.compile the model")
    # fmt: on
    p.usage = "python train_vq.py --data shapes|DIR ... (--help lists the flags)"
    return p, p.parse_args()


def learning_rate(args, step, max_steps):
    """The optimizer's rate for a step, counted from 0."""
    scale = 1.0
    if step < args.warmup_steps:
        scale = (step + 1) / args.warmup_steps  # not 0 in the first step
    if args.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
    return args.lr * scale


# ---- losses --------------------------------------------------------------------------------------
class PatchGAN(nn.Module):
    """Judges overlapping patches (arXiv:1611.07004): images (B, 3, H, W) -> scores (B, 1, h, w),
    large for real images. Batch statistics are those of a micro-batch on one process; they are not
    averaged over processes, as in the paper's code."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c_in, c, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers.append(nn.Conv2d(c_in, c, 4, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, images):
        return self.main(images)


def hinge(real, fake):
    """Discriminator loss: scores of real images are pushed above 1, of reconstructions below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def tokenizer_losses(args, x, recon, codebook, perceptual, disc):
    """What the tokenizer learns from, weighted: a dict of scalars whose sum is the loss.

    x, recon           (B, 3, H, W) images and their reconstructions
    codebook           the model's own losses
    perceptual, disc   LPIPS and the discriminator; None without"""
    losses = {"rec": F.mse_loss(recon.float(), x)}
    losses |= {"vq": codebook["vq"], "commit": codebook["commit"]}
    if perceptual:
        losses["lpips"] = args.lpips_weight * perceptual(recon, x).mean()
    if disc:  # its scores are high for reconstructions that it takes for real images
        losses["adv"] = -args.disc_weight * disc(recon).mean()
    return losses


# ---- training ------------------------------------------------------------------------------------
def main(tokenizer=vq.VQModel, configs=vq.VQ_CONFIGS):
    """Flags, processes, data, model, optimizers, loop.

    tokenizer, configs   a class that derives from VQModel, and its sizes by name"""
    parser, args = parse(configs)
    rank, world, device = runs.this_process(args.device)
    signals = runs.catch_signals()
    out = Path(args.out)
    torch.manual_seed(args.seed)  # all processes start with the same weights

    # ---- data: images on disk, or shapes ---------------------------------------------------------
    try:
        images = data.open_images(args.data, unlabelled=True)
        config = configs[args.model]
        if args.codebook_size:
            config = replace(config, codebook_size=args.codebook_size)
        if args.code_dim:
            config = replace(config, code_dim=args.code_dim)
        path, saved = runs.find_checkpoint(out)
        init, init_disc = None, None
        if args.init and not saved:
            init, init_disc = load_init(args.init, tokenizer)
        check(args, config, world, path, saved, init)
        examples = load_examples(images, args)  # (n, 3, H, W)
        perceptual = lpips.load().to(device) if args.lpips_weight else None
        files.make_folder(out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    share = args.batch_size // world  # images of a batch that this process takes
    micro = args.micro_batch or share  # images that it takes at once

    # ---- models: on this process's device --------------------------------------------------------
    bf16 = (args.dtype or flags.best_dtype(device)) == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    compiled = runs.can_compile(args.compile, device)
    if world > 1:
        runs.connect(device)
    model, disc = tokenizer(config).to(device), PatchGAN().to(device)
    if init:
        model.load_state_dict(init.state_dict())
    if init_disc:
        disc.load_state_dict(init_disc)
    forward = torch.compile(model) if compiled else model
    if world > 1:  # DDP averages gradients; each process counts the codes that it uses itself
        gpus = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, gpus, broadcast_buffers=False)

    # ---- optimizers ------------------------------------------------------------------------------
    adamw = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    disc_optimizer = torch.optim.AdamW(disc.parameters(), **adamw)
    ema = None  # averaged weights, by name
    if args.ema_decay:
        ema = {name: value.clone() for name, value in model.state_dict().items()}

    # ---- resume ----------------------------------------------------------------------------------
    parts = {"model": model, "optimizer": optimizer, "disc": disc, "disc_optimizer": disc_optimizer}
    step, images_seen = 0, 0
    if saved:
        step, images_seen = restore(parts, ema, saved)
    saved = init = None  # frees their memory
    images_left = max(0, args.epochs * len(images) - images_seen)
    max_steps = args.max_steps or step + math.ceil(images_left / args.batch_size)
    first_step = step
    log = runs.Log(out, step, max_steps, args.batch_size, rank, world, device)
    if rank == 0:
        how = f"{'bfloat16' if bf16 else 'float32'}{', compiled' if compiled else ''}"
        print(f"{world} process(es) on {device.type}, {how}, torch {torch.__version__}")
        describe(args, images, model, init_disc, step, max_steps)

    def due(every):
        """Whether it is time for what happens every so many steps, and at the end."""
        return step % every == 0 or step == max_steps

    def store():
        """Write a checkpoint. All processes call it."""
        state = {name: part.state_dict() for name, part in parts.items()}
        if ema:
            state["ema"] = ema
        plain = {"step": step, "images_seen": images_seen, "config": asdict(config)}
        plain |= {"args": vars(args), "image_size": args.image_size}
        try:
            runs.save(state, plain, out, rank, args.keep)
        except OSError as error:
            runs.give_up(f"train_vq.py: {error}", rank)

    # ---- loop ------------------------------------------------------------------------------------
    model.train()
    batches = load_batches(images, args, images_seen, rank, world, device)
    stop = False
    while step < max_steps and not stop:
        # 1. The learning rate. As the images do, it follows from the step's number.
        lr = learning_rate(args, step, max_steps)
        for group in optimizer.param_groups + disc_optimizer.param_groups:
            group["lr"] = lr

        # 2. This process's share of the batch, which its workers read while the step before ran.
        batch = next(batches).split(micro)  # each (B, 3, H, W)

        # 3. Forward and backward, in micro-batches if the share does not fit in memory. First the
        #    tokenizer, then the discriminator on the same images. The discriminator comes late,
        #    because it would always win against an untrained tokenizer.
        adversarial = args.disc_weight > 0 and step >= args.disc_start
        judge = disc if adversarial else None
        disc.requires_grad_(False)
        recons = []
        for x in batch:
            if world > 1:
                forward.require_backward_grad_sync = x is batch[-1]
            with autocast():
                recon, codebook = forward(x)
                losses = tokenizer_losses(args, x, recon, codebook, perceptual, judge)
            loss = sum(losses.values()) / len(batch)
            loss.backward()
            log.add(**losses)
            recons.append(recon.detach())
        if adversarial:
            disc.requires_grad_(True)
            for x, recon in zip(batch, recons):
                with autocast():
                    loss = args.disc_weight * hinge(disc(x), disc(recon))
                (loss / len(batch)).backward()
                log.add(disc=loss)

        # 4. Clip and update. The averaged weights follow.
        norms = [nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if adversarial:
            average_over_processes(disc, world)
            norms.append(nn.utils.clip_grad_norm_(disc.parameters(), GRAD_CLIP))
            disc_optimizer.step()
            disc_optimizer.zero_grad(set_to_none=True)
        if ema:
            state = model.state_dict()
            weights = {name: x for name, x in state.items() if x.is_floating_point()}
            runs.average_weights(ema, weights, args.ema_decay, step)
        step += 1
        images_seen += args.batch_size

        # 5. Is all well? Then a line, a checkpoint, a picture. Asking makes the CPU wait for the
        #    GPU, so this asks rarely, and always before something is shown or saved.
        logging = step == first_step + 1 or due(args.log_every)
        if logging or due(args.save_every) or step % 10 == 0 or device.type == "cpu":
            finite, stop = runs.status(norms, bool(signals), world)
            if not finite:
                runs.give_up(f"train_vq.py: {runs.NOT_FINITE} at step {step}", rank)
        if logging or stop:
            log.write(step, usage=model.quantize.usage(), lr=lr, norm=norms[0].item())
        if due(args.save_every) or stop:
            store()
        if rank == 0 and due(args.save_every):
            weights = ema or model.state_dict()
            picture(model, weights, examples.to(device), out / f"recon_{step:06d}.png")

    if rank == 0 and step < max_steps:
        print(f"stopped as asked; saved at step {step}. --resume continues")
    elif rank == 0:
        print(f"done: {out}/ckpt.pt")
    runs.disconnect(device)


# ---- data ----------------------------------------------------------------------------------------
class TrainCrops(torch.utils.data.Dataset):
    """(epoch, index) -> uint8 array (3, size, size): ADM's random crop, mirrored half the time. The
    crop follows from (seed, epoch, index), so a resumed run needs no stored random state. An
    unreadable image is replaced by another one."""

    def __init__(self, images, size, seed):
        self.images, self.size, self.seed = images, size, seed
        self.warned = set()

    def __getitem__(self, key):
        rng = random.Random(f"{self.seed}/{key}")
        _, index = key
        for _ in range(100):
            try:
                image = self.images.load(index)
            except OSError as error:
                if index not in self.warned:
                    print(f"warning: unreadable, another image is taken: {error}", file=sys.stderr)
                self.warned.add(index)
                index = rng.randrange(len(self.images))
                continue
            image = data.random_crop(image, self.size, rng)
            if rng.random() < 0.5:
                image = image.transpose(Image.FLIP_LEFT_RIGHT)
            return np.array(image).transpose(2, 0, 1)
        raise ValueError("100 unreadable images in a row")


def load_batches(images, args, images_seen, rank, world, device):
    """Yield this process's share of each batch: tensors (share, 3, H, W). Workers read ahead.

    images_seen   how many images the steps before have used"""
    share = args.batch_size // world
    workers = 8 if device.type == "cuda" else 0

    def keys():
        pairs = data.shuffled(len(images), args.seed, images_seen)
        while True:
            batch = [next(pairs) for _ in range(args.batch_size)]  # of (epoch, index)
            yield batch[rank * share : (rank + 1) * share]

    loader = torch.utils.data.DataLoader(
        TrainCrops(images, args.image_size, args.seed),
        batch_sampler=keys(),
        num_workers=workers if args.workers is None else args.workers,
        worker_init_fn=leave_group,
        collate_fn=np.stack,  # arrays come through pipes; tensors would fill Docker's /dev/shm
    )
    for pixels in loader:
        pixels = torch.from_numpy(pixels)  # (share, 3, H, W) uint8
        pixels = pixels.pin_memory() if device.type == "cuda" else pixels
        yield pixels.to(device, non_blocking=True).float() / 127.5 - 1


def leave_group(_):
    """Put a worker in a process group of its own. torchrun sends a signal to a process and its
    group, and without workers there would be no last step."""
    os.setpgid(0, 0)


def load_examples(images, args):
    """Centre crops (n, 3, H, W) of up to eight images, for the pictures. The seed decides which.
    Raises ValueError if none of them can be read."""
    crops, problem = [], None
    for i in random.Random(args.seed).sample(range(len(images)), min(8, len(images))):
        try:
            crops.append(vq.to_tensor(data.center_crop(images.load(i), args.image_size)))
        except OSError as error:  # training warns when it comes to this image
            problem = error
    if not crops:
        raise ValueError(f"--data {args.data}: none of the images tried can be read ({problem})")
    return torch.stack(crops)


# ---- checkpoints, several processes --------------------------------------------------------------
def load_init(path, tokenizer):
    """The tokenizer of a file, and the weights of its discriminator, or None: the released files
    have no discriminator. Files of the official training code call it "discriminator"."""
    model = vq.load_vq(path, tokenizer=tokenizer)
    checkpoint = files.read_checkpoint(path)
    return model, checkpoint.get("disc") or checkpoint.get("discriminator")


def restore(parts, ema, saved):
    """Put a checkpoint's values into models, optimizers and averaged weights (None: there are
    none). Returns (step, images seen so far)."""
    for name, part in parts.items():
        state = copy.deepcopy(saved[name])  # in memory, since the file will be replaced
        if isinstance(part, torch.optim.Optimizer):  # rates and decay are those of today's flags
            state["param_groups"] = part.state_dict()["param_groups"]
        part.load_state_dict(state)
    if ema:  # if until now the run had no averages, they start here
        runs.fill(ema, saved["ema"] or saved["model"])
    return saved["step"], saved["images_seen"]


def average_over_processes(disc, world):
    """Average the discriminator's gradients. It is not within DDP, which expects one forward and
    one backward pass of the same weights."""
    if world > 1:
        for weight in disc.parameters():
            dist.all_reduce(weight.grad)
            weight.grad /= world


# ---- what a run shows ----------------------------------------------------------------------------
def describe(args, images, model, init_disc, step, max_steps):
    """Print what is trained on what."""
    parameters = sum(weight.numel() for weight in model.parameters())
    T, V = model.codes_per_image(args.image_size), model.config.codebook_size
    print(f"{args.model}: {parameters / 1e6:.1f}M parameters; {T} codes of {V:,} per image")
    print(
        f"{args.data}: {len(images):,} images; {max_steps:,} steps of {args.batch_size} images = "
        f"{max_steps * args.batch_size / len(images):.1f} epochs -> {args.out}"
    )
    if step:
        print(f"resumed at step {step}")
    elif args.init:
        also = " and its discriminator" if init_disc else "; the discriminator is new"
        print(f"the first weights are those of {args.init}{also}")


@torch.no_grad()
def picture(model, weights, images, path):
    """Write images above their reconstructions by these weights."""
    copied = type(model)(model.config).to(images.device).eval()
    copied.load_state_dict(weights)
    recons = copied.decode(copied.encode(images))
    rows = np.concatenate([vq.to_uint8(images), vq.to_uint8(recons)])
    data.save_grid(rows, path, columns=len(images))
    print(f"{path}: originals above, reconstructions below", flush=True)


# ---- argument checks -----------------------------------------------------------------------------
def check(args, config, world, path, saved, init):
    """Raise ValueError if flags and checkpoints do not fit together."""
    share = args.batch_size // world
    if args.batch_size % world:
        raise ValueError(
            f"--batch-size {args.batch_size} does not split over {world} processes; "
            f"try --batch-size {max(share, 1) * world}"
        )
    if args.micro_batch and share % args.micro_batch:
        raise ValueError(
            f"--micro-batch {args.micro_batch} does not divide the {share} images of each process"
        )
    if args.image_size < 24 and args.disc_weight:
        raise ValueError(
            f"--image-size {args.image_size}: the discriminator needs 24 pixels; --disc-weight 0 "
            "trains without it"
        )
    step = config.downsample
    if args.image_size % step:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of the downsampling {step}; "
            f"try --image-size {max(args.image_size // step, 1) * step}"
        )
    if saved and not args.resume:
        raise ValueError(
            f"--out {args.out} holds a run; add --resume to continue it, or choose another folder"
        )
    if args.resume and not saved:
        raise ValueError(f"--resume: {args.out} has no ckpt.pt")
    if saved:
        runs.check_same_run(path, saved, asdict(config), {"image_size": args.image_size})
    if init and init.config != config:
        raise ValueError(
            f"--init {args.init} does not fit --model {args.model}: it is {asdict(init.config)}"
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # such as a full disk
        sys.exit(f"train_vq.py: {error}; the last checkpoint is untouched")
