"""Numbers that describe a prompt, for a calibrator that has never seen it.

Hashed words and characters, reduced to a few directions, and lengths. The hash is CRC-32, which is the same in every
process and every version of Python. What was learned (the directions) is a table of numbers; nothing is refitted.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_BUCKETS = 512
_WORD = re.compile(r"\w+|[^\w\s]")
_MAX_CHARACTERS = 20_000
"""Of a longer prompt only its end is read: what is asked for stands there more often than at the beginning."""


def hashed_words(prompts: Sequence[str]) -> Floats:
    """Counts of words, damped by a square root and of length 1, in `NUM_BUCKETS` signed buckets; [prompts, buckets]."""
    rows = np.zeros((len(prompts), NUM_BUCKETS))
    for row, prompt in zip(rows, prompts, strict=True):
        for word in _WORD.findall(prompt[-_MAX_CHARACTERS:].lower()):
            code = zlib.crc32(word.encode("utf-8", "surrogatepass"))
            row[code % NUM_BUCKETS] += 1.0 if code & 0x8000_0000 else -1.0
    rows = np.sign(rows) * np.sqrt(np.abs(rows))
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def lengths(prompts: Sequence[str]) -> Floats:
    """Logarithms of the numbers of characters and words, and whether it ends in a question mark; [prompts, 3]."""
    return np.array(
        [
            [np.log1p(len(prompt)), np.log1p(len(prompt.split())), float(prompt.rstrip().endswith("?"))]
            for prompt in prompts
        ]
    ).reshape(len(prompts), 3)


@dataclass(frozen=True)
class PromptFeatures:
    """Turns a prompt into d numbers of about unit size.

    Attributes:
        directions: [reduced, NUM_BUCKETS], of the hashed words.
        mean: [d], d = reduced + 3.
        scale: [d], positive.
    """

    directions: Floats
    mean: Floats
    scale: Floats

    @property
    def num_features(self) -> int:
        """d."""
        return len(self.mean)

    def apply(self, prompts: Sequence[str]) -> Floats:
        """The features of prompts, [prompts, d]."""
        raw = np.concatenate([hashed_words(prompts) @ self.directions.T, lengths(prompts)], axis=1)
        # A prompt far outside of what was seen is taken for the outermost one: nothing is known beyond.
        return np.clip((raw - self.mean) / self.scale, -4.0, 4.0)
