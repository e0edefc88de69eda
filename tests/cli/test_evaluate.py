"""Several test sets, speech in other scripts and cases, and ``sparsewav-evaluate``."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest

from sparsewav.inference.bootstrap import bootstrap_difference
from sparsewav.pipeline.run_folder import RATES

Run = Callable[..., Any]

CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъ"

TUNING = ("finetune_strategy=one_pass", "training.batch_size=4", "training.epochs=1", "data.training_subset=train")


def _predictions(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def _one_sentence(result: Any) -> str:
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    return re.sub(r"\s+", " ", result.stdout + result.stderr)


@pytest.fixture
def two_sets(own_corpus: Path) -> Path:
    """The corpus with the second speaker of ``test`` in a set of its own, ``other``."""
    (own_corpus / "other").mkdir()
    (own_corpus / "test" / "101").rename(own_corpus / "other" / "101")
    return own_corpus


def test_a_run_has_all_rates_of_every_test_set_and_goes_on_where_it_stopped(
    run_sparsewav: Run, small: list[str], two_sets: Path, tmp_path: Path
) -> None:
    arguments = [*small, *TUNING, f"data.root={two_sets}", "hydra.run.dir=mine"]
    both = "data.evaluation_subset=[test,other]"
    assert "add -m to run each of them, or write a list: data.evaluation_subset=[test,other]" in _one_sentence(
        run_sparsewav(*arguments, "data.evaluation_subset=test,other")
    )
    folder = tmp_path / "mine"
    (folder / "predictions.jsonl").mkdir(parents=True)
    assert "cannot write" in _one_sentence(run_sparsewav(*arguments, both))
    (folder / "predictions.jsonl").rmdir()
    result = run_sparsewav(*arguments, both)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Going on from model" in result.stdout
    metrics, rows = json.loads((folder / "metrics.json").read_text()), _predictions(folder)
    assert [record["name"] for record in metrics["evaluation"]] == ["test", "other"]
    for record in metrics["evaluation"]:
        own = [row for row in rows if row["set"] == record["name"]]
        assert len(own) == record["n_utterances"] == 3
        assert {row["speaker"] for row in own} == {"100" if record["name"] == "test" else "101"}
        for key, model in (("_dense", "before"), ("", "after")):
            texts = [row["reference"] for row in own], [row[model] for row in own]
            assert (record[f"wer{key}"], record[f"cer{key}"]) == (jiwer.wer(*texts), jiwer.cer(*texts))
        assert f"{100 * record['wer']:.2f} %   (CER {100 * record['cer']:.2f} %)   {record['name']}" in result.stdout
        assert set(RATES) <= set(record)
        assert record["overlap"] == 0
    assert {key: metrics[key] for key in RATES} == {key: metrics["evaluation"][0][key] for key in RATES}
    assert metrics["n_utterances"] == 3

    alone = run_sparsewav(*arguments[:-1], "data.evaluation_subset=other", "hydra.run.dir=alone")
    assert alone.returncode == 0
    assert "Evaluating the dense model" not in alone.stdout, "every set's hypotheses are kept"
    (record,) = json.loads((tmp_path / "alone" / "metrics.json").read_text())["evaluation"]
    assert record == metrics["evaluation"][1]

    seen = "data.evaluation_subset=[test,train]"
    assert "12 of 12 train utterances are in the calibration set" in _one_sentence(run_sparsewav(*arguments[:-1], seen))
    allowed = run_sparsewav(*small, f"data.root={two_sets}", seen, "data.allow_overlap=true", "hydra.run.dir=seen")
    assert "12 of its utterances are in the calibration or training set, too (train)" in allowed.stdout
    metrics = json.loads((tmp_path / "seen" / "metrics.json").read_text())
    assert [record["overlap"] for record in metrics["evaluation"]] == [0, 12]


def test_a_lower_case_cyrillic_model_learns_and_reads_text_as_people_write_it(
    run_sparsewav: Run, small: list[str], own_corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Mixed case and punctuation: what the model lacks is listed with an option to paste, and the rest is automatic."""
    model = shutil.copytree(model_folder, tmp_path / "cyrillic")
    tokens = json.loads((model / "vocab.json").read_text())
    letters = dict(zip([token for token in tokens if len(token) == 1 and token != "|"], CYRILLIC, strict=True))
    (model / "vocab.json").write_text(
        json.dumps({letters.get(token, token): index for token, index in tokens.items()}, ensure_ascii=False)
    )
    for transcript in own_corpus.rglob("*.trans.txt"):
        lines = [line.partition(" ")[0] + " «Море», РЕКА и дом." for line in transcript.read_text().splitlines()]
        transcript.write_text("\n".join(lines) + "\n")
    arguments = [f"model.name_or_path={model}", *small[1:], *TUNING, f"data.root={own_corpus}", "hydra.run.dir=mine"]
    message = _one_sentence(run_sparsewav(*arguments))
    assert "18 of 18 transcripts have characters outside the model's vocabulary: « (18×), » (18×), , (18×)" in message
    (pasted,) = re.findall(r"leave them out with ('data\.remove_characters=.*?')$", message.strip())
    result = run_sparsewav(*arguments, *shlex.split(pasted))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "are in lower case (data.case=auto): the model's vocabulary has 100 %" in result.stdout
    rows = _predictions(tmp_path / "mine")
    assert {row["reference"] for row in rows} == {"море река и дом"}
    assert set("".join(row["before"] + row["after"] for row in rows)) <= {*letters.values(), " "}
    metrics = json.loads((tmp_path / "mine" / "metrics.json").read_text())
    assert metrics["text"] == {
        "case": "lower",
        "removed_characters": ",.«»",
        "unicode_form": "NFC",
        "straight_apostrophe": False,
    }
    assert metrics["cer"] == jiwer.cer([row["reference"] for row in rows], [row["after"] for row in rows])


def test_models_are_evaluated_and_compared_in_pairs(
    run_sparsewav: Run, small: list[str], two_sets: Path, model_folder: Path, tmp_path: Path
) -> None:
    arguments = [*small, "allocation=uniform", f"data.root={two_sets}", "data.evaluation_subset=[test,other]"]
    assert run_sparsewav(*arguments, "sparsity.target=0.9", "hydra.run.dir=mine").returncode == 0
    metrics = json.loads((tmp_path / "mine" / "metrics.json").read_text())

    def evaluate(*words: str) -> Any:
        return run_sparsewav(*words, command="sparsewav-evaluate")

    models = ["mine", str(model_folder)]
    result = evaluate(*models, "--output", "errors/of.json")  # on the speech of the run
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the speech is that of mine: data.evaluation_subset=['test', 'other']" in result.stdout
    record = json.loads((tmp_path / "errors/of.json").read_text())
    rates = {(row["model"], row["set"]): row for row in record["rates"]}
    for about in metrics["evaluation"]:
        own, dense = (rates[model, about["name"]] for model in models)
        assert (own["wer"], own["cer"]) == pytest.approx((about["wer"], about["cer"]))
        assert (dense["wer"], dense["cer"]) == pytest.approx((about["wer_dense"], about["cer_dense"]))
        assert own["wer_difference"] is None
        assert dense["cer_difference"] == pytest.approx(dense["cer"] - own["cer"])
        assert dense["cer_difference_low"] <= dense["cer_difference"] <= dense["cer_difference_high"]
        assert f"{100 * own['wer_low']:.2f} to {100 * own['wer_high']:.2f}" in result.stdout
    assert "samples of the 3 utterances; speakers are not drawn" in result.stdout, "it is one alone"

    one_set = ["--data", "data.evaluation_subset=[train]"]
    result = evaluate(*models, *one_set, "--output", "errors.csv")
    assert "samples of the 12 utterances of 2 speakers; so few" in result.stdout
    assert "Evaluating mine" in result.stdout
    again = evaluate(*models, *one_set, "--output", "again.json")
    assert "Evaluating" not in again.stdout, "hypotheses are kept"
    record = json.loads((tmp_path / "again.json").read_text())
    edits, words, speakers = {}, {}, []
    for model in models:
        rows = [row for row in record["utterances"] if row["model"] == model]
        edits[model] = np.array([[round(jiwer.wer(r["reference"], r["hypothesis"]) * r["words"]) for r in rows]])
        words[model], speakers = np.array([row["words"] for row in rows]), [row["speaker"] for row in rows]
    expected = bootstrap_difference(edits[models[1]], edits[models[0]], words["mine"], speakers)
    found = record["rates"][1]
    assert tuple(found[f"wer_difference{end}"] for end in ("", "_low", "_high")) == pytest.approx(expected)
    assert found["wer_low"] < found["wer_high"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}"], r"is no run, whose speech could be taken; name the speech: --data data=\.\.\."),
        (["{model}", "--data", "seed=1"], r"--data seed=1 is no option of data"),
        (["{model}", "--data", "data=manifesto"], r"data=manifesto does not exist"),
        (["{model}", "--data", "data=librispeech_dir"], r"error: data\.root has no value; give it: data\.root=\.\.\."),
        (["{model}", "{model}"], r"is named twice"),
        (["demo", "--output", "rates.txt"], r"--output rates\.txt must end with \.csv or \.json"),
        (["demo", "/nowhere"], r"^error: /nowhere is not a folder"),  # before the speech of the demo is looked at
    ],
)
def test_what_cannot_be_evaluated_gets_one_sentence(
    run_sparsewav: Run, words: list[str], message: str, model_folder: Path
) -> None:
    words = [word.format(model=model_folder) for word in words]
    assert re.search(message, _one_sentence(run_sparsewav(*words, command="sparsewav-evaluate")))
