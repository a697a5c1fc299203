"""Words: the names of classes, and in place of classes captions, with the features of their words
by FLAN-T5.

After `vq.py encode` has made codes of captioned images, once for all epochs of training:
$ python -m nanollamagen.captions encode --codes codes --t5 google/flan-t5-xl
$ torchrun --nproc_per_node=8 -m nanollamagen.captions encode --codes codes

    features, mask = captions.encode_captions(["a red fox in the snow"])      # (1, 120, 2048), (1, 120)

The file in order: names of classes, cleaning, the encoder, features for sampling, features on disk,
the command.
"""

# Shapes:  B captions   c = 120 condition tokens   n tokens of one caption   D features of a token   N images
import argparse
import difflib
import hashlib
import html
import itertools
import json
import os
import re
import shutil
import sys
import time
import unicodedata
import zlib
from html.entities import html5
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_plus

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nanollamagen import data

CAPTION_TOKENS = (
    120  # c of caption models: longer captions are cut, shorter ones padded on the left
)


# ---- names of classes, and captions in a file --------------------------------------------------
def imagenet_classes():
    """The 1000 names in label order, each a list of synonyms separated by commas."""
    lines = (
        (Path(__file__).parent.parent / "assets" / "imagenet_classes.txt").read_text().splitlines()
    )
    return [line.split(" ", 1)[1] for line in lines]


def class_names(model):
    """Names of a model's classes in label order: its own, ImageNet's if there are 1000, else
    numbers."""
    if model.classes:
        return model.classes
    return (
        imagenet_classes()
        if model.config.num_classes == 1000
        else [str(i) for i in range(model.config.num_classes)]
    )


def find_class(text, names):
    """Class id of what a user typed: an id, or a name or part of one. Raises ValueError that lists
    the close ones."""
    text = text.strip()
    if re.fullmatch("-?[0-9]+", text):
        if not 0 <= int(text) < len(names):
            raise ValueError(f"class {text} is out of range: ids go from 0 to {len(names) - 1}")
        return int(text)
    synonyms = [[s.strip().lower() for s in name.split(",")] for name in names]
    exact = [i for i, s in enumerate(synonyms) if text.lower() in s]
    within = [i for i, name in enumerate(names) if text.lower() in name.lower()]
    found = exact or within
    if len(found) == 1:
        return found[0]
    if found:
        close, what = found[:12], "fits several classes"
    else:
        words = {s: i for i, group in reversed(list(enumerate(synonyms))) for s in group}
        close, what = (
            [words[w] for w in difflib.get_close_matches(text.lower(), words, 6, 0.5)],
            "is no class's name",
        )
    listed = "; ".join(f"{i} {names[i]}" for i in dict.fromkeys(close))
    raise ValueError(f"class {text!r} {what}" + (f"; close ones: {listed}" if listed else ""))


def read_prompts(path):
    """The lines of a file that are not empty. Raises OSError or ValueError with one sentence."""
    try:
        prompts = [
            line.strip()
            for line in Path(path).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is not a text file") from None
    if not prompts:
        raise ValueError(f"--prompts {path} has no captions")
    return prompts


# ---- cleaning ----------------------------------------------------------------------------------
# DeepFloyd IF's rules, made for texts beside pictures in web shops: a pattern and what replaces it,
# in this order.
SITE = r"[a-z\d.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"
FILE = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
ADDRESSES = [(rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z\d%])|{SITE})", "") for scheme in ("https?", "www")]
SYMBOLS = (
    (r"@\w+", ""),  # account names
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters, and signs of their neighbourhood
    ("[-֊־᐀᠆‐-―⸗⸚⸺⸻⹀〜〰゠︱︲﹘﹣－]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # 127.0.0.1
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    (
        r"#(?:\d{1,3}|\d{5,})\b|\b\d{6,}\b",
        "",
    ),  # #12 and #12345, but not #1234: a year, perhaps; 123456
    (rf"\S+\.{FILE}", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}|[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
ENCODING = (  # what the package ftfy does to text that is not garbled
    ("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", ""),
    (
        "[ĲĳŉǄ-ǌǱ-ǳﬀ-ﬆ\u3000\uff01-\uffef]",
        lambda found: unicodedata.normalize("NFKC", found[0]),
    ),  # ﬁ
    ("[“-‟]", '"'),
    ("[ʼ‘-‛]", "'"),
)
SHOP = (
    (
        r"\b(?:[a-zA-Z]{1,3}\d{3,15}|[a-zA-Z]+\d+[a-zA-Z]+|\d+[a-zA-Z]+\d+)\b",
        "",
    ),  # ab1234, ab12cd, 12ab34; 2x2 too
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (rf"\bclick\b\s(?:for|on)\s\w+|\b{FILE}(?:\simages?)?|\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes: 20x30, with a Latin x, a Cyrillic one, a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),  # a space after punctuation
    (r"\s+", " "),
    (r"""^["']([\w\W]+)["']$""", r"\1"),  # quotation marks around the whole; a lone one stays
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text):
    """A caption as the released text models saw it in training: the cleaning of DeepFloyd IF,
    twice, as LlamaGen does.

    Lower case, without addresses, tags, account and file names, article numbers, symbols and words
    of web shops. Left out: what follows after 3,000 characters, and ftfy's repair of text decoded
    by a wrong table ("schÃ¶n")."""
    text = text[:3000]  # 120 tokens are some 600; the rules' time grows as a square
    for _ in range(2):  # the second pass finds what the first uncovered
        text = unquote_plus(text).strip().lower()  # + is a space and %20 too, as in addresses
        text = replaced(text.replace("<person>", "person"), ADDRESSES)
        text = replaced(without_tags(text), SYMBOLS)
        if (
            len(re.findall("[-_]", text)) > 3
        ):  # this-is-the-name-of-a-file; a jack-in-the-box is not
            text = re.sub("[-_]", " ", text)
        text = unicodedata.normalize("NFC", replaced(html.unescape(text), ENCODING))
        text = html.unescape(html.unescape(text)).strip()
        text = replaced(text, SHOP).strip()
    return text


def replaced(text, rules):
    """The text after all rules (pattern, replacement), one after the other."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def without_tags(text):
    """What a browser would show of a piece of HTML; "1 < 2" passes as it is."""
    parser, shown = HTMLParser(convert_charrefs=False), []
    parser.handle_data = shown.append
    parser.handle_entityref = lambda name: shown.append(
        html5.get(f"{name};", f"&{name}")
    )  # &eacute; but not &me
    parser.handle_charref = lambda number: shown.append(html.unescape(f"&#{number};"))
    try:
        parser.feed(text)
        parser.close()  # hands over the rest: an unfinished tag is text
    except AssertionError:  # "<![": the official code raises an error, too
        return text
    return "".join(shown)


# ---- the encoder -------------------------------------------------------------------------------
def load_pretrained(flag, name, *kinds):
    """An object of each of these classes of the package transformers, from a folder or Hugging Face
    name. Raises OSError or ValueError with one sentence when the package or the files are missing
    or broken."""
    try:
        import transformers

        return [getattr(transformers, kind).from_pretrained(name) for kind in kinds]
    except ImportError:
        raise ValueError(
            f"{flag} {name} needs the package transformers: pip install transformers"
        ) from None
    except Exception as error:  # transformers raises a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{flag} {name} cannot be loaded ({reason}); give a folder with its files"
        ) from None


class CaptionEncoder:
    """Features of captions by FLAN-T5's encoder, or by the stand-in "words": there a token is a
    word and its features are random numbers that follow from its letters. That is no language
    model: words have identity but no meaning.

    name    folder or Hugging Face name of a T5 (loaded by the package transformers; bfloat16 on a GPU), or "words"
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
            self.tokenizer, self.model = load_pretrained(
                "--t5", name, "AutoTokenizer", "T5EncoderModel"
            )
            self.model.to(
                self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32
            ).eval()
            digest = (
                hashlib.sha256()
            )  # of a little of every tensor, rounded alike whatever the device
            for key, value in sorted(self.model.state_dict().items()):
                first = value.flatten()[:64].bfloat16().float().cpu().numpy()
                digest.update(f"{key} {tuple(value.shape)}".encode() + first.tobytes())
            self.about |= {"dim": self.model.config.d_model, "hash": digest.hexdigest()}

    @torch.no_grad()
    def __call__(self, texts, batch_size=16):
        """Strings -> float tensors (n, D) on the CPU, n <= 120 tokens each; n = 0 where cleaning
        leaves nothing."""
        tokens = self.tokenize([clean_caption(text) for text in texts])
        features = [torch.zeros(0, self.about["dim"])] * len(tokens)
        order = sorted(
            (i for i, row in enumerate(tokens) if row), key=lambda i: len(tokens[i])
        )  # little padding
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            states = self.states([tokens[i] for i in batch])
            for i, row in zip(batch, states):
                features[i] = row[: len(tokens[i])].cpu()
        return features

    def tokenize(self, texts):
        """Clean strings -> lists of at most 120 tokens: of too many the first 119 and the last, an
        end mark."""
        if self.model:
            rows = self.tokenizer(texts, verbose=False).input_ids
        else:
            rows = [re.findall(r"[\w'-]+", text) for text in texts]
        rows = [
            row if text else [] for text, row in zip(texts, rows)
        ]  # T5 has an end mark for nothing, too
        self.cut += sum(len(row) > CAPTION_TOKENS for row in rows)
        return [
            row if len(row) <= CAPTION_TOKENS else row[: CAPTION_TOKENS - 1] + row[-1:]
            for row in rows
        ]

    def states(self, rows):
        """Lists of tokens -> features (n or more, D) of each. The stand-in's follow from a word's
        letters alone."""
        if self.model:
            ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -1).to(
                self.device
            )
            return self.model(ids.clamp(min=0), attention_mask=(ids >= 0).long()).last_hidden_state
        seeds = [[zlib.crc32(word.encode()) for word in row] for row in rows]
        return [
            torch.tensor(np.stack([np.random.RandomState(s).randn(64) for s in row])).float()
            for row in seeds
        ]


# ---- features for sampling ---------------------------------------------------------------------
def pad_left(rows, c=CAPTION_TOKENS):
    """Tensors (n, D), n <= c -> (B, c, D) with zeros on the left, and the mask (B, c), False at
    these.

    On the left, because codes follow on the right: a caption's last word then stands next to the
    first code."""
    features = rows[0].new_zeros(len(rows), c, rows[0].shape[1])
    for i, row in enumerate(rows):
        features[i, c - len(row) :] = row
    return features, torch.arange(c) >= c - torch.tensor([[len(row)] for row in rows])


def caption_encoder(t5=None, device="cpu", model=None):
    """The CaptionEncoder `t5`, a folder or name; None: the one that `model` was trained with, or
    google/flan-t5-xl.

    model: the GPT that its features are for, if known. Raises ValueError where that was trained on
    others."""
    trained = getattr(model, "text", None) or {}  # released models do not tell
    encoder = CaptionEncoder(t5 or trained.get("encoder", "google/flan-t5-xl"), device)
    about = encoder.about
    if (
        model
        and about["dim"] != model.config.caption_dim
        or trained.get("hash", about["hash"]) != about["hash"]
    ):
        raise ValueError(
            f"--t5 {about['encoder']} ({about['dim']} features a token) is not the encoder that the GPT "
            f"was trained with ({trained.get('encoder', 'FLAN-T5 XL')}, {model.config.caption_dim})"
        )
    return encoder


def encode_captions(texts, t5=None, device="cpu", model=None, batch_size=16):
    """Strings -> features (B, 120, D) and mask (B, 120) bool for a caption model, on the CPU; the
    encoder is gone from memory afterwards. A caption of more than 120 tokens is cut, with a
    warning; one without words is a ValueError."""
    encoder = caption_encoder(t5, device, model)
    rows = encoder(texts, batch_size)
    for text, row in zip(texts, rows):
        if not len(row):
            raise ValueError(f"the caption {text!r} has no words")
    if encoder.cut:
        print(
            f"warning: {encoder.cut} of {len(texts)} captions have more than {CAPTION_TOKENS} tokens and are cut",
            file=sys.stderr,
        )
    del encoder
    torch.cuda.empty_cache()
    return pad_left(rows)


# ---- features on disk --------------------------------------------------------------------------
# A T5 of 1.2B parameters in every training step would cost more than the GPT itself, so its
# features are computed once. They are not padded: 50 million captions of 20 tokens are 4 TB in
# float16; padded to 120 they would be 25 TB.
PART = 1024  # images in one part file


def encode(args):
    """Write the features of captions.jsonl beside its codes: text.npy, text_spans.npy and text.json
    (see load_text).

    Every 1024 images are a part file until all are done, so that a second start goes on where the
    first ended. Under torchrun the processes take turns at parts. text.json is written last: where
    it is, the features are complete."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder, path = Path(args.codes), Path(args.codes, "captions.jsonl")
    count = len(data.load_codes(folder)[0])
    if not path.is_file():
        raise ValueError(
            f"--codes {folder} has no captions.jsonl: its images have classes, not captions"
        )
    encoder = CaptionEncoder(args.t5, args.device)
    about = {**encoder.about, "images": count, "bytes": path.stat().st_size}
    if (folder / "text.json").exists():
        read_about(folder, about)  # a ValueError if they are of other captions
        if rank == 0:
            print(f"{folder}/text.npy is complete. Nothing to do.")
        return
    parts = (
        folder / f"text.parts-{about['hash'][:8]}-{about['bytes']}"
    )  # other encoders have other parts
    parts.mkdir(exist_ok=True)
    files = [parts / f"{first:010d}.npz" for first in range(0, count, PART)]
    texts = read_captions(path, count)
    for number, file in enumerate(
        tqdm(files, desc="captions", unit=" parts of 1024", disable=rank > 0)
    ):
        # Lines have no fixed length, so every process reads all of them; T5, which takes the time,
        # sees its share.
        lines = list(itertools.islice(texts, min(PART, count - PART * number)))
        joined = (
            folder / "text.json"
        ).exists()  # by process 0, if it found all parts there at the start
        if number % world == rank and not file.exists() and not joined:
            write_part(file, encoder, lines, args.batch_size)
    if rank == 0:
        while not all(file.exists() for file in files):  # those of the other processes
            time.sleep(1)
        join(folder, about, files)
        shutil.rmtree(parts)


def write_part(file, encoder, lines, batch_size):
    """Features of some lines, (caption, short caption) each: text and spans as in load_text, and
    how many were cut."""
    before = encoder.cut
    texts = [text for line in lines for text in line]  # caption, short caption, caption, ...
    rows = encoder(texts, batch_size)
    lengths = np.array([len(row) for row in rows])
    ends = lengths.cumsum()
    spans = np.stack([ends - lengths, ends], -1).reshape(-1, 2, 2)
    with open(file.with_suffix(".tmp"), "wb") as f:
        np.savez(f, text=torch.cat(rows).half().numpy(), spans=spans, cut=encoder.cut - before)
    os.replace(file.with_suffix(".tmp"), file)


def join(folder, about, files):
    """Stream the part files into text.npy and text_spans.npy, so that memory does not grow with the
    images."""

    def each(name):
        for file in files:
            with np.load(file, allow_pickle=False) as part:
                yield part[name]

    starts = [
        0,
        *itertools.accumulate(int(spans.max()) for spans in each("spans")),
    ]  # of each part in text.npy
    tokens, cut = starts[-1], sum(int(cut) for cut in each("cut"))
    given = sum(
        (spans[..., 1] > spans[..., 0]).sum(0) for spans in each("spans")
    )  # captions, short captions
    if not tokens:
        raise ValueError(f"{folder}/captions.jsonl has no words in any caption")
    moved = (spans + start for spans, start in zip(each("spans"), starts))
    with open(folder / "spans.tmp", "wb") as f:
        data.write_npy(f, np.int64, (about["images"], 2, 2), moved)
    with open(folder / "text.tmp", "wb") as f:
        data.write_npy(f, np.float16, (tokens, about["dim"]), each("text"))
    (folder / "json.tmp").write_text(json.dumps({**about, "tokens": tokens}, indent=1))
    for tmp, name in (
        ("text.tmp", "text.npy"),
        ("spans.tmp", "text_spans.npy"),
        ("json.tmp", "text.json"),
    ):
        os.replace(folder / tmp, folder / name)
    print(
        f"{folder}/text.npy: {tokens:,} tokens x {about['dim']} features of {given[0]:,} captions and {given[1]:,} "
        f"short ones; {about['images'] - given[0]:,} captions are empty, {cut:,} were cut to {CAPTION_TOKENS} tokens"
    )


def load_text(folder):
    """What the captions command wrote there, memory-mapped: features float16 (tokens, D), spans
    int64 (N, 2, 2), the first token and the one after the last of each image's caption and short
    caption (equal where there is none), and {"encoder", "dim", "hash"}. Raises ValueError with one
    sentence when they are missing or do not fit."""
    folder = Path(folder)
    if not (folder / "text.json").exists():
        raise ValueError(
            f"{folder} has no features of its captions; make them with: "
            f"python -m nanollamagen.captions encode --codes {folder}"
        )
    about = read_about(folder)
    try:
        text = np.load(folder / "text.npy", mmap_mode="r", allow_pickle=False)
        spans = np.load(folder / "text_spans.npy", mmap_mode="r", allow_pickle=False)
        fits = text.shape == (about["tokens"], about["dim"]) and spans.shape == (
            about["images"],
            2,
            2,
        )
    except (OSError, ValueError, EOFError, LookupError):  # one is missing, or was cut short
        fits = False
    if not fits:
        raise ValueError(
            f"{folder}: text.npy, text_spans.npy and text.json do not belong together; delete text.json "
            "and run nanollamagen.captions encode again"
        )
    return text, spans, {key: about[key] for key in ("encoder", "dim", "hash")}


def caption_features(text, spans, ids, short):
    """Features (tokens, D) of a caption of each image: of the short one where it is wanted and
    there is one."""
    has_short = spans[ids, 1, 1] > spans[ids, 1, 0]
    rows = spans[
        ids, (short & has_short).astype(int)
    ]  # (B, 2): its first token, and the one after its last
    return [torch.tensor(text[start:end]) for start, end in rows]


def read_captions(path, count=0):
    """Yield (caption, short caption or "") of every line. Raises ValueError with one sentence for a
    line that has no caption, and at the end for a file of fewer than `count` lines."""
    number = 0
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield (
                    row["caption"] + "",
                    (row.get("short_caption") or "") + "",
                )  # + "": only text can be added
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(
                    f'{path}, line {number}: expected {{"caption": "..."}}, perhaps with a '
                    f'"short_caption"; it is {line.strip()[:80]}'
                ) from None
    if number < count:
        raise ValueError(f"{path} has fewer lines than codes.npy has images, {count:,}")


# ---- the command -------------------------------------------------------------------------------
def main():
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = p.add_subparsers(required=True).add_parser(
        "encode", help=encode.__doc__.splitlines()[0]
    )
    command.add_argument(
        "--codes", default="codes", help="folder written by vq.py encode (default: codes)"
    )
    command.add_argument(
        "--t5",
        default="google/flan-t5-xl",
        help="folder or Hugging Face name of a T5, or words, a "
        "stand-in without weights (default: google/flan-t5-xl)",
    )
    command.add_argument(
        "--batch-size", type=int, default=64, help="captions that go through T5 together"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument(
        "--device", type=data.device, default=device, help="default: cuda where there is one"
    )
    args = p.parse_args()
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    p.usage = (
        "python -m nanollamagen.captions encode --codes DIR ... (encode --help lists the flags)"
    )
    data.within(p, args, batch_size=(1, 1e5))
    try:
        encode(args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")


# ---- what a user can get wrong -----------------------------------------------------------------
def read_about(folder, expected=()):
    """The content of a folder's text.json. Raises ValueError with one sentence when it is damaged,
    or tells of another encoder or other captions than the dict `expected`."""
    try:
        about = json.loads((folder / "text.json").read_text())
        same = not expected or all(
            about[key] == expected[key] for key in ("hash", "images", "bytes")
        )
        encoder = f"{about['encoder']}, {about['dim']} features a token"
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{folder}/text.json is damaged; delete it and run nanollamagen.captions encode again"
        ) from None
    if not same:
        raise ValueError(
            f"{folder}/text.json tells of another encoder or other captions ({encoder}); delete it to "
            "replace them"
        )
    return about


if __name__ == "__main__":
    main()
