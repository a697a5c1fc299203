r"""Train the Llama over image codes (gpt.py) on a folder of codes (vq.py encode), as LlamaGen does
(arXiv:2406.06525). The loss is plain cross-entropy: each code is predicted from its class or
caption and the codes before it.

A small model on a laptop's CPU:
$ python train_gpt.py --codes codes --model demo --batch-size 64 --lr 1e-3 --max-steps 1000
The paper's 343M model on 8 GPUs (the defaults are its recipe; add --resume after a stop):
$ torchrun --nproc_per_node=8 train_gpt.py --model L
The 3.1B model on two nodes, which both run this line. FSDP shards its weights and gradients:
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
      train_gpt.py --model 3B
The paper's text model in two stages, on codes of captioned images (nanollamagen.captions encode):
$ torchrun --nproc_per_node=8 train_gpt.py --codes codes256 --model XL --out runs/t2i-256
$ torchrun --nproc_per_node=8 train_gpt.py --codes codes512 --model XL --init runs/t2i-256/ckpt.pt
"""

# Shapes:  B images in a micro-batch   T codes per image   V codebook entries
import argparse
import math
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gpt
import sample
import vq
from nanollamagen import data, files, flags, runs
from nanollamagen.codes import Codes
from nanollamagen.loss import cross_entropy

# Batch size and learning rate. The larger ones are the authors' (issue 8 of their repository).
RECIPE, RECIPES = (256, 1e-4), {"XL": (256, 2e-4), "XXL": (512, 2e-4), "3B": (512, 2e-4)}
GRAD_CLIP = 1.0  # largest norm of the gradient


# ---- flags ---------------------------------------------------------------------------------------
def parse():
    """The parser and the flags of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = p.add_argument
    one, switch = flags.at_least_one, argparse.BooleanOptionalAction
    # fmt: off
    flag("--codes", default="codes", help="folder written by vq.py encode")
    flag("--init", metavar="CKPT", help="start from this model's weights; other classes will do")
    flag("--out", default="runs/gpt", help="run folder: ckpt.pt, log.jsonl, samples_*.png")
    flag("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    # the model and its recipe
    flag("--model", choices=gpt.GPT_CONFIGS, default="B", help="size, see GPT_CONFIGS in gpt.py")
    flag("--batch-size", type=flags.batch, help="images per step, over all processes")
    flag("--micro-batch", type=flags.batch, help="images a process takes at once")
    flag("--epochs", type=flags.positive, default=300, help="passes over the images")
    flag("--max-steps", type=one, help="steps, instead of --epochs")
    flag("--lr", type=flags.positive, help="AdamW's learning rate (default: the authors', by size)")
    flag("--schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    flag("--warmup-steps", type=flags.count, default=0, help="steps of linear warm-up")
    flag("--weight-decay", type=flags.weight, default=0.05, help="of matrices; norms have none")
    flag("--dropout", type=flags.fraction, default=0.1, help="of embeddings, attention and FFN")
    flag("--class-dropout", type=flags.fraction, default=0.1, help="of class or caption")
    flag("--ema-decay", type=flags.fraction, default=0.0, help="of averaged weights; 0: none")
    # what a run shows and keeps
    flag("--val-images", type=flags.count, default=0, help="images held out for a validation loss")
    flag("--val-every", type=one, default=1000, help="steps between validation losses")
    flag("--log-every", type=one, default=100, help="steps between lines")
    flag("--save-every", type=one, default=5000, help="steps between checkpoints and pictures")
    flag("--keep", type=flags.count, default=0, help="older checkpoints to keep, as ckpt_STEP")
    flag("--vq", help="tokenizer that made the codes; with it, samples_*.png are written")
    # the machine
    flag("--seed", type=flags.seed, default=0, help="of weights, order, crops and dropout")
    flags.add_device(p)
    flag("--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)")
    flag("--compile", action=switch, help="torch.compile the blocks (default: on GPU)")
    flag("--parallel", choices=["auto", "ddp", "fsdp", "hsdp"], default="auto",
         help="ddp: every process holds the model; fsdp: a shard of it; hsdp: each node holds one "
         "sharded copy; auto: fsdp above 1B parameters")
    flag("--checkpoint-activations", action="store_true", help="less memory, a third more work")
    # fmt: on
    p.usage = "python train_gpt.py --codes DIR ... (--help lists the flags)"
    return p, p.parse_args()


def learning_rate(args, step, max_steps):
    """The optimizer's rate for a step, counted from 0."""
    scale = 1.0
    if step < args.warmup_steps:
        scale = (step + 1) / args.warmup_steps  # not 0 in the first step
    if args.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
    return args.lr * scale


# ---- training ------------------------------------------------------------------------------------
def main():
    """Flags, processes, data, model, optimizer, resume, loop."""
    parser, args = parse()
    rank, world, device = runs.this_process(args.device)
    signals = runs.catch_signals()
    out = Path(args.out)

    # ---- data: codes on disk, and what each image is conditioned on ------------------------------
    try:
        codes = Codes(args.codes, args.val_images)
        dropout = {"dropout": args.dropout, "class_dropout": args.class_dropout}
        config = replace(gpt.GPT_CONFIGS[args.model], **codes.config, **dropout)
        recipe = RECIPES.get(args.model, RECIPE) if config.num_classes else RECIPE
        args.batch_size = args.batch_size or recipe[0]
        args.lr = args.lr or recipe[1]
        path, saved = runs.find_checkpoint(out)
        init = gpt.load_gpt(args.init) if args.init and not saved else None
        vq_model = vq.load_vq(args.vq, device) if args.vq and rank == 0 else None
        check(args, codes, config, world, path, saved, init, vq_model)
        files.make_folder(out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    share = args.batch_size // world  # images of a batch that this process takes
    micro = args.micro_batch or share  # images that it takes at once

    # ---- model: on this process's device, whole or a shard of it ---------------------------------
    bf16 = (args.dtype or flags.best_dtype(device)) == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    compiled = runs.can_compile(args.compile, device)
    with torch.device("meta"):
        model = gpt.GPT(config)  # shapes only; memory comes in build()
    parallel = args.parallel
    if parallel == "auto":
        large = sum(weight.numel() for weight in model.parameters()) > 1e9
        parallel = "fsdp" if large and world > 1 else "ddp"
    sharded = parallel != "ddp"
    if world > 1 or sharded:  # FSDP needs a process group even for one process
        runs.connect(device)
    forward = build(model, args, parallel, device, bf16, compiled)  # `model`, perhaps within DDP
    if not saved:
        runs.copy_weights(model, model.initial_weights(args.seed))
        if init:
            trained = init.state_dict()
            if init.config.num_classes != config.num_classes:
                del trained["cls_embedding.embedding_table.weight"]  # starts over
            runs.copy_weights(model, trained.items())

    # ---- optimizer -------------------------------------------------------------------------------
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    scales = [weight for weight in model.parameters() if weight.dim() == 1]  # of the norms
    groups = [{"params": matrices, "weight_decay": args.weight_decay}]
    groups += [{"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    ema = None  # averaged weights, by name
    if args.ema_decay:
        ema = {name: value.clone() for name, value in model.state_dict().items()}

    # ---- resume ----------------------------------------------------------------------------------
    step, images_seen = 0, 0
    if saved:
        step, images_seen = runs.restore_run(model, optimizer, ema, path, saved)
    images_left = max(0, args.epochs * len(codes.train_ids) - images_seen)
    max_steps = args.max_steps or step + math.ceil(images_left / args.batch_size)
    work = gpt.flops_per_image(config)
    log = runs.Log(out, step, max_steps, args.batch_size, rank, world, device, work)
    if rank == 0:
        how = f"{'bfloat16' if bf16 else 'float32'}{', compiled' if compiled else ''}"
        print(f"{world} process(es) on {device.type}, {parallel}, {how}, torch {torch.__version__}")
        describe(args, codes, model, init, step, max_steps, recipe)
    saved = init = None  # frees their memory

    def due(every):
        """Whether it is time for what happens every so many steps, and at the end."""
        return step % every == 0 or step == max_steps

    def store(joined):
        """Write a checkpoint. All processes call it. joined: under FSDP, also write ckpt.pt."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if ema:
            state["ema"] = ema
        plain = {"step": step, "images_seen": images_seen, "config": asdict(config)}
        plain |= {"args": vars(args), **codes.origin}
        try:
            runs.save(state, plain, out, rank, args.keep, sharded, joined)
        except OSError as error:
            runs.give_up(f"train_gpt.py: {error}", rank)

    if step >= max_steps and path.is_dir():  # the run ended before its shards were joined
        store(joined=True)

    # ---- loop ------------------------------------------------------------------------------------
    model.train()
    steps, cuda = range(step, max_steps), device.type == "cuda"
    batches = codes.batches(
        steps, args.batch_size, args.seed, images_seen, rank, world, pin=cuda, full_length=compiled
    )
    stop = False
    while step < max_steps and not stop:
        # 1. The learning rate, and the seed of dropout. Both follow from the step's number, so a
        #    resumed run needs no stored random state.
        lr = learning_rate(args, step, max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)

        # 2. This process's share of the batch, which was read while the step before ran.
        batch = [x.to(device, non_blocking=cuda) for x in next(batches)]

        # 3. Forward and backward, in micro-batches if the share does not fit in memory.
        step_loss = torch.zeros((), device=device)
        for i in range(0, share, micro):
            tokens, *cond = (x[i : i + micro] for x in batch)  # (B, T), then classes or captions
            average_gradients(forward, last=i + micro == share)
            with autocast():
                logits = forward(tokens[:, :-1], *cond)  # (B, T, V); logits[:, i] predicts code i
            loss = cross_entropy(logits.flatten(0, 1), tokens.flatten()) * (micro / share)
            loss.backward()
            step_loss += loss.detach()
        log.add(loss=step_loss)

        # 4. Clip and update. The averaged weights follow.
        norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        norm = norm.full_tensor() if sharded else norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            runs.average_weights(ema, dict(model.named_parameters()), args.ema_decay, step)
        step += 1
        images_seen += args.batch_size

        # 5. Is all well? Then a line, a checkpoint, a picture. Asking makes the CPU wait for the
        #    GPU, so this asks rarely, and always before something is shown or saved.
        validating = len(codes.val_ids) > 0 and due(args.val_every)
        logging = validating or step == steps.start + 1 or due(args.log_every)
        if logging or due(args.save_every) or step % 10 == 0 or device.type == "cpu":
            finite, stop = runs.status([norm], bool(signals), world)
            if not finite:
                runs.give_up(f"train_gpt.py: {runs.NOT_FINITE} at step {step}", rank)
        if logging or stop:
            val = {}
            if validating:
                val["val_loss"] = validate(model, codes, micro, rank, world, device, autocast)
            log.write(step, **val, lr=lr, norm=norm.item())
        if due(args.save_every) or stop:
            store(joined=step >= max_steps)
        if args.vq and due(args.save_every):
            weights = runs.gather(ema or model.state_dict())
            if rank == 0:
                picture(config, weights, vq_model, codes, device, out / f"samples_{step:06d}.png")

    if rank == 0 and step < max_steps:
        print(f"stopped as asked; saved at step {step}. --resume continues")
    elif rank == 0:
        print(f"done: {out}/ckpt.pt")
    runs.disconnect(device)


# ---- several processes ---------------------------------------------------------------------------
def build(model, args, parallel, device, bf16, compiled):
    """Give a model on the meta device its memory: all of it, or this process's shard. Returns what
    the training loop calls: the model, or DDP around it."""
    for layer in model.layers:
        if compiled:  # one by one: FSDP and checkpoints work between compiled blocks
            layer.forward = torch.compile(layer.forward)
        if args.checkpoint_activations:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if parallel in ("fsdp", "hsdp"):
        shard(model, parallel, device, bf16)
    model.to_empty(device=device)
    if parallel == "ddp" and dist.is_initialized():
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    return model


def shard(model, parallel, device, bf16):
    """FSDP: cut each weight into a piece for each process, or (hsdp) for each process of a node. A
    block's weights come together while it runs; they stay float32 and travel as bfloat16."""
    world = dist.get_world_size()
    sizes = (world,)
    if parallel == "hsdp":
        node = int(os.environ["LOCAL_WORLD_SIZE"])
        sizes = (world // node, node)  # copies, and shards of a copy
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "shard")[-len(sizes) :])
    travel = torch.bfloat16 if bf16 else None  # not the inputs: the rotary table is float32
    policy = MixedPrecisionPolicy(travel, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(True)  # then divide: torch 2.8's gloo has no mean


def average_gradients(model, last):
    """Tell DDP or FSDP whether the next backward pass is the last of a step. DDP averages
    gradients over the processes after the last one. FSDP does after each, so that no process holds
    more than its shard; over several copies of the model it averages after the last."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


# ---- what a run shows ----------------------------------------------------------------------------
def describe(args, codes, model, init, step, max_steps, recipe):
    """Print what is trained on what, and the loss to expect first."""
    config = model.config
    parameters = sum(weight.numel() for weight in model.parameters())  # whole ones, FSDP or not
    T, V = config.grid**2, config.vocab_size
    batch_size, images = args.batch_size, len(codes.train_ids)
    print(f"{args.model}: {parameters / 1e6:.1f}M weights; {T} codes of {V:,} per image; {codes}")
    print(
        f"{args.codes}: {images:,} images x {codes.codes.shape[1]} crops, {len(codes.val_ids):,} "
        f"held out; {max_steps:,} steps of {batch_size} images = "
        f"{max_steps * batch_size / images:.1f} epochs -> {args.out}"
    )
    scaled = recipe[1] * batch_size / recipe[0]
    hint = "" if batch_size == recipe[0] else f"; the authors', scaled to this batch: {scaled:.1e}"
    print(f"learning rate {args.lr:.1e}{hint}")
    if step:
        print(f"resumed at step {step}")
    elif init:
        print(f"the first weights are those of {args.init}")
        if init.config.num_classes != config.num_classes:
            print(f"it has {init.config.num_classes} classes: the table of classes starts over")
    else:
        print(f"the first loss should be ln({V}) = {math.log(V):.2f}: the output layer is zero")


@torch.no_grad()
def validate(model, codes, micro, rank, world, device, autocast):
    """Mean loss over the held-out images, without dropout. The processes share the images."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, of codes
    for i in range(0, len(codes.val_ids), micro * world):
        ids = codes.val_ids[i : i + micro * world][rank::world]
        # a process without images runs the model all the same: under FSDP all must call it
        batch = codes.validation(ids if len(ids) else codes.val_ids[:1])
        tokens, *cond = (x.to(device) for x in batch)
        with autocast():
            logits = model(tokens[:, :-1], *cond)
        if len(ids):
            loss = cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
            sums += torch.tensor([loss.item(), tokens.numel()], dtype=torch.float64)
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    model.train()
    return float(sums[0] / sums[1])


def picture(config, weights, vq_model, codes, device, path):
    """Sample two images for each of ten classes or captions. The training state is in memory too:
    the model for sampling is bfloat16 where a GPU has it, and makes a few images at once."""
    titles, cond = codes.examples()
    with torch.device("meta"):
        model = gpt.GPT(config).eval()
    dtype = getattr(torch, flags.best_dtype(device))
    weights = {name: value.to(device, dtype) for name, value in weights.items()}
    model.load_state_dict(weights, assign=True)
    model.to(device)  # makes the rotary table
    pixels = []
    for seeds in torch.arange(2 * len(titles)).split(4):
        rows = [x[seeds % len(titles)].to(device) for x in cond]
        tokens = sample.generate(model, *rows, cfg_scale=2.0, seeds=seeds.tolist())
        pixels.append(sample.to_pixels(vq_model, tokens))
    data.save_grid(np.concatenate(pixels), path, len(titles), titles * 2)
    print(f"{path}: samples, guidance 2", flush=True)


# ---- argument checks -----------------------------------------------------------------------------
def check(args, codes, config, world, path, saved, init, vq_model):
    """Raise ValueError if flags, codes and checkpoints do not fit together."""
    share = args.batch_size // world
    if args.batch_size % world:
        raise ValueError(
            f"--batch-size {args.batch_size} does not split over {world} processes; "
            f"try --batch-size {max(share, 1) * world}"
        )
    if args.micro_batch and share % args.micro_batch:
        what = f"does not divide the {share} images of each process"
        raise ValueError(f"--micro-batch {args.micro_batch} {what}")
    if args.dropout == 1:
        raise ValueError("--dropout 1.0: nothing would be left of the activations")
    if args.parallel in ("fsdp", "hsdp") and "RANK" not in os.environ:
        raise ValueError(f"--parallel {args.parallel}: start it with torchrun")
    if vq_model and vq.weights_hash(vq_model) != codes.origin["tokenizer"]:
        raise ValueError(f"--vq {args.vq} is not the tokenizer that made {args.codes}")
    if saved and not args.resume:
        raise ValueError(
            f"--out {args.out} holds a run; add --resume to continue it, or choose another folder"
        )
    if args.resume and not saved:
        raise ValueError(f"--resume: {args.out} has no ckpt.pt and no folder ckpt_STEP")
    if saved:
        runs.check_same_run(path, saved, asdict(config), codes.origin)
    if init:
        check_init(args, codes, config, init)


def check_init(args, codes, config, init):
    """Raise ValueError unless --init is a model of this size, for the same kind of condition."""
    if bool(init.config.caption_dim) != bool(config.caption_dim):
        kinds = ("classes", "captions") if config.caption_dim else ("captions", "classes")
        what = f"is a model for {kinds[0]}, but the images of {args.codes} have {kinds[1]}"
        raise ValueError(f"--init {args.init} {what}")
    free = ("grid", "num_classes", "dropout", "class_dropout")
    differing = [
        f"{name} {value} there, {getattr(config, name)} here"
        for name, value in asdict(init.config).items()
        if name not in free and value != getattr(config, name)
    ]
    if differing:
        what = f"does not fit --model {args.model} and {args.codes}"
        raise ValueError(f"--init {args.init} {what}: {', '.join(differing)}")
    if init.text and init.text["hash"] != codes.encoder["hash"]:
        raise ValueError(
            f"--init {args.init} was trained on captions of another encoder "
            f"({init.text['encoder']}) than {args.codes} ({codes.encoder['encoder']})"
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # such as a full disk
        sys.exit(f"train_gpt.py: {error}; the last checkpoint is untouched")
