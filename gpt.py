"""The Llama over image codes of LlamaGen (arXiv:2406.06525, section 2.3), for classes or captions.

A plain Llama: RMSNorm, SwiGLU, rotary positions. Only this is specific to images: positions have
two dimensions, a class embedding or 120 caption embeddings come before the first code, and the
codes of an image follow row by row. It loads released files and those of train_gpt.py:

    model = gpt.load_gpt("c2i_B_256.pt")
    logits = model(codes[:, :-1], labels)      # (B, T, V): logits[:, i] predicts code i
"""

# Shapes:  B images   T codes per image = grid * grid   c condition tokens   V codebook entries
#          C width   n heads   d = C / n   L positions in one call   D features of a caption's token
import math
import zlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from nanollamagen import files


# ---- sizes -------------------------------------------------------------------------------------
@dataclass
class GPTConfig:
    """What fixes the shapes of a model; saved in every checkpoint."""

    dim: int = 768  # C
    n_layer: int = 12
    n_head: int = 12
    vocab_size: int = 16384  # V, entries in the tokenizer's codebook
    grid: int = 16  # rows = columns of codes, so T = grid * grid
    num_classes: int = 1000  # id num_classes means "no class", used for guidance
    cond_tokens: int = 1  # c, positions before the first code: one class token, or 120 of a caption
    dropout: float = 0.1  # of token embeddings, attention output and FFN output, in training
    class_dropout: float = 0.1  # how often training replaces the condition by "none"
    caption_dim: int = 0  # D, 2048 for FLAN-T5 XL; 0: the model is for classes

    @property
    def head_dim(self):
        """d, channels of one head."""
        return self.dim // self.n_head

    @property
    def hidden(self):
        """Width inside a feed-forward layer: 2/3 of 4C, rounded up to a multiple of 256."""
        return math.ceil(int(8 * self.dim / 3) / 256) * 256


# fmt: off
GPT_CONFIGS = {  # paper, table 1; 1B, XXXL and 7B come with its code
    "B":    GPTConfig(dim=768,  n_layer=12, n_head=12),  # 111M
    "L":    GPTConfig(dim=1024, n_layer=24, n_head=16),  # 343M
    "XL":   GPTConfig(dim=1280, n_layer=36, n_head=20),  # 775M
    "XXL":  GPTConfig(dim=1536, n_layer=48, n_head=24),  # 1.4B
    "3B":   GPTConfig(dim=3200, n_layer=24, n_head=32),  # 3.1B
    "1B":   GPTConfig(dim=2048, n_layer=22, n_head=32),  # 1.2B
    "XXXL": GPTConfig(dim=2560, n_layer=48, n_head=40),  # 3.9B
    "7B":   GPTConfig(dim=4096, n_layer=32, n_head=32),  # 6.6B
    "demo": GPTConfig(dim=128,  n_layer=6,  n_head=4),   # 1.6M, for laptops
    "tiny": GPTConfig(dim=128,  n_layer=2,  n_head=4),   # 0.6M, for `make demo`
}
# fmt: on


# ---- rotary positions --------------------------------------------------------------------------
def rope_table(grid, head_dim, cond_tokens, base=10000.0):
    """Cosine and sine for every position: float32 (c + T, d/2, 2), T = grid * grid.

    The first half of a head's channel pairs turns with the row of a code, the second half with its
    column, both with the frequencies base^(-2j / (d/2)), j = 0 .. d/4 - 1. Condition positions hold
    zeros (cos = sin = 0): queries and keys vanish there, and codes attend to the condition with
    score 0. That is not a rotation at all, but the released weights were trained with it."""
    half = head_dim // 2
    frequency = base ** (-torch.arange(0, half, 2).float() / half)  # (d/4,)
    angle = torch.outer(torch.arange(grid).float(), frequency)  # (grid, d/4)
    rows = angle[:, None].expand(grid, grid, -1)
    columns = angle[None].expand(grid, grid, -1)
    angles = torch.cat([rows, columns], -1).flatten(0, 1)  # (T, d/2)
    table = torch.stack([angles.cos(), angles.sin()], -1)  # (T, d/2, 2)
    return torch.cat([torch.zeros(cond_tokens, *table.shape[1:]), table])


def rotate(x, rope):
    """Turn adjacent channel pairs of x (B, L, n, d) by rope (L, d/2, 2), in float32."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, L, n, d/2)
    cos, sin = rope[..., None, :, :].unbind(-1)  # each (L, 1, d/2)
    return torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).flatten(-2).type_as(x)


# ---- model -------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) in float32, cast back, then scaled (arXiv:1910.07467)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class Attention(nn.Module):
    """Self-attention over (B, L, C), causal unless `visible` (see who_sees_whom) says more."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, visible=None, cache=None, positions=None):
        B, L, C = x.shape
        qkv = self.wqkv(x).view(B, L, 3 * self.n_head, -1)
        qk, v = qkv.split([2 * self.n_head, self.n_head], dim=2)
        q, k = rotate(qk, rope).chunk(2, dim=2)  # each (B, L, n, d)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each (B, n, L, d)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None)
        else:
            y = attend_to_cache(q, k, v, visible, cache, positions)
        return self.dropout(self.wo(y.transpose(1, 2).reshape(B, L, C)))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Attention, then feed-forward; each reads a normalised x (B, L, C) and is added to it."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)

    def forward(self, x, rope, visible=None, cache=None, positions=None):
        x = x + self.attention(self.attention_norm(x), rope, visible, cache, positions)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Class ids (B,) -> condition embeddings (B, c = 1, C)."""

    def __init__(self, config):
        super().__init__()
        self.num_classes = config.num_classes
        self.dropout = config.class_dropout
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels):
        # sometimes "no class", so that guidance has something to compare with (arXiv:2207.12598)
        if self.training:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]

    def uncond(self, labels):
        """The condition of the same shape that means "none"."""
        return torch.full_like(labels, self.num_classes)


class CaptionEmbedding(nn.Module):
    """Features of captions (B, c = 120, D) -> condition embeddings (B, c, C), by a two-layer MLP.
    "No caption" is `uncond_embedding`. It is a buffer in the released code: no optimizer sees it,
    and the weights were trained with its first random values."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.class_dropout
        fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        fc2 = nn.Linear(config.dim, config.dim, bias=False)
        self.cap_proj = nn.ModuleDict({"fc1": fc1, "fc2": fc2})
        no_caption = torch.zeros(config.cond_tokens, config.caption_dim)
        self.register_buffer("uncond_embedding", no_caption)

    def forward(self, features):
        features = features.to(self.uncond_embedding.dtype)
        if self.training:  # padding is replaced too, and stays masked
            drop = torch.rand(len(features), 1, 1, device=features.device) < self.dropout
            features = torch.where(drop, self.uncond(features), features)
        return self.cap_proj.fc2(F.gelu(self.cap_proj.fc1(features), approximate="tanh"))

    def uncond(self, features):
        no_caption = self.uncond_embedding[-features.shape[1] :].to(features.dtype)
        return no_caption.expand_as(features)


class GPT(nn.Module):
    """The model; parameter names are those of the released checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        embedding = CaptionEmbedding if config.caption_dim else ClassEmbedding
        self.cls_embedding = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rope = rope_table(config.grid, config.head_dim, config.cond_tokens)
        if not self.norm.weight.is_meta:
            self.load_state_dict(dict(self.initial_weights(seed=int(torch.randint(2**62, ())))))

    def initial_weights(self, seed):
        """Yield (name, tensor) of an untrained model; its first loss is ln(V), as the output layer
        is zero. A tensor follows from (seed, name) alone and only one exists at a time: processes
        that hold a shard each of a large model make it like this and agree."""
        for name, weight in self.state_dict().items():
            key = zlib.crc32(f"{seed} {name}".encode())
            generator = torch.Generator(weight.device).manual_seed(key)
            value = torch.zeros(weight.shape, device=weight.device)
            if weight.dim() == 1:  # a norm
                value.fill_(1)
            elif name.endswith("uncond_embedding"):
                value.normal_(std=weight.shape[1] ** -0.5, generator=generator)
            elif name != "output.weight":
                value.normal_(std=0.02, generator=generator)
            yield name, value

    def _apply(self, fn, recurse=True):
        """Move or cast the model. The rotary table follows but stays float32: it is no buffer."""
        super()._apply(fn, recurse)
        table = rope_table(self.config.grid, self.config.head_dim, self.config.cond_tokens)
        self.rope = table.to(self.norm.weight.device)
        return self

    def forward(self, tokens, cond, mask=None):
        """Teacher-forced logits.

        tokens   (B, m) int64, the first m <= T codes of each image
        cond     (B,) int64 class ids in [0, num_classes], or (B, c, D) features of captions, padded
                 on the left to the longest of them; in training some are dropped
        mask     (B, c) bool, False where a caption is padded: no other position attends there
        returns  (B, m + 1, V): logits[:, i] predicts code i from all that comes before it
        """
        cond = self.cls_embedding(cond)  # (B, c, C)
        x = self.tok_dropout(torch.cat([cond, self.tok_embeddings(tokens)], dim=1))  # (B, c + m, C)
        c, L = cond.shape[1], x.shape[1]
        first = self.config.cond_tokens - c  # short captions lack the first positions
        rope = self.rope[first : first + L]
        visible = None
        if mask is not None:
            visible = who_sees_whom(torch.arange(L, device=x.device), L, mask)
        for layer in self.layers:
            x = layer(x, rope, visible)
        return self.output(self.norm(x[:, c - 1 :]))

    # ---- cached decoding: new_cache, then extend with the condition, then with codes ------------
    def new_cache(self, batch, positions=None):
        """Zeros for the keys and values of each layer, (2, B, n, positions, d). The last code is
        never fed. d is a multiple of 8, or a GPU would copy the cache at every step."""
        if positions is None:
            positions = self.config.cond_tokens + self.config.grid**2 - 1
        d = math.ceil(self.config.head_dim / 8) * 8
        shape = (2, batch, self.config.n_head, positions, d)
        return [self.norm.weight.new_zeros(shape) for _ in self.layers]

    def extend(self, x, start, cache, mask=None, last=1):
        """Feed embeddings x (B, L, C) at positions start .. start + L - 1 and fill the cache there;
        later positions may hold any finite numbers. start is an int or a tensor, mask is the same
        at every call. Returns the logits (B, last, V) that follow the `last` positions."""
        positions = start + torch.arange(x.shape[1], device=x.device)  # (L,)
        rope = self.rope[positions]
        visible = who_sees_whom(positions, cache[0].shape[3], mask)
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, rope, visible, layer_cache, positions)
        return self.output(self.norm(x[:, -last:]))


def who_sees_whom(positions, keys, mask=None):
    """Bool (L, keys), or (B, 1, L, keys) with a mask (B, c): which of the first `keys` positions
    the queries at positions (L,) see. They see themselves and all before them but padding."""
    query = positions[:, None]
    key = torch.arange(keys, device=positions.device)
    if mask is None:
        return key <= query
    padded = F.pad(~mask, (0, keys - mask.shape[1]))[:, None, None]  # (B, 1, 1, keys)
    # Padding sees itself: softmax over nothing is NaN, and 0 * NaN is NaN for all that follow.
    return (key <= query) & ~padded | (key == query)


def attend_to_cache(q, k, v, visible, cache, positions):
    """Write k and v (B, n, L, d) into a layer's cache (2, B, n, keys, d or more) at positions (L,),
    then attend to it. No shape depends on how far decoding is: a GPU can record this once."""
    d = q.shape[-1]
    cache[0][:, :, positions, :d] = k
    cache[1][:, :, positions, :d] = v
    keys, values = cache
    q = F.pad(q * d**-0.5, (0, cache.shape[-1] - d))
    if q.is_cuda or q.dtype != torch.float32:
        y = F.scaled_dot_product_attention(q, keys, values, visible, scale=1.0)
    else:  # on a CPU that kernel takes twice as long for one query as plain products
        scores = (q @ keys.transpose(-1, -2)).masked_fill_(~visible, -torch.inf)
        y = scores.softmax(-1) @ values
    return y[..., :d]


# ---- work --------------------------------------------------------------------------------------
def flops_per_image(config):
    """Operations of a forward and backward pass (arXiv:2204.02311, appendix B): 6 per weight and
    position, and the causal half of 12 per layer, channel and pair of positions for attention."""
    T, C = config.grid**2, config.dim
    L = config.cond_tokens + T - 1  # positions; T of them predict a code
    layers = config.n_layer * (4 * C**2 + 3 * C * config.hidden)
    return 6 * (layers * L + C * config.vocab_size * T + config.n_layer * C * L**2)


# ---- checkpoints -------------------------------------------------------------------------------
def load_gpt(path, device="cpu", grid=16):
    """A model in eval mode, float32, from one of train_gpt.py's checkpoints (its averaged weights
    if it has them) or a released file, whose size is recognised from its shapes.

    grid: rows of codes, for released files only (24 for 384 pixels, 32 for 512). The model also has
    `classes` (names in label order), `tokenizer` (the hash of its weights) and `text` (about the
    encoder of captions) from the file. Raises OSError or ValueError with the reason."""
    checkpoint = files.read_checkpoint(path)
    state = files.weights_of(checkpoint, path)
    state.pop("freqs_cis", None)  # a stray rotary table of some files
    if "tok_embeddings.weight" not in state:
        other = "VAR, for extras/var.py" if "pos_1LC" in state else "the tokenizer"
        raise ValueError(f"{path} is not a GPT checkpoint; is it {other}?")
    if "config" in checkpoint:
        config = GPTConfig(**checkpoint["config"])
    else:
        config = released_config(state, path, grid)
    with torch.device("meta"):
        model = GPT(config)
    files.load_weights(model, state, path, assign=True)
    for name in ("classes", "tokenizer", "text"):
        setattr(model, name, checkpoint.get(name))
    return model.float().to(device).eval()


def released_config(state, path, grid):
    """The sizes of a released model, as the shapes of its weights tell them."""
    vocab_size, dim = state["tok_embeddings.weight"].shape
    n_layer = sum(name.endswith("ffn_norm.weight") for name in state)
    sizes = [c for c in GPT_CONFIGS.values() if (c.dim, c.n_layer) == (dim, n_layer)]
    classes = state.get("cls_embedding.embedding_table.weight")  # (num_classes + 1, C)
    no_caption = state.get("cls_embedding.uncond_embedding")  # (c, D)
    if not sizes or (classes is None and no_caption is None):
        raise ValueError(
            f"{path} has no 'config', and width {dim} with {n_layer} layers is no released model"
        )
    config = replace(sizes[0], vocab_size=vocab_size, grid=grid)
    if no_caption is None:
        return replace(config, num_classes=len(classes) - 1)
    c, D = no_caption.shape
    return replace(config, num_classes=0, cond_tokens=c, caption_dim=D)
