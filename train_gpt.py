"""Train the Llama over image codes (gpt.py) on a folder of codes (vq.py encode), as LlamaGen does (arXiv:2406.06525).

A small one on a laptop's CPU:
$ python train_gpt.py --codes codes --model demo --batch-size 64 --lr 4e-3 --max-steps 1000 --vq runs/vq/ckpt.pt
The paper's 343M model, one node with 8 GPUs (the defaults are its recipe; --resume goes on after a stop):
$ torchrun --nproc_per_node=8 train_gpt.py --model L
The 3.1B model on two nodes, which both run this line; its weights, gradients and averages are sharded (FSDP):
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train_gpt.py --model 3B
The paper's text model in its two stages, after captions.py encode; the second starts from the weights of the first:
$ torchrun --nproc_per_node=8 train_gpt.py --cond text --codes codes256 --model XL --out runs/t2i-256
$ torchrun --nproc_per_node=8 train_gpt.py --cond text --codes codes512 --model XL --init runs/t2i-256/ckpt.pt \
      --image-size 512 --out runs/t2i-512

The loss is plain cross-entropy: every code is predicted from its class or caption and the codes before it.
"""
# Shapes:  B images in this process's share of a batch   T codes per image   V codebook entries   N images   A crops
import argparse
import itertools
import json
import math
import mmap
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import captions
import data
import gpt
import sample
import vq

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12}   # dense bf16 by data sheet


SHORT = 0.3   # how often an image's short caption is taken in place of its caption, where there is one


def flops_per_image(config):
    """Floating-point operations of one forward and backward pass over one image: 6 a weight and position, and the
    causal half of 12 a layer, channel and pair of positions for attention (arXiv:2204.02311, appendix B)."""
    T, hidden = config.grid ** 2, -(-int(8 * config.dim / 3) // 256) * 256
    L = config.cond_tokens + T - 1   # positions; T of them predict a code
    layers = config.n_layer * (4 * config.dim ** 2 + 3 * config.dim * hidden)
    return 6 * (layers * L + config.dim * config.vocab_size * T) + 6 * config.n_layer * config.dim * L ** 2


def cross_entropy_(logits, tokens, scale=1.0):
    """The sum of -log p over logits (B, T, V) and tokens (B, T), times scale; its gradient overwrites the logits.

    A step's largest tensors would be this loss's: in float32 autograd holds three of the logits' size. Here there are
    the logits alone, in their own type, since log-probabilities and gradient exist for a few rows at a time."""
    rows = 1024 if logits.is_cuda else 64   # small kernels are slow on a GPU, large buffers do not fit a CPU's cache
    total = torch.zeros((), device=logits.device)
    for some, targets in zip(logits.detach().view(-1, logits.shape[-1]).split(rows), tokens.reshape(-1, 1).split(rows)):
        log_p = some.float().log_softmax(-1)                                       # (rows, V)
        total -= log_p.gather(1, targets).sum()
        p = log_p.exp_()
        some.copy_(p.scatter_add_(1, targets, p.new_full(targets.shape, -1)).mul_(scale))
    return total * scale


def main():
    """Flags, set-up, loop."""
    # ---- flags ------------------------------------------------------------------------------------------------------
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--codes", default="codes", help="folder written by vq.py encode")
    p.add_argument("--cond", choices=["class", "text"], help="what images are drawn from (default: what --codes has)")
    p.add_argument("--image-size", type=int, help="pixels a side that the codes must be of (default: any)")
    p.add_argument("--init", metavar="CKPT", help="start from the weights of this model, whatever its image size")
    p.add_argument("--out", default="runs/gpt", help="run folder: ckpt.pt or ckpt_STEP/, log.jsonl, samples_*.png")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    p.add_argument("--model", choices=gpt.GPT_CONFIGS, default="B", help="named size, see GPT_CONFIGS in gpt.py")
    p.add_argument("--batch-size", type=int, default=256, help="images per step, summed over processes")
    p.add_argument("--micro-batch", type=int, help="images that one process takes at once, if its share is too many")
    p.add_argument("--epochs", type=float, default=300, help="passes over the images, one random crop of each")
    p.add_argument("--max-steps", type=int, help="steps, instead of --epochs")
    p.add_argument("--lr", type=float, default=1e-4, help="AdamW's rate for 256 images; scaled with --batch-size")
    p.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    p.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--dropout", type=float, default=0.1, help="of embeddings, attention and feed-forward outputs")
    p.add_argument("--class-dropout", type=float, default=0.1, help="how often class or caption is hidden (guidance)")
    p.add_argument("--ema-decay", type=float, default=0.0, help="averaged weights for sampling, 0.9999 say; 0: none")
    p.add_argument("--val-images", type=int, default=0, help="images held out for a validation loss (the paper: none)")
    p.add_argument("--val-every", type=int, default=1000, help="steps between validation losses")
    p.add_argument("--vq", help="tokenizer that made the codes: draws samples_*.png")
    p.add_argument("--sample-every", type=int, default=5000, help="steps between samples_*.png; 0: none")
    p.add_argument("--log-every", type=int, default=100, help="steps")
    p.add_argument("--tensorboard", action="store_true", help="write what log.jsonl gets for TensorBoard too")
    p.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints")
    p.add_argument("--keep", type=int, default=0, help="older checkpoints to keep beside the newest, as ckpt_STEP")
    p.add_argument("--consolidate", action="store_true", help="FSDP: write ckpt.pt at every save, not only at the end")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default: on GPU)")
    p.add_argument("--parallel", choices=["auto", "ddp", "fsdp"], default="auto", help="ddp: every process holds the "
                   "model; fsdp: a shard of it; auto: fsdp above 1B parameters, on several processes")
    p.add_argument("--shard-size", type=int, help="FSDP: processes that share one copy of the model, those of a node "
                   "say (default: all)")
    p.add_argument("--checkpoint-activations", action="store_true", help="compute each block again in the backward "
                   "pass: less memory, a third more work")
    p.add_argument("--timeout", type=float, default=10, help="minutes a process waits for the others before it ends")
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
    out, caught = Path(args.out), []
    # what queues send before they kill: finish the step and save (not where a test imports this file: let it be ended)
    for number in (signal.SIGTERM, signal.SIGUSR1) if __name__ == "__main__" else ():
        signal.signal(number, lambda number, _: (caught.append(number), signal.signal(number, signal.SIG_DFL)))

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
        codes, labels, meta = data.load_codes(args.codes)
        codes.base.madvise(mmap.MADV_RANDOM)   # a row is 512 bytes; the kernel would read megabytes around each
        if meta["h"] != meta["w"]:
            raise ValueError(f"--codes {args.codes}: {meta['h']} x {meta['w']} codes an image; only squares will do")
        has = "class" if labels is not None else "text"
        if args.cond not in (None, has):
            raise ValueError(f"--cond {args.cond}: {args.codes} was made from images with "
                             f"{'classes' if has == 'class' else 'captions'}")
        if args.image_size not in (None, meta["image_size"]):
            raise ValueError(f"--image-size {args.image_size}: {args.codes} holds codes of {meta['image_size']}-pixel "
                             "images; vq.py encode --image-size makes others")
        usable, cond = np.arange(len(codes)), {"num_classes": len(meta["classes"])}
        text = spans = encoder = None
        if has == "text":
            text, spans, encoder = captions.load_text(args.codes)
            usable = np.flatnonzero(spans[:, 0, 1] > spans[:, 0, 0])   # no loss on images without a caption
            cond = {"num_classes": 0, "cond_tokens": captions.CAPTION_TOKENS, "caption_dim": encoder["dim"]}
        if not 0 <= args.val_images < len(usable):
            raise ValueError(f"--val-images {args.val_images}: the folder has {len(usable)} images")
        config = replace(gpt.GPT_CONFIGS[args.model], vocab_size=meta["codebook_size"], grid=meta["h"],
                         dropout=args.dropout, class_dropout=args.class_dropout, **cond)
        with torch.device("meta"):
            model = gpt.GPT(config)   # shapes only; memory comes when it is known what this process holds
        parameters = sum(q.numel() for q in model.parameters())
        sharded = args.parallel == "fsdp" or args.parallel == "auto" and parameters > 1e9 and world > 1
        if sharded and "RANK" not in os.environ:
            raise ValueError("--parallel fsdp: start it with torchrun")
        if args.shard_size and not sharded:
            raise ValueError("--shard-size is for --parallel fsdp")
        if args.shard_size and (args.shard_size < 1 or world % args.shard_size):
            raise ValueError(f"--shard-size {args.shard_size} does not divide the {world} processes")
        path, resumed = find_checkpoint(out)
        if resumed and not args.resume:
            raise ValueError(f"--out {out} holds a run; add --resume to go on with it, or choose another folder")
        if args.resume and not resumed:
            raise ValueError(f"--resume: {out}/ckpt.pt: no such file, and no folder ckpt_STEP")
        origin = {k: meta.get(k) for k in ("classes", "tokenizer", "image_size", "crops")}
        origin |= {"images": len(codes), "text": encoder}
        now, then = {**asdict(config), **origin}, {**resumed["config"], **resumed} if resumed else {}
        wrong = [f"{k} was {str(then[k])[:40]}, is {str(now[k])[:40]}" for k in now if then.get(k, now[k]) != now[k]]
        if wrong:
            raise ValueError(f"{path} is of another model or other codes ({'; '.join(wrong)}); go on with those of "
                             "that run, or choose another --out")
        init = gpt.load_gpt(args.init) if args.init and not resumed else None
        if init and bool(init.config.caption_dim) != (has == "text"):
            raise ValueError(f"--init {args.init} is a model for {'captions' if has == 'class' else 'classes'}, but "
                             f"{args.codes} was made from images with {'classes' if has == 'class' else 'captions'}")
        here, there = asdict(config), asdict(init.config) if init else {}
        wrong = [f"{k} {there[k]} there, {here[k]} here" for k in there if there[k] != here[k] and
                 k not in ("grid", "dropout", "class_dropout")]
        if wrong:
            raise ValueError(f"--init {args.init} does not fit --model {args.model} and {args.codes}: "
                             f"{', '.join(wrong)}")
        if init and init.text and init.text["hash"] != encoder["hash"]:
            raise ValueError(f"--init {args.init} was trained on captions of another encoder ({init.text['encoder']}) "
                             f"than {args.codes} ({encoder['encoder']})")
        vq_model = vq.load_vq(args.vq, device) if args.vq and rank == 0 else None
        if vq_model and vq.weights_hash(vq_model) != meta["tokenizer"]:
            raise ValueError(f"--vq {args.vq} is not the tokenizer that made {args.codes}")
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        p.error(f"--tensorboard: {error}; install it with: pip install tensorboard")
    except (OSError, ValueError) as error:
        p.error(str(error))
    if world > 1 or sharded:   # the timeout: a process that waits for a dead one ends too
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=args.timeout))
    T = meta["h"] * meta["w"]
    order = usable[np.random.RandomState(0).permutation(len(usable))]   # the same are held out whatever --seed
    train_ids, val_ids = order[args.val_images:], np.sort(order[:args.val_images])
    max_steps = args.max_steps or math.ceil(args.epochs * len(train_ids) / args.batch_size)
    lr = args.lr * args.batch_size / 256

    def to_device(ids, crops, short=False, c=None):
        """Images' numbers, the crop of each and whether its short caption is wanted -> codes (B, T) int64 and labels
        (B,) int64, or features of captions (B, c, D) and their mask (B, c), c being the longest if not given."""
        rows = torch.from_numpy(codes[ids, crops].astype(np.int64))
        if has == "class":
            given = [torch.from_numpy(labels[ids].astype(np.int64))]
        else:
            ends = spans[ids]                                                               # (B, 2, 2)
            which = (short & (ends[:, 1, 1] > ends[:, 1, 0])).astype(int)
            tokens = [torch.tensor(text[a:b]) for a, b in ends[np.arange(len(ids)), which]]
            c = c or (config.cond_tokens if compiled else max(map(len, tokens)))   # compiled code wants one shape
            given = captions.pad_left(tokens, c)
        return [x.to(device, non_blocking=True) for x in (rows, *given)]

    # ---- model and optimizer ----------------------------------------------------------------------------------------
    if sharded:
        shape = (world // args.shard_size, args.shard_size) if args.shard_size else (world,)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape):])
        # weights stay float32 and travel as bfloat16; inputs are not cast, since the rotary table is float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
    for layer in model.layers:
        if sharded and compiled:   # block by block, so that FSDP's transfers stay between the compiled parts
            layer.forward = torch.compile(layer.forward)
        if args.checkpoint_activations:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if sharded:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    if sharded:
        fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    if not resumed:
        weights = model.state_dict()
        for name, value in init.state_dict().items() if init else model.initial_weights(args.seed):
            weights[name].copy_(part(value, weights[name]))
    del init
    matrices = [q for q in model.parameters() if q.dim() > 1]   # scales of norms are not decayed
    scales = [q for q in model.parameters() if q.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": scales, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95), fused=True)
    ema = {k: v.clone() for k, v in model.state_dict().items()} if args.ema_decay else None
    first, seen = 0, 0
    if resumed:
        moments = {i: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(q), "exp_avg_sq": torch.zeros_like(q)}
                   for i, q in enumerate(matrices + scales)}
        restore({"model": model.state_dict(), "optimizer": moments, **({"ema": ema} if ema and resumed["ema"] else {})},
                path, resumed)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        if ema and not resumed["ema"]:
            fill(ema, model.state_dict())
        first, seen, resumed = resumed["step"], resumed["images_seen"], None   # None lets go of the file
    forward = torch.compile(model) if compiled and not sharded else model
    if world > 1 and not sharded:
        forward = DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None)
    peak = next((v for k, v in PEAK_FLOPS.items() if device.type == "cuda" and k in torch.cuda.get_device_name()), None)

    say(f"torch {torch.__version__}, {world} process(es) on {device.type}{' with FSDP' * sharded}, "
        f"{'bfloat16' if bf16 else 'float32'}{', compiled' * compiled}")
    say(f"{args.model}: {parameters / 1e6:.1f}M parameters; {T} codes of {config.vocab_size:,} an image, "
        + (f"{config.num_classes} classes" if has == "class" else f"captions through {encoder['encoder']} "
           f"({config.caption_dim} features a token), which {len(codes) - len(usable):,} images do not have"))
    say(f"{args.codes}: {len(train_ids):,} images x {codes.shape[1]} crops, {len(val_ids)} held out; {max_steps:,} "
        f"steps of {args.batch_size} images ({args.batch_size * T:,} codes) = "
        f"{max_steps * args.batch_size / len(train_ids):.1f} epochs -> {out}")
    say(f"resumed at step {first} from {path}" if first else f"the first weights are those of {args.init}" if args.init
        else f"the first loss should be {math.log(config.vocab_size):.2f} = ln({config.vocab_size}), since the output "
        "layer starts at zero")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "log.jsonl").exists():   # steps that were logged after the checkpoint come again
            lines = [line for line in (out / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("}\n")]
            (out / "log.tmp").write_text("".join(line for line in lines if json.loads(line)["step"] <= first))
            os.replace(out / "log.tmp", out / "log.jsonl")
        board = SummaryWriter(out, purge_step=first + 1) if args.tensorboard else None

    shown = [torch.arange(min(10, len(meta["classes"])), device=device)], meta["classes"][:10]
    if has == "text" and vq_model:   # ten captions from among the first ten thousand
        few = np.unique(usable[np.linspace(0, min(len(usable), 10_000) - 1, 10).astype(int)])
        texts = enumerate(captions.read_captions(Path(args.codes) / "captions.jsonl"))
        titles = [caption for i, (caption, _) in itertools.islice(texts, int(few[-1]) + 1) if i in few]
        shown = to_device(few, np.zeros_like(few), c=config.cond_tokens)[1:], titles

    # ---- loop -------------------------------------------------------------------------------------------------------
    pairs = vq.shuffled(len(train_ids), args.seed, seen)
    step, total, clock, clock_step, record = first, torch.zeros((), device=device), time.time(), first, {}
    stop = torch.zeros((), device=device)
    while step < max_steps and not stop:
        # 1. learning rate of this step; its dropout too follows from (seed, step, process), so that a resumed run needs
        #    no stored random state
        scale = min(1, (step + 1) / max(args.warmup_steps, 1))
        if args.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * step / max_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2 ** 63)

        # 2. this process's share of the batch: a random crop of each image, and sometimes its short caption
        ids = train_ids[[index for _, (_, index) in zip(range(args.batch_size), pairs)]]
        rng = np.random.RandomState((args.seed * 1_000_003 + step) % 2 ** 32)
        crops, short = rng.randint(codes.shape[1], size=len(ids)), rng.rand(len(ids)) < SHORT
        share = slice(rank * per_rank, (rank + 1) * per_rank)
        batch = to_device(ids[share], crops[share], short[share])

        # 3. forward and backward over the micro-batches; gradients sync on the last one
        model.train()
        for i in range(0, per_rank, micro):
            if sharded:
                model.set_requires_gradient_sync(i + micro == per_rank)
            elif world > 1:
                forward.require_backward_grad_sync = i + micro == per_rank
            tokens, *given = [x[i:i + micro] for x in batch]
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = forward(tokens[:, :-1], *given)                             # (B, T, V)
            total += cross_entropy_(logits, tokens, scale=1 / (per_rank * T))
            logits.backward(logits.detach())

        # 4. clip and update; averaged weights follow, with a decay that grows so that early ones are soon forgotten
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        norm = norm.full_tensor() if sharded else norm
        if not torch.isfinite(norm):
            p.exit(2, f"train_gpt.py: the loss is not finite at step {step}; {out} holds the last good state. A lower "
                      "--lr or --dtype float32 may help\n" * (rank == 0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in model.named_parameters():
                    ema[name].mul_(decay).add_(value, alpha=1 - decay)
        step, seen = step + 1, seen + args.batch_size

        # 5. one line, validation, a picture, a checkpoint; if any process was asked to stop, all do
        stop.fill_(len(caught))
        if world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        due = {k: every and (step % every == 0 or step == max_steps) for k, every in
               (("log", args.log_every), ("val", args.val_images and args.val_every), ("sample", args.sample_every),
                ("save", args.save_every))}
        if due["val"]:
            record["val_loss"] = validate(model, val_ids, to_device, micro, rank, world, device, bf16)
        if due["log"] or due["val"] or step == first + 1 or stop:
            if world > 1:
                dist.all_reduce(total)
            now, steps = time.time(), step - clock_step
            dt = (now - clock) / steps
            record = {"step": step, "loss": float(total) / world / steps, **record, "lr": lr * scale,
                      "norm": float(norm), "codes_per_s": args.batch_size * T / dt}
            if peak:
                record["mfu"] = flops_per_image(config) * args.batch_size / dt / peak / world
            if rank == 0:
                with open(out / "log.jsonl", "a") as f:
                    f.write(json.dumps(record) + "\n")
                for name in record.keys() - {"step"} if board else ():
                    board.add_scalar(name, record[name], step)
                    board.flush()
            say(f"step {step:06d}/{max_steps} | loss {record['loss']:.4f}"
                + (f" | val {record['val_loss']:.4f}" if "val_loss" in record else "")
                + f" | lr {lr * scale:.1e} | norm {float(norm):.2f} | {dt * 1e3:.0f} ms"
                + f" | {record['codes_per_s']:,.0f} codes/s"
                + (f" | MFU {record['mfu']:.1%}" if peak else "") + f" | {(max_steps - step) * dt / 60:.1f} min left")
            total.zero_()
            clock, clock_step, record = now, step, {}
        if due["sample"] and args.vq:
            weights = whole(ema or model.state_dict())
            if rank == 0:
                picture(config, weights, vq_model, *shown, out / f"samples_{step:06d}.png")
        if due["save"] or stop:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **({"ema": ema} if ema else {})}
            plain = {"step": step, "images_seen": seen, "config": asdict(config), "args": vars(args), **origin}
            try:
                if sharded:
                    save_shards(state, {**plain, "ema": bool(ema)}, out)
                if not sharded or args.consolidate or step == max_steps:
                    state = whole(state)
                    if rank == 0:
                        data.save_checkpoint({"ema": None, **state, **plain}, out / "ckpt.pt")
                if rank == 0:
                    keep_some(out, args.keep, step, sharded)
            except OSError as error:
                p.exit(2, f"train_gpt.py: {error}\n" * (rank == 0))
    say(f"asked to stop: saved at step {step}; --resume goes on" if step < max_steps else f"done: {out}/ckpt.pt")
    if dist.is_initialized() and device.type == "cuda":
        dist.destroy_process_group()
    elif dist.is_initialized():   # gloo, when it is taken down in order, hangs in one of 30 runs (torch 2.13)
        os._exit(0)


# ---- shards and checkpoints -----------------------------------------------------------------------------------------
def part(value, like):
    """What `like` holds of a whole tensor: all of it, or under FSDP this process's shard. No process sends anything."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value


def fill(target, source):
    """Copy whole tensors into those of a nested dict, which may be shards; what only source has is left out."""
    for key, value in target.items():
        if isinstance(value, dict):
            fill(value, source[key])
        else:
            value.copy_(part(source[key], value))


def whole(tree):
    """A nested dict with every shard replaced by its whole tensor: on the CPU of process 0, None elsewhere. All
    processes must call it. Tensors are gathered one at a time, so that no GPU holds more than one of them."""
    if isinstance(tree, dict):
        return {k: whole(v) for k, v in tree.items()}
    if isinstance(tree, DTensor):
        value = tree.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None
    return tree


def find_checkpoint(out):
    """The newest checkpoint of a run folder: its path, and a dict of step, config and so on, to which a file adds its
    tensors (not yet read from disk). (None, None) if there is none.
    Raises ValueError with one sentence for a damaged one."""
    found = [(out / "ckpt.pt", data.read_checkpoint(out / "ckpt.pt", mmap=True))] if (out / "ckpt.pt").exists() else []
    for folder in sorted(out.glob("ckpt_[0-9]*/"))[-1:]:
        try:
            files = {i.relative_path for i in dcp.FileSystemReader(folder).read_metadata().storage_data.values()}
            lost = sorted(name for name in files if not (folder / name).exists())
            if lost:
                raise OSError(f"{', '.join(lost)} not found")
            found.append((folder, json.loads((folder / "plain.json").read_text())))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is damaged ({error}); remove it to resume from an earlier one") from None
    return max(found, key=lambda pair: pair[1]["step"], default=(None, None))


def restore(state, path, saved):
    """Fill a nested dict of tensors, or shards, from what find_checkpoint found, of any number of processes."""
    if path.is_dir():
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    else:
        fill(state, {**saved, "optimizer": saved["optimizer"]["state"]})


def save_shards(state, plain, out):
    """Write the checkpoint folder out/ckpt_STEP: shards by every process, plain values as plain.json. The folder gets
    its name when it is complete, so that a kill at any moment leaves the one before.
    Raises OSError with one sentence, on every process."""
    tmp, folder = out / "ckpt.tmp", out / f"ckpt_{plain['step']:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save({**state, "optimizer": state["optimizer"]["state"]}, checkpoint_id=tmp)
    except dcp.api.CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise OSError(f"could not save {folder} ({reason}); earlier checkpoints are untouched") from None
    if dist.get_rank() == 0:
        (tmp / "plain.json").write_text(json.dumps(plain))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
    dist.barrier()


def keep_some(out, keep, step, sharded):
    """Name the new ckpt.pt also ckpt_STEP.pt if older ones are wanted, and delete all but the `keep` older ones."""
    if keep and not sharded:
        (out / f"ckpt_{step:08d}.pt").unlink(missing_ok=True)
        os.link(out / "ckpt.pt", out / f"ckpt_{step:08d}.pt")
    newest = 1 if keep or sharded else 0
    for old in sorted(out.glob("ckpt_[0-9]*"), reverse=True)[newest + keep:]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


# ---- what a run shows -----------------------------------------------------------------------------------------------
@torch.no_grad()
def validate(model, ids, to_device, micro, rank, world, device, bf16):
    """Mean loss over the first crop of the held-out images, without dropout, shared among the processes."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for i in range(0, len(ids), micro * world):   # as many forward passes everywhere: under FSDP they are collective
        mine = ids[i:i + micro * world][rank::world]
        padded = mine if len(mine) else ids[:1]
        tokens, *given = to_device(padded, np.zeros(len(padded), dtype=int))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(tokens[:, :-1], *given)
        if len(mine):
            loss = cross_entropy_(logits, tokens).double()
            sums += torch.stack([loss, loss.new_tensor(tokens.numel())])
    if world > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def picture(config, weights, vq_model, given, titles, path):
    """Draw two images of each condition: given is [labels] or [features, mask]."""
    shadow = gpt.GPT(config).to(given[0].device).eval()
    shadow.load_state_dict(weights)
    twice = [torch.cat([x, x]) for x in given]
    codes = sample.generate(shadow, *twice, cfg_scale=2.0, seeds=range(2 * len(titles)))
    data.save_grid(sample.to_pixels(vq_model, codes), path, len(titles), titles * 2)
    print(f"{path}: samples, guidance 2", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
