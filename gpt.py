"""The Llama over image codes of LlamaGen (arXiv:2406.06525, section 2.3), for classes or captions.

RMSNorm, SwiGLU and 2D rotary positions; a class embedding or 120 caption embeddings stand before
the first code, and the codes of an image follow row by row. Nothing else is specific to images.
Loaded from a released file or one of train_gpt.py's:

    model = gpt.load_gpt("c2i_B_256.pt")
    logits = model(codes[:, :-1], labels)      # (B, T, V): logits[:, i] predicts code i

The file in order: sizes, rotary positions, model, cached decoding, checkpoints.
"""

# Shapes:  B images   T codes per image = grid * grid   c condition tokens   V codebook entries
#          C width   n heads   d = C / n   L positions in one call   D features of a caption's token
import zlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from nanollamagen import data


# ---- sizes -------------------------------------------------------------------------------------
@dataclass
class GPTConfig:
    """What fixes the shapes of a model; saved in every checkpoint."""

    dim: int = 768  # C
    n_layer: int = 12
    n_head: int = 12
    vocab_size: int = 16384  # V, entries in the tokenizer's codebook
    grid: int = 16  # rows = columns of codes, so T = grid * grid
    num_classes: int = 1000  # id num_classes stands for "no class", used for guidance
    cond_tokens: int = 1  # c, positions before the first code: one class token, or 120 of a caption
    dropout: float = 0.1  # of token embeddings, attention output and FFN output, in training
    class_dropout: float = (
        0.1  # how often training replaces the class by "no class", or the caption by "no caption"
    )
    caption_dim: int = (
        0  # D, features of a caption's token (2048 for FLAN-T5 XL); 0: the model is for classes
    )


GPT_CONFIGS = {  # paper, table 1; 1B, XXXL and 7B come with its code
    "B": GPTConfig(dim=768, n_layer=12, n_head=12),  # 111M
    "L": GPTConfig(dim=1024, n_layer=24, n_head=16),  # 343M
    "XL": GPTConfig(dim=1280, n_layer=36, n_head=20),  # 775M
    "XXL": GPTConfig(dim=1536, n_layer=48, n_head=24),  # 1.4B
    "3B": GPTConfig(dim=3200, n_layer=24, n_head=32),  # 3.1B
    "1B": GPTConfig(dim=2048, n_layer=22, n_head=32),  # 1.2B
    "XXXL": GPTConfig(dim=2560, n_layer=48, n_head=40),  # 3.9B
    "7B": GPTConfig(dim=4096, n_layer=32, n_head=32),  # 6.6B
    "demo": GPTConfig(
        dim=128, n_layer=6, n_head=4
    ),  # 1.6M, for laptops; the vocabulary follows the codes
}


# ---- rotary positions --------------------------------------------------------------------------
def rope_table(grid, head_dim, cond_tokens, base=10000.0):
    """Cosine and sine for every position: float32 (c + T, d/2, 2), T = grid * grid.

    The first half of a head's channel pairs turns with the row of a code, the second half with its
    column, both with the frequencies base^(-2j / (d/2)), j = 0 .. d/4 - 1. Condition positions hold
    zeros (cos = sin = 0), so queries and keys vanish there and codes attend to the condition with
    score 0: not a rotation at all, but the released weights were trained with it."""
    frequency = base ** (
        -torch.arange(0, head_dim // 2, 2)[: head_dim // 4].float() / (head_dim // 2)
    )  # (d/4,)
    angle = torch.outer(torch.arange(grid).float(), frequency)  # (grid, d/4)
    rows = angle[:, None].expand(grid, grid, -1)
    columns = angle[None].expand(grid, grid, -1)
    angles = torch.cat([rows, columns], -1).flatten(0, 1)  # (T, d/2)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([torch.zeros(cond_tokens, *table.shape[1:]), table])


def rotate(x, rope):
    """Turn adjacent channel pairs of x (B, L, n, d) by rows of the table, rope (L, d/2, 2) or (B,
    L, d/2, 2), in float32."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, n, d/2)
    cos, sin = rope[..., None, :, :].unbind(-1)  # (L, 1, d/2) or (B, L, 1, d/2)
    return torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).flatten(-2).type_as(x)


# ---- model -------------------------------------------------------------------------------------
def visible(positions, keys, mask=None):
    """Who sees whom: bool (B or 1, 1, L, keys), for queries at positions (L,) or (B, L) and the
    first `keys` positions.

    A position sees itself and everything before it but padding; mask (B, c) tells a caption's
    tokens from padding."""
    key = torch.arange(keys, device=positions.device)
    query = positions.view(-1, 1, positions.shape[-1], 1)
    if mask is None:
        return key <= query
    keys_to_see = F.pad(mask, (0, keys - mask.shape[1]), value=True)[
        :, None, None
    ]  # (B, 1, 1, keys)
    return (key < query) & keys_to_see | (key == query)


def attend(q, k, v, seen):
    """Softmax attention of q (B, n, L, d) to cached k and v (B, n, keys, d), where seen allows it;
    d may be padded."""
    if q.is_cuda or q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, k, v, seen, scale=1.0)
    scores = q @ k.transpose(
        -1, -2
    )  # on a CPU, with one query, that kernel takes twice as long as plain products
    return scores.masked_fill_(~seen, -torch.inf).softmax(-1) @ v


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) in float32, cast back, then scaled (arXiv:1910.07467)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention over (B, L, C). `seen`, the result of visible(), takes the place of the
    causal triangle."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, seen=None, cache=None, positions=None):
        B, L, C = x.shape
        qkv = self.wqkv(x).view(B, L, 3 * self.n_head, -1)
        q, k = rotate(qkv[:, :, : 2 * self.n_head], rope).chunk(2, dim=2)  # each (B, L, n, d)
        v = qkv[:, :, 2 * self.n_head :]
        if cache is None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each (B, n, L, d)
            y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None and L > 1)
        else:
            y = self.attend_to_cache(q, k, v, seen, cache, positions)
        return self.dropout(self.wo(y.transpose(1, 2).reshape(B, L, C)))

    def attend_to_cache(self, q, k, v, seen, cache, positions):
        """Write k and v (B, L, n, d) into cache (2, B, n, keys, d or more) at positions (L,) or (B,
        L), then attend to all that is there. The sizes say nothing about how far decoding is, so
        that a GPU can record this once."""
        d, rows = q.shape[-1], torch.arange(len(q), device=q.device)[:, None]
        cache[:, rows, :, positions, :d] = torch.stack([k, v], 2)
        q = F.pad(q.transpose(1, 2) * d**-0.5, (0, cache.shape[-1] - d))
        return attend(q, cache[0], cache[1], seen)[..., :d]


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) * w3 x), hidden width 2/3 * 4C rounded up to a
    multiple of 256."""

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
    """Attention, then feed-forward, each on a normalised input and added to the residual stream (B,
    L, C)."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)

    def forward(self, x, rope, seen=None, cache=None, positions=None):
        x = x + self.attention(self.attention_norm(x), rope, seen, cache, positions)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Class ids (B,) -> condition embeddings (B, c = 1, C)."""

    def __init__(self, config):
        super().__init__()
        self.num_classes, self.dropout = config.num_classes, config.class_dropout
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels):
        # sometimes "no class", so that guidance has something to compare with (arXiv:2207.12598)
        if self.training:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]

    def uncond(self, labels):
        """The condition of the same shape that stands for none."""
        return torch.full_like(labels, self.num_classes)


class CaptionEmbedding(nn.Module):
    """Features of captions (B, c = 120, D) -> condition embeddings (B, c, C), by a two-layer MLP
    without biases.

    "No caption" is `uncond_embedding` at all positions. In the released code it is a buffer that no
    optimizer sees, and the weights were trained with its first random values."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.class_dropout
        self.cap_proj = nn.ModuleDict(
            {
                "fc1": nn.Linear(config.caption_dim, config.dim, bias=False),
                "fc2": nn.Linear(config.dim, config.dim, bias=False),
            }
        )
        self.register_buffer(
            "uncond_embedding", torch.zeros(config.cond_tokens, config.caption_dim)
        )

    def forward(self, features):
        features, none = (
            features.to(self.uncond_embedding.dtype),
            self.uncond_embedding[-features.shape[1] :],
        )
        if self.training:  # padding is replaced too, and stays masked
            drop = torch.rand(len(features), 1, 1, device=features.device) < self.dropout
            features = torch.where(drop, none, features)
        return self.cap_proj.fc2(F.gelu(self.cap_proj.fc1(features), approximate="tanh"))

    def uncond(self, features):
        """The condition of the same shape that stands for none."""
        return self.uncond_embedding[-features.shape[1] :].to(features.dtype).expand_as(features)


class GPT(nn.Module):
    """The model; parameter names are those of the released checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = (
            CaptionEmbedding(config) if config.caption_dim else ClassEmbedding(config)
        )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rope = rope_table(config.grid, config.dim // config.n_head, config.cond_tokens)
        if not self.norm.weight.is_meta:
            self.load_state_dict(dict(self.initial_weights(seed=int(torch.randint(2**62, ())))))

    def initial_weights(self, seed):
        """Yield (name, tensor) of an untrained model: N(0, 0.02), ones for norms, and zeros for the
        output layer, so that the first loss is ln(V); "no caption" is N(0, 1 / D). A tensor follows
        from (seed, name) alone and only one exists at a time: processes that hold a shard each of a
        large model draw it like this and agree."""
        for name, weight in self.state_dict().items():
            value = torch.ones(weight.shape, device=weight.device)
            if weight.dim() > 1:
                generator = torch.Generator(weight.device).manual_seed(
                    zlib.crc32(f"{seed} {name}".encode())
                )
                std = weight.shape[1] ** -0.5 if name.endswith("uncond_embedding") else 0.02
                value.normal_(std=std, generator=generator)
            yield name, value.zero_() if name == "output.weight" else value

    def _apply(self, fn, recurse=True):
        """Move or cast the model; the rotary table follows to the device but stays float32 (not a
        buffer for that)."""
        super()._apply(fn, recurse)
        table = rope_table(
            self.config.grid, self.config.dim // self.config.n_head, self.config.cond_tokens
        )
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
        x = torch.cat(
            [self.cls_embedding(cond), self.tok_embeddings(tokens)], dim=1
        )  # (B, c + m, C)
        x, c = self.tok_dropout(x), x.shape[1] - tokens.shape[1]
        rope = self.rope[self.config.cond_tokens - c : self.config.cond_tokens + tokens.shape[1]]
        seen = (
            None
            if mask is None
            else visible(torch.arange(x.shape[1], device=x.device), x.shape[1], mask)
        )
        for layer in self.layers:
            x = layer(x, rope, seen)
        return self.output(self.norm(x[:, c - 1 :]))

    # ---- cached decoding: new_cache, then extend with the condition, then with codes ------------
    def new_cache(self, batch, positions=None):
        """Zeros for keys and values, for each layer (2, B, n, positions, d); at most c + T - 1
        positions are fed, since the last code never is. d is rounded up to a multiple of 8, or a
        GPU would copy the cache at every step."""
        c = self.config
        d = -(-c.dim // c.n_head // 8) * 8
        positions = positions or c.cond_tokens + c.grid**2 - 1
        return [self.norm.weight.new_zeros(2, batch, c.n_head, positions, d) for _ in self.layers]

    def extend(self, x, start, cache, mask=None, last=1):
        """Feed embeddings x (B, L, C) at positions start .. start + L - 1 and fill the cache there;
        later positions may hold anything. start is an int, or int64 (B, 1) for rows that are not
        equally far; mask as in forward, the same at every call. Returns the logits that follow the
        `last` positions, (B, last, V)."""
        positions = start + torch.arange(x.shape[1], device=x.device)  # (L,) or (B, L)
        rope, seen = self.rope[positions], visible(positions, cache[0].shape[3], mask)
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, rope, seen, layer_cache, positions)
        return self.output(self.norm(x[:, -last:]))


# ---- work --------------------------------------------------------------------------------------
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
}  # dense bf16 by data sheet


def flops_per_image(config):
    """Floating-point operations of one forward and backward pass over one image: 6 a weight and
    position, and the causal half of 12 a layer, channel and pair of positions for attention
    (arXiv:2204.02311, appendix B)."""
    T, hidden = config.grid**2, -(-int(8 * config.dim / 3) // 256) * 256
    L = config.cond_tokens + T - 1  # positions; T of them predict a code
    layers = config.n_layer * (4 * config.dim**2 + 3 * config.dim * hidden)
    return (
        6 * (layers * L + config.dim * config.vocab_size * T)
        + 6 * config.n_layer * config.dim * L**2
    )


def utilisation(config, images_per_s, device):
    """MFU: the share of a GPU's peak rate that training on `images_per_s` takes; None where that
    peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)
    return peak and flops_per_image(config) * images_per_s / peak


# ---- checkpoints -------------------------------------------------------------------------------
def load_gpt(path, device="cpu", grid=None):
    """A model in eval mode, float32, from one of train_gpt.py's checkpoints (its averaged weights
    if it has them) or a released file, whose size is recognised from its shapes.

    grid: rows of codes, for released files only (16 for 256-pixel models, the default; 24 for 384,
    32 for 512). The result also tells `classes` (names in label order), `tokenizer` (the hash of
    its weights) and `text` (what encoded the captions: encoder, dim, hash), where known. Raises
    OSError or ValueError with one sentence for a file that is missing, damaged or not a GPT."""
    checkpoint = data.read_checkpoint(path)
    state = data.weights_of(checkpoint, path)
    state.pop("freqs_cis", None)  # a stray rotary table of some files
    if "tok_embeddings.weight" not in state:
        raise ValueError(
            f"{path} is not a GPT checkpoint (no tok_embeddings.weight); is it "
            f"{'VAR, for extras/var.py' if 'pos_1LC' in state else 'the tokenizer'}?"
        )
    if "config" in checkpoint:
        config = GPTConfig(**checkpoint["config"])
    else:
        (V, dim), n_layer = (
            state["tok_embeddings.weight"].shape,
            sum(k.endswith("ffn_norm.weight") for k in state),
        )
        named = [c for c in GPT_CONFIGS.values() if (c.dim, c.n_layer) == (dim, n_layer)]
        table, caption = (
            state.get(f"cls_embedding.{k}") for k in ("embedding_table.weight", "uncond_embedding")
        )
        if not named or table is None and caption is None:
            raise ValueError(
                f"{path}: width {dim} with {n_layer} layers is none of the sizes "
                f"{', '.join(GPT_CONFIGS)} for classes or captions, and the file has no 'config'"
            )
        cond = (
            dict(num_classes=len(table) - 1)
            if caption is None
            else dict(num_classes=0, cond_tokens=len(caption), caption_dim=caption.shape[1])
        )
        config = replace(named[0], vocab_size=V, grid=grid or 16, **cond)
    with torch.device("meta"):
        model = GPT(config)
    data.load_weights(model, state, path, assign=True)
    for name in ("classes", "tokenizer", "text"):
        setattr(model, name, checkpoint.get(name))  # None in released files
    return model.float().to(device).eval()
