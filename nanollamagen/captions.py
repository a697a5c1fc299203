"""Captions: the features of their words by FLAN-T5, for sampling and on disk.

After `vq.py encode` has made codes of captioned images, once for all epochs of training:
$ python -m nanollamagen.captions encode --codes codes --t5 google/flan-t5-xl
$ torchrun --nproc_per_node=8 -m nanollamagen.captions encode --codes codes

    features, mask = captions.encode_captions(["a red fox"])      # (1, 120, 2048), (1, 120)
"""

# Shapes:  B captions   c = 120 condition tokens   n tokens of one caption   D features of a token
#          N images
import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nanollamagen import data, files, flags, parts
from nanollamagen.cleaning import clean_caption

CAPTION_TOKENS = 120  # c: longer captions are cut, shorter ones padded on the left


# ---- captions in files -------------------------------------------------------------------------
def read_prompts(path):
    """The lines of a file that are not empty. Raises OSError or ValueError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is not a text file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {path} has no captions")
    return prompts


# ---- the encoder -------------------------------------------------------------------------------
def load_pretrained(flag, name, *kinds):
    """An object of each of these classes of the package transformers, from a folder or Hugging Face
    name. Raises OSError or ValueError if the package or the files are missing or broken."""
    try:
        import transformers

        return [getattr(transformers, kind).from_pretrained(name) for kind in kinds]
    except ImportError:
        raise ValueError(f"{flag} {name} needs transformers: pip install transformers") from None
    except Exception as error:  # transformers raises a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "give a folder with its files"
        raise OSError(f"{flag} {name} cannot be loaded ({reason}); {fix}") from None


class CaptionEncoder:
    """Features of captions by FLAN-T5's encoder, or by the stub "words", which is no language
    model: a token is a word, and each word has a fixed random vector.

    name    folder or Hugging Face name of a T5, which the package transformers loads, or "words"
    about   {"encoder": name, "dim": D, "hash": tells encoders apart}
    cut     how many captions had more than 120 tokens, so far"""

    def __init__(self, name="google/flan-t5-xl", device="cpu"):
        if os.path.isdir(name):
            name = os.path.abspath(name)  # checkpoints remember it
        self.device = torch.device(device)
        self.cut = 0
        self.about = {"encoder": name, "dim": 64, "hash": "words"}
        self.tokenizer = self.model = None
        if name != "words":
            kinds = "AutoTokenizer", "T5EncoderModel"
            self.tokenizer, self.model = load_pretrained("--t5", name, *kinds)
            self.model.to(self.device, getattr(torch, flags.best_dtype(device))).eval()
            self.about["dim"] = self.model.config.d_model
            self.about["hash"] = short_hash(self.model)

    @torch.no_grad()
    def __call__(self, texts, batch_size=16):
        """Strings -> float tensors (n, D) on the CPU, 0 <= n <= 120 tokens."""
        tokens = self.tokenize([clean_caption(text) for text in texts])
        features = [torch.zeros(0, self.about["dim"])] * len(tokens)
        words = [i for i, row in enumerate(tokens) if row]
        words.sort(key=lambda i: len(tokens[i]))  # captions of similar length need little padding
        for start in range(0, len(words), batch_size):
            batch = words[start : start + batch_size]
            states = self.states([tokens[i] for i in batch])
            for i, row in zip(batch, states):
                features[i] = row[: len(tokens[i])].cpu()
        return features

    def tokenize(self, texts):
        """Clean strings -> lists of at most 120 tokens, the last one T5's end mark."""
        if self.model:
            rows = self.tokenizer(texts, verbose=False).input_ids
        else:
            rows = [re.findall(r"[\w'-]+", text) for text in texts]
        for i, row in enumerate(rows):
            if not texts[i]:  # T5 has an end mark here, too
                rows[i] = []
            elif len(row) > CAPTION_TOKENS:
                rows[i] = row[: CAPTION_TOKENS - 1] + row[-1:]
                self.cut += 1
        return rows

    def states(self, rows):
        """Lists of tokens -> features (n or more, D) of each."""
        if self.model:
            rows = [torch.tensor(row) for row in rows]
            ids = nn.utils.rnn.pad_sequence(rows, True, -1).to(self.device)  # (B, longest n)
            mask = (ids >= 0).long()
            return self.model(ids.clamp(min=0), attention_mask=mask).last_hidden_state
        return [torch.stack([word_features(word) for word in row]) for row in rows]


def word_features(word):
    """The stub's fixed random vector of a word, (64,)."""
    rng = np.random.RandomState(zlib.crc32(word.encode()))
    return torch.tensor(rng.randn(64)).float()


def short_hash(model):
    """SHA-256 of a little of every tensor, rounded to bfloat16 so that every device agrees."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        first = value.flatten()[:64].bfloat16().float().cpu().numpy()
        digest.update(f"{name} {tuple(value.shape)}".encode() + first.tobytes())
    return digest.hexdigest()


# ---- features for sampling ---------------------------------------------------------------------
def pad_left(rows, c=CAPTION_TOKENS):
    """Tensors (n, D), n <= c -> (B, c, D) with zeros on the left, and the mask (B, c), False at
    these. On the left, so that a caption's last word is next to the first code."""
    features = rows[0].new_zeros(len(rows), c, rows[0].shape[1])
    for i, row in enumerate(rows):
        features[i, c - len(row) :] = row
    return features, torch.arange(c) >= c - torch.tensor([[len(row)] for row in rows])


def caption_encoder(t5=None, device="cpu", model=None):
    """The CaptionEncoder `t5`, a folder or name; None means that of `model`, a GPT, or
    google/flan-t5-xl. Raises ValueError if the GPT was trained with another one."""
    trained = getattr(model, "text", None) or {}  # released models do not say
    encoder = CaptionEncoder(t5 or trained.get("encoder", "google/flan-t5-xl"), device)
    about = encoder.about
    same = trained.get("hash", about["hash"]) == about["hash"]
    if model and about["dim"] != model.config.caption_dim or not same:
        ours = f"{about['encoder']} ({about['dim']} features per token)"
        its = f"{trained.get('encoder', 'FLAN-T5 XL')}, {model.config.caption_dim}"
        raise ValueError(f"--t5 {ours} is not the encoder that the GPT was trained with ({its})")
    return encoder


def encode_captions(texts, t5=None, device="cpu", model=None, batch_size=16):
    """Strings -> features (B, 120, D) and mask (B, 120) bool for a caption model, on the CPU. Warns
    of captions cut to 120 tokens. Raises ValueError for one without words."""
    encoder = caption_encoder(t5, device, model)
    rows = encoder(texts, batch_size)
    for text, row in zip(texts, rows):
        if not len(row):
            raise ValueError(f"the caption {text!r} has no words")
    if encoder.cut:
        cut = f"{encoder.cut} of {files.counted(len(texts), 'caption')}"
        print(f"warning: {cut} cut to {CAPTION_TOKENS} tokens", file=sys.stderr)
    del encoder
    torch.cuda.empty_cache()
    return pad_left(rows)


# ---- features on disk --------------------------------------------------------------------------
# T5 in every training step would cost more than the GPT itself, so its features are computed once.
# They are not padded: 50 million captions of 20 tokens are 4 TB in float16, padded 25 TB.
PART = 1024  # images in one part file


def encode(args):
    """Write the features of captions.jsonl next to its codes: text.npy, text_spans.npy and
    text.json (see load_text). text.json is last: where it is, the features are complete."""
    folder, path = Path(args.codes), Path(args.codes, "captions.jsonl")
    count = len(data.load_codes(folder)[0])
    if not path.is_file():
        raise ValueError(f"--codes {folder} has no captions.jsonl: its images have classes")
    files.make_folder(folder, "--codes")
    encoder = CaptionEncoder(args.t5, args.device)
    about = {**encoder.about, "images": count, "bytes": path.stat().st_size}
    if (folder / "text.json").exists():
        read_about(folder, about)  # a ValueError if they are of other captions
        if parts.processes()[0] == 0:
            print(f"{folder}/text.npy is complete. Nothing to do.")
        return
    settings = {name: about[name] for name in ("hash", "images", "bytes")}
    lines = data.read_lines(path, "caption")
    work = partial(encode_blocks, encoder, lines, args.batch_size)
    begun, final = folder / "text.parts", folder / "text.json"
    part_files = parts.make("captions", begun, final, settings, count, PART, work)
    if part_files:
        join(folder, about, part_files)


def encode_blocks(encoder, captions, batch_size, blocks, bar):
    """Yield the part of each block of images: text and spans as in load_text, captions cut. Raises
    ValueError if there are fewer captions."""
    line = 0
    for block in blocks:
        # Lines have no fixed length, so every process reads all lines up to those of its block.
        pairs = list(itertools.islice(captions, block.start - line, block.stop - line))
        if len(pairs) < len(block):
            raise ValueError("captions.jsonl has fewer lines than codes.npy has images")
        line = block.stop
        cut_before = encoder.cut
        texts = [text for pair in pairs for text in pair]  # caption, short caption, caption, ...
        rows = encoder(texts, batch_size)
        lengths = np.array([len(row) for row in rows])
        ends = lengths.cumsum()
        spans = np.stack([ends - lengths, ends], -1).reshape(-1, 2, 2)
        text = torch.cat(rows).half().numpy()
        bar.update(len(block))
        yield {"text": text, "spans": spans, "cut": encoder.cut - cut_before}


def join(folder, about, part_files):
    """Write the parts as text.npy, text_spans.npy and text.json, with one of them in memory."""
    start, starts = 0, []  # of each part in text.npy
    empty = 0
    for spans in parts.each(part_files, "spans"):
        starts.append(start)
        start += int(spans.max())
        empty += int((spans[:, 0, 0] == spans[:, 0, 1]).sum())
    tokens, cut = start, sum(int(cut) for cut in parts.each(part_files, "cut"))
    if not tokens:
        raise ValueError(f"{folder}/captions.jsonl has no words in any caption")
    moved = (spans + start for spans, start in zip(parts.each(part_files, "spans"), starts))
    with open(folder / "spans.tmp", "wb") as f:
        files.write_npy(f, np.int64, (about["images"], 2, 2), moved)
    with open(folder / "text.tmp", "wb") as f:
        files.write_npy(f, np.float16, (tokens, about["dim"]), parts.each(part_files, "text"))
    (folder / "json.tmp").write_text(json.dumps({**about, "tokens": tokens}, indent=1))
    os.replace(folder / "text.tmp", folder / "text.npy")
    os.replace(folder / "spans.tmp", folder / "text_spans.npy")
    os.replace(folder / "json.tmp", folder / "text.json")
    shutil.rmtree(folder / "text.parts", ignore_errors=True)
    lost = f"{files.counted(empty, 'empty caption')}, {cut:,} cut to {CAPTION_TOKENS} tokens"
    size = f"{files.counted(tokens, 'token')} x {about['dim']} features"
    print(f"{folder}/text.npy: {size}; {lost}")


def load_text(folder):
    """What `encode` wrote there, memory-mapped: features float16 (tokens, D), spans int64
    (N, 2, 2), and {"encoder", "dim", "hash"}. Spans are the first token and the one after the last
    of each image's caption and short caption, equal where there is none. Raises ValueError."""
    folder = Path(folder)
    if not (folder / "text.json").exists():
        command = f"python -m nanollamagen.captions encode --codes {folder}"
        raise ValueError(f"{folder} has no features of its captions; make them with: {command}")
    about = read_about(folder)
    try:
        text = np.load(folder / "text.npy", mmap_mode="r", allow_pickle=False)
        spans = np.load(folder / "text_spans.npy", mmap_mode="r", allow_pickle=False)
        shapes = (about["tokens"], about["dim"]), (about["images"], 2, 2)
        if (text.shape, spans.shape) != shapes:
            raise ValueError
    except (OSError, ValueError, EOFError, LookupError):  # one is missing, or was cut short
        what = "text.npy, text_spans.npy and text.json do not belong together"
        raise ValueError(f"{folder}: {what}; delete text.json and encode again") from None
    return text, spans, {key: about[key] for key in ("encoder", "dim", "hash")}


def read_about(folder, expected=None):
    """The content of a folder's text.json. Raises ValueError if it is damaged, or not as
    `expected`."""
    try:
        about = json.loads((folder / "text.json").read_text())
        encoder = f"{about['encoder']}, {about['dim']} features per token"
        this = [about[key] for key in ("hash", "images", "bytes")]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{folder}/text.json is damaged; delete it and encode again") from None
    if expected and this != [expected[key] for key in ("hash", "images", "bytes")]:
        what = f"tells of another encoder or other captions ({encoder})"
        raise ValueError(f"{folder}/text.json {what}; delete it to replace them")
    return about


def caption_features(text, spans, ids, short):
    """Features (tokens, D) of each image's caption, or of the short one if `short` and there."""
    which = (short & (spans[ids, 1, 1] > spans[ids, 1, 0])).astype(int)  # (B,)
    return [torch.tensor(text[start:end]) for start, end in spans[ids, which]]


def main():
    """The command line."""
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    commands = p.add_subparsers(required=True)
    # fmt: off
    enc = commands.add_parser("encode", help="write the features of captions next to their codes")
    flag = enc.add_argument
    flag("--codes", default="codes", help="folder of vq.py encode (default: codes)")
    flag("--t5", default="google/flan-t5-xl", help="folder or Hugging Face name of a T5, or words, "
         "a stub without weights (default: google/flan-t5-xl)")
    flag("--batch-size", type=flags.batch, default=64, help="captions T5 takes together")
    flags.add_device(enc)
    # fmt: on
    args = p.parse_args()
    try:
        encode(args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command continues from here")


if __name__ == "__main__":
    main()
