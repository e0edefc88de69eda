"""Speech synthesis with eSpeak NG, driven through its C library (from the wheel ``espeakng-loader``)."""

import ctypes
from functools import cache

import espeakng_loader
import numpy as np

SAMPLE_RATE = 22_050
"""Rate in Hz of what eSpeak NG speaks."""

# Values of the enumerations in espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1

_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Synthesizer:
    """The one eSpeak NG of this process: the C library keeps global state."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = espeakng_loader.get_data_path().encode()
        sample_rate = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
        if sample_rate != SAMPLE_RATE:
            raise RuntimeError(f"eSpeak NG did not start (espeak_Initialize returned {sample_rate})")
        # Breathy voices draw noise, from a generator that starts with the time of day.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._pieces: list[np.ndarray] = []
        self._callback = _SynthCallback(self._receive)  # kept: the C side holds only a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, voice: str, words_per_minute: int, pitch: int, pitch_range: int) -> np.ndarray:
        self._pieces.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        for parameter, value in ((_RATE, words_per_minute), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode() + b"\0"
        self._library.espeak_Synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._pieces).astype(np.float32) / 32768


@cache
def _synthesizer() -> _Synthesizer:
    return _Synthesizer()


def speak(text: str, voice: str, words_per_minute: int = 170, pitch: int = 50, pitch_range: int = 50) -> np.ndarray:
    """Speak a text.

    eSpeak NG keeps state between utterances (an echo's tail, for one), so the samples depend on what this process
    spoke before: for the same bytes again, speak the same list in the same order in a fresh process.

    Args:
        text: what to say.
        voice: a language with a variant, e.g. ``en-us+f2``.
        words_per_minute: speed, 80 to 450.
        pitch: base pitch, 0 to 99.
        pitch_range: liveliness of the intonation, 0 to 99.

    Returns:
        Samples, shape (samples,), float32 in [-1, 1), at :data:`SAMPLE_RATE` Hz.

    Raises:
        ValueError: the voice does not exist.
    """
    return _synthesizer().speak(text, voice, words_per_minute, pitch, pitch_range)
