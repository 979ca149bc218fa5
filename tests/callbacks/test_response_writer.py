import json
from pathlib import Path

import pytest
import tiny

from remax_lightning.callbacks import ResponseWriter


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


def test_an_interrupted_list_is_still_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ResponseWriter(format="alpaca_eval")
    write = writer._write

    def failing(rows: list[dict[str, object]]) -> None:
        if writer.num_rows:
            raise OSError("no space left")
        write(rows)

    monkeypatch.setattr(writer, "_write", failing)
    with pytest.raises(OSError, match="no space"):
        predict(tmp_path, writer, ROWS)
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 2
