"""Whether an image is one that training could read."""

from worker.data.decode import CorruptImage, open_image


def why_corrupt(image: bytes, max_pixels: int) -> str | None:
    """The reason in one line, or None for a sound image of no more than `max_pixels`."""
    try:
        open_image(image, max_pixels).rgb()
    except CorruptImage as error:
        return " ".join(str(error).split()) or "can't be decoded"
    return None
