"""Train VAR (arXiv:2404.02905): its tokenizer in train_vq.py's own loop, and the transformer over
its codes. The loss is plain cross-entropy: all codes of a scale are predicted at once from the
class and the scales before it.

Small ones on drawn shapes, on a laptop's CPU:
$ python extras/train_var.py tokenizer --data shapes --model VAR-demo --image-size 24 \
      --lpips-weight 0 --max-steps 1000
$ python extras/var.py encode --vq runs/var-vq/ckpt.pt --data shapes --out codes-var
$ python extras/train_var.py --vq runs/var-vq/ckpt.pt --codes codes-var --model demo
The paper's 310M model on 8 GPUs (the defaults are its recipe; add --resume after a stop):
$ torchrun --nproc_per_node=8 extras/train_var.py --vq vae_ch160v4096z32.pth --codes codes-var

`tokenizer` takes the flags of train_vq.py, except that --out is runs/var-vq.
"""

# Shapes:  B images in a micro-batch   L codes per image   D code dimension   V codebook entries
#          N images in the folder   A crops
import argparse
import itertools
import math
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import var
import var_model
import var_vq

import train_vq
import vq
from nanollamagen import data, files, flags, runs

# Paper and official code. lr is the optimizer's highest rate and final_lr the last one as a part of
# it; final_decay is the last weight decay; gate is what a block adds at first.
# fmt: off
RECIPES = {
    "d16": dict(batch_size=768, epochs=200, lr=3e-4, gate=1e-3, final_lr=0.1, final_decay=0.05),
    "d20": dict(batch_size=768, epochs=250, lr=3e-4, gate=1e-3, final_lr=0.1, final_decay=0.05),
    "d24": dict(batch_size=768, epochs=350, lr=2.4e-4, gate=1e-4, final_lr=0.01, final_decay=0.05),
    "d30": dict(batch_size=1024, epochs=350, lr=3.2e-4, gate=1e-5, final_lr=0.01, final_decay=0.08),
    "d36": dict(batch_size=768, epochs=350, lr=2.4e-4, gate=5e-6, final_lr=0.01, final_decay=0.08),
    "demo": dict(batch_size=128, epochs=10, lr=2e-3, gate=1e-3, final_lr=0.1, final_decay=0.05),
}
# fmt: on
GRAD_CLIP = 2.0  # largest norm of the gradient


# ---- flags ---------------------------------------------------------------------------------------
def parse():
    """The parser and the flags of the command line. What --model decides comes from RECIPES."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = p.add_argument
    # fmt: off
    flag("--codes", default="codes", help="folder written by var.py encode")
    flag("--vq", required=True, help="tokenizer that made the codes")
    flag("--out", default="runs/var", help="run folder: ckpt.pt, log.jsonl, samples_*.png")
    flag("--resume", action="store_true", help="continue from the checkpoint in --out")
    # the model and its recipe
    flag("--model", choices=var_model.VAR_CONFIGS, default="d16", help="size, see var_model.py")
    flag("--batch-size", type=flags.batch, help="images per step, over all processes")
    flag("--micro-batch", type=flags.batch, help="images a process takes at once")
    flag("--epochs", type=flags.positive, help="passes over the images (default: the paper's)")
    flag("--max-steps", type=flags.at_least_one, help="steps, instead of --epochs")
    flag("--lr", type=flags.positive, help="AdamW's highest learning rate (default: the paper's)")
    # what a run shows and keeps
    flag("--log-every", type=flags.at_least_one, default=100, help="steps between lines")
    flag("--save-every", type=flags.at_least_one, default=5000,
         help="steps between checkpoints and pictures")
    # the machine
    flag("--seed", type=flags.seed, default=0, help="of weights, order, crops and dropped classes")
    flags.add_device(p)
    flag("--dtype", choices=["float32", "bfloat16"], help="arithmetic (default: bfloat16 on GPU)")
    # fmt: on
    p.usage = "python extras/train_var.py --vq CKPT --codes DIR ... (--help lists the flags)"
    args = p.parse_args()
    recipe = RECIPES[args.model]
    args.batch_size = args.batch_size or recipe["batch_size"]
    args.epochs = args.epochs or recipe["epochs"]
    args.lr = args.lr or recipe["lr"]
    return p, args


def schedule(step, max_steps, final_lr, final_decay):
    """Learning rate as a part of its highest, and weight decay, for a step counted from 0.

    The rate rises during the first fiftieth of the steps, is constant during a twentieth of the
    others, then falls in a straight line. Decay follows a cosine."""
    warmup, last = max(max_steps // 50, 1), max(max_steps - 1, 1)
    done = (step - warmup) / max(last - warmup, 1)
    scale = min(1, final_lr + (1 - final_lr) * (1 - done) / 0.95)
    if step < warmup:
        scale = 0.005 + 0.995 * step / warmup
    return scale, final_decay + (0.05 - final_decay) * 0.5 * (1 + math.cos(math.pi * step / last))


# ---- training ------------------------------------------------------------------------------------
def main():
    """Flags, processes, data, model, optimizer, loop."""
    parser, args = parse()
    recipe = RECIPES[args.model]
    rank, world, device = runs.this_process(args.device)
    signals = runs.catch_signals()
    torch.manual_seed(args.seed)
    out = Path(args.out)

    # ---- data: codes on disk, and the tokenizer that made them -----------------------------------
    # The transformer does not read codes but sums of their entries, which the tokenizer makes.
    try:
        codes, labels, meta = data.load_codes(args.codes)  # (N, A, L) uint16, (N,)
        tokenizer = tokenizer_of(meta, args.vq, device)
        config = replace(
            var_model.VAR_CONFIGS[args.model],
            scales=tokenizer.quantize.scales,
            vocab_size=meta["codebook_size"],
            code_dim=tokenizer.config.code_dim,
            num_classes=len(meta["classes"]),
        )
        path, saved = runs.find_checkpoint(out)
        origin = {"classes": meta["classes"], "tokenizer": meta["tokenizer"]}
        check(args, labels, config, origin, tokenizer, world, path, saved)
        files.make_folder(out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    max_steps = args.max_steps or math.ceil(args.epochs * len(codes) / args.batch_size)
    share = args.batch_size // world  # images of a batch that this process takes
    micro = args.micro_batch or share  # images that it takes at once

    # ---- model -----------------------------------------------------------------------------------
    bf16 = (args.dtype or flags.best_dtype(device)) == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    model = var_model.VAR(config)
    var_model.init_weights(model, recipe["gate"])
    model.to(device)
    forward = model
    if world > 1:  # averages gradients over the processes
        runs.connect(device)
        devices = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(model, devices, broadcast_buffers=False)

    # ---- optimizer -------------------------------------------------------------------------------
    decayed, others = weight_groups(model)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    # ---- resume ----------------------------------------------------------------------------------
    step, images_seen = 0, 0
    if saved:
        step, images_seen = runs.restore_run(model, optimizer, None, path, saved)
    saved = None  # frees its memory
    first_step = step
    log = runs.Log(out, step, max_steps, args.batch_size, rank, world, device)
    if rank == 0:
        describe(args, codes, config, step, max_steps)
        how = "bfloat16" if bf16 else "float32"
        print(f"{world} process(es) on {device.type}, {how}, torch {torch.__version__}", flush=True)

    def due(every):
        """Whether it is time for what happens every so many steps, and at the end."""
        return step % every == 0 or step == max_steps

    # ---- loop ------------------------------------------------------------------------------------
    model.train()
    finest = config.scales[-1] ** 2  # codes of the last scale
    batches = read(codes, labels, args.batch_size, args.seed, step, images_seen, rank, world)
    stop = False
    while step < max_steps and not stop:
        # 1. Learning rate, weight decay, and the seed of what is dropped. All follow from the
        #    step's number, so a resumed run needs no stored random state.
        scale, decay = schedule(step, max_steps, recipe["final_lr"], recipe["final_decay"])
        lr = scale * args.lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = decay
        torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)

        # 2. This process's share of the batch.
        batch = [x.to(device) for x in next(batches)]

        # 3. Forward and backward, in micro-batches if the share does not fit in memory.
        step_loss = torch.zeros((), device=device)
        last_scale = torch.zeros((), device=device)  # the part of the finest codes, for the log
        for i in range(0, share, micro):
            tokens, classes = (x[i : i + micro] for x in batch)  # (B, L), (B,)
            if world > 1:
                forward.require_backward_grad_sync = i + micro == share
            inputs = tokenizer.quantize.teacher_input(tokens)  # (B, L - 1, D)
            with autocast():
                logits = forward(inputs, classes)  # (B, L, V)
            losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
            losses = losses.view_as(tokens)
            loss = losses.mean() * (micro / share)
            loss.backward()
            step_loss += loss.detach()
            last_scale += losses[:, -finest:].detach().mean() * (micro / share)
        log.add(loss=step_loss, last_scale=last_scale)

        # 4. Clip and update.
        norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        images_seen += args.batch_size

        # 5. Is all well? Then a line, a checkpoint, a picture. Asking makes the CPU wait for the
        #    GPU, so this asks rarely, and always before something is shown or saved.
        logging = step == first_step + 1 or due(args.log_every)
        if logging or due(args.save_every) or step % 10 == 0 or device.type == "cpu":
            finite, stop = runs.status([norm], bool(signals), world)
            if not finite:
                runs.give_up(f"train_var.py: {runs.NOT_FINITE} at step {step}", rank)
        if logging or stop:
            log.write(step, lr=lr, norm=norm.item())
        if due(args.save_every) or stop:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            plain = {"step": step, "images_seen": images_seen, "config": asdict(config)}
            plain |= {"args": vars(args), **origin}
            try:
                runs.save(state, plain, out, rank)
            except OSError as error:
                runs.give_up(f"train_var.py: {error}", rank)
        if due(args.save_every) and rank == 0:
            picture(model, tokenizer, meta["classes"][:10], out / f"samples_{step:06d}.png")

    if rank == 0 and step < max_steps:
        print(f"stopped as asked; saved at step {step}. --resume continues")
    elif rank == 0:
        print(f"done: {out}/ckpt.pt")
    runs.disconnect(device)


# ---- data and weights ----------------------------------------------------------------------------
def tokenizer_of(meta, path, device):
    """The tokenizer of a folder of codes. The released one works at 256 and 512 pixels; the number
    of codes tells for which it was used."""
    known = {sum(p * p for p in s): s for s in (var_vq.SCALES_256, var_vq.SCALES_512)}
    return var_vq.load_tokenizer(path, device, known.get(meta["codes"]))


def read(codes, labels, batch_size, seed, step, images_seen, rank, world):
    """This process's share of the batch of each step, a random crop of each image: codes (B, L) and
    labels (B,), int64. Every process samples for the whole batch, so the batch is the same for any
    number of processes."""
    images = data.shuffled(len(codes), seed, images_seen)
    share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    while True:
        ids = np.array([index for _, index in itertools.islice(images, batch_size)])
        rng = np.random.RandomState((seed * 1_000_003 + step) % 2**32)
        crops = rng.randint(codes.shape[1], size=batch_size)
        tokens = codes[ids[share], crops[share]].astype(np.int64)
        yield torch.from_numpy(tokens), torch.from_numpy(labels[ids[share]].astype(np.int64))
        step += 1


def weight_groups(model):
    """The parameters that weight decay applies to, and the others. It applies to matrices, but not
    to positions, levels, offsets and temperatures."""
    bare = ("pos_1LC", "pos_start", "lvl_embed.weight", "ada_gss", "scale_mul_1H11")
    decayed, others = [], []
    for name, weight in model.named_parameters():
        matrix = weight.dim() > 1 and not name.endswith(bare)
        (decayed if matrix else others).append(weight)
    return decayed, others


# ---- what a run shows ----------------------------------------------------------------------------
def describe(args, codes, config, step, max_steps):
    """Print what is trained on what, and the loss to expect first."""
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in var_model.VAR(config).parameters())
    recipe, images = RECIPES[args.model], len(codes)
    print(
        f"{args.model}: {parameters / 1e6:.1f}M parameters; {config.codes} codes of "
        f"{config.vocab_size:,} per image in {len(config.scales)} scales; "
        f"{config.num_classes} classes"
    )
    print(
        f"{args.codes}: {images:,} images x {codes.shape[1]} crops; {max_steps:,} steps of "
        f"{args.batch_size} images = {max_steps * args.batch_size / images:.1f} epochs "
        f"-> {args.out}"
    )
    scaled = recipe["lr"] * args.batch_size / recipe["batch_size"]
    hint = ""
    if args.batch_size != recipe["batch_size"]:
        hint = f"; the paper's, scaled to this batch: {scaled:.1e}"
    print(f"learning rate {args.lr:.1e}{hint}")
    if step:
        print(f"resumed at step {step}")
    else:
        V = config.vocab_size
        print(f"the first loss should be near ln({V}) = {math.log(V):.2f}")


def picture(model, tokenizer, classes, path):
    """Sample two images of each class, with guidance."""
    labels = torch.arange(len(classes), device=model.pos_start.device).repeat(2)
    model.eval()
    pixels = var.sample_pixels(model, tokenizer, [labels], range(len(labels)), var_cfg=1.5)
    model.train()
    data.save_grid(pixels, path, len(classes), classes * 2)
    print(f"{path}: samples, guidance 1.5", flush=True)


# ---- the tokenizer -------------------------------------------------------------------------------
def train_tokenizer():
    """`tokenizer`: train_vq.py with VAR's tokenizers instead of its own."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.usage = "python extras/train_var.py tokenizer --data shapes|DIR ... (--help lists the flags)"
    p.add_argument("--model", default="VAR-256", help="see train_vq.py")
    p.add_argument("--image-size", type=flags.pixels, default=256, help="see train_vq.py")
    args, _ = p.parse_known_args(sys.argv[2:])  # train_vq.py reads these and the other flags
    if args.model in var_vq.TOKENIZERS:
        try:
            with torch.device("meta"):
                tokenizer = var_vq.ScaleVQ(var_vq.TOKENIZERS[args.model])
            tokenizer.codes_per_image(args.image_size)
        except ValueError as error:
            p.error(f"--image-size {args.image_size}: {error}")
    default_out = ["--out", "runs/var-vq"]  # a later --out among the flags wins
    sys.argv = ["train_var.py tokenizer", *default_out, *sys.argv[2:]]
    train_vq.main(var_vq.ScaleVQ, var_vq.TOKENIZERS)


# ---- argument checks -----------------------------------------------------------------------------
def check(args, labels, config, origin, tokenizer, world, path, saved):
    """Raise ValueError if flags, codes and checkpoints do not fit together."""
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
    if labels is None:
        raise ValueError(
            f"--codes {args.codes} was made from images with captions; VAR is for classes"
        )
    if vq.weights_hash(tokenizer) != origin["tokenizer"]:
        raise ValueError(f"--vq {args.vq} is not the tokenizer that made {args.codes}")
    if saved and not args.resume:
        raise ValueError(
            f"--out {args.out} holds a run; add --resume to continue it, or choose another folder"
        )
    if args.resume and not saved:
        raise ValueError(f"--resume: {args.out} has no ckpt.pt")
    if saved:
        runs.check_same_run(path, saved, asdict(config), origin)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["tokenizer"]:
            train_tokenizer()
        else:
            main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # such as a full disk
        sys.exit(f"train_var.py: {error}; the last checkpoint is untouched")
