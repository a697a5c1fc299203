"""The Llama over image codes of LlamaGen (arXiv:2406.06525, sections 2.2 and 2.3), for classes or captions.

RMSNorm, SwiGLU and 2D rotary positions; a class embedding or 120 caption embeddings stand before the first code, and
the codes of an image follow row by row. Nothing else is specific to images. Loaded from a released file or one of
train_gpt.py's:

    model = gpt.load_gpt("c2i_B_256.pt")
    logits = model(codes[:, :-1], labels)      # (B, T, V): logits[:, i] predicts code i

Run as a script, it computes the features of captions beside their codes, once for all epochs of training:
$ python gpt.py captions --codes codes --t5 google/flan-t5-xl
$ torchrun --nproc_per_node=8 gpt.py captions --codes codes

The file in order: sizes, rotary positions, model, cached decoding, checkpoints, captions.
"""
# Shapes:  B images   T codes per image = grid * grid   c condition tokens   V codebook entries
#          C width   n heads   d = C / n   L positions in one call   D features of a caption's token   N images
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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data


# ---- sizes ----------------------------------------------------------------------------------------------------------
@dataclass
class GPTConfig:
    """What fixes the shapes of a model; saved in every checkpoint."""
    dim: int = 768              # C
    n_layer: int = 12
    n_head: int = 12
    vocab_size: int = 16384     # V, entries in the tokenizer's codebook
    grid: int = 16              # rows = columns of codes, so T = grid * grid
    num_classes: int = 1000     # id num_classes stands for "no class", used for guidance
    cond_tokens: int = 1        # c, positions before the first code: one class token, or 120 of a caption
    dropout: float = 0.1        # of token embeddings, attention output and FFN output, in training
    class_dropout: float = 0.1  # how often training replaces the class by "no class", or the caption by "no caption"
    caption_dim: int = 0        # D, features of a caption's token (2048 for FLAN-T5 XL); 0: the model is for classes


GPT_CONFIGS = {                                               # paper, table 1; the last four come with its code
    "B": GPTConfig(dim=768, n_layer=12, n_head=12),           # 111M
    "L": GPTConfig(dim=1024, n_layer=24, n_head=16),          # 343M
    "XL": GPTConfig(dim=1280, n_layer=36, n_head=20),         # 775M
    "XXL": GPTConfig(dim=1536, n_layer=48, n_head=24),        # 1.4B
    "3B": GPTConfig(dim=3200, n_layer=24, n_head=32),         # 3.1B
    "1B": GPTConfig(dim=2048, n_layer=22, n_head=32),         # 1.2B
    "XXXL": GPTConfig(dim=2560, n_layer=48, n_head=40),       # 3.9B
    "7B": GPTConfig(dim=4096, n_layer=32, n_head=32),         # 6.6B
    "demo": GPTConfig(dim=128, n_layer=6, n_head=4),          # 1.6M, for laptops; the vocabulary follows the codes
}


# ---- rotary positions -----------------------------------------------------------------------------------------------
def rope_table(grid, head_dim, cond_tokens, base=10000.0):
    """Cosine and sine for every position: float32 (c + T, d/2, 2), T = grid * grid.

    The first half of a head's channel pairs turns with the row of a code, the second half with its column, both with
    the frequencies base^(-2j / (d/2)), j = 0 .. d/4 - 1. Condition positions hold zeros (cos = sin = 0), so queries
    and keys vanish there and codes attend to the condition with score 0: not a rotation at all, but the released
    weights were trained with it."""
    frequency = base ** (-torch.arange(0, head_dim // 2, 2)[: head_dim // 4].float() / (head_dim // 2))   # (d/4,)
    angle = torch.outer(torch.arange(grid).float(), frequency)                                            # (grid, d/4)
    rows = angle[:, None].expand(grid, grid, -1)
    columns = angle[None].expand(grid, grid, -1)
    angles = torch.cat([rows, columns], -1).flatten(0, 1)                                                 # (T, d/2)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([torch.zeros(cond_tokens, *table.shape[1:]), table])


def rotate(x, rope):
    """Turn adjacent channel pairs of x (B, L, n, d) by the table rows rope (L, d/2, 2), in float32."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)      # (B, L, n, d/2)
    cos, sin = rope[:, None].unbind(-1)                       # (L, 1, d/2)
    return torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).flatten(-2).type_as(x)


# ---- model ----------------------------------------------------------------------------------------------------------
def visible(mask, start, L):
    """Who sees whom: bool (B, 1, L, start + L), for queries at positions start .. start + L - 1 and all keys so far.

    mask (B, c) tells a caption's tokens from padding. A position sees itself and everything before it but padding."""
    keys = F.pad(mask, (0, start + L - mask.shape[1]), value=True)[:, None]          # (B, 1, start + L)
    query, key = (torch.arange(first, start + L, device=mask.device) for first in (start, 0))
    return ((key < query[:, None]) & keys | (key == query[:, None]))[:, None]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) in float32, cast back, then scaled (arXiv:1910.07467)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention over (B, L, C). With a cache, the L positions follow `start` earlier ones. `seen`, the
    result of visible(), takes the place of the causal triangle."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache=None, start=0, seen=None):
        B, L, C = x.shape
        q, k, v = self.wqkv(x).view(B, L, 3, self.n_head, -1).unbind(2)           # each (B, L, n, d)
        q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)         # each (B, n, L, d)
        if cache is not None:                                                     # (2, B, n, positions, d)
            cache[0, :, :, start:start + L], cache[1, :, :, start:start + L] = k, v
            k, v = cache[:, :, :, :start + L]                                     # views, nothing is copied
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None and L > 1)
        return self.dropout(self.wo(y.transpose(1, 2).reshape(B, L, C)))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) * w3 x), hidden width 2/3 * 4C rounded up to a multiple of 256."""

    def __init__(self, config):
        super().__init__()
        hidden = -(-int(2 * 4 * config.dim / 3) // 256) * 256
        self.w1 = nn.Linear(config.dim, hidden, bias=False)
        self.w3 = nn.Linear(config.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised input and added to the residual stream (B, L, C)."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)

    def forward(self, x, rope, cache=None, start=0, seen=None):
        x = x + self.attention(self.attention_norm(x), rope, cache, start, seen)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Class ids (B,) -> condition embeddings (B, c = 1, C)."""

    def __init__(self, config):
        super().__init__()
        self.num_classes, self.dropout = config.num_classes, config.class_dropout
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels):
        if self.training:   # sometimes "no class", so that guidance has something to compare with (arXiv:2207.12598)
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]

    def uncond(self, labels):
        """The condition of the same shape that stands for none."""
        return torch.full_like(labels, self.num_classes)


class CaptionEmbedding(nn.Module):
    """Features of captions (B, c = 120, D) -> condition embeddings (B, c, C), by a two-layer MLP without biases.

    "No caption" is `uncond_embedding` at all positions. The paper calls it learned; in the released code it is a buffer
    that no optimizer sees, and the weights were trained with its first random values."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.class_dropout
        self.cap_proj = nn.ModuleDict({"fc1": nn.Linear(config.caption_dim, config.dim, bias=False),
                                       "fc2": nn.Linear(config.dim, config.dim, bias=False)})
        self.register_buffer("uncond_embedding", torch.zeros(config.cond_tokens, config.caption_dim))

    def forward(self, features):
        features, none = features.to(self.uncond_embedding.dtype), self.uncond_embedding[-features.shape[1]:]
        if self.training:   # padding is replaced too, and stays masked
            drop = torch.rand(len(features), 1, 1, device=features.device) < self.dropout
            features = torch.where(drop, none, features)
        return self.cap_proj.fc2(F.gelu(self.cap_proj.fc1(features), approximate="tanh"))

    def uncond(self, features):
        """The condition of the same shape that stands for none."""
        return self.uncond_embedding[-features.shape[1]:].to(features.dtype).expand_as(features)


class GPT(nn.Module):
    """The model; parameter names are those of the released checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = CaptionEmbedding(config) if config.caption_dim else ClassEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rope = rope_table(config.grid, config.dim // config.n_head, config.cond_tokens)
        if not self.norm.weight.is_meta:
            self.load_state_dict(dict(self.initial_weights(seed=int(torch.randint(2 ** 62, ())))))

    def initial_weights(self, seed):
        """Yield (name, tensor) of an untrained model: N(0, 0.02), ones for norms, and zeros for the output layer, so
        that the first loss is ln(V); "no caption" is N(0, 1 / D). A tensor follows from (seed, name) alone and only
        one exists at a time: processes that hold a shard each of a large model draw it like this and agree."""
        for name, weight in self.state_dict().items():
            value = torch.ones(weight.shape, device=weight.device)
            if weight.dim() > 1:
                generator = torch.Generator(weight.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                std = weight.shape[1] ** -0.5 if name.endswith("uncond_embedding") else 0.02
                value.normal_(std=std, generator=generator)
            yield name, value.zero_() if name == "output.weight" else value

    def _apply(self, fn, recurse=True):
        """Move or cast the model; the rotary table follows to the device but stays float32 (not a buffer for that)."""
        super()._apply(fn, recurse)
        table = rope_table(self.config.grid, self.config.dim // self.config.n_head, self.config.cond_tokens)
        self.rope = table.to(self.norm.weight.device)
        return self

    def forward(self, tokens, cond, mask=None):
        """Teacher-forced logits.

        tokens   (B, m) int64, the first m <= T codes of each image
        cond     (B,) int64 class ids in [0, num_classes], or (B, c, D) features of captions, padded on the left (with a
                 mask, to the longest of them is enough); in training some are dropped
        mask     (B, c) bool, False where a caption is padded: there nothing looks. None: everything is seen
        returns  (B, m + 1, V): logits[:, i] predicts code i from the condition and the codes before it
        """
        x = torch.cat([self.cls_embedding(cond), self.tok_embeddings(tokens)], dim=1)   # (B, c + m, C)
        x, c = self.tok_dropout(x), x.shape[1] - tokens.shape[1]
        rope = self.rope[self.config.cond_tokens - c:self.config.cond_tokens + tokens.shape[1]]
        seen = None if mask is None else visible(mask, 0, x.shape[1])
        for layer in self.layers:
            x = layer(x, rope, seen=seen)
        return self.output(self.norm(x[:, c - 1:]))

    # ---- cached decoding: new_cache, then extend with the condition, then with one code after the other -------------
    def new_cache(self, batch):
        """Room for keys and values of every position: (n_layer, 2, B, n, c + T - 1, d); the last code is never fed."""
        n, d, weight = self.config.n_head, self.config.dim // self.config.n_head, self.norm.weight
        positions = self.config.cond_tokens + self.config.grid ** 2 - 1
        return weight.new_zeros(self.config.n_layer, 2, batch, n, positions, d)

    def extend(self, x, start, cache, mask=None):
        """Feed embeddings x (B, L, C) at positions start .. start + L - 1, filling the cache there; L > 1 only at
        start 0. mask as in forward, the same at every call. Returns the logits that follow the last of them, (B, V)."""
        rope = self.rope[start:start + x.shape[1]]
        seen = None if mask is None else visible(mask, start, x.shape[1])
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, rope, layer_cache, start, seen)
        return self.output(self.norm(x[:, -1]))


# ---- checkpoints ----------------------------------------------------------------------------------------------------
def read_checkpoint(path, mmap=False):
    """A checkpoint as a dict of plain values and tensors on the CPU; nothing in the file is executed. With mmap,
    tensors are read from disk when they are used.

    Raises OSError for a missing file and ValueError for one that is damaged or holds other objects."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # released training files hold their flags so
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from None
    except Exception as error:   # the bytes of a broken file can make the reader stumble in any way
        code = any(f"Unsupported {kind}" in str(error) for kind in ("global", "class"))
        raise ValueError(f"{path} holds Python objects beside tensors and is refused: it could run code" if code else
                         f"{path} is truncated, or not a PyTorch checkpoint") from None


def load_gpt(path, device="cpu", grid=None):
    """A model in eval mode, float32, from one of train_gpt.py's checkpoints (its averaged weights if it has them) or
    a released file, whose size is recognised from its shapes.

    grid: rows of codes, for released files only (16 for 256-pixel models, the default; 24 for 384, 32 for 512).
    The result also tells `classes` (names in label order), `tokenizer` (the hash of its weights) and `text` (what
    encoded the captions: encoder, dim, hash), where known.
    Raises OSError or ValueError with one sentence for a file that is missing, damaged or not a GPT."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not the weights of a GPT")
    state = next((checkpoint[k] for k in ("ema", "model", "module", "state_dict") if checkpoint.get(k)), checkpoint)
    state.pop("freqs_cis", None)                                       # a stray rotary table of some files
    if "tok_embeddings.weight" not in state:
        raise ValueError(f"{path} is not a GPT checkpoint (no tok_embeddings.weight); is it the tokenizer?")
    if "config" in checkpoint:
        config = GPTConfig(**checkpoint["config"])
    else:
        (V, dim), n_layer = state["tok_embeddings.weight"].shape, sum(k.endswith("ffn_norm.weight") for k in state)
        named = [c for c in GPT_CONFIGS.values() if (c.dim, c.n_layer) == (dim, n_layer)]
        table, caption = (state.get(f"cls_embedding.{k}") for k in ("embedding_table.weight", "uncond_embedding"))
        if not named or table is None and caption is None:
            raise ValueError(f"{path}: width {dim} with {n_layer} layers is none of the sizes "
                             f"{', '.join(GPT_CONFIGS)} for classes or captions, and the file has no 'config'")
        cond = dict(num_classes=len(table) - 1) if caption is None else \
            dict(num_classes=0, cond_tokens=len(caption), caption_dim=caption.shape[1])
        config = replace(named[0], vocab_size=V, grid=grid or 16, **cond)
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit a GPT of width {config.dim}: {reason}") from None
    for name in ("classes", "tokenizer", "text"):
        setattr(model, name, checkpoint.get(name))                     # None in released files
    return model.float().to(device).eval()


# ---- captions -------------------------------------------------------------------------------------------------------
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


def captions(args):
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
    texts, files = data.read_captions(path), [parts / f"{s:010d}.npz" for s in range(0, count, 1024)]
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


def main():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = p.add_subparsers(required=True).add_parser("captions", help=captions.__doc__.splitlines()[0])
    command.add_argument("--codes", default="codes", help="folder written by vq.py encode (default: codes)")
    command.add_argument("--t5", default="google/flan-t5-xl", help="folder or Hugging Face name of a T5, or words: a "
                         "stand-in that only tells words apart, without weights (default: google/flan-t5-xl)")
    command.add_argument("--batch-size", type=int, default=64, help="captions that go through T5 together")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", default=device, help="cuda or cpu (default: cuda where there is one)")
    args = p.parse_args()
    p.usage = "python gpt.py captions --codes DIR ... (captions --help lists the flags)"
    try:
        captions(args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")


if __name__ == "__main__":
    main()
