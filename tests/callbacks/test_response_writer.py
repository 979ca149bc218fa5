import datetime
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny

from remax_lightning import FunctionReward, PromptDataModule
from remax_lightning.callbacks import ResponseWriter, SelfCheck


def predict(folder: Path, writer: ResponseWriter, rows: list[dict[str, object]]) -> list[list[dict[str, str]]]:
    policy = tiny.save_model(folder / "policy")
    data = tiny.prompt_data(folder, rows, predict=tiny.write_rows(folder / "predict.jsonl", rows), batch_size=2)
    predictions = tiny.trainer(folder, callbacks=[writer]).predict(tiny.remax(policy), datamodule=data)
    assert predictions is not None
    return predictions


ROWS: list[dict[str, object]] = [
    {"instruction": "Tell me", "output": "of old", "generator": "old", "dataset": "first"},
    {"instruction": "Sing a song", "output": "of old", "generator": "old", "dataset": "second"},
    {"instruction": "a", "output": "of old", "generator": "old", "dataset": "first"},
]


def test_alpaca_eval_reads_a_list_of_outputs(tmp_path: Path) -> None:
    predictions = predict(tmp_path, ResponseWriter(format="alpaca_eval", generator="mine"), ROWS)
    written = json.loads((tmp_path / "predictions.json").read_text())
    responses = [row["response"] for batch in predictions for row in batch]
    assert written == [
        {"instruction": row["instruction"], "output": response, "generator": "mine", "dataset": row["dataset"]}
        for row, response in zip(ROWS, responses, strict=True)
    ]


@pytest.mark.parametrize(("form", "name"), [("rows", "predictions.jsonl"), ("alpaca_eval", "predictions.json")])
def test_an_interrupted_file_is_partial_and_the_one_before_stays(
    form: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("of before")
    writer = ResponseWriter(format=form)
    write = writer._write
    limit = 2  # rows

    def failing(rows: list[dict[str, object]]) -> None:
        if writer.num_rows >= limit:
            raise OSError("no space left")
        write(rows)

    monkeypatch.setattr(writer, "_write", failing)
    partial = tmp_path / f"{name}.partial"
    with pytest.raises(OSError, match="no space"), pytest.warns(match=rf"the 2 rows so far are in .*{name}.partial"):
        predict(tmp_path, writer, ROWS)
    kept = partial.read_text()
    assert len(json.loads(kept) if form == "alpaca_eval" else kept.splitlines()) == 2
    assert (tmp_path / name).read_text() == "of before"
    limit = 0
    with pytest.raises(OSError, match="no space"):
        predict(tmp_path, writer, ROWS)
    assert partial.read_text() == kept
    limit = 9
    predict(tmp_path, writer, ROWS)
    whole = (tmp_path / name).read_text()
    assert len(json.loads(whole) if form == "alpaca_eval" else whole.splitlines()) == 3
    assert not partial.exists()


def test_a_list_is_whole_after_each_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kills the process then."""
    writer = ResponseWriter(format="alpaca_eval")
    write = writer._write
    sizes = []

    def watching(rows: list[dict[str, object]]) -> None:
        write(rows)
        sizes.append(len(json.loads((tmp_path / "predictions.json.partial").read_text())))

    monkeypatch.setattr(writer, "_write", watching)
    predict(tmp_path, writer, ROWS)
    assert sizes == [2, 3]


ODD: dict[str, object] = {
    "title": "cut \ud83d \u2028 \u0085",
    "score": float("nan"),
    "day": datetime.datetime(2024, 5, 1),
    "raw": b"\x00",
    "large": 10**400,
    "responses": "of old",
    "prompts": ["of old"],
    "self": 1,
    "_position": {"rows": 1},
    "prompt_mask": [1, 1],
}


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_any_name_and_value_are_trained_on_and_written(streaming: bool, policy: str, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "answer": prompt, **ODD} for prompt in tiny.PROMPTS]
    data = PromptDataModule(train=rows, test=rows, predict=rows, batch_size=5, streaming=streaming)
    module = tiny.remax(policy, FunctionReward(counted), kl_coef=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = tiny.fit(module, data, tmp_path, callbacks=[SelfCheck()])
    told = [str(warning.message) for warning in caught if "columns" in str(warning.message)]
    assert len(told) == 2
    assert "columns ['prompt_mask'] are left out, since a batch has tensors of these names" in told[0]
    assert "columns ['responses', 'prompts', 'self'] are not given to rewards" in told[1]
    assert history["train/rows_dropped"] == [0.0]
    for stage, name in (("test", "responses.jsonl"), ("predict", "predictions.jsonl")):
        trainer = tiny.trainer(tmp_path, callbacks=[ResponseWriter()])
        getattr(trainer, stage)(module, datamodule=data)
        written = tiny.read_rows(tmp_path / name)
        assert [row["prompt"] for row in written] == tiny.PROMPTS
        for row in written:
            assert row["title"] == ODD["title"]
            assert (row["score"], row["day"], row["raw"]) == (None, "2024-05-01T00:00:00", "AA==")
            assert {"responses", "prompts", "self", "_position"} <= set(row)


def counted(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
    assert set(columns) == set(ODD) - {"responses", "prompts", "self", "prompt_mask"} | {"answer"}
    return [float(len(response)) for response in responses]
