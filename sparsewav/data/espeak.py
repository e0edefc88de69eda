"""Speech synthesis with the C library of eSpeak NG, from the wheel ``espeakng-loader``."""

import ctypes
from functools import cache

import espeakng_loader
import numpy as np

SAMPLE_RATE = 22_050
"""Sample rate of eSpeak NG in Hz."""

# Values of the enumerations in espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1

_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_pieces: list[np.ndarray] = []
"""Samples of the current text, piece by piece."""


@_SynthCallback
def _receive(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
    if samples and count > 0:
        _pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
    return 0


@cache
def _library() -> ctypes.CDLL:
    """Start eSpeak NG once in this process, because the C library keeps global state."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data_path = espeakng_loader.get_data_path().encode()
    sample_rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
    if sample_rate != SAMPLE_RATE:
        raise RuntimeError(f"eSpeak NG did not start (espeak_Initialize returned {sample_rate})")
    # Breathy voices draw noise from a generator that is seeded with the time of day otherwise.
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    library.espeak_SetSynthCallback(_receive)
    return library


def speak(text: str, voice: str, words_per_minute: int = 170, pitch: int = 50, pitch_range: int = 50) -> np.ndarray:
    """Speak a text.

    eSpeak NG keeps state between utterances (such as the tail of an echo), so that the samples depend on what this
    process spoke before. The same list of texts in a fresh process gives the same bytes.

    Args:
        text: The text.
        voice: A language with a variant, e.g. ``en-us+f2``.
        words_per_minute: Speed, 80 to 450.
        pitch: Base pitch, 0 to 99.
        pitch_range: Range of the intonation, 0 to 99.

    Returns:
        Samples, shape (samples,), float32 in [-1, 1), at :data:`SAMPLE_RATE` Hz.

    Raises:
        ValueError: The voice does not exist.
    """
    library = _library()
    _pieces.clear()
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"eSpeak NG has no voice {voice!r}")
    for parameter, value in ((_RATE, words_per_minute), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
        library.espeak_SetParameter(parameter, value, 0)
    encoded = text.encode() + b"\0"
    library.espeak_Synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None)
    library.espeak_Synchronize()
    return np.concatenate(_pieces).astype(np.float32) / 32768
