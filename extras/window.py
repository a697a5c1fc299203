"""Sample one image faster: several codes at once, the same picture as sample.py in fewer steps.

$ python extras/window.py --vq CKPT --gpt CKPT --classes star --window 8 --out window.png

Flags, seeds and pictures are those of sample.py. Several classes or captions are sampled one image
after the other. A step of one image mostly waits for the weights to be read, so eight codes take
little longer than one. A batch of images uses that time already: there sample.py is faster.

A code follows from the codes before it and from its own noise, which is fixed: it never changes
from step to step. So a step may guess the next codes, and the following step tells which were
right. This is Jacobi iteration (Teng et al., arXiv:2410.01699).
"""

# Shapes:  T codes per image   W codes in one step   c condition tokens   V codebook entries
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
def window_codes(
    model, cond, mask=None, *, window=8, seed=0, cfg_scale=1.0, cfg_interval=-1, trace=None, **how
):
    """Codes of one image and the number of steps it took: int64 (1, T), int.

    window   W, the codes of one step. The codes are those of sample.generate, whatever it is.
    trace    a list; every step but that of code 0 adds (number of the first code that it computed,
             all codes (T,) after it)
    cond (1,) or (1, c, D), mask (1, c), seed and the rest are those of sample.generate

    A step feeds the last final code and W - 1 guesses, and computes the code after each. The first
    of these follows from final codes alone: it is final. If it equals its guess, then what was fed
    next was right too, and the second is final as well, and so on. The others are better guesses
    for the next step. It overwrites what wrong guesses left in the cache before it reads it."""
    T, c = model.config.grid**2, model.config.cond_tokens
    seed = torch.tensor(seed % 2**63, device=cond.device)
    codes = torch.zeros(T, dtype=torch.int64, device=cond.device)  # the first guess is 0
    guided = cfg_scale > 1
    if guided:  # row 0 has the condition, row 1 has none
        cond, mask = sample.add_uncond(model, cond, mask)

    def choose(logits, numbers):
        """The codes `numbers`, (L,), from the logits that predict them, (1 or 2, L, V)."""
        chosen = logits[0].float()  # (L, V)
        if guided:
            with_guidance = sample.guide(logits, cfg_scale)[0]
            here = (numbers <= cfg_interval + 1) | (cfg_interval < 0)
            chosen = torch.where(here[:, None], with_guidance, chosen)
        return sample.draw(chosen, sample.gumbel_noise(seed, numbers, chosen.shape[-1]), **how)

    # Code 0 follows from the condition.
    cache = model.new_cache(len(cond), positions=0)
    fast.grow(cache, c, c + T - 1)
    logits = model.extend(model.cls_embedding(cond), 0, cache, mask)
    codes[:1] = choose(logits, torch.arange(1, device=cond.device))

    final, steps = 1, 1  # the first `final` codes are final
    while final < T:
        end = min(final + window, T)
        numbers = torch.arange(final, end, device=cond.device)  # (W,), fewer at the end
        x = model.tok_embeddings(codes[final - 1 : end - 1]).expand(len(cond), -1, -1)
        fast.grow(cache, c + end - 1, c + T - 1)
        logits = model.extend(x, c + final - 1, cache, mask, last=len(numbers))
        chosen = choose(logits, numbers)
        right = chosen[:-1] == codes[final : end - 1]
        codes[final:end] = chosen
        if trace is not None:
            trace.append((final, codes.clone()))
        final += 1 + int(right.long().cumprod(0).sum())  # those before the first wrong guess
        steps += 1
    return codes[None], steps


# ---- the command line --------------------------------------------------------------------------
def parse():
    """The command line: its parser, and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sample.add_flags(p)
    p.add_argument("--window", type=flags.at_least_one, default=8, help="codes of one step")
    p.add_argument("--out", default="window.png", help="PNG")
    p.set_defaults(num_samples=None)  # a flag of sample.py that its checks look at
    p.usage = "python extras/window.py --vq CKPT --gpt CKPT ... (--help lists the flags)"
    return p, p.parse_args()


def main():
    """Flags, models, conditions, settings, then one image after the other."""
    parser, args = parse()
    sample.check_flags(parser, args)
    device = torch.device(args.device)
    try:
        files.make_folder(Path(args.out).parent)
        model, vq_model = sample.load_models(args, device)
        titles, cond = sample.conditions(args, model, device)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    settings = sample.choose_settings(args, captioned=model.config.caption_dim > 0)
    words = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"{args.gpt}: {words}, seed {args.seed}, window {args.window}")
    if (args.dtype or flags.best_dtype(args.device)) == "bfloat16":
        model = model.bfloat16()
    if device.type == "cpu":
        fast.pack(model)

    pixels = []
    for i, title in enumerate(titles):
        one = [x[i : i + 1].to(device) for x in cond]
        began = time.time()
        codes, steps = window_codes(model, *one, window=args.window, seed=args.seed + i, **settings)
        spent = time.time() - began
        print(f"{title}: {codes.shape[1]} codes in {steps} steps, {spent:.2f} s", flush=True)
        pixels.append(sample.to_pixels(vq_model, codes, args.resize))
    data.save_grid(np.concatenate(pixels), args.out, min(len(titles), 10), titles)
    print(f"{args.out}: {len(titles)} images")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
