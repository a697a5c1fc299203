"""Train VAR (arXiv:2404.02905): its tokenizer in train_vq.py's own loop, and the transformer over
its codes.

Small ones on drawn shapes, on a laptop's CPU:
$ python extras/train_var.py tokenizer --data shapes --model VAR-demo --image-size 24 --lpips-weight 0 --max-steps 1000
$ python extras/var.py encode --vq runs/var-vq/ckpt.pt --data shapes --out codes-var
$ python extras/train_var.py --vq runs/var-vq/ckpt.pt --codes codes-var --model demo --batch-size 128 --lr 4e-3
The paper's 310M model, one node with 8 GPUs (the defaults are its recipe; --resume goes on after a
stop):
$ torchrun --nproc_per_node=8 extras/train_var.py --vq vae_ch160v4096z32.pth --codes codes-var --model d16

The loss is plain cross-entropy: all codes of a scale are predicted at once from the class and the
scales before it. `tokenizer` takes the flags of train_vq.py, with --out runs/var-vq in place of
runs/vq.
"""

# Shapes:  B images in this process's share of a batch   L codes of an image   D code dimension   V codebook entries
import argparse
import itertools
import math
import os
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import var
import var_vq

import train_vq
import vq
from nanollamagen import data, runs

# paper and official code; lr is for 256 images, final_lr a part of it, gate what a block adds at
# first
RECIPES = {
    "d16": dict(batch_size=768, epochs=200, lr=1e-4, gate=1e-3, final_lr=0.1, final_decay=0.05),
    "d20": dict(batch_size=768, epochs=250, lr=1e-4, gate=1e-3, final_lr=0.1, final_decay=0.05),
    "d24": dict(batch_size=768, epochs=350, lr=8e-5, gate=1e-4, final_lr=0.01, final_decay=0.05),
    "d30": dict(batch_size=1024, epochs=350, lr=8e-5, gate=1e-5, final_lr=0.01, final_decay=0.08),
    "d36": dict(batch_size=768, epochs=350, lr=8e-5, gate=5e-6, final_lr=0.01, final_decay=0.08),
    "demo": dict(batch_size=128, epochs=10, lr=4e-3, gate=1e-3, final_lr=0.1, final_decay=0.05),
}


# ---- flags -------------------------------------------------------------------------------------
def parse():
    """The parser and the flags; what depends on the model comes from RECIPES."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--codes", default="codes", help="folder written by var.py encode")
    p.add_argument("--vq", required=True, help="tokenizer that made the codes")
    p.add_argument(
        "--out", default="runs/var", help="run folder: ckpt.pt, log.jsonl, samples_*.png"
    )
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument(
        "--model",
        choices=var.VAR_CONFIGS,
        default="d16",
        help="named size, see VAR_CONFIGS in var.py",
    )
    p.add_argument(
        "--batch-size",
        type=int,
        help="images per step, summed over processes (default: see RECIPES)",
    )
    p.add_argument(
        "--epochs",
        type=float,
        help="passes over the images, a random crop of each (default: see RECIPES)",
    )
    p.add_argument(
        "--lr",
        type=float,
        help="AdamW's rate for 256 images; scaled with --batch-size (see RECIPES)",
    )
    p.add_argument("--max-steps", type=int, help="steps, instead of --epochs")
    p.add_argument(
        "--micro-batch",
        type=int,
        help="images that one process takes at once, if its share is too many",
    )
    p.add_argument("--grad-clip", type=float, default=2.0, help="largest gradient norm")
    p.add_argument("--log-every", type=int, default=100, help="steps")
    p.add_argument(
        "--sample-every", type=int, default=5000, help="steps between samples_*.png; 0: none"
    )
    p.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--device", type=data.device, help="cuda or cpu (default: cuda where there is one)"
    )
    p.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)"
    )
    args = p.parse_args()
    p.usage = "python extras/train_var.py --vq CKPT --codes DIR ... (--help lists the flags)"
    for name in ("batch_size", "epochs", "lr"):
        setattr(
            args,
            name,
            RECIPES[args.model][name] if getattr(args, name) is None else getattr(args, name),
        )
    data.within(
        p,
        args,
        batch_size=(1, 2**20),
        micro_batch=(1, 2**20),
        epochs=(1e-6, 1e6),
        max_steps=(1, 1e9),
        lr=(0, 10),
        grad_clip=(1e-9, 1e9),
        log_every=(1, 1e9),
        sample_every=(0, 1e9),
        save_every=(1, 1e9),
        seed=(0, 2**32),
    )
    return p, args


# ---- training ----------------------------------------------------------------------------------
def decayed(model):
    """Parameters that weight decay applies to: matrices, but not positions, levels, offsets and
    temperatures."""
    bare = ("pos_1LC", "pos_start", "lvl_embed.weight", "ada_gss", "scale_mul_1H11")
    return [
        weight
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and not name.endswith(bare)
    ]


def schedule(step, max_steps, final_lr, final_decay):
    """Learning rate as a part of its highest, and weight decay, at a step. Warm-up over a fiftieth
    of all steps, constant until a twentieth of the rest is done, then a straight line down; decay
    goes along a cosine."""
    warmup, last = max(max_steps // 50, 1), max(max_steps - 1, 1)
    done = (step - warmup) / max(last - warmup, 1)
    scale = min(1, final_lr + (1 - final_lr) * (1 - done) / 0.95)
    if step < warmup:
        scale = 0.005 + 0.995 * step / warmup
    return scale, final_decay + (0.05 - final_decay) * 0.5 * (1 + math.cos(math.pi * step / last))


def main():
    """Flags, devices, data, model, optimizer, loop."""
    parser, args = parse()
    recipe = RECIPES[args.model]

    # ---- devices, precision ---------------------------------------------------------------------
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        )
        torch.cuda.set_device(device)
    bf16 = args.dtype == "bfloat16" if args.dtype else device.type == "cuda"
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=bf16
    )  # weights stay float32
    torch.manual_seed(args.seed)
    out = Path(args.out)
    signals = runs.catch_signals()

    def print0(text):
        if rank == 0:
            print(text, flush=True)

    # ---- data -----------------------------------------------------------------------------------
    # Codes (N, A, L) uint16 stay on disk. The tokenizer comes along, because the transformer does
    # not read codes but sums of what they stand for.
    try:
        codes, labels, meta = data.load_codes(args.codes)
        resumed = data.read_checkpoint(out / "ckpt.pt") if args.resume else None
        tokenizer, config = check(args, labels, meta, resumed, world, device)
        if rank == 0:
            runs.open_log(out, resumed["step"] if resumed else 0, tensorboard=False)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    per_rank = args.batch_size // world  # images of a step that this process takes,
    micro = args.micro_batch or per_rank  # so many at a time
    max_steps = args.max_steps or math.ceil(args.epochs * len(codes) / args.batch_size)

    def load(step, images):
        """This process's share of a batch, a random crop of each image: codes (B, L) and labels
        (B,), int64. Every process draws for the whole batch, which is thus the same however many
        processes share it."""
        ids = np.array([index for _, index in itertools.islice(images, args.batch_size)])
        crops = np.random.RandomState((args.seed * 1_000_003 + step) % 2**32).randint(
            codes.shape[1], size=len(ids)
        )
        ids, crops = (x[rank * per_rank : (rank + 1) * per_rank] for x in (ids, crops))
        return [
            torch.from_numpy(x.astype(np.int64)).to(device)
            for x in (codes[ids, crops], labels[ids])
        ]

    # ---- model ----------------------------------------------------------------------------------
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = var.VAR(config)
    var.init_weights(model, recipe["gate"])
    model.to(device)
    forward = model
    if world > 1:  # averages the gradients over the processes while the backward pass still runs
        forward = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )

    # ---- optimizer ------------------------------------------------------------------------------
    matrices = decayed(model)
    others = [
        weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)
    ]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    first, seen = 0, 0
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        first, seen, resumed = (
            resumed["step"],
            resumed["images_seen"],
            None,
        )  # None lets go of the file

    print0(
        f"torch {torch.__version__}, {world} process(es) on {device.type}, {'bfloat16' if bf16 else 'float32'}"
    )
    parameters = sum(weight.numel() for weight in model.parameters())
    print0(
        f"{args.model}: {parameters / 1e6:.1f}M parameters; {meta['codes']} codes of {config.vocab_size:,} in "
        f"{len(config.scales)} scales, {config.num_classes} classes"
    )
    print0(
        f"{args.codes}: {len(codes):,} images x {codes.shape[1]} crops; {max_steps:,} steps of {args.batch_size} "
        f"images = {max_steps * args.batch_size / len(codes):.1f} epochs -> {out}"
    )
    print0(
        f"resumed at step {first}"
        if first
        else "the first loss should be near "
        f"{math.log(config.vocab_size):.2f} = ln({config.vocab_size})"
    )

    # ---- loop -----------------------------------------------------------------------------------
    images, step, stop = vq.shuffled(len(codes), args.seed, seen), first, False
    total = torch.zeros(
        2, device=device
    )  # losses, of all scales and of the last, since a line was printed
    clock, clock_step = time.time(), first
    while step < max_steps and not stop:
        # 1. Learning rate and weight decay of this step. What it drops follows from (seed, step,
        #    process), so that a
        #    resumed run needs no stored random state.
        scale, decay = schedule(step, max_steps, recipe["final_lr"], recipe["final_decay"])
        for group in optimizer.param_groups:
            group["lr"] = scale * args.lr * args.batch_size / 256
        optimizer.param_groups[0]["weight_decay"] = decay
        torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)

        # 2. This process's share of the batch.
        batch = load(step, images)

        # 3. Forward and backward over the micro-batches; DDP averages gradients after the last one.
        model.train()
        for i in range(0, per_rank, micro):
            if world > 1:
                forward.require_backward_grad_sync = i + micro == per_rank
            tokens, classes = (x[i : i + micro] for x in batch)
            inputs = tokenizer.quantize.teacher_input(tokens)  # (B, L - 1, D)
            with autocast():
                logits = forward(inputs, classes)  # (B, L, V)
            each = F.cross_entropy(
                logits.flatten(0, 1), tokens.flatten(), reduction="none"
            ).view_as(tokens)
            loss = each.mean() * len(tokens) / per_rank
            loss.backward()
            last = each[:, -(config.scales[-1] ** 2) :].mean() * len(tokens) / per_rank
            total += torch.stack([loss, last]).detach()

        # 4. Clip and update.
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + args.batch_size

        # 5. One line, a picture, a checkpoint; if any process was asked to stop, all do.
        finite, stop = runs.status(norm, bool(signals), world)
        if not finite:
            parser.exit(
                2,
                f"train_var.py: the loss is not finite at step {step}; {out}/ckpt.pt is the last good "
                "state. A lower --lr or --dtype float32 may help\n" * (rank == 0),
            )
        if step % args.log_every == 0 or step in (first + 1, max_steps):
            if world > 1:
                dist.all_reduce(total)
            seconds = (time.time() - clock) / (step - clock_step)
            loss, last = (total / world / (step - clock_step)).tolist()
            if rank == 0:
                runs.log(
                    {
                        "step": step,
                        "loss": loss,
                        "last_scale": last,
                        "lr": optimizer.param_groups[0]["lr"],
                        "norm": float(norm),
                        "images_per_s": args.batch_size / seconds,
                    },
                    out,
                    None,
                )
            print0(
                f"step {step:06d}/{max_steps} | loss {loss:.4f} | last scale {last:.4f} | norm {float(norm):.2f} | "
                f"{seconds * 1e3:.0f} ms | {(max_steps - step) * seconds / 60:.1f} min left"
            )
            total.zero_()
            clock, clock_step = time.time(), step
        if rank == 0 and args.sample_every and (step % args.sample_every == 0 or step == max_steps):
            picture(model.eval(), tokenizer, meta["classes"][:10], out / f"samples_{step:06d}.png")
        if rank == 0 and (step % args.save_every == 0 or step == max_steps or stop):
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "images_seen": seen,
                "config": asdict(config),
                "args": vars(args),
                "classes": meta["classes"],
                "tokenizer": meta["tokenizer"],
            }
            try:
                data.save_checkpoint(state, out / "ckpt.pt")
            except OSError as error:
                parser.exit(2, f"train_var.py: {error}\n")
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
def check(args, labels, meta, resumed, world, device):
    """The tokenizer, and the transformer's config. Raises OSError or ValueError for what a user can
    get wrong."""
    if args.batch_size % world:
        raise ValueError(
            f"--batch-size {args.batch_size} does not split over {world} processes; "
            f"try --batch-size {max(args.batch_size // world, 1) * world}"
        )
    if args.micro_batch and args.batch_size // world % args.micro_batch:
        raise ValueError(
            f"--micro-batch {args.micro_batch} does not divide the {args.batch_size // world} images of "
            "each process"
        )
    if labels is None:
        raise ValueError(
            f"--codes {args.codes} was made from images with captions; VAR draws classes"
        )
    if not args.resume and (Path(args.out) / "ckpt.pt").exists():
        raise ValueError(
            f"--out {args.out} holds a run; add --resume to go on with it, or choose another folder"
        )
    fitting = [
        s for s in (var.SCALES_256, var.SCALES_512) if sum(p * p for p in s) == meta["codes"]
    ]
    tokenizer = var_vq.load_tokenizer(args.vq, device, fitting[0] if fitting else None)
    if vq.weights_hash(tokenizer) != meta["tokenizer"]:
        raise ValueError(f"--vq {args.vq} is not the tokenizer that made {args.codes}")
    config = replace(
        var.VAR_CONFIGS[args.model],
        scales=tokenizer.quantize.scales,
        vocab_size=meta["codebook_size"],
        code_dim=tokenizer.config.code_dim,
        num_classes=len(meta["classes"]),
    )
    if args.resume and not (isinstance(resumed, dict) and "depth" in resumed.get("config", {})):
        raise ValueError(f"--resume: {args.out}/ckpt.pt was not written by train_var.py")
    then = (
        {**resumed["config"], "tokenizer": resumed["tokenizer"], "classes": resumed["classes"]}
        if resumed
        else {}
    )
    now = {**asdict(config), "tokenizer": meta["tokenizer"], "classes": meta["classes"]}
    wrong = [
        f"{k} was {str(then[k])[:40]}, is {str(now[k])[:40]}" for k in then if then[k] != now[k]
    ]
    if wrong:
        raise ValueError(
            f"{args.out}/ckpt.pt is of another model or other codes ({'; '.join(wrong)}); go on with "
            "those of that run, or choose another --out"
        )
    return tokenizer, config


def picture(model, tokenizer, classes, path):
    """Draw two images of each class, with guidance."""
    labels = torch.arange(len(classes), device=model.pos_start.device).repeat(2)
    pixels = var.draw_pixels(model, tokenizer, [labels], range(len(labels)), cfg_scale=1.5)
    data.save_grid(pixels, path, len(classes), classes * 2)
    print(f"{path}: samples, guidance 1.5", flush=True)


def train_tokenizer():
    """`tokenizer`: train_vq.py, with VAR's tokenizers in place of its own."""
    sys.argv = [
        "train_var.py tokenizer",
        "--out",
        "runs/var-vq",
        *sys.argv[2:],
    ]  # of two --out the later one counts
    p = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False
    )  # three flags are looked at before
    p.usage = "python extras/train_var.py tokenizer --data shapes|DIR ... (--help lists the flags)"
    p.add_argument("--model", default="VAR-256")
    p.add_argument("--image-size", type=int, default=256)
    p.add_argument("--entropy-weight", type=float, default=0)
    args, _ = p.parse_known_args()
    if args.entropy_weight:
        p.error("--entropy-weight: VAR's quantizer has no such loss")
    if args.model in var_vq.TOKENIZERS:
        try:
            with torch.device("meta"):
                var_vq.ScaleVQ(var_vq.TOKENIZERS[args.model]).codes_per_image(args.image_size)
        except ValueError as error:
            p.error(f"--image-size {args.image_size}: {error}")
    train_vq.main(var_vq.ScaleVQ, var_vq.TOKENIZERS)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["tokenizer"]:
            train_tokenizer()
        else:
            main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, say
        sys.exit(f"train_var.py: {error}; the last checkpoint is untouched")
