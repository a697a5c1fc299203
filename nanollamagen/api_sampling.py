"""From a Job to its images, as OpenAI's events: the engine's codes, the tokenizer's pixels."""

import asyncio
import base64
import contextlib
import io
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from vllm.exceptions import VLLMError, VLLMServerError
from vllm.v1.engine.exceptions import EngineDeadError

import sample
import serve_vllm
from nanollamagen import flags

BATCH = 8  # images that the tokenizer decodes together at most, which bounds its memory
ENCODERS = ThreadPoolExecutor(4)  # Pillow compresses without Python's lock


async def events_of(images, job):
    """Yield the events about all images of a job as they come. Raises what ended them before the
    last image. When this ends, also because the client has left, all sampling for the job ends."""
    queue = asyncio.Queue(1)  # one place: a client that reads slowly holds up only itself
    left = job.body.n
    streams = [image_events(images, job, i) for i in range(left)]
    tasks = [asyncio.create_task(put_all(events, queue)) for events in streams]
    try:
        while left:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event["type"].endswith("completed"):
                left -= 1
            yield event
    finally:
        for task in tasks:
            task.cancel()


async def put_all(events, queue):
    """Put events into a queue, and if an exception ends them, that for the client."""
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                await queue.put(event)
    except EngineDeadError:
        await queue.put(VLLMServerError("the engine has stopped; the server must be restarted"))
    except VLLMError as error:  # overload: vLLM has a status and a message for it
        await queue.put(error)
    except Exception as error:
        traceback.print_exception(error)
        await queue.put(VLLMServerError("sampling failed; the server's log tells why"))


async def image_events(images, job, i):
    """Sample image i of a job; yield an event for each partial image, then one for the whole."""
    grid, body = images.info["grid"], job.body
    parts = body.partial_images if body.stream else 0
    due = [(part + 1) * grid // (parts + 1) for part in range(parts)]  # rows before a partial image
    settings = body.model_dump(include=set(sample.SETTINGS))
    settings |= {"seed": job.seed + i, "stream": parts > 0, "known": job.edit and job.edit.codes}
    params = serve_vllm.sampling_params(images.info, **settings)
    codes, shown, sent = [], 0, 0
    outputs = images.engine.generate(job.prompt, params, uuid.uuid4().hex)
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            # While a client reads, more codes come as one output: some parts may be left out.
            codes += output.outputs[0].token_ids
            if max(codes, default=0) >= images.vq.config.codebook_size:  # see Draw
                raise RuntimeError("the model's logits are not finite")
            rows = len(codes) // grid
            if rows < grid and any(shown < row <= rows for row in due):
                event = await event_of(images, job, i, "partial_image", codes[: rows * grid])
                yield event | {"partial_image_index": sent, "rows": rows}
                shown, sent = rows, sent + 1
    if len(codes) < grid * grid:
        raise RuntimeError("the engine left an image unfinished")
    event = await event_of(images, job, i, "completed", codes)
    yield event | {"usage": usage(images, job, 1)} | job.warning


async def event_of(images, job, i, kind, codes):
    """An event that shows these codes of image i."""
    file = asyncio.get_running_loop().create_future()
    images.decoder.put_nowait((codes, job, file))
    return {
        "type": f"{job.kind}.{kind}",
        "b64_json": base64.b64encode(await file).decode(),
        "index": i,
        "seed": job.seed + i,
        "created_at": int(time.time()),
        "size": images.size,
        "quality": "auto",
        "background": "opaque",
        "output_format": job.body.output_format,
    }


def usage(images, job, n):
    """What n images cost, in OpenAI's words. Codes and positions of the prompt are tokens."""
    length, T = len(*job.prompt.values()), images.info["grid"] ** 2
    details = {"input_tokens_details": {"text_tokens": n * length, "image_tokens": 0}}
    counts = {"output_tokens": n * T, "total_tokens": n * (T + length)}
    return {"input_tokens": n * length} | details | counts


async def decode_forever(waiting, vq_model, grid):
    """Serve a queue of (codes, job, future of the file): all that wait together, in a thread."""

    def decode(batch):
        codes, jobs, _ = zip(*batch)
        return list(ENCODERS.map(to_file, decode_rows(vq_model, codes, grid), jobs))

    while True:
        batch = [await waiting.get()]
        while not waiting.empty() and len(batch) < BATCH:
            batch.append(waiting.get_nowait())
        try:
            files = await asyncio.to_thread(decode, batch)
        except Exception as error:  # out of memory, say: these images fail, later ones may not
            files = [error] * len(batch)
        for (_, _, future), file in zip(batch, files):
            if future.done():  # cancelled: the client has left
                continue
            if isinstance(file, Exception):
                future.set_exception(file)
            else:
                future.set_result(file)


def decode_rows(vq_model, codes, grid):
    """Whole rows of codes, at least one for each image -> images, uint8 (B, H, W, 3). Missing rows
    are filled with the last one before decoding, and painted grey after it."""
    filled = [c + c[-grid:] * (grid - len(c) // grid) for c in codes]
    device = vq_model.quantize.embedding.weight.device
    half = flags.best_dtype(device) == "bfloat16"  # on a GPU there are hundreds of images a second
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        pixels = sample.to_pixels(vq_model, torch.tensor(filled, device=device))
    for image, c in zip(pixels, codes):
        image[len(c) // grid * len(image) // grid :] = 128
    return pixels


def to_file(pixels, job):
    """Pixels (H, W, 3) as bytes of the wanted format; what an edit keeps is the picture's own."""
    if job.edit:
        pixels = np.where(job.edit.kept[..., None], job.edit.picture, pixels)
    file, kind = io.BytesIO(), job.body.output_format
    options = {"compress_level": 1} if kind == "png" else {"quality": job.body.output_compression}
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()
