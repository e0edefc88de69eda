"""Token ids and text, for any CTC tokenizer: labels of a text, the greedy CTC rule, and what tokens write.

Tokenizers differ in what a token is (a character, a piece of a word, bytes) and in how they decode. Only what they
share is used: the call that makes ids of a text, and ``decode``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Emission:
    """A token that a CTC model writes, on the frames from ``first`` up to and without ``stop``."""

    token: int
    first: int
    stop: int


def labels_of(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Give the labels that spell texts, without tokens for their start and end."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def collapse(best: Tensor, tokenizer: Any) -> list[Emission]:
    """Apply the greedy CTC rule to the best token of every frame, shape (frames,): join repeats, remove blanks."""
    emissions, frame = [], 0
    for token, repeats in groupby(best.tolist()):
        count = len(list(repeats))
        if token != tokenizer.pad_token_id:
            emissions.append(Emission(token, frame, frame + count))
        frame += count
    return emissions


def write_text(tokens: Sequence[int], tokenizer: Any) -> str:
    """Write tokens, which are collapsed already, as the tokenizer does, with one space between words.

    Special tokens write nothing: neither the marks of start and end, nor the unknown token, which stands for a
    character that the model cannot write. The delimiter of words is a space.
    """
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=True, group_tokens=False, clean_up_tokenization_spaces=False
    )
    return " ".join(text.split())


def write_words(emissions: Sequence[Emission], tokenizer: Any) -> Iterator[tuple[str, int, int]]:
    """Give every word that tokens write, with its first frame and the frame after its last.

    A token begins a word if, written behind the tokens of the word before, it makes two words. So no assumption is made
    about how a tokenizer marks the start of a word.
    """
    tokens: list[int] = []
    text, first, stop = "", 0, 0
    for emission in emissions:
        words = write_text([*tokens, emission.token], tokenizer).split()
        if len(words) > 1:
            if text:
                yield text, first, stop
            tokens, text = [], ""
            words = write_text([emission.token], tokenizer).split()
            for word in words[:-1]:  # of a token with several words
                yield word, emission.first, emission.stop
        tokens.append(emission.token)
        now = words[-1] if words else ""
        if now != text:  # a delimiter takes no time of a word's
            first = first if text else emission.first
            text, stop = now, emission.stop
    if text:
        yield text, first, stop
