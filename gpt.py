"""The Llama over image codes of LlamaGen (arXiv:2406.06525, section 2.2), class-conditional.

RMSNorm, SwiGLU and 2D rotary positions; a class embedding stands before the first code, and the codes of an image
follow row by row. Nothing else is specific to images. Loaded from a released file or one of train_gpt.py's:

    model = gpt.load_gpt("c2i_B_256.pt")
    logits = model(codes[:, :-1], labels)      # (B, T, V): logits[:, i] predicts code i

The file in order: sizes, rotary positions, model, cached decoding, checkpoints.
"""
# Shapes:  B images   T codes per image = grid * grid   c condition tokens   V codebook entries
#          C width   n heads   d = C / n   L positions in one call
import argparse
import zlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


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
    cond_tokens: int = 1        # c, positions before the first code: one class token
    dropout: float = 0.1        # of token embeddings, attention output and FFN output, in training
    class_dropout: float = 0.1  # how often training replaces the class by "no class"


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
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) in float32, cast back, then scaled (arXiv:1910.07467)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention over (B, L, C). With a cache, the L positions follow `start` earlier ones."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache=None, start=0):
        B, L, C = x.shape
        q, k, v = self.wqkv(x).view(B, L, 3, self.n_head, -1).unbind(2)           # each (B, L, n, d)
        q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)         # each (B, n, L, d)
        if cache is not None:                                                     # (2, B, n, positions, d)
            cache[0, :, :, start:start + L], cache[1, :, :, start:start + L] = k, v
            k, v = cache[:, :, :, :start + L]                                     # views, nothing is copied
        y = F.scaled_dot_product_attention(q, k, v, is_causal=L > 1)
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

    def forward(self, x, rope, cache=None, start=0):
        x = x + self.attention(self.attention_norm(x), rope, cache, start)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Class ids (B,) -> condition embeddings (B, c = 1, C). A caption condition would be another such module."""

    def __init__(self, config):
        super().__init__()
        self.num_classes, self.dropout = config.num_classes, config.class_dropout
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels):
        if self.training:   # sometimes "no class", so that guidance has something to compare with (arXiv:2207.12598)
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]


class GPT(nn.Module):
    """The model; parameter names are those of the released checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = ClassEmbedding(config)
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
        that the first loss is ln(V). A tensor follows from (seed, name) alone and only one exists at a time: processes
        that hold a shard each of a large model draw it like this and agree (train_gpt.py)."""
        for name, weight in self.named_parameters():
            value = torch.ones(weight.shape, device=weight.device)
            if weight.dim() > 1:
                generator = torch.Generator(weight.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                value.normal_(std=0.02, generator=generator)
            yield name, value.zero_() if name == "output.weight" else value

    def _apply(self, fn, recurse=True):
        """Move or cast the model; the rotary table follows to the device but stays float32 (not a buffer for that)."""
        super()._apply(fn, recurse)
        table = rope_table(self.config.grid, self.config.dim // self.config.n_head, self.config.cond_tokens)
        self.rope = table.to(self.norm.weight.device)
        return self

    def forward(self, tokens, cond):
        """Teacher-forced logits.

        tokens   (B, m) int64, the first m <= T codes of each image
        cond     (B,) int64 class ids in [0, num_classes]; in training some are dropped to num_classes
        returns  (B, m + 1, V): logits[:, i] predicts code i from the condition and the codes before it
        """
        x = torch.cat([self.cls_embedding(cond), self.tok_embeddings(tokens)], dim=1)   # (B, c + m, C)
        x = self.tok_dropout(x)
        rope = self.rope[:x.shape[1]]
        for layer in self.layers:
            x = layer(x, rope)
        return self.output(self.norm(x[:, self.config.cond_tokens - 1:]))

    # ---- cached decoding: new_cache, then extend with the condition, then with one code after the other -------------
    def new_cache(self, batch):
        """Room for keys and values of every position: (n_layer, 2, B, n, c + T - 1, d); the last code is never fed."""
        n, d, weight = self.config.n_head, self.config.dim // self.config.n_head, self.norm.weight
        positions = self.config.cond_tokens + self.config.grid ** 2 - 1
        return weight.new_zeros(self.config.n_layer, 2, batch, n, positions, d)

    def extend(self, x, start, cache):
        """Feed embeddings x (B, L, C) at positions start .. start + L - 1, filling the cache there; L > 1 only at
        start 0. Returns the logits that follow the last of them, (B, V)."""
        rope = self.rope[start:start + x.shape[1]]
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, rope, layer_cache, start)
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

    grid: rows of codes, for released files only (16 for 256-pixel models, the default; 24 for 384).
    The result also tells `classes` (names in label order) and `tokenizer` (the hash of its weights), where known.
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
        if not named or "cls_embedding.embedding_table.weight" not in state:
            raise ValueError(f"{path}: width {dim} with {n_layer} layers is none of the class-conditional sizes "
                             f"{', '.join(GPT_CONFIGS)}, and the file has no 'config'")
        classes = len(state["cls_embedding.embedding_table.weight"]) - 1
        config = replace(named[0], vocab_size=V, num_classes=classes, grid=grid or 16)
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit a GPT of width {config.dim}: {reason}") from None
    model.classes, model.tokenizer = checkpoint.get("classes"), checkpoint.get("tokenizer")   # None in released files
    return model.float().to(device).eval()
