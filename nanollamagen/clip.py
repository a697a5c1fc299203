"""CLIP, as the metrics know it: how well an image shows what its caption says (arXiv:2104.08718).

net = clip.load("openai/clip-vit-base-patch32", device)       # a folder or Hugging Face name
scores = clip.scores(net, images, texts)                      # 100 x cosine, (B,)
"""

# Shapes:  B images   side  pixels of CLIP's input
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import vq
from nanollamagen import captions

# Mean and deviation by channel of the images that CLIP was trained on.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def load(name, device="cpu"):
    """The model and its tokenizer. Raises OSError or ValueError that names --clip."""
    model, tokenizer = captions.load_pretrained("--clip", name, "CLIPModel", "AutoTokenizer")
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def scores(net, images, texts):
    """B images, uint8 (H, W, 3) each, and B texts -> 100 x the cosine of their features, (B,)."""
    model, tokenizer = net
    side = model.config.vision_config.image_size
    crops = [ImageOps.fit(Image.fromarray(x), (side, side), Image.BICUBIC) for x in images]
    pixels = (torch.stack([vq.to_tensor(crop) for crop in crops]) + 1) / 2  # (B, 3, side, side)
    most = model.config.text_config.max_position_embeddings
    how = {"padding": True, "truncation": True, "return_tensors": "pt"}
    words = tokenizer(texts, max_length=most, **how)
    pixels = ((pixels - MEAN) / STD).to(model.device)
    out = model(**words.to(model.device), pixel_values=pixels)
    return 100 * F.cosine_similarity(out.image_embeds, out.text_embeds)
