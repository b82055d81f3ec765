"""The Inception V3 of Keras 1.1, line by line, in today's Keras.

Written apart from `model/inception_v3.py`, from that version's published code.
"""

from typing import Any

EPSILON = 1e-5
"""Keras 1.1's default for batch norm."""


def inception_v3_of_2016(keras: Any) -> Any:
    """From (N, H, W, 3) images to maps that global average pooling follows."""
    layers = keras.layers

    def conv(x: Any, channels: int, rows: int, columns: int, **options: Any) -> Any:
        options = {"padding": "same", "activation": "relu", **options}
        x = layers.Conv2D(channels, (rows, columns), **options)(x)
        return layers.BatchNormalization(epsilon=EPSILON)(x)

    def strided(x: Any, channels: int) -> Any:
        return conv(x, channels, 3, 3, strides=(2, 2), padding="valid")

    def pooled(x: Any, channels: int) -> Any:
        x = layers.AveragePooling2D((3, 3), strides=(1, 1), padding="same")(x)
        return conv(x, channels, 1, 1)

    images = keras.Input((None, None, 3))
    x = strided(images, 32)
    x = conv(x, 32, 3, 3, padding="valid")
    x = conv(x, 64, 3, 3)
    x = layers.MaxPooling2D((3, 3), strides=(2, 2))(x)
    x = conv(x, 80, 1, 1, padding="valid")
    x = conv(x, 192, 3, 3, padding="valid")
    x = layers.MaxPooling2D((3, 3), strides=(2, 2))(x)

    for _ in range(3):
        branch1x1 = conv(x, 64, 1, 1)
        branch5x5 = conv(x, 48, 1, 1)
        branch5x5 = conv(branch5x5, 64, 5, 5)
        branch3x3dbl = conv(x, 64, 1, 1)
        branch3x3dbl = conv(branch3x3dbl, 96, 3, 3)
        branch3x3dbl = conv(branch3x3dbl, 96, 3, 3)
        x = layers.concatenate([branch1x1, branch5x5, branch3x3dbl, pooled(x, 32)])

    branch3x3 = strided(x, 384)
    branch3x3dbl = conv(x, 64, 1, 1)
    branch3x3dbl = conv(branch3x3dbl, 96, 3, 3)
    branch3x3dbl = strided(branch3x3dbl, 96)
    branch_pool = layers.MaxPooling2D((3, 3), strides=(2, 2))(x)
    x = layers.concatenate([branch3x3, branch3x3dbl, branch_pool])

    for first, inner in ((128, 128), (160, 160), (160, 160), (160, 192)):
        branch1x1 = conv(x, 192, 1, 1)
        branch7x7 = conv(x, inner, 1, 1)
        branch7x7 = conv(branch7x7, inner, 1, 7)
        branch7x7 = conv(branch7x7, 192, 7, 1)
        branch7x7dbl = conv(x, first, 1, 1)
        branch7x7dbl = conv(branch7x7dbl, inner, 7, 1)
        branch7x7dbl = conv(branch7x7dbl, inner, 1, 7)
        branch7x7dbl = conv(branch7x7dbl, inner, 7, 1)
        branch7x7dbl = conv(branch7x7dbl, 192, 1, 7)
        x = layers.concatenate([branch1x1, branch7x7, branch7x7dbl, pooled(x, 192)])

    branch3x3 = conv(x, 192, 1, 1)
    branch3x3 = strided(branch3x3, 320)
    branch7x7x3 = conv(x, 192, 1, 1)
    branch7x7x3 = conv(branch7x7x3, 192, 1, 7)
    branch7x7x3 = conv(branch7x7x3, 192, 7, 1)
    branch7x7x3 = strided(branch7x7x3, 192)
    branch_pool = layers.AveragePooling2D((3, 3), strides=(2, 2))(x)
    x = layers.concatenate([branch3x3, branch7x7x3, branch_pool])

    for _ in range(2):
        branch1x1 = conv(x, 320, 1, 1)
        branch3x3 = conv(x, 384, 1, 1)
        branch3x3_1 = conv(branch3x3, 384, 1, 3)
        branch3x3_2 = conv(branch3x3, 384, 3, 1)
        branch3x3 = layers.concatenate([branch3x3_1, branch3x3_2])
        branch3x3dbl = conv(x, 448, 1, 1)
        branch3x3dbl = conv(branch3x3dbl, 384, 3, 3)
        branch3x3dbl_1 = conv(branch3x3dbl, 384, 1, 3)
        branch3x3dbl_2 = conv(branch3x3dbl, 384, 3, 1)
        branch3x3dbl = layers.concatenate([branch3x3dbl_1, branch3x3dbl_2])
        x = layers.concatenate([branch1x1, branch3x3, branch3x3dbl, pooled(x, 192)])
    return keras.Model(images, x)
