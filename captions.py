"""Words in place of classes: captions, the features of their words by FLAN-T5, and both on disk.

After `vq.py encode` has made codes of captioned images, once for all epochs of training:
$ python captions.py encode --codes codes --t5 google/flan-t5-xl
$ torchrun --nproc_per_node=8 captions.py encode --codes codes

    features, mask = captions.encode_captions(["a red fox in the snow"])      # (1, 120, 2048), (1, 120)

The file in order: cleaning, the encoder, features for sampling, features on disk, the command.
"""
# Shapes:  B captions   c = 120 condition tokens   n tokens of one caption   D features of a token   N images
import argparse
import hashlib
import html
import itertools
import json
import os
import re
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data


# ---- cleaning -------------------------------------------------------------------------------------------------------
CAPTION_TOKENS = 120   # c of caption models: longer captions are cut, shorter ones padded on the left
NOT_TEXT = re.compile(r"""https?://\S+ | \bwww\.\S+ | \S+\.(?:jpe?g|png|gif|bmp|webp|pdf|mp4)\b | <[^<>]*> | @\w+ |
    [\u31c0-\u9fff]+ | \#?\b\d{5,}\b | [#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+ | \s\.\s | \.{2,}""", re.X)


def clean_caption(text):
    """A caption as the released text models saw it in training: the cleaning of DeepFloyd IF, as far as it matters.

    Lower case; entities decoded; addresses, tags, file and account names, Chinese characters, long numbers and bare
    symbols to spaces; one kind of dash and of quotation mark; a space after punctuation, single spaces, no punctuation
    around the whole. Left out: repairing wrong encodings (ftfy), parsing HTML (BeautifulSoup), phrases of web shops."""
    text = html.unescape(html.unescape(text)).strip().lower()
    for pattern, other in (("[‐-―−]", "-"), ("[`´«»“”¨]+", '"'), ("[‘’]", "'"), (NOT_TEXT, " "),
                           (r"(\D[,./])\b", r"\1 "), (r"\s+:\s+", ": "), (r"\s+", " ")):
        text = re.sub(pattern, other, text)
    return re.sub(r"""^['"_,\-:;\s]+|['"_,\-:;+\s]+$""", "", text)


# ---- the encoder ----------------------------------------------------------------------------------------------------
def load_pretrained(flag, name, *kinds):
    """An object of each of these classes of the package transformers, from a folder or Hugging Face name. Raises
    OSError or ValueError with one sentence when the package or the files are missing or broken."""
    try:
        import transformers
        return [getattr(transformers, kind).from_pretrained(name) for kind in kinds]
    except ImportError:
        raise ValueError(f"{flag} {name} needs the package transformers: pip install transformers") from None
    except Exception as error:   # transformers raises a dozen kinds
        raise OSError(f"{flag} {name} cannot be loaded ({str(error).splitlines()[0]}); give a folder with its files"
                      ) from None


class CaptionEncoder:
    """Features of captions by FLAN-T5's encoder, or by the stand-in "words": there a token is a word and its features
    are random numbers that follow from its letters. That is no language model: words have identity but no meaning.

    name    folder or Hugging Face name of a T5 (loaded by the package transformers; bfloat16 on a GPU), or "words"
    about   {"encoder": name, "dim": D, "hash": tells encoders apart}
    cut     how many captions had more than 120 tokens, so far"""

    def __init__(self, name="google/flan-t5-xl", device="cpu"):
        name = os.path.abspath(name) if os.path.isdir(name) else name   # checkpoints remember it
        self.device, self.cut, self.about = torch.device(device), 0, {"encoder": name, "dim": 64, "hash": "words"}
        if name == "words":
            return
        self.tokenizer, self.model = load_pretrained("--t5", name, "AutoTokenizer", "T5EncoderModel")
        self.model.to(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32).eval()
        digest = hashlib.sha256()   # of a little of every tensor, rounded alike whatever the device
        for key, value in sorted(self.model.state_dict().items()):
            some = value.flatten()[:64].bfloat16().float().cpu().numpy()
            digest.update(f"{key} {tuple(value.shape)}".encode() + some.tobytes())
        self.about |= {"dim": self.model.config.d_model, "hash": digest.hexdigest()}

    @torch.no_grad()
    def __call__(self, texts, batch_size=16):
        """Strings -> float tensors (n, D) on the CPU, n <= 120 tokens each; n = 0 where cleaning leaves nothing. Of too
        many tokens the first 119 and the last one stay, which is T5's end mark."""
        texts, words = [clean_caption(text) for text in texts], self.about["encoder"] == "words"
        rows = [re.findall(r"[\w'-]+", text) for text in texts] if words else \
            self.tokenizer(texts, verbose=False).input_ids
        self.cut += sum(len(row) > CAPTION_TOKENS for row in rows)
        rows = [row if len(row) <= CAPTION_TOKENS else row[:CAPTION_TOKENS - 1] + row[-1:] for row in rows]
        features = [torch.zeros(0, self.about["dim"])] * len(rows)
        order = [i for i in range(len(rows)) if texts[i] and rows[i]]
        order.sort(key=lambda i: len(rows[i]))   # so that batches need little padding
        for batch in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
            if words:
                random = {w: np.random.RandomState(zlib.crc32(w.encode())).randn(64) for i in batch for w in rows[i]}
                out = [torch.tensor(np.stack([random[w] for w in rows[i]])).float() for i in batch]
            else:
                ids = nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in batch], True, -1).to(self.device)
                out = self.model(ids.clamp(min=0), attention_mask=(ids >= 0).long()).last_hidden_state
            for i, row in zip(batch, out):
                features[i] = row[:len(rows[i])].cpu()
        return features


# ---- features for sampling ------------------------------------------------------------------------------------------
def pad_left(rows, c=CAPTION_TOKENS):
    """Tensors (n, D), n <= c -> (B, c, D) with zeros on the left, and the mask (B, c), False at these."""
    features = rows[0].new_zeros(len(rows), c, rows[0].shape[1])
    for i, row in enumerate(rows):
        features[i, c - len(row):] = row
    return features, torch.arange(c) >= c - torch.tensor([[len(row)] for row in rows])


def caption_encoder(t5=None, device="cpu", model=None):
    """The CaptionEncoder `t5`, a folder or name; None: the one that `model` was trained with, or google/flan-t5-xl.

    model: the GPT that its features are for, if known. Raises ValueError where that was trained on others."""
    trained = getattr(model, "text", None) or {}
    encoder = CaptionEncoder(t5 or trained.get("encoder", "google/flan-t5-xl"), device)
    about = encoder.about
    if model and about["dim"] != model.config.caption_dim or trained.get("hash", about["hash"]) != about["hash"]:
        raise ValueError(f"--t5 {about['encoder']} ({about['dim']} features a token) is not the encoder that the GPT "
                         f"was trained with ({trained.get('encoder', 'FLAN-T5 XL')}, {model.config.caption_dim})")
    return encoder


def encode_captions(texts, t5=None, device="cpu", model=None, batch_size=16):
    """Strings -> features (B, 120, D) and mask (B, 120) bool for a caption model, on the CPU; the encoder is gone from
    memory afterwards. A caption of more than 120 tokens is cut, with a warning. t5 and model as in caption_encoder."""
    encoder = caption_encoder(t5, device, model)
    rows = encoder(texts, batch_size)
    if not all(map(len, rows)):
        raise ValueError(f"the caption {texts[[len(row) for row in rows].index(0)]!r} has no words")
    if encoder.cut:
        print(f"warning: {encoder.cut} of {len(texts)} captions have more than {CAPTION_TOKENS} tokens and are cut",
              file=sys.stderr)
    del encoder
    torch.cuda.empty_cache()
    return pad_left(rows)


# ---- features on disk -----------------------------------------------------------------------------------------------
def read_captions(path):
    """Yield (caption, short caption or "") of every line. Raises ValueError with one sentence for a line without."""
    with open(path, encoding="utf-8") as lines:
        for i, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield row["caption"] + "", (row.get("short_caption") or "") + ""
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {i}: expected {{"caption": "..."}}, perhaps with a "short_caption"; '
                                 f"it is {line.strip()[:80]}") from None


def load_text(folder):
    """What the captions command wrote there, memory-mapped: features float16 (tokens, D), spans int64 (N, 2, 2), the
    first token and the one after the last of each image's caption and short caption (equal where there is none), and
    {"encoder", "dim", "hash"}. Raises ValueError with one sentence when they are missing or do not fit."""
    folder = Path(folder)
    if not (folder / "text.json").exists():
        raise ValueError(f"{folder} has no features of its captions; make them with: "
                         f"python captions.py encode --codes {folder}")
    about = json.loads((folder / "text.json").read_text())
    text, spans = (np.load(folder / f, mmap_mode="r", allow_pickle=False) for f in ("text.npy", "text_spans.npy"))
    if text.shape != (about["tokens"], about["dim"]) or spans.shape != (about["images"], 2, 2):
        raise ValueError(f"{folder}: text.npy {text.shape}, text_spans.npy {spans.shape} and text.json do not belong "
                         "together; delete text.json and run captions.py encode again")
    return text, spans, {k: about[k] for k in ("encoder", "dim", "hash")}


def caption_features(text, spans, ids, short):
    """Features (tokens, D) of a caption of each image: of the short one where it is wanted and there is one."""
    has_short = spans[ids, 1, 1] > spans[ids, 1, 0]
    rows = spans[ids, (short & has_short).astype(int)]      # (B, 2): its first token, and the one after its last
    return [torch.tensor(text[start:end]) for start, end in rows]


def encode(args):
    """Write the features of captions.jsonl beside its codes: text.npy, text_spans.npy and text.json (see load_text).

    Every 1024 images are a part file until all are done, so that a second start goes on where the first ended. Under
    torchrun the processes take turns at parts. text.json is written last: where it is, the features are complete."""
    rank, world, folder = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), Path(args.codes)
    count, path = len(data.load_codes(folder)[0]), folder / "captions.jsonl"
    if not path.exists():
        raise ValueError(f"--codes {folder} has no captions.jsonl: its images have classes, not captions")
    encoder = CaptionEncoder(args.t5, args.device)
    about = {**encoder.about, "images": count, "bytes": path.stat().st_size}
    if (folder / "text.json").exists():
        done = json.loads((folder / "text.json").read_text())
        if any(done[k] != about[k] for k in ("hash", "images", "bytes")):
            raise ValueError(f"{folder}/text.json tells of another encoder or other captions ({done['encoder']}, "
                             f"{done['dim']} features a token); delete it to replace them")
        return print(f"{folder}/text.npy is complete. Nothing to do.") if rank == 0 else None
    parts = folder / f"text.parts-{about['hash'][:8]}-{about['bytes']}"   # other encoders have other parts
    parts.mkdir(exist_ok=True)
    texts, files = read_captions(path), [parts / f"{s:010d}.npz" for s in range(0, count, 1024)]
    for number, file in enumerate(tqdm(files, desc="captions", unit=" parts of 1024", disable=rank > 0)):
        some = list(itertools.islice(texts, min(1024, count - 1024 * number)))
        if len(some) < min(1024, count - 1024 * number):
            raise ValueError(f"{path} has fewer lines than codes.npy has images, {count:,}")
        if number % world == rank and not file.exists() and not (folder / "text.json").exists():
            before, rows = encoder.cut, encoder(sum(some, ()), args.batch_size)   # caption, short caption, caption ...
            ends = np.cumsum([len(row) for row in rows])
            spans = np.stack([ends - [len(row) for row in rows], ends], -1).reshape(-1, 2, 2)
            with open(file.with_suffix(".tmp"), "wb") as f:
                np.savez(f, text=torch.cat(rows).half().numpy(), spans=spans, cut=encoder.cut - before)
            os.replace(file.with_suffix(".tmp"), file)
    while rank == 0 and not all(file.exists() for file in files):   # of the other processes
        time.sleep(1)
    if rank == 0:
        join(folder, about, files)
        shutil.rmtree(parts)


def join(folder, about, files):
    """Stream the part files into text.npy and text_spans.npy, so that memory does not grow with the images."""
    spans = np.lib.format.open_memmap(folder / "spans.tmp", "w+", np.int64, (about["images"], 2, 2))
    tokens, cut, given = 0, 0, np.zeros(2, int)   # given: captions and short captions that have words
    for i, file in enumerate(files):
        with np.load(file, allow_pickle=False) as part:
            spans[1024 * i:1024 * (i + 1)] = part["spans"] + tokens
            tokens, cut = tokens + int(part["spans"].max()), cut + int(part["cut"])
            given += (part["spans"][..., 1] > part["spans"][..., 0]).sum(0)
    if not tokens:
        raise ValueError(f"{folder}/captions.jsonl has no words in any caption")
    text, start = np.lib.format.open_memmap(folder / "text.tmp", "w+", np.float16, (tokens, about["dim"])), 0
    for file in files:
        with np.load(file, allow_pickle=False) as part:
            text[start:start + len(part["text"])] = part["text"]
            start += len(part["text"])
    text.flush(), spans.flush()
    os.replace(folder / "text.tmp", folder / "text.npy")
    os.replace(folder / "spans.tmp", folder / "text_spans.npy")
    (folder / "json.tmp").write_text(json.dumps({**about, "tokens": tokens}, indent=1))
    os.replace(folder / "json.tmp", folder / "text.json")
    print(f"{folder}/text.npy: {tokens:,} tokens x {about['dim']} features of {given[0]:,} captions and {given[1]:,} "
          f"short ones; {about['images'] - given[0]:,} captions are empty, {cut:,} were cut to {CAPTION_TOKENS} tokens")


# ---- the command ----------------------------------------------------------------------------------------------------
def main():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = p.add_subparsers(required=True).add_parser("encode", help=encode.__doc__.splitlines()[0])
    command.add_argument("--codes", default="codes", help="folder written by vq.py encode (default: codes)")
    command.add_argument("--t5", default="google/flan-t5-xl", help="folder or Hugging Face name of a T5, or words: a "
                         "stand-in that only tells words apart, without weights (default: google/flan-t5-xl)")
    command.add_argument("--batch-size", type=int, default=64, help="captions that go through T5 together")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", default=device, help="cuda or cpu (default: cuda where there is one)")
    args = p.parse_args()
    p.usage = "python captions.py encode --codes DIR ... (encode --help lists the flags)"
    try:
        encode(args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")


if __name__ == "__main__":
    main()
