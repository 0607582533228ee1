"""Pieces of the texts with which scikit-learn describes its data sets, to be continued: `description_prompt`.

Plain language modelling, without a download. Every fifth stretch of the texts is held out.
"""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_linnerud, load_wine

from epsim.capture.prompts.requests import Prompt

PIECE, GIVEN = 100, 20  # letters of a piece, and how many of them are the prompt
STRETCH = 500  # letters; a piece lies within one
HELD_OUT = 5  # one in five
_LOADERS = (load_breast_cancer, load_diabetes, load_digits, load_iris, load_linnerud, load_wine)


def description_prompt(rng: np.random.Generator, name: str, held_out: bool) -> Prompt:
    """Return 20 letters from a random place in a text; the answer is the 80 that follow."""
    stretches = _stretches(held_out)
    stretch = stretches[int(rng.integers(len(stretches)))]
    start = int(rng.integers(STRETCH - PIECE + 1))
    piece = stretch[start : start + PIECE]
    return Prompt(text=piece[:GIVEN], max_new_tokens=PIECE - GIVEN + 1, name=name, answer=piece[GIVEN:])


@cache
def _stretches(held_out: bool) -> Sequence[str]:
    """Return the stretches that are held out, or the others; white space and rules are single spaces."""
    text = " ".join(re.sub(r"[-=\s]{2,}|\s", " ", load().DESCR) for load in _LOADERS)
    stretches = [text[start : start + STRETCH] for start in range(0, len(text) - STRETCH + 1, STRETCH)]
    return [text for index, text in enumerate(stretches) if (index % HELD_OUT == HELD_OUT - 1) == held_out]
