"""How text is written where it is learned or compared: one function for references, labels and hypotheses.

Transcripts are kept as their source has them until :func:`choose_normalization` has seen them all beside the model's
vocabulary. What a run records (``predictions.jsonl``, error rates) is the normalized text of both sides.
"""

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any, Literal

from sparsewav.data.tokens import labels_of, write_text
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError

LISTED = 100
"""Most characters that a message lists; a model of another script lacks thousands."""

TURKISH = 0.2
"""A text is Turkish (or Azerbaijani) if ı and İ are more than this share of all its i; names alone are far below."""


@dataclass(frozen=True)
class Normalization:
    """What :func:`normalize` does to a text.

    Attributes:
        case: ``keep``, ``lower`` or ``upper``.
        removed: Characters that are left out, before and after the change of case.
        form: Unicode's form of letters with accents: one character (NFC), or letter and accent apart (NFD).
        letters: Letters whose other case is not that of Unicode.
        apostrophe: Write the curly apostrophe between letters as the straight one.
    """

    case: Literal["keep", "lower", "upper"] = "keep"
    removed: str = ""
    form: Literal["NFC", "NFD"] = "NFC"
    letters: Mapping[str, str] = field(default_factory=dict)
    apostrophe: bool = False

    def record(self) -> dict[str, Any]:
        """Give what a run and a training record of it."""
        return {
            "case": self.case,
            "removed_characters": self.removed,
            "unicode_form": self.form,
            "straight_apostrophe": self.apostrophe,
        }


def normalize(text: str, how: Normalization) -> str:
    """Write a text as a :class:`Normalization` says, with one space between words.

    No case is folded: ``straße`` stays ``straße`` in lower case. A capital letter that is lowered gives one letter.
    """
    without = str.maketrans("", "", how.removed)
    text = unicodedata.normalize("NFC", text)
    if how.apostrophe:  # first: where ’ is left out, it is so as a quotation mark
        text = _APOSTROPHE.sub("'", text)
    text = text.translate(without)
    if how.case == "lower":  # of the whole text, because Σ is ς at the end of a word
        text = text.translate({ord(letter): other for letter, other in how.letters.items()}).lower()
    elif how.case == "upper":
        text = "".join(how.letters.get(letter) or letter.upper() for letter in text)
    return " ".join(unicodedata.normalize(how.form, text).translate(without).split())


def normalized(utterances: Iterable[Utterance], how: Normalization) -> list[Utterance]:
    """Give utterances whose transcripts are normalized."""
    return [utterance.with_text(normalize(utterance.text, how)) for utterance in utterances]


def choose_normalization(
    texts: Iterable[str], tokenizer: Any, case: str = "auto", remove: str | None = None
) -> tuple[Normalization, list[str]]:
    """Choose how texts are normalized for a model.

    With ``auto``, the case is the one in which the model's vocabulary has most of the characters, as they are written
    if that is not fewer. In upper case ``ß`` becomes ``ẞ``, or stays, where the vocabulary has that, and is ``SS``
    elsewhere, as Unicode has it; other letters whose capital is several letters stay where the vocabulary has them.
    Where ``ı`` or ``İ`` are frequent and the vocabulary has them, cases are those of Turkish: ``ı I`` and ``i İ``.
    Elsewhere ``İ``, as in a foreign name, is lowered to ``i``. The apostrophe ``’`` between letters, as in ``don’t``,
    is ``'`` where the vocabulary has that alone, also if ``’`` is left out. Letters and accents are apart (NFD) only
    where the vocabulary has more of the characters in that form.

    Args:
        texts: The transcripts of all sets of a run.
        tokenizer: That of the model; without one, ``auto`` keeps the case.
        case: ``auto``, ``keep``, ``lower`` or ``upper``.
        remove: Characters that are left out.

    Returns:
        How to normalize, and sentences about what was assumed.
    """
    removed = unicodedata.normalize("NFC", remove or "")
    plain = Normalization(removed=removed)
    counts = Counter(chain.from_iterable(normalize(text, Normalization()).replace(" ", "") for text in texts))
    curly = [character for character in "’ʼ" if counts[character]]
    for character in removed:
        del counts[character]
    turkish = counts["ı"] + counts["İ"] > TURKISH * sum(counts[letter] for letter in "iıIİ")
    if tokenizer is None:
        chosen: Any = "keep" if case == "auto" else case
        return replace(plain, case=chosen, letters=_letters(chosen, "ıİ".__contains__, turkish)), []
    writes = writable(tokenizer)
    if curly and writes("'") and not any(map(writes, curly)):
        plain = replace(plain, apostrophe=True)
    cases: list[Any] = ["keep", "lower", "upper"] if case == "auto" else [case]
    forms: tuple[Any, ...] = ("NFC", "NFD")
    choices = [
        replace(plain, case=cased, form=form, letters=_letters(cased, writes, turkish))
        for cased in cases
        for form in forms
    ]

    def share(how: Normalization) -> float:
        known = sum(count for character, count in counts.items() if all(map(writes, normalize(character, how))))
        return known / max(1, counts.total())

    how = max(choices, key=share)  # the first one of the best
    notes = []
    if case == "auto" and how.case != "keep":
        notes.append(
            f"references and hypotheses are in {how.case} case (data.case=auto): the model's vocabulary has "
            f"{100 * share(how):.3g} % of the transcripts' characters then, and {100 * share(choices[0]):.3g} % as "
            "they are written"
        )
    if how.letters.keys() & {"i", "I"}:
        notes.append("the transcripts have many ı or İ: the cases of i and ı are those of Turkish")
    if how.apostrophe:
        notes.append(f"{' and '.join(curly)} between letters is written as ', which the model's vocabulary has")
    if how.form != "NFC":
        notes.append("letters and accents are apart (NFD), as in the model's vocabulary")
    return how, notes


def _letters(case: str, writes: Callable[[str], bool], turkish: bool) -> dict[str, str]:
    """Give the letters whose other case is not Unicode's; see :func:`choose_normalization`."""
    if case == "lower":  # Unicode's İ in lower case is i with a second dot above
        return {"İ": "i"} | ({"I": "ı"} if turkish and writes("ı") else {})
    if case == "keep":
        return {}
    kept = {letter: letter for letter in _WITHOUT_CAPITAL if writes(letter)}
    return kept | ({"ß": "ẞ"} if writes("ẞ") else {}) | ({"i": "İ", "ı": "I"} if turkish and writes("İ") else {})


_APOSTROPHE = re.compile(r"(?<=[^\W\d_])[’ʼ](?=[^\W\d_])")

_WITHOUT_CAPITAL = [letter for letter in map(chr, range(0x10000)) if len(letter.upper()) > 1]
"""Letters whose capital is several letters: ß, ligatures, and letters with rare accents."""


def writable(tokenizer: Any) -> Callable[[str], bool]:
    """Give a function that tells whether a tokenizer can write a character, so that it is read as the same one.

    It may be a token, or several. Some tokenizers read capitals as tokens of small letters, or the other way round.
    """

    @cache
    def writes(character: str) -> bool:
        (tokens,) = labels_of([character], tokenizer)
        return write_text(tokens, tokenizer) == character

    return writes


def check_characters(utterances: Sequence[Utterance], tokenizer: Any, how: Normalization) -> None:
    """Check that a model can write all characters of normalized transcripts.

    Raises:
        UserError: It lists those that it cannot write, with their counts, an utterance, and what to do.
    """
    counts = Counter(chain.from_iterable(utterance.text for utterance in utterances))
    writes = writable(tokenizer)
    # Of a letter in the vocabulary that is written as another one, the check of the words tells more.
    letters_of_model = tokenizer.get_vocab().keys() - {getattr(tokenizer, "word_delimiter_token", None)}
    unknown = {
        character: count
        for character, count in counts.most_common()
        if not character.isspace() and character not in letters_of_model and not writes(character)
    }
    if not unknown:
        return
    having = [utterance for utterance in utterances if not unknown.keys().isdisjoint(utterance.text)]
    shown = ", ".join(f"{_visible(item)} ({count:,}×)" for item, count in list(unknown.items())[:LISTED])
    more = f" and {len(unknown) - LISTED:,} others" if len(unknown) > LISTED else ""
    letters = [item for item in unknown if unicodedata.category(item)[0] in "LMN"]
    marks = "".join(sorted(unknown.keys() - set(letters)))
    remedies = []
    if marks:
        words = "leave punctuation out with " if letters else "leave them out with "
        remedies.append(words + _override("data.remove_characters", how.removed + marks))
    if letters:
        which = "letters and digits" if marks else "them"
        remedies.append(f"for {which} correct the transcripts (numbers are spoken as words) or choose another model")
    if any(all(map(writes, item.swapcase())) for item in letters):
        remedies.append(f"or let data.case be auto, in place of {how.case}")
    raise UserError(
        f"{len(having):,} of {len(utterances):,} transcripts have characters outside the model's vocabulary: "
        f"{shown}{more}; e.g. utterance {having[0].id} ({having[0].source}): {having[0].text!r}; {'; '.join(remedies)}"
    )


def _override(key: str, value: str) -> str:
    """Write ``key=value`` so that a shell and Hydra's grammar both take the value literally."""
    value = value.replace("${", "{$")  # an interpolation; the order has no meaning
    quoted = re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + match[2].replace('"', r"\""), value)
    return shlex.quote(f'{key}="{quoted}"')


def _visible(character: str) -> str:
    """Give a character, or its code point if nobody sees it, as of an accent alone."""
    seen = character.isprintable() and not character.isspace() and not unicodedata.combining(character)
    return character if seen else f"U+{ord(character):04X}"
