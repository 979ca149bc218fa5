"""The command line, run in this process on tiny models."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from remax_lightning import cli
from remax_lightning.modules import ReMax
from remax_lightning.strategies import FSDP2Strategy

pytestmark = pytest.mark.slow

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}


@pytest.fixture
def remax(policy: str, tmp_path: Path) -> Path:
    """Configuration of a ReMax run of three steps."""
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    init = {
        "policy": {"path": policy},
        "reward": {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}},
        "sampling": {"max_new_tokens": 8},
        "kl_coef": 0.2,
        "optimizer": SGD,
    }
    data = {"train": prompts, "validation": prompts, "test": prompts, "batch_size": 2}
    return write(tmp_path, "remax", init, "ReMax", data, "PromptDataModule")


def write(folder: Path, name: str, model: Any, module: str, data: Any, data_module: str, steps: int = 3) -> Path:
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "default_root_dir": str(folder / f"{name}_run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": module, "init_args": model},
        "data": {"class_path": data_module, "init_args": data},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def printed(*arguments: object) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code in (0, None)
    return output.getvalue()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code not in (0, None)
    return capsys.readouterr().err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules that were trained, caught on their way to the trainer."""
    caught: list[Any] = []
    fit = cli.ExportingTrainer.fit

    def catching(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        caught.append(model)
        fit(self, model, *args, **kwargs)

    monkeypatch.setattr(cli.ExportingTrainer, "fit", catching)
    return caught


def test_remax_from_fit_to_export(remax: Path, policy: str, tmp_path: Path) -> None:
    root = tmp_path / "remax_run"
    run("fit", "--config", remax)
    assert not tiny.are_equal(weights(root / "hf"), weights(Path(policy)))
    assert torch.load(root / "checkpoints" / "step=3.ckpt", weights_only=True)["global_step"] == 3
    table = pandas.read_csv(root / "logs" / "version_0" / "metrics.csv")
    assert table["train/reward"].notna().sum() == 3
    assert table["val/win_rate"].notna().sum() >= 1
    saved = yaml.safe_load((root / "logs" / "version_0" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["kl_coef"] == 0.2

    run("validate", "--config", remax, "--ckpt_path", "last")
    run("test", "--config", remax, "--ckpt_path", "last")
    assert len(tiny.read_rows(root / "responses.jsonl")) == len(tiny.PROMPTS)
    assert {"logs", "validate", "test", "hf", "checkpoints"} <= {path.name for path in root.iterdir()}
    for stage, prefix in (("validate", "val"), ("test", "test")):
        results = pandas.read_csv(root / stage / "version_0" / "metrics.csv")
        assert f"{prefix}/win_rate" in results
    run("predict", "--config", remax, "--ckpt_path", "last")
    assert [row["prompt"] for row in tiny.read_rows(root / "predictions.jsonl")] == tiny.PROMPTS

    checkpoint = root / "checkpoints" / "step=3.ckpt"
    run("export", "--config", remax, "--ckpt_path", checkpoint, "--output_dir", tmp_path / "exported")
    assert tiny.are_equal(weights(tmp_path / "exported"), weights(root / "hf"))
    loaded, other = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "exported", root / "hf"))
    assert loaded.generation_config.to_dict() == other.generation_config.to_dict()


def test_the_saved_configuration_repeats_the_run(remax: Path, tmp_path: Path) -> None:
    run("fit", "--config", remax)
    root = tmp_path / "remax_run"
    again = tmp_path / "again"
    saved = root / "logs" / "version_0" / "config.yaml"
    run("fit", "--config", saved, "--trainer.logger", "false", "--trainer.default_root_dir", again)
    assert (again / "checkpoints" / "step=3.ckpt").exists()
    assert tiny.are_equal(weights(root / "hf"), weights(again / "hf"))


def test_a_saved_configuration_works_with_every_sub_command(remax: Path, tmp_path: Path) -> None:
    run("fit", "--config", remax, "--ckpt_path", "last")
    root = tmp_path / "remax_run"
    saved = root / "logs" / "version_0" / "config.yaml"
    for subcommand in ("validate", "test", "predict"):
        run(subcommand, "--config", saved)
    run("export", "--config", saved, "--output_dir", tmp_path / "exported")
    assert tiny.are_equal(weights(tmp_path / "exported"), weights(root / "hf"))
    run("plan", "--config", saved, "--gpus", 1)
    for subcommand in ("test", "predict"):
        other = root / subcommand / "version_0" / "config.yaml"
        run("fit", "--config", other, "--trainer.max_steps", 4, "--trainer.logger", "false")


def test_export_and_predict_do_without_the_reward_model(policy: str, tmp_path: Path) -> None:
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    reward = Path(tiny.save_reward_model(tmp_path / "reward"))
    init = {
        "policy": {"path": policy},
        "reward": {"class_path": "ModelReward", "init_args": {"path": str(reward)}},
        "sampling": {"max_new_tokens": 4},
        "optimizer": SGD,
    }
    data = {"train": prompts, "predict": prompts, "batch_size": 2}
    config = write(tmp_path, "scored", init, "ReMax", data, "PromptDataModule", 1)
    run("fit", "--config", config)
    reward.rename(tmp_path / "elsewhere")
    run("export", "--config", config, "--ckpt_path", "last", "--output_dir", tmp_path / "exported")
    assert tiny.are_equal(weights(tmp_path / "exported"), weights(tmp_path / "scored_run" / "hf"))
    run("predict", "--config", config, "--ckpt_path", "last")
    assert len(tiny.read_rows(tmp_path / "scored_run" / "predictions.jsonl")) == len(tiny.PROMPTS)


def test_one_seed_decides_the_run(remax: Path, tmp_path: Path, fitted: list[Any]) -> None:
    def trained(name: str, *arguments: object) -> dict[str, torch.Tensor]:
        run("fit", "--config", remax, "--trainer.default_root_dir", tmp_path / name, *arguments)
        return weights(tmp_path / name / "hf")

    first, again = (trained(name, "--seed_everything", 1) for name in ("first", "again"))
    assert tiny.are_equal(first, again)
    other = trained("other", "--seed_everything", 2)
    assert not tiny.are_equal(first, other)
    # both of the seeds that follow the one: the responses', and that of the order of prompts
    responses = trained("responses", "--seed_everything", 2, "--model.seed", 1)
    assert not tiny.are_equal(responses, other)
    assert not tiny.are_equal(responses, first)
    both = trained("both", "--seed_everything", 2, "--model.seed", 1, "--data.seed", 1)
    assert tiny.are_equal(both, first)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        (["--trainer.strategy", "FSDP2Strategy"], torch.bfloat16),
        (["--trainer.strategy", "fsdp2"], torch.bfloat16),
        (["--trainer.strategy", "fsdp2", "--trainer.strategy.compute_dtype", "float32"], torch.float32),
        (["--trainer.strategy=fsdp2", "--trainer.strategy.compute_dtype=float32"], torch.float32),
        (["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.compute_dtype", "float32"], torch.float32),
        (["--config", "short.yaml", "--trainer.strategy.compute_dtype", "float32"], torch.float32),
        (["--config", "class.yaml", "--config", "other.yaml"], torch.float32),
        (["--config", "class.yaml", "--trainer.strategy.compute_dtype", "bfloat16"], torch.bfloat16),
    ],
)
def test_a_strategy_by_either_name(
    remax: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fitted: list[Any],
    arguments: list[str],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(cli.ExportingTrainer, "fit", lambda self, model, **_: fitted.append(self.strategy))
    monkeypatch.chdir(tmp_path)
    Path("short.yaml").write_text("trainer: {strategy: fsdp2}")
    Path("class.yaml").write_text(
        "trainer: {strategy: {class_path: FSDP2Strategy, init_args: {compute_dtype: float32}}}"
    )
    Path("other.yaml").write_text("trainer: {max_steps: 2}")
    run("fit", "--config", remax, *arguments)
    assert type(fitted[0]) is FSDP2Strategy
    assert fitted[0].compute_dtype == dtype


def test_settings_of_the_trainer_that_are_true_already(remax: Path, fitted: list[Any]) -> None:
    run("fit", "--config", remax, "--trainer.accumulate_grad_batches", 1, "--trainer.gradient_clip_val", 1.0)
    assert fitted[0].max_grad_norm == 1.0


def test_print_config_explains(remax: Path, tmp_path: Path) -> None:
    first = printed("fit", "--config", remax, "--print_config=comments")
    path = tmp_path / "printed.yaml"
    path.write_text(first)
    assert "# Steps between two lines; 0 prints none." in first
    assert printed("fit", "--config", path, "--print_config=comments") == first


@pytest.mark.parametrize(("program", "typed"), [("cli.py", "python cli.py"), ("remax-lightning", "remax-lightning")])
def test_options_are_completed(program: str, typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--print_completion", "shtab-bash"])
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        cli.main()
    (tmp_path / "script").write_text(output.getvalue())
    first = typed.split()[0]
    script = f"""
        source {tmp_path / "script"}
        function=$(complete -p {first} | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
        COMP_WORDS=({typed} fit --trainer.max_ep)
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        $function
        echo "${{COMPREPLY[@]}}"
    """
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["--trainer.max_epochs"], ended.stderr


def test_last_resumes(remax: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run("fit", "--config", remax, "--trainer.default_root_dir", whole, "--model.lr_schedule", "constant")
    part = tmp_path / "remax_run"
    run("fit", "--config", remax, "--trainer.max_steps", 2, "--model.lr_schedule", "constant")
    run("fit", "--config", remax, "--ckpt_path", "last", "--model.lr_schedule", "constant")
    assert torch.load(part / "checkpoints" / "step=3.ckpt", weights_only=True)["global_step"] == 3
    assert tiny.are_equal(weights(whole / "hf"), weights(part / "hf"))


def test_last_without_a_checkpoint(remax: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint in .*checkpoints; run fit first"):
        run("validate", "--config", remax, "--ckpt_path", "last")
    run("fit", "--config", remax, "--ckpt_path", "last")
    assert (tmp_path / "remax_run" / "hf").exists()


def test_a_fit_without_validation_rows(remax: Path, tmp_path: Path) -> None:
    run("fit", "--config", remax, "--hf_export.enabled", "false")
    weights_with = torch.load(tmp_path / "remax_run" / "checkpoints" / "step=3.ckpt", weights_only=True)
    options = ["--trainer.val_check_interval", 100, "--trainer.default_root_dir", tmp_path / "other"]
    run("fit", "--config", remax, "--data.validation", "null", *options, "--hf_export.enabled", "false")
    weights_without = torch.load(tmp_path / "other" / "checkpoints" / "step=3.ckpt", weights_only=True)
    for name, weight in weights_with["state_dict"].items():
        assert torch.equal(weight, weights_without["state_dict"][name])
    metrics = (tmp_path / "other" / "logs" / "version_0" / "metrics.csv").read_text()
    assert "train/reward" in metrics
    assert "val/" not in metrics


def test_what_only_python_can_give_is_refused(remax: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("Dataset", "IterableDataset"):
        message = refused(capsys, "fit", "--config", remax, "--data.train", f'{{"class_path": "datasets.{kind}"}}')
        assert message.startswith("error: data.train: only Python code can give an object here, got {'class_path'")


@pytest.mark.parametrize("train", [["a.jsonl", "b.jsonl"], [{"prompt": "a b"}, {"prompt": "b c"}]])
def test_lists_of_sources_and_of_rows_round_trip(remax: Path, tmp_path: Path, train: list[Any]) -> None:
    text = printed("fit", "--config", remax, "--data.train", json.dumps(train), "--print_config")
    assert yaml.safe_load(text)["data"]["init_args"]["train"] == train
    (tmp_path / "printed.yaml").write_text(text)
    assert printed("fit", "--config", tmp_path / "printed.yaml", "--print_config") == text


def test_sft_and_reward_model(policy: str, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "response": " c" * n} for n in range(1, 5)]
    demonstrations = tiny.write_rows(tmp_path / "demonstrations.jsonl", rows)
    data = {"train": demonstrations, "validation": demonstrations, "batch_size": 2}
    model = {"policy": {"path": policy}, "optimizer": SGD}
    run("fit", "--config", write(tmp_path, "sft", model, "SFT", data, "DemonstrationDataModule"))
    folder = tmp_path / "sft_run" / "hf"
    assert not tiny.are_equal(weights(folder), weights(Path(policy)))

    pairs = tiny.write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": "ab", "chosen": " c" * n, "rejected": " d"} for n in range(1, 5)]
    )
    data = {"train": pairs, "validation": pairs, "predict": pairs, "batch_size": 2}
    model = {"model": {"path": str(folder)}, "optimizer": SGD}
    config = write(tmp_path, "scored", model, "RewardModel", data, "PreferenceDataModule")
    run("fit", "--config", config)
    scored = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scored_run" / "hf")
    assert scored.config.num_labels == 1
    run("predict", "--config", config, "--ckpt_path", "last")
    assert len(tiny.read_rows(tmp_path / "scored_run" / "predictions.jsonl")) == 4


def test_the_default_optimizer_trains(policy: str, tmp_path: Path, fitted: list[Any]) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab", "response": " c"}] * 2)
    data = {"train": rows, "batch_size": 2}
    run(
        "fit",
        "--config",
        write(tmp_path, "sft", {"policy": {"path": policy}}, "SFT", data, "DemonstrationDataModule", 1),
    )
    optimizer = fitted[0].trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_overrides_reach_the_module(remax: Path, tmp_path: Path, fitted: list[Any]) -> None:
    overrides: dict[str, Any] = {
        "kl_coef": 0.1,
        "kl_form": "one_step",
        "gamma": 0.9,
        "reward_clip": 2.0,
        "missing_stop_penalty": 0.5,
        "greedy_max_new_tokens": 4,
        "seed": 7,
        "lr_schedule": "linear",
        "warmup_fraction": 0.25,
        "micro_batch_size": 1,
        "max_grad_norm": 0.5,
    }
    arguments = [text for name, value in overrides.items() for text in (f"--model.{name}", value)]
    nested = ["--model.sampling.temperature", 0.7, "--model.sampling.num_samples", 2, "--data.batch_size", 1]
    run("fit", "--config", remax, "--trainer.max_steps", 1, *arguments, *nested, "--model.optimizer.init_args.lr", 0.01)
    module = fitted[0]
    assert type(module) is ReMax
    assert {name: getattr(module, name) for name in overrides} == overrides
    assert (module.sampling.temperature, module.sampling.num_samples, module.sampling.max_new_tokens) == (0.7, 2, 8)
    assert module.trainer.datamodule.batch_size == 1
    assert module.trainer.optimizers[0].defaults["lr"] == 0.01


def test_a_second_configuration_overlays_the_first(remax: Path, tmp_path: Path, fitted: list[Any]) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": {"kl_coef": 0.4}}, "trainer": {"max_steps": 1}}))
    run("fit", "--config", remax, "--config", overlay)
    module = fitted[0]
    assert module.kl_coef == 0.4
    assert module.sampling.max_new_tokens == 8
    assert module.global_step == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.kl_coeff", "0.1"], "kl_coeff"),
        (["--model.kl_form", "both"], "kl_form"),
        (["--model.lr_schedule", "square"], "lr_schedule"),
        (["--data.batchsize", "1"], "batchsize"),
        (["--trainer.max_stepps", "1"], "max_stepps"),
        (["--model", "ReMaks"], "ReMaks"),
        (["--hf_export.enabeld", "false"], "enabeld"),
    ],
)
def test_what_is_misspelt_is_refused(
    remax: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, "fit", "--config", remax, *arguments)


def test_a_model_source_with_path_and_config_is_refused(remax: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model.policy.config", '{"model_type": "llama"}']
    try:
        message = refused(capsys, "fit", "--config", remax, *given)
    except ValueError as error:
        message = str(error)
    assert "exactly one of path" in message


def test_callbacks_are_set_by_their_own_keys(remax: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint.every_n_train_steps", 1, "--checkpoint.save_top_k", -1]
    run("fit", "--config", remax, "--hf_export.enabled", "false", *arguments)
    folder = tmp_path / "remax_run" / "checkpoints"
    assert {path.name for path in folder.glob("*.ckpt")} == {"step=1.ckpt", "step=2.ckpt", "step=3.ckpt"}
    assert not (tmp_path / "remax_run" / "hf").exists()
    run("predict", "--config", remax, "--response_writer.path", tmp_path / "rows.jsonl")
    assert len(tiny.read_rows(tmp_path / "rows.jsonl")) == len(tiny.PROMPTS)


def test_print_config_round_trips(remax: Path, tmp_path: Path) -> None:
    first = printed("fit", "--config", remax, "--model.gamma", 0.9, "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(first)
    assert printed("fit", "--config", path, "--print_config") == first
    config = yaml.safe_load(first)
    assert config["model"]["class_path"] == "remax_lightning.ReMax"
    assert config["model"]["init_args"]["gamma"] == 0.9


def test_sub_commands_are_there() -> None:
    text = printed("--help")
    for name in ("fit", "validate", "test", "predict", "export", "make-toy-data", "report"):
        assert name in text
    assert "REMAX_TRACEBACK=1" in text
    assert "--print_completion" in text
    assert "--output_dir" in printed("make-toy-data", "--help")
    assert "--run_dir" in printed("report", "--help")
    assert "--output_dir" in printed("export", "--help")


def test_toy_data_and_report(remax: Path, tmp_path: Path) -> None:
    sizes = [text for name in ("demonstrations", "preferences", "prompts", "held_out") for text in (f"--num_{name}", 8)]
    run("make-toy-data", "--output_dir", tmp_path / "toy", "--vocab_size", 300, *sizes)
    assert len(tiny.read_rows(tmp_path / "toy" / "prompts.jsonl")) == 8
    run("fit", "--config", remax)
    run("test", "--config", remax, "--ckpt_path", "last")
    root = tmp_path / "remax_run"
    run("report", "--run_dir", root, "--output_dir", tmp_path / "report")
    assert {"summary.json", "reward.png"} <= {path.name for path in (tmp_path / "report").iterdir()}
