"""Several codes of an image at once: the same picture as sample.py's, in fewer steps. This pays for
one image at a time, where a step with eight codes takes little longer than a step with one.

$ python extras/window.py --vq runs/vq/ckpt.pt --gpt runs/gpt/ckpt.pt --classes star --window 8
$ python extras/window.py --pretrained t2i-256 --prompt "a red fox in the snow" --out fox.png

The next W codes are guesses. They are fed together, and the code after each is chosen again,
with the noise of its place. The first of these is final: it is what sample.py chooses. If it equals
the guess, then what was fed next was right, and the second is final too, and so on. The others are
better guesses for the next step (Jacobi iteration, with noise that is fixed for each code: Teng et
al., arXiv:2410.01699).
"""

# Shapes:  T codes per image   c condition tokens   W window   V codebook entries   C model width
#          R rows of the cache: 1, or 2 for guidance, with the condition and without
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import sample
from nanollamagen import data, fast, files, flags


@torch.no_grad()
def generate(
    model, cond, mask=None, *, seed, window=8, cfg_scale=1.0, cfg_interval=-1, trace=None, **how
):
    """Codes (1, T) int64 of one image: those of sample.generate with this seed.

    cond, mask  of one image; these, cfg_scale and the rest are as in sample.generate
    window      W, codes that are computed at once
    trace       a list to which each step appends (how many codes are final, codes and guesses (T,))
    """
    T, c = model.config.grid**2, model.config.cond_tokens
    window = min(window, T - 1)
    seeds = torch.tensor([seed % 2**63], device=cond.device)
    guided = cfg_scale > 1
    if guided:
        cond, mask = sample.add_uncond(model, cond, mask)

    def choose(logits, numbers):
        """The codes `numbers`, (W,), from the logits that predict them, (R, W, V)."""
        chosen_from = logits[0].float()
        if guided:
            chosen_from = sample.guide(logits, cfg_scale)[0]  # (W, V)
        if guided and cfg_interval >= 0:  # the interval may end within the window
            inside = (numbers <= cfg_interval + 1)[:, None]
            chosen_from = torch.where(inside, chosen_from, logits[0].float())
        gumbel = sample.gumbel_noise(seeds, numbers, chosen_from.shape[-1])
        return sample.draw(chosen_from, gumbel, **how)

    def next_codes(codes, final):
        """Codes and guesses (T,) with W of them chosen again. The first `final` stay. A GPU records
        this once: final is a tensor, and no shape depends on it."""
        first = final.clamp(max=T - window)  # in the end the window reaches back to final codes
        numbers = first + torch.arange(window, device=codes.device)  # (W,)
        x = model.tok_embeddings(codes[numbers - 1])[None]  # (1, W, C)
        if guided:
            x = x.repeat(2, 1, 1)  # both rows see the same codes
        logits = model.extend(x, c + first - 1, cache, mask, last=window)  # (R, W, V)
        chosen = torch.where(numbers < final, codes[numbers], choose(logits, numbers))
        return codes.index_copy(0, numbers, chosen)

    # Code 0 follows from the condition.
    codes = torch.zeros(T, dtype=torch.int64, device=cond.device)
    cache = model.new_cache(len(cond), positions=0)
    fast.grow(cache, c, model.config)
    logits = model.extend(model.cls_embedding(cond), 0, cache, mask)
    codes[:1] = choose(logits, torch.zeros_like(codes[:1]))

    # What the cache holds of wrong guesses is overwritten before anything final attends to it.
    step, final = fast.Recorded(next_codes, cache), 1
    while final < T:
        if guided and 0 <= cfg_interval < final - 1:  # the row without condition is done
            guided = False
            cache[:] = [layer[:, :1].clone() for layer in cache]
            mask = None if mask is None else mask[:1]
        first = min(final, T - window)
        fast.grow(cache, c + first + window - 1, model.config)
        before, codes = codes, step(codes, final).clone()
        # Code `first` is final now. A code after it is final if all guesses before it were right.
        right = (codes == before)[first : first + window - 1]
        final = first + 1 + int(right.long().cumprod(0).sum())
        if trace is not None:
            trace.append((final, codes))
    return codes[None]


def main():
    """Flags, models, conditions, then the images, one after the other."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sample.add_flags(p)
    p.add_argument(
        "--window", type=flags.at_least_one, default=8, help="codes computed at once (default: 8)"
    )
    p.add_argument("--out", default="window.png", help="PNG, one image for each class or caption")
    p.set_defaults(num_samples=None)
    p.usage = "python extras/window.py --vq CKPT --gpt CKPT ... (--help lists the flags)"
    args = p.parse_args()
    sample.check_flags(p, args)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the current device is where CUDA graphs are recorded
    try:
        model, vq_model = sample.load_models(args, device)
        titles, cond = sample.conditions(args, model, device)
    except (OSError, ValueError) as error:
        p.error(str(error))
    settings = sample.choose_settings(args, captioned=model.config.caption_dim > 0)
    if args.dtype == "bfloat16":
        model = model.bfloat16()
    if device.type == "cpu":
        fast.pack(model)

    began, pixels, trace = time.time(), [], []
    with files.progress(len(titles), "sample") as bar:
        for i in range(len(titles)):
            one = [x[i : i + 1].to(device) for x in cond]
            how = dict(seed=args.seed + i, window=args.window, trace=trace)
            codes = generate(model, *one, **how, **settings)
            pixels.append(sample.to_pixels(vq_model, codes, args.resize))
            bar.update()
    data.save_grid(np.concatenate(pixels), args.out, min(len(titles), 10), titles)
    rate = len(titles) / (time.time() - began)
    print(
        f"{args.out}: {len(titles)} images, {rate:.2f} images/s; "
        f"{len(titles) * codes.shape[1]} codes in {len(titles) + len(trace)} steps"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
