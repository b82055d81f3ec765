"""Random words as a pure function of what they are for."""

import numpy as np
from numpy.typing import NDArray

ORDER = 0
AUGMENT = 1


def random_words(length: int, seed: int, purpose: int, *numbers: int) -> NDArray[np.uint64]:
    """`length` uniform 64-bit words for (seed, purpose, *numbers), all from 0 to 2**64 - 1.

    Raw words of PCG64, which numpy promises never to change; the methods of its Generator may
    change from version to version, and then two hosts would disagree on the order of samples.
    """
    # As a spawn key, since SeedSequence pads entropy so that (1,) and (1, 0) are one; and each
    # number as two 32-bit words, since it takes large ones apart so that (2**32,) is (0, 1).
    key = [word for number in (purpose, *numbers) for word in divmod(number, 2**32)]
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return np.random.PCG64(sequence).random_raw(length)
