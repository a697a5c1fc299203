r"""Group relative policy optimisation of a trained GPT: sample images, reward each, and make those
likelier that are better than others of the same class or caption (arXiv:2402.03300; for images,
with LlamaGen's models, AR-GRPO, arXiv:2508.06924).

The demo's model on a laptop's CPU, rewarded by a classifier (rewards.py makes it):
$ python extras/train_grpo.py --gpt runs/demo/gpt/ckpt.pt --vq runs/demo/vq/ckpt.pt \
      --reward runs/classifier.pt --cfg-scale 1 --batch-size 64 --lr 5e-5 --max-steps 80
Any Python function of pixels and classes, on 4 GPUs (the defaults are AR-GRPO's for classes):
$ torchrun --nproc_per_node=4 extras/train_grpo.py --gpt c2i_L_256.pt --vq vq_ds16_c2i.pt \
      --reward my_rewards.py:sharpness
A model of captions needs --prompts FILE, and --reward clip scores how well images fit them.

The policy is what samples: softmax(logits / temperature) of all codes, where logits are guided if
--cfg-scale is above 1. Gradients then go through both rows, with the condition and without. There
is no top-k and no top-p: a code that they exclude would have probability 0, and its ratio none.
"""

# Shapes:  B images in a micro-batch   G images in a group   T codes per image   V codebook entries
import argparse
import itertools
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import rewards

import gpt
import sample
import vq
from nanollamagen import captions, classes, data, files, flags, runs

GRAD_CLIP = 1.0  # largest norm of the gradient


# ---- flags ---------------------------------------------------------------------------------------
def parse():
    """The parser and the flags of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag, one = p.add_argument, flags.at_least_one
    # fmt: off
    flag("--gpt", required=True, help="the trained model, which is the first policy")
    flag("--vq", required=True, help="its tokenizer")
    flag("--image-size", type=flags.pixels, help="of a released --gpt file (default: 256)")
    flag("--reward", required=True, help="FILE.pt of rewards.py, FILE.py:function, or clip")
    flag("--prompts", metavar="FILE", help="captions, one per line, for a model of captions")
    flag("--t5", help="encoder of captions (default: the one that the GPT was trained with)")
    flag("--out", default="runs/grpo", help="run folder: ckpt.pt, log.jsonl, samples_*.png")
    flag("--resume", action="store_true", help="continue from the checkpoint in --out")
    # the policy
    flag("--cfg-scale", type=flags.bounded(float, 0, 1000), default=2.0, help="guidance; 1: none")
    flag("--temperature", type=flags.bounded(float, 0.1, 2), default=1.0, help="of sampling")
    # the recipe
    flag("--batch-size", type=flags.batch, default=32, help="images per step, over all processes")
    flag("--group", type=flags.bounded(int, 2, 2**20), default=8, help="images of one condition")
    flag("--micro-batch", type=flags.batch, help="images a process trains on at once")
    flag("--passes", type=one, default=1, help="updates for each batch of samples")
    flag("--max-steps", type=one, default=400, help="batches of samples")
    flag("--lr", type=flags.positive, default=1e-5, help="Adam's learning rate")
    flag("--kl", type=flags.weight, default=0.1, help="weight of the KL term; 0: none")
    flag("--clip", type=flags.positive, default=0.2, help="ratios are clipped to 1 -+ this")
    # what a run shows and keeps
    flag("--save-every", type=one, default=50, help="steps between checkpoints and pictures")
    flag("--keep", type=flags.count, default=0, help="older checkpoints to keep, as ckpt_STEP")
    # the machine
    flag("--seed", type=flags.seed, default=0, help="of the conditions' order and the samples")
    flags.add_device(p)
    # fmt: on
    p.usage = "python extras/train_grpo.py --gpt CKPT --vq CKPT --reward R ... (--help lists all)"
    return p, p.parse_args()


# ---- the method ----------------------------------------------------------------------------------
def log_probs(forward, model, codes, cond, cfg_scale, temperature):
    """Log-probabilities of sampled codes under the policy, (B, T), and its mean entropy in nats.

    forward   the model, or DDP around it
    codes     (B, T) int64
    cond      [labels (B,)], or [features (B, c, D), mask (B, c)]"""
    tokens, guided = codes[:, :-1], cfg_scale > 1
    if guided:  # as sample.generate does it
        tokens, cond = tokens.repeat(2, 1), sample.add_uncond(model, *cond)
    logits = forward(tokens, *cond)  # (B or 2B, T, V)
    if guided:
        logits = sample.guide(logits, cfg_scale)
    log_p = (logits / temperature).log_softmax(-1)  # (B, T, V)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return log_p.gather(-1, codes[..., None])[..., 0], entropy


def advantages(rewards, group):
    """How much better than its group an image is, (B,), from rewards (B,), groups one after the
    other. A_i = (r_i - mean(r)) / std(r) (arXiv:2402.03300, section 4.1.2). The 1e-4 is that of
    AR-GRPO's code. Equal rewards teach nothing: 0."""
    r = rewards.view(-1, group)
    scaled = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)  # a mean can be off by rounding
    return scaled.masked_fill(equal, 0).flatten()


def grpo_loss(new, old, reference, advantage, clip, kl_weight):
    """The loss, the mean KL divergence to the reference, and the share of codes whose ratio is
    clipped. new, old, reference: log-probabilities (B, T); advantage (B,)

    Equation 3 of arXiv:2402.03300, with a minus sign, for images of equally many codes:
        ratio = new probability / old probability
        loss = -mean(min(ratio A, clip(ratio, 1 - e, 1 + e) A) - b KL)
    Equation 4, never negative, and right on average (the estimator k3):
        KL = q - log q - 1,  q = reference probability / new probability"""
    advantage = advantage[:, None]
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    log_q = reference - new
    kl = log_q.exp() - log_q - 1
    clipped = (gain < ratio * advantage).float().mean()
    return (kl_weight * kl - gain).mean(), kl.mean(), clipped


# ---- training ------------------------------------------------------------------------------------
def main():
    """Flags, processes, models, reward, optimizer, resume, loop."""
    parser, args = parse()
    rank, world, device = runs.this_process(args.device)
    signals = runs.catch_signals()
    out = Path(args.out)

    # ---- models: the policy, its frozen copy, the tokenizer; then conditions and reward ----------
    try:
        vq_model = vq.load_vq(args.vq, device)
        grid = (args.image_size or vq_model.image_size) // vq_model.config.downsample
        model = gpt.load_gpt(args.gpt, device, grid)
        reference = gpt.load_gpt(args.gpt, device, grid).requires_grad_(False)
        sample.check_pair(model, vq_model, args.gpt, args.vq, args.image_size)
        origin = {"tokenizer": vq.weights_hash(vq_model), "reference": vq.weights_hash(model)}
        path, saved = runs.find_checkpoint(out)
        check(args, model, origin, world, path, saved)
        asked, titles, conditions = read_conditions(args, model)
        named = titles if model.config.num_classes else None
        reward = rewards.find(args.reward, device, named)
        files.make_folder(out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    share = args.batch_size // world  # images of a step that this process samples
    micro = args.micro_batch or share
    # The model stays in eval mode: dropout would make the policy another than the one that samples.
    forward = model
    if world > 1:  # averages gradients over the processes
        runs.connect(device)
        devices = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(model, devices, broadcast_buffers=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    policy = {"cfg_scale": args.cfg_scale, "temperature": args.temperature}

    # ---- resume ----------------------------------------------------------------------------------
    step, images_seen = 0, 0
    if saved:
        step, images_seen = runs.restore_run(model, optimizer, None, path, saved)
    saved = None  # frees its memory
    log = runs.Log(out, step, args.max_steps, args.batch_size, rank, world, device)
    if rank == 0:
        describe(args, model, len(titles), step, world, device)

    # ---- loop ------------------------------------------------------------------------------------
    stop = False
    while step < args.max_steps and not stop:
        # 1. Sample a group of images for each of some conditions. Which ones, and the seed of each
        #    image, follow from images_seen: a resumed run needs no stored random state.
        first = images_seen + rank * share
        order = data.shuffled(len(titles), args.seed, first // args.group)
        ids = [i for _, i in itertools.islice(order, share // args.group)]
        ids = [i for i in ids for _ in range(args.group)]
        cond = [x[ids].to(device) for x in conditions]
        seeds = [((args.seed + 1) << 40) + first + i for i in range(share)]  # not sample.py's
        codes = sample.generate(model, *cond, seeds=seeds, **policy)  # (share, T)

        # 2. Reward them, and compare each with its group.
        pixels = sample.to_pixels(vq_model, codes)  # uint8 (share, H, W, 3)
        scores = rewards.ask(reward, pixels, [asked[i] for i in ids]).to(device)
        log.add(reward=scores.mean(), spread=scores.view(-1, args.group).std(1).mean())
        gains = advantages(scores, args.group)

        # 3. Update the policy, several times if asked. At first it is the one that sampled.
        old = torch.zeros(codes.shape, device=device)
        before = torch.zeros_like(old)  # log-probabilities of the frozen copy
        for number in range(args.passes):
            for i in range(0, share, micro):
                part = slice(i, i + micro)
                what = (codes[part], [x[part] for x in cond])
                if world > 1:
                    forward.require_backward_grad_sync = i + micro == share
                new, entropy = log_probs(forward, model, *what, **policy)
                if number == 0:
                    old[part] = new.detach()
                    with torch.no_grad():
                        before[part] = log_probs(reference, reference, *what, **policy)[0]
                loss, kl, clipped = grpo_loss(
                    new, old[part], before[part], gains[part], args.clip, args.kl
                )
                (loss * (micro / share)).backward()
                log.add(kl=kl, clipped=clipped, entropy=entropy)
            norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        images_seen += args.batch_size

        # 4. Is all well? Then a line, a checkpoint, a picture.
        finite, stop = runs.status([norm], bool(signals), world)
        if not finite:
            runs.give_up(f"train_grpo.py: {runs.NOT_FINITE} at step {step}", rank)
        last = step == args.max_steps or stop
        log.write(step, norm=norm.item())
        if last or step % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            plain = {"step": step, "images_seen": images_seen, "config": asdict(model.config)}
            plain |= {"classes": model.classes, "text": model.text, "args": vars(args), **origin}
            try:
                runs.save(state, plain, out, rank, args.keep)
            except OSError as error:
                runs.give_up(f"train_grpo.py: {error}", rank)
            if rank == 0:
                picture(model, vq_model, titles, conditions, policy, out, step)

    if rank == 0 and step < args.max_steps:
        print(f"stopped as asked; saved at step {step}. --resume continues")
    elif rank == 0:
        print(f"done: {out}/ckpt.pt")
    runs.disconnect(device)


# ---- conditions, rewards, pictures ---------------------------------------------------------------
def read_conditions(args, model):
    """What the reward is told (class ids, or captions), titles for pictures, and what the model
    reads: [labels (N,)], or [features, mask] of N captions. Raises OSError or ValueError."""
    if model.config.caption_dim:
        prompts = captions.read_prompts(args.prompts)
        return prompts, prompts, captions.encode_captions(prompts, args.t5, args.device, model)
    titles = classes.class_names(model)
    return list(range(len(titles))), titles, [torch.arange(len(titles))]


def describe(args, model, conditions, step, world, device):
    """Print what is trained, and how."""
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{args.gpt}: {weights / 1e6:.1f}M weights; reward {args.reward} -> {args.out}")
    print(f"each step: {args.batch_size} images, {args.group} of a condition out of {conditions:,}")
    print(f"guidance {args.cfg_scale}, temperature {args.temperature}")
    how = f"resumed at step {step}; " if step else ""
    print(f"{how}{world} process(es) on {device.type}, torch {torch.__version__}", flush=True)


def picture(model, vq_model, titles, conditions, policy, out, step):
    """Sample two images for each of the first ten conditions, as the policy does."""
    titles, path = titles[:10], out / f"samples_{step:06d}.png"
    rows = torch.arange(2 * len(titles)) % len(titles)
    cond = [x[rows].to(model.norm.weight.device) for x in conditions]
    codes = sample.generate(model, *cond, seeds=range(len(rows)), **policy)
    data.save_grid(sample.to_pixels(vq_model, codes), path, len(titles), titles * 2)
    print(f"{path}: samples", flush=True)


# ---- argument checks -----------------------------------------------------------------------------
def check(args, model, origin, world, path, saved):
    """Raise ValueError if flags, models and checkpoints do not fit together."""
    least = args.group * world
    if args.batch_size % least:
        fix = f"try --batch-size {max(args.batch_size // least, 1) * least}"
        what = f"does not split into groups of {args.group} over {world} processes"
        raise ValueError(f"--batch-size {args.batch_size} {what}; {fix}")
    if args.micro_batch and args.batch_size // world % args.micro_batch:
        what = f"does not divide the {args.batch_size // world} images of each process"
        raise ValueError(f"--micro-batch {args.micro_batch} {what}")
    if bool(args.prompts) != bool(model.config.caption_dim):
        kind = "captions: give" if model.config.caption_dim else "classes, without"
        raise ValueError(f"{args.gpt} is for {kind} --prompts FILE")
    if saved and not args.resume:
        fix = "add --resume to continue it, or choose another folder"
        raise ValueError(f"--out {args.out} holds a run; {fix}")
    if args.resume and not saved:
        raise ValueError(f"--resume: {args.out} has no ckpt.pt")
    if saved:
        runs.check_same_run(path, saved, asdict(model.config), origin)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # such as a full disk
        sys.exit(f"train_grpo.py: {error}; the last checkpoint is untouched")
