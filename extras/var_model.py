"""VAR's transformer (arXiv:2404.02905): all codes of a scale at once, from the class and the
coarser scales.

Loaded from a released file or one of train_var.py's, with the tokenizer of var_vq.py:

    model = var_model.load_var("var_d16.pth")
    logits = model(tokenizer.quantize.teacher_input(codes), labels)  # logits[:, i] predicts code i

extras/train_var.py trains it, extras/var.py samples from it. The file in order: sizes,
transformer, untrained weights, checkpoints.
"""

# Shapes:  B images   S scales, the s-th a grid of p x p codes   L codes per image, the sum of all
#          p * p   l positions in one call   V codebook entries   D code dimension   C width
#          n heads
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
from var_vq import SCALES_256, SCALES_512

from nanollamagen import files


# ---- sizes -------------------------------------------------------------------------------------
@dataclass
class VARConfig:
    """What fixes the shapes of a transformer. Most follow from depth: C = 64 * depth, n = depth."""

    depth: int = 16
    scales: tuple = SCALES_256
    vocab_size: int = 4096  # V
    code_dim: int = 32  # D
    num_classes: int = 1000  # id num_classes means "no class"
    shared_adaln: bool = False  # one modulation for all blocks, and an offset for each
    class_dropout: float = 0.1  # how often training replaces the class by "no class"

    @property
    def width(self):
        """C"""
        return 64 * self.depth

    @property
    def codes(self):
        """L"""
        return sum(p * p for p in self.scales)


VAR_CONFIGS = {
    "d16": VARConfig(16),  # 310M
    "d20": VARConfig(20),  # 601M
    "d24": VARConfig(24),  # 1.0B
    "d30": VARConfig(30),  # 2.0B
    "d36": VARConfig(36, SCALES_512, shared_adaln=True),  # 2.4B, 512 pixels
    "demo": VARConfig(3),  # 2.1M, for laptops
}


# ---- transformer -------------------------------------------------------------------------------
def modulation(C, parts):
    """adaLN: the class vector (B, C) -> so many scales, shifts and gates of width C."""
    return nn.Sequential(nn.SiLU(), nn.Linear(C, parts * C))


def layer_norm(x, scale, shift):
    """Normalise x (B, l, C), then scale and shift it as the class says, (B, 1, C) each."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Attention(nn.Module):
    """Self-attention between unit queries and keys, with a learned temperature for each head."""

    def __init__(self, C, n):
        super().__init__()
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, n, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(C, 3 * C, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(C))
        self.v_bias = nn.Parameter(torch.zeros(C))
        self.register_buffer("zero_k_bias", torch.zeros(C))
        self.proj = nn.Linear(C, C)

    def forward(self, x, mask, cache=None, start=0):
        B, L, C = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(B, L, 3, -1, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n, L, 64)
        scale = self.scale_mul_1H11.clamp(max=math.log(100)).exp()  # (1, n, 1, 1)
        q = F.normalize(q, dim=-1) * scale
        k = F.normalize(k, dim=-1)
        if cache is not None:  # keys and values of all positions, (2, B, n, all of them, 64)
            end = start + L
            cache[0, :, :, start:end] = k
            cache[1, :, :, start:end] = v
            k, v = cache[:, :, :, :end]
        q, k = q.type_as(v), k.type_as(v)  # under autocast, normalize gives float32
        mask = None if mask is None else mask.type_as(v)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)  # (B, n, L, 64)
        return self.proj(y.transpose(1, 2).reshape(B, L, C))


class Block(nn.Module):
    """Attention, then feed-forward. The class scales and shifts the input of each and gates its
    output (adaLN)."""

    def __init__(self, config, drop):
        super().__init__()
        C = config.width
        self.drop = drop
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, C))
        else:
            self.ada_lin = modulation(C, 6)
        self.attn = Attention(C, config.depth)
        self.ffn = nn.ModuleDict({"fc1": nn.Linear(C, 4 * C), "fc2": nn.Linear(4 * C, C)})

    def drop_path(self, y):
        """In training, leave the branch y (B, l, C) out for a fraction of the images. The others
        make up for it."""
        if not self.training or not self.drop:
            return y
        kept = torch.rand(len(y), 1, 1, device=y.device) >= self.drop
        return y * kept / (1 - self.drop)

    def forward(self, x, cond, mask=None, cache=None, start=0):
        """x (B, l, C); cond (B, C), or (B, 1, 6, C) where all blocks share the modulation."""
        if cond.dim() == 4:
            modulated = cond + self.ada_gss
        else:
            modulated = self.ada_lin(cond).view(len(cond), 1, 6, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulated.unbind(2)  # each (B, 1, C)
        y = self.attn(layer_norm(x, scale1, shift1), mask, cache, start)
        x = x + self.drop_path(y * gate1)
        y = self.ffn.fc1(layer_norm(x, scale2, shift2))  # (B, l, 4 * C)
        y = self.ffn.fc2(F.gelu(y, approximate="tanh"))
        return x + self.drop_path(y * gate2)


class VAR(nn.Module):
    """The transformer. Its names, those of buffers included, are the released checkpoints'."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, L = config.width, config.codes
        self.pos_start = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_1LC = nn.Parameter(torch.zeros(1, L, C))
        level = torch.cat([torch.full((p * p,), s) for s, p in enumerate(config.scales)])  # (L,)
        self.register_buffer("lvl_1L", level[None])
        # a code sees all codes of its own scale and of the coarser ones
        hidden = level[:, None] < level
        mask = torch.zeros(L, L).masked_fill(hidden, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])
        self.word_embed = nn.Linear(config.code_dim, C)
        self.class_emb = nn.Embedding(config.num_classes + 1, C)
        self.lvl_embed = nn.Embedding(len(config.scales), C)
        if config.shared_adaln:
            self.shared_ada_lin = modulation(C, 6)
        drops = torch.linspace(0, 0.1 * config.depth / 24, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, drop) for drop in drops)
        self.head_nm = nn.ModuleDict({"ada_lin": modulation(C, 2)})
        self.head = nn.Linear(C, config.vocab_size)

    def new_cache(self, B, dtype=None):
        """Room for the keys and values of B images. In d36 it is 48 GB for 32 guided images."""
        config = self.config
        shape = (config.depth, 2, B, config.depth, config.codes, 64)
        return self.pos_start.new_zeros(shape, dtype=dtype)

    def add_positions(self, x, start=0):
        """Add to x (B, l, C) the embeddings of positions start .. start + l - 1 and of their
        scales."""
        here = slice(start, start + x.shape[1])
        return x + (self.lvl_embed(self.lvl_1L[:, here]) + self.pos_1LC[:, here])

    def run(self, x, cond, mask=None, cache=None, start=0):
        """The blocks and the head: x (B, l, C), class vectors cond (B, C) -> logits (B, l, V)
        float32."""
        for_blocks = cond
        if self.config.shared_adaln:
            for_blocks = self.shared_ada_lin(cond).view(len(cond), 1, 6, -1)
        for i, block in enumerate(self.blocks):
            x = block(x, for_blocks, mask, None if cache is None else cache[i], start)
        scale, shift = self.head_nm.ada_lin(cond).view(len(cond), 1, 2, -1).unbind(2)
        return self.head(layer_norm(x, scale, shift)).float()

    def forward(self, inputs, labels):
        """Teacher-forced logits: inputs (B, L - 1, D) of ScaleQuantizer.teacher_input, labels (B,)
        int64 in [0, num_classes] -> (B, L, V) float32. logits[:, i] predicts code i from the class
        and the scales before it."""
        if self.training:  # the official code drops classes in evaluation, too
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
            labels = torch.where(dropped, self.config.num_classes, labels)
        cond = self.class_emb(labels)  # (B, C)
        first = cond[:, None] + self.pos_start  # (B, 1, C)
        x = torch.cat([first, self.word_embed(inputs)], 1)  # (B, L, C)
        return self.run(self.add_positions(x), cond, self.attn_bias_for_masking)


# ---- untrained weights -------------------------------------------------------------------------
@torch.no_grad()
def init_weights(model, gate):
    """Give a transformer the weights of an untrained one, in place. Blocks add little at first:
    `gate` of it."""
    C, depth = model.config.width, model.config.depth
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif name.endswith("ada_gss"):
            weight.normal_(0, C**-0.5)
        elif not name.endswith("scale_mul_1H11"):
            weight.normal_(0, (3 * C) ** -0.5)
    model.head.weight *= 0.02
    model.head_nm.ada_lin[1].weight *= 0.5
    for block in model.blocks:
        block.attn.proj.weight /= (2 * depth) ** 0.5
        block.ffn.fc2.weight /= (2 * depth) ** 0.5
        if model.config.shared_adaln:
            modulated = block.ada_gss[0, 0]  # (6, C)
        else:
            modulated = block.ada_lin[1].weight.view(6, C, C)
        modulated[:2] *= gate  # the two gates
        modulated[2:] *= 0.5  # scales and shifts


# ---- checkpoints -------------------------------------------------------------------------------
def load_var(path, device="cpu"):
    """A transformer in eval mode, float32, from a released file, one of the official training code,
    or one of train_var.py's. Its `classes` and `tokenizer` (the hash of its weights) are None where
    the file does not hold them. Raises OSError or ValueError that names the file."""
    checkpoint = files.read_checkpoint(path)
    state = files.weights_of(checkpoint, path)
    if "trainer" in state:  # the official training code's wrapper
        state = state["trainer"].get("var_wo_ddp", state)
    if "tok_embeddings.weight" in state:
        raise ValueError(f"{path} is LlamaGen's GPT, not VAR's transformer; use sample.py")
    if "pos_1LC" not in state:
        raise ValueError(f"{path} is not a checkpoint of VAR's transformer (no pos_1LC)")
    if "config" in checkpoint:
        config = VARConfig(**checkpoint["config"])
    else:
        config = released_config(state, path)
    with torch.device("meta"):
        model = VAR(config)
    files.load_weights(model, state, path, assign=True)
    model.classes, model.tokenizer = checkpoint.get("classes"), checkpoint.get("tokenizer")
    return model.float().to(device).eval()


def released_config(state, path):
    """The config of a released file, which shows in the shapes of its weights."""
    _, length, width = state["pos_1LC"].shape
    scales_of = {sum(p * p for p in scales): scales for scales in (SCALES_256, SCALES_512)}
    if length not in scales_of:
        raise ValueError(
            f"{path} is for {length} codes per image; released files are for 680 or 2240"
        )
    return VARConfig(
        depth=width // 64,
        scales=scales_of[length],
        vocab_size=len(state["head.weight"]),
        code_dim=state["word_embed.weight"].shape[1],
        num_classes=len(state["class_emb.weight"]) - 1,
        shared_adaln="shared_ada_lin.1.weight" in state,
    )
