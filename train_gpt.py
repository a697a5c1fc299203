"""Train the Llama over image codes (gpt.py) on a folder of codes (vq.py encode), as LlamaGen does
(arXiv:2406.06525).

A small one on a laptop's CPU:
$ python train_gpt.py --codes codes --model demo --batch-size 64 --lr 4e-3 --max-steps 1000 --vq runs/vq/ckpt.pt
The paper's 343M model, one node with 8 GPUs (the defaults are its recipe; --resume goes on after a
stop):
$ torchrun --nproc_per_node=8 train_gpt.py --model L
The 3.1B model on two nodes, which both run this line; its weights, gradients and averages are
sharded (FSDP):
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train_gpt.py --model 3B
The paper's text model in its two stages, after nanollamagen.captions encode; the second starts from
the weights of the first:
$ torchrun --nproc_per_node=8 train_gpt.py --cond text --codes codes256 --model XL --out runs/t2i-256
$ torchrun --nproc_per_node=8 train_gpt.py --cond text --codes codes512 --model XL --init runs/t2i-256/ckpt.pt \
      --image-size 512 --out runs/t2i-512

The loss is plain cross-entropy: every code is predicted from its class or caption and the codes
before it.
"""

# Shapes:  B images in this process's share of a batch   T codes per image   V codebook entries   N images   A crops
#          c condition tokens   D features of a caption's token
import argparse
import itertools
import math
import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gpt
import sample
import vq
from nanollamagen import captions, data, runs

# Batch size and learning rate (for 256 images) of the authors' runs, by their table (official
# repository, issue 8). Other sizes, and captions: 256 and 1e-4
RECIPES = {"XL": (256, 2e-4), "XXL": (512, 1e-4), "3B": (512, 1e-4)}
SHORT_CAPTIONS = (
    0.3  # how often an image's short caption takes the place of its caption, where it has one
)


# ---- flags -------------------------------------------------------------------------------------
def parse():
    """The command line: its parser, and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--codes", default="codes", help="folder written by vq.py encode")
    p.add_argument(
        "--cond",
        choices=["class", "text"],
        help="what images are drawn from (default: what --codes has)",
    )
    p.add_argument(
        "--image-size", type=int, help="pixels a side that the codes must be of (default: any)"
    )
    p.add_argument(
        "--init",
        metavar="CKPT",
        help="start from the weights of this model, whatever its image size",
    )
    p.add_argument(
        "--out",
        default="runs/gpt",
        help="run folder: ckpt.pt or ckpt_STEP/, log.jsonl, samples_*.png",
    )
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    # the model and its recipe
    p.add_argument(
        "--model",
        choices=gpt.GPT_CONFIGS,
        default="B",
        help="named size, see GPT_CONFIGS in gpt.py",
    )
    p.add_argument(
        "--batch-size",
        type=int,
        help="images per step, summed over processes (default: the paper's for "
        "the --model, 256 or 512)",
    )
    p.add_argument(
        "--micro-batch",
        type=int,
        help="images that one process takes at once, if its share is too many",
    )
    p.add_argument(
        "--epochs", type=float, default=300, help="passes over the images, one random crop of each"
    )
    p.add_argument("--max-steps", type=int, help="steps, instead of --epochs")
    p.add_argument(
        "--lr",
        type=float,
        help="AdamW's rate for 256 images, scaled with --batch-size (default: the "
        "paper's for the --model, 1e-4 or 2e-4)",
    )
    p.add_argument(
        "--schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0"
    )
    p.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument(
        "--dropout",
        type=float,
        default=0.1,
        help="of embeddings, attention and feed-forward outputs",
    )
    p.add_argument(
        "--class-dropout",
        type=float,
        default=0.1,
        help="how often class or caption is hidden (guidance)",
    )
    p.add_argument(
        "--ema-decay",
        type=float,
        default=0.0,
        help="averaged weights for sampling, 0.9999 say; 0: none",
    )
    # what a run shows and keeps
    p.add_argument(
        "--val-images",
        type=int,
        default=0,
        help="images held out for a validation loss (the paper: none)",
    )
    p.add_argument("--val-every", type=int, default=1000, help="steps between validation losses")
    p.add_argument("--vq", help="tokenizer that made the codes: draws samples_*.png")
    p.add_argument(
        "--sample-every", type=int, default=5000, help="steps between samples_*.png; 0: none"
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
    p.add_argument(
        "--consolidate",
        action="store_true",
        help="FSDP: write ckpt.pt at every save, not only at the end",
    )
    # the machine
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--device", type=data.device, help="cuda or cpu (default: cuda where there is one)"
    )
    p.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)"
    )
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile blocks (default: on GPU)",
    )
    p.add_argument(
        "--parallel",
        choices=["auto", "ddp", "fsdp"],
        default="auto",
        help="ddp: every process holds the "
        "model; fsdp: a shard of it; auto: fsdp above 1B parameters, on several processes",
    )
    p.add_argument(
        "--shard-size",
        type=int,
        help="FSDP: processes that share one copy of the model, those of a node say (default: all)",
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
    p.usage = "python train_gpt.py --codes DIR ... (--help lists the flags)"
    return p, args


# ---- loss --------------------------------------------------------------------------------------
def cross_entropy_(logits, tokens, scale=1.0):
    """The sum of -log p over logits (B, T, V) and tokens (B, T), times scale; its gradient
    overwrites the logits.

    A step's largest tensors would be this loss's: in float32 autograd holds three of the logits'
    size. Here there are the logits alone, in their own type, since log-probabilities and gradient
    exist for a few rows at a time."""
    rows = (
        1024 if logits.is_cuda else 64
    )  # small kernels are slow on a GPU, large buffers do not fit a CPU's cache
    total = torch.zeros((), device=logits.device)
    chunks = zip(
        logits.detach().view(-1, logits.shape[-1]).split(rows), tokens.reshape(-1, 1).split(rows)
    )
    for chunk, targets in chunks:
        log_p = chunk.float().log_softmax(-1)  # (rows, V)
        total -= log_p.gather(1, targets).sum()
        gradient = log_p.exp_()  # softmax, minus 1 where the target is
        gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1)).mul_(scale)
        chunk.copy_(gradient)
    return total * scale


# ---- training ----------------------------------------------------------------------------------
def main():
    """Flags, devices, data, model, optimizer, loop."""
    parser, args = parse()

    # ---- devices, precision ---------------------------------------------------------------------
    # torchrun starts this script once for each GPU, and tells each process its number in these
    # variables
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_flags(parser, args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        )
        torch.cuda.set_device(device)
    bf16 = args.dtype == "bfloat16" if args.dtype else device.type == "cuda"
    compiled = runs.can_compile(args.compile, device)
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=bf16
    )  # weights stay float32
    out = Path(args.out)
    signals = runs.catch_signals()

    def print0(text):
        if rank == 0:
            print(text, flush=True)

    # ---- data -----------------------------------------------------------------------------------
    # Codes (N, A, T) uint16 stay on disk: ImageNet's are 13 GB. Beside them each image has a label,
    # or captions whose features (tokens, D) stay on disk too. What does not go together is refused
    # at once, by check_files().
    try:
        codes, labels, meta = data.load_codes(args.codes)
        text, spans, encoder = (
            captions.load_text(args.codes) if labels is None else (None, None, None)
        )
        usable, given = np.arange(len(codes)), {"num_classes": len(meta["classes"])}
        if encoder:
            usable = np.flatnonzero(
                spans[:, 0, 1] > spans[:, 0, 0]
            )  # there is no loss on images without a caption
            given = {
                "num_classes": 0,
                "cond_tokens": captions.CAPTION_TOKENS,
                "caption_dim": encoder["dim"],
            }
        config = replace(
            gpt.GPT_CONFIGS[args.model],
            vocab_size=meta["codebook_size"],
            grid=meta["h"],
            dropout=args.dropout,
            class_dropout=args.class_dropout,
            **given,
        )
        recipe = (256, 1e-4) if encoder else RECIPES.get(args.model, (256, 1e-4))
        args.batch_size = recipe[0] if args.batch_size is None else args.batch_size
        args.lr = recipe[1] if args.lr is None else args.lr
        with torch.device("meta"):
            model = gpt.GPT(
                config
            )  # shapes only; memory comes when it is known what this process holds
        parameters = sum(weight.numel() for weight in model.parameters())
        sharded = (
            args.parallel == "fsdp" or args.parallel == "auto" and parameters > 1e9 and world > 1
        )
        path, resumed = runs.find_checkpoint(out)
        init = gpt.load_gpt(args.init) if args.init and not resumed else None
        vq_model = vq.load_vq(args.vq, device) if args.vq and rank == 0 else None
        source = {
            "classes": meta["classes"],
            "tokenizer": meta["tokenizer"],
            "image_size": meta["image_size"],
            "crops": meta.get("crops"),
            "images": len(codes),
            "text": encoder,
        }
        check_files(
            args, world, sharded, meta, config, source, len(usable), path, resumed, init, vq_model
        )
        board = (
            runs.open_log(out, resumed["step"] if resumed else 0, args.tensorboard)
            if rank == 0
            else None
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))

    codes.base.madvise(
        mmap.MADV_RANDOM
    )  # a row is 512 bytes; the kernel would read megabytes around each
    order = usable[
        np.random.RandomState(0).permutation(len(usable))
    ]  # the same are held out whatever --seed
    train_ids, val_ids = order[args.val_images :], np.sort(order[: args.val_images])
    max_steps = args.max_steps or math.ceil(args.epochs * len(train_ids) / args.batch_size)
    per_rank = args.batch_size // world  # images of a step that this process takes,
    micro = args.micro_batch or per_rank  # so many at a time
    T = config.grid**2

    def load(ids, crops, short=False):
        """Numbers of images, which crop of each, and whether its short caption is wanted -> codes
        (B, T) int64, and labels (B,) int64, or features of captions (B, c, D) and their mask (B,
        c)."""
        tokens = torch.from_numpy(codes[ids, crops].astype(np.int64))
        if not encoder:
            return tokens, torch.from_numpy(labels[ids].astype(np.int64))
        rows = captions.caption_features(text, spans, ids, short)
        longest = (
            config.cond_tokens if compiled else max(map(len, rows))
        )  # compiled code wants one shape
        return tokens, *captions.pad_left(rows, longest)

    def batches(step, seen):
        """This process's share of each batch from `step` on, when `seen` images have been used.
        Each epoch takes the images in another order, which follows from its number: a resumed run
        needs to know no more. Every process draws for the whole batch, which is thus the same
        however many processes share it."""
        images = vq.shuffled(len(train_ids), args.seed, seen)
        share = slice(rank * per_rank, (rank + 1) * per_rank)
        for step in range(step, max_steps):
            ids = train_ids[[index for _, index in itertools.islice(images, args.batch_size)]]
            rng = np.random.RandomState((args.seed * 1_000_003 + step) % 2**32)
            crops = rng.randint(codes.shape[1], size=len(ids))
            short = rng.rand(len(ids)) < SHORT_CAPTIONS
            batch = load(ids[share], crops[share], short[share])
            yield [x.pin_memory() for x in batch] if device.type == "cuda" else batch

    # ---- model ----------------------------------------------------------------------------------
    if world > 1 or sharded:  # the timeout: a process that waits for a dead one ends too
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=args.timeout)
        )
    for layer in model.layers:
        # block by block, so that FSDP's transfers and checkpoints stay between the compiled parts
        if compiled:
            layer.forward = torch.compile(layer.forward)
        if args.checkpoint_activations:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if sharded:
        shard(model, args.shard_size, device, bf16)
    model.to_empty(
        device=device
    )  # memory for all of the weights, or for this process's shard of each
    if not resumed:
        weights = model.state_dict()
        for name, value in init.state_dict().items() if init else model.initial_weights(args.seed):
            weights[name].copy_(runs.part(value, weights[name]))
        init = None  # lets go of its memory
    forward = model
    if (
        world > 1 and not sharded
    ):  # averages the gradients over the processes while the backward pass still runs
        forward = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )

    # ---- optimizer ------------------------------------------------------------------------------
    lr = args.lr * args.batch_size / 256
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    scales = [
        weight for weight in model.parameters() if weight.dim() == 1
    ]  # of the norms; they are not decayed
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    ema = (
        {name: value.clone() for name, value in model.state_dict().items()}
        if args.ema_decay
        else None
    )
    first, seen = 0, 0
    if resumed:
        first, seen = runs.restore_run(model, optimizer, ema, path, resumed)
        resumed = None  # lets go of the file

    about = (
        f"captions through {encoder['encoder']} ({encoder['dim']} features a token), which "
        f"{len(codes) - len(usable):,} images do not have"
        if encoder
        else f"{config.num_classes} classes"
    )
    print0(
        f"torch {torch.__version__}, {world} process(es) on {device.type}{' with FSDP' * sharded}, "
        f"{'bfloat16' if bf16 else 'float32'}{', compiled' * compiled}"
    )
    print0(
        f"{args.model}: {parameters / 1e6:.1f}M parameters; {T} codes of {config.vocab_size:,} an image, {about}"
    )
    print0(
        f"{args.codes}: {len(train_ids):,} images x {codes.shape[1]} crops, {len(val_ids)} held out; {max_steps:,} "
        f"steps of {args.batch_size} images ({args.batch_size * T:,} codes) = "
        f"{max_steps * args.batch_size / len(train_ids):.1f} epochs, learning rate {lr:.1e} -> {out}"
    )
    if first:
        print0(f"resumed at step {first} from {path}")
    elif args.init:
        print0(f"the first weights are those of {args.init}")
    else:
        print0(
            f"the first loss should be {math.log(config.vocab_size):.2f} = ln({config.vocab_size}), since the "
            "output layer starts at zero"
        )

    # ---- loop -----------------------------------------------------------------------------------
    def due(every):
        """Whether it is time for what happens every so many steps, and at the end."""
        return every > 0 and (step % every == 0 or step == max_steps)

    def store():
        """Write a checkpoint; all processes call it."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"ema": ema} if ema else {}
        plain = {
            "step": step,
            "images_seen": seen,
            "config": asdict(config),
            "args": vars(args),
            **source,
        }
        try:
            runs.save(
                state, plain, out, rank, sharded, args.consolidate or step >= max_steps, args.keep
            )
        except OSError as error:
            parser.exit(2, f"train_gpt.py: {error}\n" * (rank == 0))

    model.train()
    step, stop, val_loss = first, False, None
    total = torch.zeros((), device=device)  # losses since the last line was printed
    clock, clock_step = time.time(), first
    coming = one_ahead(batches(first, seen))
    if (
        sharded and first >= max_steps and path.is_dir()
    ):  # ended before its shards were joined to ckpt.pt
        store()
    while step < max_steps and not stop:
        # 1. Learning rate of this step. Its dropout too follows from (seed, step, process), so that
        #    a resumed run needs
        #    no stored random state.
        scale = min(1, (step + 1) / max(args.warmup_steps, 1))
        if args.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)

        # 2. This process's share of the batch, which was read while the step before ran.
        batch = [x.to(device, non_blocking=True) for x in next(coming)]

        # 3. Forward and backward over the micro-batches. DDP averages gradients over the processes
        #    after the last one;
        #    FSDP after each, so that no process holds more than its shard of them, and over copies of the model after
        #    the last. The loss has put its gradient where the logits were: there the backward pass starts.
        for i in range(0, per_rank, micro):
            if sharded:
                model.set_requires_all_reduce(i + micro == per_rank)
            elif world > 1:
                forward.require_backward_grad_sync = i + micro == per_rank
            tokens, *given = [x[i : i + micro] for x in batch]
            with autocast():
                logits = forward(tokens[:, :-1], *given)  # (B, T, V)
            total += cross_entropy_(logits, tokens, scale=1 / (per_rank * T))
            logits.backward(logits.detach())

        # 4. Clip and update. The averaged weights follow, quickly at first: with a decay of 0.9999
        #    from the start, the
        #    random first weights would be among them for ten thousand steps.
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        norm = norm.full_tensor() if sharded else norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            averages = [ema[name] for name, _ in model.named_parameters()]
            with torch.no_grad():
                torch._foreach_lerp_(
                    averages, list(model.parameters()), 1 - decay
                )  # a few launches for all tensors
        step, seen = step + 1, seen + args.batch_size

        # 5. One line, validation, a picture, a checkpoint; but first: is all well? To learn it, the
        #    CPU waits until
        #    a GPU has done all its work. So it asks rarely, though always before it shows or saves something.
        showing = any(
            map(due, (args.log_every, args.val_every, args.sample_every, args.save_every))
        )
        if showing or step % 10 == 0 or step == first + 1 or device.type == "cpu":
            finite, stop = runs.status(norm, bool(signals), world)
            if not finite:
                parser.exit(
                    2,
                    f"train_gpt.py: the loss is not finite at step {step}; {out} holds the last good state. "
                    "A lower --lr or --dtype float32 may help\n" * (rank == 0),
                )
        if args.val_images and due(args.val_every):
            val_loss = validate(model, val_ids, load, micro, rank, world, device, autocast)
        if due(args.log_every) or val_loss is not None or step == first + 1 or stop:
            if world > 1:
                dist.all_reduce(total)
            seconds = (time.time() - clock) / (step - clock_step)
            record = {
                "step": step,
                "loss": float(total) / world / (step - clock_step),
                "val_loss": val_loss,
                "lr": lr * scale,
                "norm": float(norm),
                "codes_per_s": args.batch_size * T / seconds,
                "mfu": gpt.utilisation(config, args.batch_size / world / seconds, device),
            }
            record = {name: value for name, value in record.items() if value is not None}
            if rank == 0:
                runs.log(record, out, board)
                print_step(record, seconds, max_steps)
            total.zero_()
            clock, clock_step, val_loss = time.time(), step, None
        if args.vq and due(args.sample_every):
            weights = runs.whole(ema or model.state_dict())
            if rank == 0:
                given, titles = conditions(config, meta, Path(args.codes), text, spans, usable)
                picture(
                    config,
                    weights,
                    vq_model,
                    given,
                    titles,
                    device,
                    out / f"samples_{step:06d}.png",
                )
        if due(args.save_every) or stop:
            store()
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
def check_flags(parser, args):
    """Refuse, with one sentence, what can be seen from the flags alone."""
    data.within(
        parser,
        args,
        image_size=(1, 8192),
        seed=(0, 2**32),
        batch_size=(1, 2**20),
        micro_batch=(1, 2**20),
        epochs=(1e-6, 1e6),
        max_steps=(1, 1e9),
        lr=(0, 10),
        warmup_steps=(0, 1e9),
        weight_decay=(0, 10),
        grad_clip=(1e-9, 1e9),
        dropout=(0, 0.999),
        class_dropout=(0, 1),
        ema_decay=(0, 0.9999999),
        val_images=(0, 1e9),
        val_every=(1, 1e9),
        sample_every=(0, 1e9),
        log_every=(1, 1e9),
        save_every=(1, 1e9),
        keep=(0, 1e6),
        shard_size=(1, 2**20),
        timeout=(0.01, 1e6),
    )
    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if gpus and args.device != "cpu" and local_rank >= gpus:
        parser.error(
            f"torch sees {gpus} GPUs here, and each process needs one; --device cpu needs none"
        )


def check_files(args, world, sharded, meta, config, source, usable, path, resumed, init, vq_model):
    """Raise ValueError, with one sentence, if codes, checkpoints and flags do not belong
    together."""
    per_rank = args.batch_size // world
    if args.batch_size % world:
        raise ValueError(
            f"--batch-size {args.batch_size} does not split over {world} processes; "
            f"try --batch-size {max(per_rank, 1) * world}"
        )
    if args.micro_batch and per_rank % args.micro_batch:
        raise ValueError(
            f"--micro-batch {args.micro_batch} does not divide the {per_rank} images of each process"
        )

    kinds = {"class": "classes", "text": "captions"}
    kind = "text" if source["text"] else "class"
    if meta["h"] != meta["w"]:
        raise ValueError(
            f"--codes {args.codes}: {meta['h']} x {meta['w']} codes an image; only squares will do"
        )
    if meta["codes"] != meta["h"] * meta["w"]:
        raise ValueError(
            f"--codes {args.codes} holds grids of several sizes an image, for extras/train_var.py"
        )
    if args.cond not in (None, kind):
        raise ValueError(
            f"--cond {args.cond}: {args.codes} was made from images with {kinds[kind]}"
        )
    if args.image_size not in (None, meta["image_size"]):
        raise ValueError(
            f"--image-size {args.image_size}: {args.codes} holds codes of {meta['image_size']}-pixel "
            "images; vq.py encode --image-size makes others"
        )
    if not 0 <= args.val_images < usable:
        raise ValueError(f"--val-images {args.val_images}: the folder has {usable} images")
    if vq_model and vq.weights_hash(vq_model) != meta["tokenizer"]:
        raise ValueError(f"--vq {args.vq} is not the tokenizer that made {args.codes}")

    if sharded and "RANK" not in os.environ:
        raise ValueError("--parallel fsdp: start it with torchrun")
    if args.shard_size and not sharded:
        raise ValueError("--shard-size is for --parallel fsdp")
    if args.shard_size and world % args.shard_size:
        raise ValueError(f"--shard-size {args.shard_size} does not divide the {world} processes")

    if resumed and not args.resume:
        raise ValueError(
            f"--out {args.out} holds a run; add --resume to go on with it, or choose another folder"
        )
    if args.resume and not resumed:
        raise ValueError(f"--resume: {args.out}/ckpt.pt: no such file, and no folder ckpt_STEP")
    if resumed:
        now, then = {**asdict(config), **source}, {**resumed["config"], **resumed}
        changed = [
            f"{name} was {str(then[name])[:40]}, is {str(now[name])[:40]}"
            for name in now
            if then.get(name, now[name]) != now[name]
        ]
        if changed:
            raise ValueError(
                f"{path} is of another model or other codes ({'; '.join(changed)}); go on with those of "
                "that run, or choose another --out"
            )
    if init:
        init_kind = "text" if init.config.caption_dim else "class"
        if init_kind != kind:
            raise ValueError(
                f"--init {args.init} is a model for {kinds[init_kind]}, but {args.codes} was made from "
                f"images with {kinds[kind]}"
            )
        here, there = asdict(config), asdict(init.config)
        differing = [
            f"{name} {there[name]} there, {here[name]} here"
            for name in there
            if there[name] != here[name] and name not in ("grid", "dropout", "class_dropout")
        ]
        if differing:
            raise ValueError(
                f"--init {args.init} does not fit --model {args.model} and {args.codes}: "
                f"{', '.join(differing)}"
            )
        if init.text and init.text["hash"] != source["text"]["hash"]:
            raise ValueError(
                f"--init {args.init} was trained on captions of another encoder "
                f"({init.text['encoder']}) than {args.codes} ({source['text']['encoder']})"
            )


# ---- data --------------------------------------------------------------------------------------
def one_ahead(items):
    """The items of a generator, each made by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


# ---- shards ------------------------------------------------------------------------------------
def shard(model, shard_size, device, bf16):
    """FSDP: cut every weight into a piece for each process, or for each `shard_size` of them, so
    that there are several whole copies. A block's weights come together when it runs and are let go
    of afterwards."""
    world = dist.get_world_size()
    shape = (world // shard_size, shard_size) if shard_size else (world,)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    # weights stay float32 and travel as bfloat16; inputs are not cast, since the rotary table is
    # float32
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(
            True
        )  # and then divide: gloo's mean is a sum in torch 2.8


# ---- how a run goes ----------------------------------------------------------------------------
def print_step(record, seconds, max_steps):
    """One line."""
    print(
        f"step {record['step']:06d}/{max_steps} | loss {record['loss']:.4f}"
        + (f" | val {record['val_loss']:.4f}" if "val_loss" in record else "")
        + f" | lr {record['lr']:.1e} | norm {record['norm']:.2f} | {seconds * 1e3:.0f} ms"
        + f" | {record['codes_per_s']:,.0f} codes/s"
        + (f" | MFU {record['mfu']:.1%}" if "mfu" in record else "")
        + f" | {(max_steps - record['step']) * seconds / 60:.1f} min left",
        flush=True,
    )


@torch.no_grad()
def validate(model, ids, load, micro, rank, world, device, autocast):
    """Mean loss over the first crop of the held-out images, without dropout, shared among the
    processes."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of codes
    for i in range(
        0, len(ids), micro * world
    ):  # as many forward passes everywhere: under FSDP they are collective
        mine = ids[i : i + micro * world][rank::world]
        padded = mine if len(mine) else ids[:1]
        tokens, *given = [x.to(device) for x in load(padded, np.zeros(len(padded), dtype=int))]
        with autocast():
            logits = model(tokens[:, :-1], *given)
        if len(mine):
            loss = cross_entropy_(logits, tokens).double()
            sums += torch.stack([loss, loss.new_tensor(tokens.numel())])
    if world > 1:
        dist.all_reduce(sums)
    model.train()
    return float(sums[0] / sums[1])


def conditions(config, meta, folder, text, spans, usable):
    """What samples are drawn from, and their titles: ten classes as [labels], or ten captions,
    spread over the first ten thousand, as [features, mask]."""
    if not config.caption_dim:
        titles = meta["classes"][:10]
        return [torch.arange(len(titles))], titles
    ids = np.unique(usable[np.linspace(0, min(len(usable), 10_000) - 1, 10).astype(int)])
    first_lines = itertools.islice(
        captions.read_captions(folder / "captions.jsonl"), int(ids[-1]) + 1
    )
    titles = [caption for i, (caption, _) in enumerate(first_lines) if i in ids]
    return captions.pad_left(
        captions.caption_features(text, spans, ids, False), config.cond_tokens
    ), titles


def picture(config, weights, vq_model, given, titles, device, path):
    """Draw two images of each condition, given as [labels] or [features, mask]. The model for it
    has the training state beside it: on a GPU it is bfloat16, and draws a few images at once."""
    with torch.device("meta"):
        model = gpt.GPT(config).eval()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model.load_state_dict(
        {name: value.to(device, dtype) for name, value in weights.items()}, assign=True
    )
    model.to(device)  # makes the rotary table
    pixels, seeds = [], range(2 * len(titles))
    for few in torch.tensor(seeds).split(4):
        rows = [x[few % len(titles)].to(device) for x in given]
        codes = sample.generate(model, *rows, cfg_scale=2.0, seeds=few.tolist())
        pixels.append(sample.to_pixels(vq_model, codes))
    data.save_grid(np.concatenate(pixels), path, len(titles), titles * 2)
    print(f"{path}: samples, guidance 2", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, say
        sys.exit(f"train_gpt.py: {error}; the last checkpoint is untouched")
