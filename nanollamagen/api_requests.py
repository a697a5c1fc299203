"""Requests to the server: their fields, uploaded pictures, and what is refused.

A mistake raises Refused (400, with the field's name) or HTTPException (another status). In the end
there is a Job: a request that api_sampling.py can sample.
"""

import asyncio
import secrets
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from fastapi import HTTPException, Request
from PIL import Image, ImageOps
from pydantic import Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from vllm.exceptions import VLLMValidationError

import sample
import serve_vllm
import vq
from nanollamagen import classes, data

MAX_JSON = 2**18  # bytes of a request; most of them are a prompt of up to 32,000 characters
MAX_FORM = 2**24  # bytes of a request with an image and a mask
MAX_PIXELS = 25_000_000  # of such an image
SILENT = {"user", "moderation"}  # fields of OpenAI's that change no picture


class Refused(VLLMValidationError):
    """A mistake in a field, or for None in the body: vLLM answers 400 with it."""

    def __init__(self, field, message):
        super().__init__(f"{field or 'the body'}: {message}", parameter=field)

    def __str__(self):
        return self.args[0]  # without what VLLMValidationError appends


# ---- fields ------------------------------------------------------------------------------------
class Fields(pydantic.BaseModel):
    """The fields of all models. Others have no effect; the answer's warning names them."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 1
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=64)] = 0  # OpenAI allows 3; more: row by row
    response_format: Literal["b64_json", "file"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100  # quality of jpeg and webp
    background: Literal["auto", "opaque"] = "auto"
    seed: Annotated[int | None, Field(ge=0, lt=2**53)] = None  # of image 0; image i has seed + i

    @pydantic.model_validator(mode="before")
    @classmethod
    def tidy(cls, fields):
        """null counts as missing. guidance_scale, the name of other servers, is cfg_scale."""
        if not isinstance(fields, dict):
            return fields
        fields = {name: value for name, value in fields.items() if value is not None}
        if {"guidance_scale", "cfg_scale"} <= fields.keys():
            raise ValueError("guidance_scale is another name of cfg_scale; give one")
        if "guidance_scale" in fields:
            fields["cfg_scale"] = fields.pop("guidance_scale")
        return fields


def request_model(info):
    """Fields, with those that depend on the exported model: its size, and sample.SETTINGS."""
    settings = {}
    for name, (for_classes, for_captions, least, most, _) in sample.SETTINGS.items():
        kind = Annotated[type(for_classes), Field(ge=least, le=most)]
        settings[name] = (kind, for_captions if info["captions"] else for_classes)
    longest = 32000 if info["captions"] else 1000
    settings["prompt"] = (Annotated[str, Field(min_length=1, max_length=longest)], ...)
    settings["negative_prompt"] = (Annotated[str, Field(max_length=longest)], "")
    settings["size"] = (Literal["auto", f"{info['image_size']}x{info['image_size']}"], "auto")
    return pydantic.create_model("ImageRequest", __base__=Fields, **settings)


def checked(request, validate, fields):
    """The validated fields. Raises Refused for the first wrong one, 404 for another model."""
    try:
        body = validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise Refused(name or None, first["msg"]) from None
    name = request.app.state.images.name
    if body.model not in (None, name):
        raise HTTPException(404, f"there is no model {body.model!r} here, only {name!r}")
    if body.response_format == "file" and (body.stream or body.n > 1):
        raise Refused("response_format", "'file' is one image, not streamed")
    return body


def check_tokens(tokens, *, parameter="prompt"):
    """Raise Refused for numbers of tokens that would end the engine, which counts in 32 bits."""
    if max(tokens, default=0) >= 2**31:
        raise Refused(parameter, f"{max(tokens)} is not a class")


async def read_json(request: Request):
    """The fields of a JSON body. Only the content type of JSON counts: before a browser posts JSON
    for a web page of another site it asks us, and for text it does not."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    check_length(request, MAX_JSON)
    validate = request.app.state.images.Request.model_validate_json
    return checked(request, validate, await request.body())


def check_length(request, most):
    """Raise 413 unless the header tells the number of bytes, and it is not too large."""
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > most:
        raise HTTPException(413, f"a request needs a Content-Length, of up to {most:,} bytes")


# ---- a form with pictures ----------------------------------------------------------------------
async def read_form(request: Request):
    """The fields of a multipart body, and the bytes of its files by their names."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send a form, with the header Content-Type: multipart/form-data")
    # A web page of any site can post a form through a visitor's browser, which then says so.
    foreign = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if foreign and not request.app.state.args.allowed_origins:
        raise HTTPException(403, "a web page of another site may not use this (--allowed-origins)")
    check_length(request, MAX_FORM)
    fields, uploads = {}, {}
    try:
        async with request.form(max_files=2, max_fields=50) as form:
            for name, value in form.multi_items():
                if isinstance(value, str):
                    fields[name] = value
                    continue
                name = name.removesuffix("[]")  # as some clients write lists
                if name in uploads or name not in ("image", "mask", "mask_image"):
                    raise Refused("image", "send one picture, and one mask")
                uploads[name] = await value.read()
    except (ClientDisconnect, StarletteHTTPException):
        raise Refused(None, "send a whole form, with one image and at most one mask") from None
    if not uploads.get("image"):
        raise Refused("image", "a file is required")
    validate = partial(request.app.state.images.Request.model_validate, strict=False)  # "2" is 2
    return checked(request, validate, fields), uploads


def open_upload(name, file):
    """The picture in an uploaded file, RGBA. Raises Refused for a broken or too costly file."""
    allowed, check = ["PNG", "JPEG", "WEBP"], partial(check_cost, name, file)
    try:
        return data.open_image(name, file, "RGBA", allowed, check)
    except OSError as error:
        if isinstance(error.__cause__, Refused):
            raise error.__cause__ from None
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise Refused(name, f"more than {MAX_PIXELS:,} pixels") from None
        raise Refused(name, "not a PNG, JPEG or WebP file, or a damaged one") from None


def check_cost(name, file, image):
    """Raise Refused for a picture whose pixels would take too much memory or time to decode."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise Image.DecompressionBombError
    # MPO is a photo with its previews, and not an animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise Refused(name, "an animation; send one picture")
    scans = file.count(b"\xff\xda")  # each of a JPEG's passes over all pixels
    if image.format in ("JPEG", "MPO") and scans * pixels > 50 * MAX_PIXELS:
        raise Refused(name, "too many scans")


# ---- edits -------------------------------------------------------------------------------------
@dataclass
class Edit:
    """What an edit keeps of its picture."""

    codes: list  # (T,), -1 for those to regenerate
    picture: np.ndarray  # uint8 (H, W, 3)
    kept: np.ndarray  # bool (H, W), False for pixels to regenerate


@torch.no_grad()
def edit_of(images, uploads):
    """The Edit of uploaded files: the image, and a mask or mask_image. Without these, the image's
    own transparency counts. Raises Refused."""
    size, grid = images.info["image_size"], images.info["grid"]
    opened = {name: open_upload(name, file) for name, file in uploads.items() if file}
    picture = opened.pop("image")
    ((which, shape),) = opened.items() or [("image", picture)]
    if shape.size != picture.size:
        (w, h), (width, height) = shape.size, picture.size
        raise Refused(which, f"{w} x {h} pixels, but the image has {width} x {height}")
    hole = "white" if which == "mask_image" else "transparent"
    shape = ImageOps.invert(shape.convert("L")) if hole == "white" else shape.getchannel("A")
    opaque = np.array(data.center_crop(shape, size)) > 127  # (H, W)
    kept = data.kept_cells(opaque, grid)  # (grid, grid)
    if kept.all():
        raise Refused(which, f"nothing is {hole}; {hole} pixels are regenerated")
    pixels = np.array(data.center_crop(picture.convert("RGB"), size))
    tensor = vq.to_tensor(pixels)[None].to(images.vq.quantize.embedding.weight.device)
    codes = images.vq.encode(tensor)[0].cpu().numpy()  # (grid, grid)
    cell = np.ones((size // grid, size // grid), bool)
    return Edit(np.where(kept, codes, -1).flatten().tolist(), pixels, np.kron(kept, cell))


# ---- jobs --------------------------------------------------------------------------------------
@dataclass
class Job:
    """One request, ready to be sampled."""

    body: Fields
    prompt: dict  # as the engine takes it
    revised: str  # the class's full name, or the caption
    seed: int  # of image 0
    warning: dict = field(default_factory=dict)  # a field of the answer, or none
    kind: str = "image_generation"  # what its events are called
    edit: Edit | None = None


async def job_of(images, body):
    """The Job of a request. Raises Refused for a prompt that this model does not know."""
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    idle = [f"{name[:40]!a}" for name in sorted(body.model_extra.keys() - SILENT)]
    warned = [f"without effect here: {', '.join(idle)}"] if idle else []
    if body.negative_prompt and body.cfg_scale <= 1:
        warned.append("negative_prompt has no effect without guidance (cfg_scale above 1)")
    if images.info["captions"]:
        revised = body.prompt
        prompt, more = await in_worker(images, images.encode, body.prompt, body.negative_prompt)
        if prompt is None:
            raise Refused("prompt", f"the caption {revised[:200]!r} has no words")
        warned += more
    else:
        class_id, negative = class_of(images, "prompt", body.prompt), -1
        revised = images.info["classes"][class_id]
        if body.negative_prompt:
            negative = class_of(images, "negative_prompt", body.negative_prompt)
        prompt = serve_vllm.class_prompt(class_id, images.info, negative)
    return Job(body, prompt, revised, seed, {"warning": "; ".join(warned)} if warned else {})


def class_of(images, field, text):
    """The id of the class that a field names. Raises Refused."""
    try:
        return classes.find_class(text, images.info["classes"])
    except ValueError as error:
        raise Refused(field, str(error)) from None


def in_worker(images, function, *arguments):
    """A function's result, to be awaited. In the worker's thread, one runs after the other."""
    return asyncio.get_running_loop().run_in_executor(images.worker, function, *arguments)
