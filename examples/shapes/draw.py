"""Draws circles, squares and triangles into one folder of images for each of them."""

import random
from pathlib import Path

from PIL import Image, ImageDraw

CORNERS = {"circle": 0, "square": 4, "triangle": 3}
SIZE = 40


def draw(kind: str, chance: random.Random) -> Image.Image:
    """A shape of this kind somewhere on a plain picture."""
    dark = tuple(chance.randrange(90) for _ in range(3))
    bright = tuple(chance.randrange(160, 256) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), dark)
    pen, radius = ImageDraw.Draw(image), chance.uniform(9, 15)
    x, y = (chance.uniform(radius, SIZE - radius) for _ in range(2))
    if kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=bright)
    else:
        pen.regular_polygon((x, y, radius), CORNERS[kind], chance.uniform(0, 360), fill=bright)
    return image


def main() -> None:
    """600 images of each for training, 100 held out."""
    chance = random.Random(0)
    for split, count in (("train", 600), ("val", 100)):
        for kind in CORNERS:
            folder = Path("images", split, kind)
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                draw(kind, chance).save(folder / f"{i}.png")


if __name__ == "__main__":
    main()
