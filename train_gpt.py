"""Train the Llama over image codes (gpt.py) on a folder of codes (vq.py encode), as LlamaGen does (arXiv:2406.06525).

A small one on a laptop's CPU:
$ python train_gpt.py --codes codes --model demo --batch-size 64 --lr 4e-3 --max-steps 1000 --vq runs/vq/ckpt.pt
The paper's 343M model, one node with 8 GPUs (the defaults are its recipe; --resume goes on after a stop):
$ torchrun --nproc_per_node=8 train_gpt.py --model L

The loss is plain cross-entropy: every code is predicted from its class and the codes before it.
"""
# Shapes:  B images in this process's share of a batch   T codes per image   V codebook entries   N images   A crops
import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gpt
import sample
import vq

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12}   # dense bf16 by data sheet


def flops_per_image(config):
    """Floating-point operations of one forward and backward pass over one image: 6 a weight and code, and the causal
    half of 12 a layer, channel and pair of positions for attention (arXiv:2204.02311, appendix B)."""
    T, hidden = config.grid ** 2, -(-int(8 * config.dim / 3) // 256) * 256
    weights = config.n_layer * (4 * config.dim ** 2 + 3 * config.dim * hidden) + config.dim * config.vocab_size
    return 6 * weights * T + 6 * config.n_layer * config.dim * T ** 2


def main():
    """Flags, set-up, loop."""
    # ---- flags ------------------------------------------------------------------------------------------------------
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--codes", default="codes", help="folder written by vq.py encode")
    p.add_argument("--out", default="runs/gpt", help="run folder: ckpt.pt, log.jsonl, samples_*.png")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--model", choices=gpt.GPT_CONFIGS, default="B", help="named size, see GPT_CONFIGS in gpt.py")
    p.add_argument("--batch-size", type=int, default=256, help="images per step, summed over processes")
    p.add_argument("--micro-batch", type=int, help="images that one process takes at once, if its share is too many")
    p.add_argument("--epochs", type=float, default=300, help="passes over the images, one random crop of each")
    p.add_argument("--max-steps", type=int, help="steps, instead of --epochs")
    p.add_argument("--lr", type=float, default=1e-4, help="AdamW's learning rate for 256 images; scaled with --batch-size")
    p.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    p.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--dropout", type=float, default=0.1, help="of embeddings, attention and feed-forward outputs")
    p.add_argument("--class-dropout", type=float, default=0.1, help="how often a class is hidden, for guidance")
    p.add_argument("--ema-decay", type=float, default=0.0, help="averaged weights for sampling, 0.9999 say; 0: none")
    p.add_argument("--val-images", type=int, default=0, help="images held out for a validation loss (the paper: none)")
    p.add_argument("--val-every", type=int, default=1000, help="steps between validation losses")
    p.add_argument("--vq", help="tokenizer that made the codes: draws samples_*.png")
    p.add_argument("--sample-every", type=int, default=5000, help="steps between samples_*.png; 0: none")
    p.add_argument("--log-every", type=int, default=100, help="steps")
    p.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default: on GPU)")
    args = p.parse_args()
    p.usage = "python train_gpt.py --codes DIR ... (--help lists the flags)"

    # ---- devices, seed, precision -----------------------------------------------------------------------------------
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    bf16 = args.dtype == "bfloat16" if args.dtype else device.type == "cuda"
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    torch.manual_seed(args.seed)
    out = Path(args.out)

    def say(text):
        if rank == 0:
            print(text, flush=True)

    # ---- data, resume: everything a user can get wrong is found here ------------------------------------------------
    try:
        per_rank = args.batch_size // world
        micro = args.micro_batch or per_rank
        if args.batch_size % world:
            raise ValueError(f"--batch-size {args.batch_size} does not split over {world} processes; "
                             f"try --batch-size {max(per_rank, 1) * world}")
        if per_rank % micro:
            raise ValueError(f"--micro-batch {micro} does not divide the {per_rank} images of each process")
        codes, labels, meta = vq.load_codes(args.codes)
        if meta["h"] != meta["w"]:
            raise ValueError(f"--codes {args.codes}: {meta['h']} x {meta['w']} codes an image; only squares are trained")
        if not 0 <= args.val_images < len(codes):
            raise ValueError(f"--val-images {args.val_images}: the folder has {len(codes)} images")
        config = replace(gpt.GPT_CONFIGS[args.model], vocab_size=meta["codebook_size"], grid=meta["h"],
                         num_classes=len(meta["classes"]), dropout=args.dropout, class_dropout=args.class_dropout)
        if not args.resume and (out / "ckpt.pt").exists():
            raise ValueError(f"--out {out} holds a run; add --resume to go on with it, or choose another folder")
        resumed = gpt.read_checkpoint(out / "ckpt.pt") if args.resume else None
        if resumed and resumed["config"] != asdict(config):
            wrong = {k: v for k, v in resumed["config"].items() if v != asdict(config)[k]}
            raise ValueError(f"{out}/ckpt.pt is of another model or other codes: it has {wrong}")
        vq_model = vq.load_vq(args.vq, device) if args.vq and rank == 0 else None
        if vq_model and vq.weights_hash(vq_model) != meta["tokenizer"]:
            raise ValueError(f"--vq {args.vq} is not the tokenizer that made {args.codes}")
    except (OSError, ValueError) as error:
        p.error(str(error))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    T = meta["h"] * meta["w"]
    order = np.random.RandomState(0).permutation(len(codes))   # the same images are held out whatever --seed
    train_ids, val_ids = order[args.val_images:], np.sort(order[:args.val_images])
    max_steps = args.max_steps or math.ceil(args.epochs * len(train_ids) / args.batch_size)
    lr = args.lr * args.batch_size / 256

    def to_device(ids, crops):
        """Images' numbers and the crop of each -> codes (B, T) int64, labels (B,) int64."""
        rows = torch.from_numpy(codes[ids, crops].astype(np.int64))
        return rows.to(device, non_blocking=True), torch.from_numpy(labels[ids].astype(np.int64)).to(device)

    # ---- model and optimizer ----------------------------------------------------------------------------------------
    model = gpt.GPT(config).to(device)
    matrices = [q for q in model.parameters() if q.dim() > 1]   # scales of norms are not decayed
    scales = [q for q in model.parameters() if q.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": scales, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95), fused=True)
    first, seen = 0, 0
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        first, seen = resumed["step"], resumed["images_seen"]
    ema = {k: v.clone() for k, v in model.state_dict().items()} if args.ema_decay else None
    if ema and resumed and resumed["ema"]:
        ema = {k: v.to(device) for k, v in resumed["ema"].items()}
    forward = torch.compile(model) if compiled else model
    if world > 1:
        forward = DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None)
    peak = next((v for k, v in PEAK_FLOPS.items() if device.type == "cuda" and k in torch.cuda.get_device_name()), None)

    say(f"torch {torch.__version__}, {world} process(es) on {device.type}, {'bfloat16' if bf16 else 'float32'}"
        f"{', compiled' if compiled else ''}")
    say(f"{args.model}: {sum(q.numel() for q in model.parameters()) / 1e6:.1f}M parameters; {T} codes of {config.vocab_size:,} "
        f"an image, {config.num_classes} classes")
    say(f"{args.codes}: {len(train_ids):,} images x {codes.shape[1]} crops, {len(val_ids)} held out; {max_steps:,} steps of "
        f"{args.batch_size} images ({args.batch_size * T:,} codes) = {max_steps * args.batch_size / len(train_ids):.1f} "
        f"epochs -> {out}")
    say(f"the first loss should be {math.log(config.vocab_size):.2f} = ln({config.vocab_size}), since the output layer starts "
        "at zero" if not resumed else f"resumed at step {first}")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)

    # ---- loop -------------------------------------------------------------------------------------------------------
    pairs = vq.shuffled(len(train_ids), args.seed, seen)
    step, total, clock, clock_step, record = first, torch.zeros((), device=device), time.time(), first, {}
    while step < max_steps:
        # 1. learning rate of this step; its dropout too follows from (seed, step, process), so that a resumed run needs
        #    no stored random state
        scale = min(1, (step + 1) / max(args.warmup_steps, 1))
        if args.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2 ** 63)

        # 2. this process's share of the batch: a random crop of each image
        ids = train_ids[[index for _, (_, index) in zip(range(args.batch_size), pairs)]]
        crops = np.random.RandomState((args.seed * 1_000_003 + step) % 2 ** 32).randint(codes.shape[1], size=len(ids))
        share = slice(rank * per_rank, (rank + 1) * per_rank)
        tokens, classes = to_device(ids[share], crops[share])

        # 3. forward and backward over the micro-batches; gradients sync on the last one
        model.train()
        for i in range(0, per_rank, micro):
            if world > 1:
                forward.require_backward_grad_sync = i + micro == per_rank
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = forward(tokens[i:i + micro, :-1], classes[i:i + micro])     # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[i:i + micro].flatten()) * micro / per_rank
            loss.backward()
            total += loss.detach()

        # 4. clip and update; averaged weights follow, with a decay that grows so that early ones are soon forgotten
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        if not torch.isfinite(norm):
            sys.exit(stopped(rank, f"the loss is not finite at step {step}; {out}/ckpt.pt is the last good state. "
                             "A lower --lr or --dtype float32 may help"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    ema[name].lerp_(value, 1 - decay)
        step, seen = step + 1, seen + args.batch_size

        # 5. one line, validation, a picture, a checkpoint
        due = {k: every and (step % every == 0 or step == max_steps) for k, every in
               (("log", args.log_every), ("val", args.val_images and args.val_every), ("sample", args.sample_every),
                ("save", args.save_every))}
        if due["val"]:
            record["val_loss"] = validate(model, val_ids[rank::world], to_device, micro, world, device, bf16)
        if due["log"] or due["val"] or step == first + 1:
            if world > 1:
                dist.all_reduce(total)
            now, steps = time.time(), step - clock_step
            dt = (now - clock) / steps
            record = {"step": step, "loss": float(total) / world / steps, **record, "lr": lr * scale, "norm": float(norm),
                      "codes_per_s": args.batch_size * T / dt}
            if peak:
                record["mfu"] = flops_per_image(config) * args.batch_size / dt / peak / world
            if rank == 0:
                with open(out / "log.jsonl", "a") as f:
                    f.write(json.dumps(record) + "\n")
            say(f"step {step:06d}/{max_steps} | loss {record['loss']:.4f}"
                + (f" | val {record['val_loss']:.4f}" if "val_loss" in record else "")
                + f" | lr {lr * scale:.1e} | norm {float(norm):.2f} | {dt * 1e3:.0f} ms | {record['codes_per_s']:,.0f} codes/s"
                + (f" | MFU {record['mfu']:.1%}" if peak else "") + f" | {(max_steps - step) * dt / 60:.1f} min left")
            total.zero_()
            clock, clock_step, record = now, step, {}
        if due["sample"] and vq_model:
            picture(model, ema, vq_model, meta["classes"], out / f"samples_{step:06d}.png")
        if due["save"] and rank == 0:
            try:
                vq.save_checkpoint(
                    {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "step": step,
                     "images_seen": seen, "config": asdict(config), "classes": meta["classes"],
                     "tokenizer": meta["tokenizer"], "image_size": meta["image_size"], "args": vars(args)}, out / "ckpt.pt")
            except OSError as error:
                sys.exit(stopped(rank, str(error)))
    if world > 1:
        dist.destroy_process_group()
    say(f"done: {out}/ckpt.pt")


def stopped(rank, text):
    """Print why a run ends early (once) and return its exit code."""
    if rank == 0:
        print(f"train_gpt.py: {text}", file=sys.stderr)
    return 2


@torch.no_grad()
def validate(model, ids, to_device, micro, world, device, bf16):
    """Mean loss over the first crop of the held-out images, without dropout; ids are this process's part of them."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for i in range(0, len(ids), micro):
        tokens, classes = to_device(ids[i:i + micro], np.zeros(len(ids[i:i + micro]), dtype=int))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(tokens[:, :-1], classes)
        sums += torch.stack([F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="sum").double(),
                             torch.tensor(float(tokens.numel()), dtype=torch.float64, device=device)])
    if world > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def picture(model, ema, vq_model, names, path):
    """Draw two images of each of the first ten classes, with the averaged weights where there are some."""
    shadow = gpt.GPT(model.config).to(model.norm.weight.device).eval()
    shadow.load_state_dict(ema or model.state_dict())
    labels = list(range(min(10, len(names)))) * 2
    cond = torch.tensor(labels, device=model.norm.weight.device)
    codes = sample.generate(shadow, cond, cfg_scale=2.0, seeds=range(len(labels)))
    vq.save_grid(sample.to_pixels(vq_model, codes), path, len(labels) // 2, [names[c] for c in labels])
    print(f"{path}: samples, guidance 2", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
