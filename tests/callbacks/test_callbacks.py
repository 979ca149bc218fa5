from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, AutoTokenizer

from remax_lightning.callbacks import Checkpoint, HFExport, ResponseWriter
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import ReMax


def fit(policy: str, root: Path, steps: int, callback: Callback, ckpt_path: str | None = None, **options: Any) -> ReMax:
    """Train in a run's folder, with checkpoints where Lightning keeps them on."""
    module = tiny.remax(policy, optimizer=tiny.adam())
    root.mkdir(exist_ok=True)
    data = tiny.prompt_data(root, batch_size=2)
    data.validation = data.train
    trainer = tiny.trainer(root, steps, [callback], enable_checkpointing=isinstance(callback, Checkpoint), **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def steps_of(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}


def test_export_at_the_end_of_fit(policy: str, tmp_path: Path) -> None:
    module = fit(policy, tmp_path / "run", 2, HFExport())
    folder = tmp_path / "run" / "hf"
    loaded, words = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([words("Tell me")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, module.policy.eval()(ids).logits)
    assert not tiny.are_equal(tiny.weights(loaded), tiny.weights(AutoModelForCausalLM.from_pretrained(policy)))
    assert loaded.generation_config.eos_token_id == list(tiny.STOPS)
    assert "model.safetensors" in names(folder)


def test_a_good_export_is_not_replaced_by_lost_weights(policy: str, tmp_path: Path) -> None:
    class Lose(HFExport):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            next(pl_module.policy.parameters()).data[0, 0] = float("nan")

    fit(policy, tmp_path / "run", 1, HFExport())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "hf").iterdir()}
    with pytest.raises(ValueError, match=r"weights that are not finite \(.*embed_tokens.weight\), so it is not exp"):
        fit(policy, tmp_path / "run", 2, Lose())
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "hf").iterdir()} == before


def test_export_to_another_folder(policy: str, tmp_path: Path) -> None:
    fit(policy, tmp_path / "run", 1, HFExport(output_dir=str(tmp_path / "elsewhere")))
    assert "config.json" in names(tmp_path / "elsewhere")
    assert "hf" not in names(tmp_path / "run")


@pytest.mark.parametrize(("enabled", "options"), [(False, {}), (True, {"fast_dev_run": True})])
def test_no_export(policy: str, tmp_path: Path, enabled: bool, options: dict[str, Any]) -> None:
    fit(policy, tmp_path / "run", 1, HFExport(enabled=enabled), **options)
    assert "hf" not in names(tmp_path / "run")


def test_no_export_without_a_fit(policy: str, tmp_path: Path) -> None:
    data = tiny.prompt_data(tmp_path)
    data.validation = data.train
    tiny.trainer(tmp_path, callbacks=[HFExport()]).validate(tiny.remax(policy), data, verbose=False)
    assert "hf" not in names(tmp_path)


@pytest.mark.parametrize(("every", "steps"), [(2, 3), (2, 4), (None, 3), (5, 3)])
def test_the_last_step_is_saved(policy: str, tmp_path: Path, every: int | None, steps: int) -> None:
    folder = tmp_path / "checkpoints"
    module = fit(policy, tmp_path / "run", steps, Checkpoint(dirpath=str(folder), every_n_train_steps=every))
    checkpoint = torch.load(folder / f"step={steps}.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    for name, weight in module.state_dict().items():
        assert torch.equal(checkpoint["state_dict"][name], weight)


def test_a_resumed_run_is_the_whole_run(policy: str, tmp_path: Path) -> None:
    whole = fit(policy, tmp_path / "whole", 5, HFExport(enabled=False))
    checkpoint = Checkpoint(dirpath=str(tmp_path / "checkpoints"), every_n_train_steps=2)
    fit(policy, tmp_path / "part", 3, checkpoint)
    seen: list[int] = []

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Any, *args: object) -> None:
            seen.append(trainer.global_step)

    resumed = fit(policy, tmp_path / "part", 5, Steps(), ckpt_path=str(tmp_path / "checkpoints" / "step=3.ckpt"))
    assert seen == [3, 4]
    assert tiny.are_equal(tiny.weights(whole.policy), tiny.weights(resumed.policy))


def test_the_reference_of_a_resumed_run_is_the_first_policy(policy: str, tmp_path: Path) -> None:
    data = tiny.prompt_data(tmp_path)
    checkpoint = Checkpoint(dirpath=str(tmp_path / "checkpoints"))
    module = tiny.remax(policy, kl_coef=0.1, optimizer=tiny.adam())
    tiny.trainer(tmp_path, 2, [checkpoint], enable_checkpointing=True).fit(module, datamodule=data)
    resumed = tiny.remax(policy, kl_coef=0.1, optimizer=tiny.adam())
    path = str(tmp_path / "checkpoints" / "step=2.ckpt")
    tiny.trainer(tmp_path, 3).fit(resumed, datamodule=data, ckpt_path=path)
    assert resumed.reference is not None
    first = AutoModelForCausalLM.from_pretrained(policy)
    assert tiny.are_equal(tiny.weights(resumed.reference.model), tiny.weights(first))


def test_which_checkpoints_are_kept(policy: str, tmp_path: Path) -> None:
    expected: dict[tuple[int, int, int], set[int]] = {
        (1, -1, 1): {1, 2, 3, 4},
        (1, 1, 2): {3, 4},
        (1, 0, 1): {4},
        (3, 1, 2): {3, 4},
        (2, 1, 3): {2, 4},
    }
    for (every, top_k, keep_last), steps in expected.items():
        folder = tmp_path / f"{every}_{top_k}_{keep_last}"
        options = {"every_n_train_steps": every, "save_top_k": top_k, "keep_last": keep_last}
        fit(policy, tmp_path / "run", 4, Checkpoint(dirpath=str(folder), **options))
        assert steps_of(folder) == {f"step={step}.ckpt": step for step in steps}, (every, top_k, keep_last)
        assert names(folder) == {f"step={step}.ckpt{suffix}" for step in steps for suffix in ("", ".json")}


def test_monitor_and_mode_choose_the_best(policy: str, tmp_path: Path) -> None:
    validate = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    for monitor, mode, best in (("val/reward", "max", max), ("val/reward", "min", min), (None, "min", max)):
        scores: dict[str, float] = {}

        class Scores(Callback):
            def on_validation_end(self, trainer: Any, *args: object, scores: dict[str, float] = scores) -> None:
                scores[f"step={trainer.global_step}.ckpt"] = float(trainer.callback_metrics["val/reward"])

        checkpoint = Checkpoint(dirpath=str(tmp_path / f"{monitor}{mode}"), monitor=monitor, mode=mode, keep_last=1)
        module = tiny.remax(policy, optimizer=tiny.adam())
        data = tiny.prompt_data(tmp_path, batch_size=2)
        data.validation = data.train
        trainer = tiny.trainer(tmp_path, 5, [Scores(), checkpoint], enable_checkpointing=True, **validate)
        trainer.fit(module, datamodule=data)
        assert len(set(scores.values())) == 5
        assert set(steps_of(tmp_path / f"{monitor}{mode}")) == {
            best(scores, key=lambda name: scores[name]),
            "step=5.ckpt",
        }
        assert Path(checkpoint.best_model_path).name == best(scores, key=lambda name: scores[name])


def test_save_weights_only(policy: str, tmp_path: Path) -> None:
    for weights_only in (False, True):
        folder = tmp_path / str(weights_only)
        fit(policy, tmp_path / "run", 1, Checkpoint(dirpath=str(folder), save_weights_only=weights_only))
        checkpoint = torch.load(folder / "step=1.ckpt", weights_only=True)
        assert ("optimizer_states" in checkpoint) is not weights_only


def written(folder: Path, policy: str, stage: str, **options: Any) -> list[dict[str, Any]]:
    rows = [{"prompt": prompt, "answer": "é"} for prompt in tiny.PROMPTS]
    data = tiny.prompt_data(folder, rows, eval_batch_size=2)
    data.test = data.predict = data.train
    module = tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=policy))
    trainer = tiny.trainer(folder, callbacks=[ResponseWriter(**options)])
    getattr(trainer, stage)(module, datamodule=data)
    default = {"test": "responses.jsonl", "predict": "predictions.jsonl"}[stage]
    path = Path(options.get("path", folder / default))
    assert "é" in path.read_text(encoding="utf-8")
    return tiny.read_rows(path)


@pytest.mark.parametrize("given", [False, True])
def test_rows_of_predict(policy: str, tmp_path: Path, given: bool) -> None:
    options = {"path": str(tmp_path / "new" / "rows.jsonl")} if given else {}
    rows = written(tmp_path, policy, "predict", **options)
    assert [row["prompt"] for row in rows] == tiny.PROMPTS
    assert all(set(row) == {"prompt", "answer", "response", "greedy_response"} for row in rows)


@pytest.mark.parametrize("given", [False, True])
def test_rows_of_test(policy: str, tmp_path: Path, given: bool) -> None:
    options = {"path": str(tmp_path / "new" / "rows.jsonl")} if given else {}
    rows = written(tmp_path, policy, "test", **options)
    assert [row["prompt"] for row in rows] == tiny.PROMPTS
    for row in rows:
        assert {"answer", "response", "reward", "reference_response", "reference_reward", "win_rate", "kl"} <= set(row)
        assert row["reference_response"] == row["response"]


def test_rows_written_before_an_error_are_kept(policy: str, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *args: object) -> None:
            if batch_idx == 1:
                raise RuntimeError("stop")

    data = tiny.prompt_data(tmp_path, eval_batch_size=2)
    data.predict = data.train
    writer = ResponseWriter()
    with pytest.raises(RuntimeError, match="stop"):
        tiny.trainer(tmp_path, callbacks=[writer, Stop()]).predict(tiny.remax(policy), data)
    assert len(tiny.read_rows(tmp_path / "predictions.jsonl.partial")) == 2
    assert writer.file is None
