"""How references, labels and hypotheses are written: case, Unicode and removed characters."""

import json
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers import Wav2Vec2CTCTokenizer

from sparsewav.data.sets import Sets
from sparsewav.data.text import Normalization, check_characters, choose_normalization, normalize, normalized
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.inference.wer import count_edits, error_rates
from sparsewav.settings.data import LibriSpeechFolder


def _tokenizer(folder: Path, letters: str) -> Wav2Vec2CTCTokenizer:
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    path = folder / "vocab.json"
    path.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return Wav2Vec2CTCTokenizer(str(path))


ENGLISH, GERMAN = "abcdefghijklmnopqrstuvwxyz'", "abcdefghijklmnopqrstuvwxyzäöüß"
RUSSIAN = "абвгдежзийклмнопрстуфхцчшщъыьэюя"
TURKISH = "abcçdefgğhıijklmnoöprsştuüvyz"


@pytest.mark.parametrize(
    ("letters", "text", "case", "written"),
    [
        (RUSSIAN, "ВЕЧЕРОМ шёл Дождь".replace("ё", "е"), "lower", "вечером шел дождь"),
        (RUSSIAN, "вечером", "keep", "вечером"),
        (RUSSIAN.upper(), "вечером Шел", "upper", "ВЕЧЕРОМ ШЕЛ"),
        (ENGLISH, "IT'S  fine", "lower", "it's fine"),
        (ENGLISH + ENGLISH.upper(), "It's Fine", "keep", "It's Fine"),
        (ENGLISH, "DON’T", "lower", "don't"),
        (ENGLISH + "’", "DON’T", "lower", "don’t"),
        (GERMAN, "Straße", "lower", "straße"),
        (GERMAN, "STRAẞE", "lower", "straße"),
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÜẞ", "Straße", "upper", "STRAẞE"),
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÜß", "Straße", "upper", "STRAßE"),
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÜ", "Straße", "upper", "STRASSE"),
        (TURKISH, "IŞIK İstanbul'da".replace("'", ""), "lower", "ışık istanbulda"),
        ("ABCÇDEFGĞHIİJKLMNOÖPRSŞTUÜVYZ", "ışık istanbul", "upper", "IŞIK İSTANBUL"),
        (ENGLISH, "I LIVE IN İSTANBUL AND IN IRELAND", "lower", "i live in istanbul and in ireland"),
        (
            ENGLISH + "ı",
            "I LIVE IN İSTANBUL AND SHE IS IN IRELAND",
            "lower",
            "i live in istanbul and she is in ireland",
        ),
        ("αβγδεζηθικλμνξοπρσςτυφχψω", "ΟΔΟΣ ΣΟΦΟΣ", "lower", "οδος σοφος"),
        ("abcdeu\u0308", "bu\u0308d b\xfcd", "keep", "bu\u0308d bu\u0308d"),  # the model has the dots apart
        (GERMAN, "bu\u0308d b\xfcd", "keep", "b\xfcd b\xfcd"),
    ],
)
def test_auto_takes_the_case_that_the_model_can_write(
    letters: str, text: str, case: str, written: str, tmp_path: Path
) -> None:
    tokenizer = _tokenizer(tmp_path, letters)
    how, notes = choose_normalization([text], tokenizer)
    assert how.case == case
    assert normalize(text, how) == written
    assert normalize(normalize(text, how), how) == written
    assert len([note for note in notes if "data.case=auto" in note]) == (case != "keep"), "what is assumed is said"
    utterances = normalized([Utterance("a", text, b"")], how)
    check_characters(utterances, tokenizer, how)
    assert tokenizer.unk_token_id not in tokenizer(utterances[0].text)["input_ids"]


def test_a_case_that_is_asked_for_is_taken_and_no_tokenizer_keeps_it(tmp_path: Path) -> None:
    both = _tokenizer(tmp_path, ENGLISH + ENGLISH.upper())
    assert choose_normalization(["It's"], both, "lower")[0].case == "lower"
    assert choose_normalization(["It's"], None) == (Normalization(), [])
    assert normalize("It's", choose_normalization(["It's"], None, "upper")[0]) == "IT'S"


def test_all_characters_that_a_model_lacks_are_listed_with_a_remedy_to_paste(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, ENGLISH)
    marks = """!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~“”…"""
    texts = [f"Well, {mark} he said" for mark in marks] + ["“Yes, 2 cafés”"]
    how, _ = choose_normalization(texts, tokenizer, remove=",")
    assert how.case == "lower"
    utterances = [Utterance(str(number), text, Path(f"{number}.wav")) for number, text in enumerate(texts)]
    with pytest.raises(UserError, match=r"34 of 35 transcripts .*: “ \(2×\), .* 2 \(1×\), é \(1×\);") as refused:
        check_characters(normalized(utterances, how), tokenizer, how)
    message = str(refused.value)
    assert "for letters and digits correct the transcripts" in message
    pasted = shlex.split(message[message.index("'data.remove_characters=") :])[0].removesuffix(";")
    value = OverridesParser.create().parse_override(pasted).value()
    assert set(value) == set(marks)
    how, _ = choose_normalization(texts, tokenizer, remove=value)
    check_characters(normalized(utterances[:-1], how), tokenizer, how)
    assert normalize("“Yes, so-called”", how) == "yes socalled"


def test_a_transcript_of_which_nothing_is_left_is_refused_or_left_out(own_corpus: Path) -> None:
    transcript = next((own_corpus / "test").rglob("100-7.trans.txt"))
    first, *others = transcript.read_text().splitlines()
    transcript.write_text("\n".join([f"{first.split()[0]} ...", *others]) + "\n")
    data = LibriSpeechFolder(root=str(own_corpus), evaluation_subset="test", remove_characters=".")
    with pytest.raises(UserError, match=r"0000\.flac: without \. nothing is left of the transcript '\.{3}'; .*skip"):
        Sets(data).evaluation()
    sets = Sets(data.changed(skip_broken=True))
    assert [len(utterances) for utterances in sets.evaluation().values()] == [5]
    assert sets.counts() == {"test": {"listed": 6, "skip_broken": 1}}


def test_error_rates_are_of_words_and_of_characters_with_spaces() -> None:
    utterances = [Utterance("a", "one two", b""), Utterance("b", "three", b""), Utterance("c", "four", b"")]
    hypotheses = ["one to", "", "four"]
    rates = error_rates(utterances, hypotheses)
    assert rates.wer == 2 / 4
    assert rates.cer == (1 + 5) / (7 + 5 + 4), "the space counts"
    edits, lengths = count_edits([utterance.text for utterance in utterances], hypotheses, characters=True)
    assert (edits.tolist(), lengths.tolist()) == ([1, 5, 0], [7, 5, 4])
    with pytest.raises(UserError, match=r"utterance c \(c\) has an empty transcript"):
        error_rates([*utterances[:2], Utterance("c", " ", b"")], hypotheses)


def test_a_curly_apostrophe_stays_one_when_the_same_character_is_left_out_as_a_quote(tmp_path: Path) -> None:
    how, notes = choose_normalization(["he said ‘don’t’", "it’s"], _tokenizer(tmp_path, ENGLISH), remove="‘’")
    assert normalize("he said ‘don’t’", how) == "he said don't"
    assert notes == ["’ between letters is written as ', which the model's vocabulary has"]
    how, _ = choose_normalization(["don’t"], _tokenizer(tmp_path, ENGLISH), remove="’'")
    assert normalize("don’t", how) == "dont"
