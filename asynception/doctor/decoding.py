"""How fast one core decodes images."""

import io
import time

import numpy as np
from PIL import Image

from asynception.doctor.finding import Verdict, fail, ok, warn
from worker.data.decode import open_image

WIDTH, HEIGHT = 500, 375
"""Of a typical photograph of ImageNet."""

SLOW_PER_S = 100.0
"""A core of the last ten years decodes several hundred."""

_MEASURED_S = 0.5


def make_jpeg() -> bytes:
    """Soft shapes with some grain, quality 90; the same every time."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (12, 16, 3), np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    grain = generator.normal(0, 6, soft.shape)
    pixels = Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=90)
    return file.getvalue()


def measure_decoding() -> Verdict:
    """Counts the thread's own time: what else runs here doesn't matter."""
    jpeg = make_jpeg()
    open_image(jpeg, WIDTH * HEIGHT).rgb()
    num_images, started_s = 0, time.thread_time()
    while (took_s := time.thread_time() - started_s) < _MEASURED_S:
        open_image(jpeg, WIDTH * HEIGHT).rgb()
        num_images += 1
    return judge_decoding(num_images / took_s, len(jpeg))


def judge_decoding(per_s: float, num_bytes: int) -> Verdict:
    """per_s: images in a second of one core. What a run needs is its workers' images a second."""
    found = f"{per_s:,.0f} images/s of one core ({WIDTH} x {HEIGHT} JPEG, {num_bytes / 1e3:.0f} kB)"
    if per_s < 1:
        return fail(found, "install simplejpeg and pillow anew: nothing decodes here")
    if per_s < SLOW_PER_S:
        return warn(found, "give workers more cores and data.num_threads, or pack smaller images")
    return ok(found)
