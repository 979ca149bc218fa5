"""Mistakes on the command line: each ends the process with one sentence that names the cause and the remedy."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import ROOT

from remax_lightning import cli
from remax_lightning.cli_errors import TRACEBACK, sentence

Shell = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_model(folder / "policy")
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A ReMax run of one step in the working directory, from a file base.yaml."""
    monkeypatch.chdir(tmp_path)
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    values = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "ReMax",
            "init_args": {
                "policy": {"path": str(models / "policy")},
                "reward": {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}},
                "sampling": {"max_new_tokens": 4},
            },
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"train": prompts, "batch_size": 2}},
    }
    Path("base.yaml").write_text(yaml.safe_dump(values))
    return values


@pytest.fixture
def shell(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """What a shell sees of a command: its exit status and the last line of what it prints of errors."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cli.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        errors = capsys.readouterr().err
        if isinstance(end.value.code, str):  # which Python prints, with status 1
            errors += end.value.code
        assert "usage:" not in errors
        assert "Traceback" not in errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return 1 if isinstance(end.value.code, str) else int(end.value.code or 0), last.removeprefix("error: ")

    return run


FIT = ("fit", "--config", "base.yaml")
KNOWN = {"PPO", "RLOO", "ReMax", "Reinforce", "RewardModel", "SFT"}
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no sub-command": ((), "the first argument must be a sub-command: fit, validate, test, predict, export, plan"),
    "sub-command": (("fitt",), "got fitt; did you mean fit?"),
    "no configuration": (("fit",), "--data and --model must be given, in a file such as --config configs/remax.yaml"),
    "option": (
        (*FIT, "--trainer.max_stepps", "4"),
        "there is no --trainer.max_stepps; did you mean --trainer.max_steps?",
    ),
    "abbreviation": ((*FIT, "--trainer.max_step", "4"), "there is no --trainer.max_step; did you mean --trainer.max_"),
    "group": ((*FIT, "--modle.kl_coef", "1"), "there is no --modle.kl_coef; did you mean --model.kl_coef?"),
    "argument": (
        (*FIT, "--model.kl_coeff", "1"),
        "model.kl_coeff: ReMax has no argument kl_coeff; did you mean kl_coef?",
    ),
    "data's argument": (
        (*FIT, "--data.batchsize", "1"),
        "PromptDataModule has no argument batchsize; did you mean batch_",
    ),
    "settings' argument": (
        (*FIT, "--model.sampling.temprature", "1"),
        "model.sampling.temprature: Sampling has no argument temprature; did you mean temperature?",
    ),
    "optional settings": (
        (*FIT, "--model.lora.rnk", "3"),
        "model.lora.rnk: LoRA has no argument rnk; did you mean rank?",
    ),
    "callback's argument": (
        (*FIT, "--hf_export.enabeld", "false"),
        "there is no --hf_export.enabeld; did you mean --hf_export.enabled?",
    ),
    "number": ((*FIT, "--model.optimizer", "AdamW", "--model.optimizer.lr", "1e-3x"), "lr must be a number, got 1e-3x"),
    "integer": ((*FIT, "--data.batch_size", "2.5"), "data.batch_size must be an integer, got 2.5"),
    "range": ((*FIT, "--data.batch_size", "0"), "batch_size must be at least 1, got 0"),
    "choice": ((*FIT, "--model.kl_form", "both"), "model.kl_form must be one of full_step, one_step, got both"),
    "module": ((*FIT, "--model", "ReMaxx"), "model: there is no class ReMaxx; did you mean ReMax? Known are "),
    "module's case": ((*FIT, "--model", "remax"), "did you mean ReMax?"),
    "reward": (
        (*FIT, "--model.reward", "FuncReward"),
        "did you mean FunctionReward? Known are",
    ),
    "callback": (
        (*FIT, "--trainer.callbacks", "EarlyStop"),
        "no class EarlyStop; did you mean EarlyStopping? Known are",
    ),
    "added callback": ((*FIT, "--trainer.callbacks+", "EarlyStop"), "did you mean EarlyStopping? Known are"),
    "optimizer": ((*FIT, "--model.optimizer", "AdamWW"), "no class AdamWW; did you mean AdamW? Known are"),
    "class of another kind": (
        (*FIT, "--model", "torch.nn.Linear"),
        "model cannot be torch.nn.Linear: Import path does",
    ),
    "class path": ((*FIT, "--model", "nowhere.Model"), "model cannot be nowhere.Model: No module named 'nowhere'"),
    "reward's class": (
        ("fit", "--config", "rewardless.yaml", "--model.reward.path", "policy"),
        "model.reward needs its class before its arguments: --model.reward CLASS, one of FunctionReward, ModelReward",
    ),
    "no reward": (
        ("fit", "--config", "rewardless.yaml"),
        "ReMax needs reward: give --model.reward ..., or set them in",
    ),
    "rewards": (
        (*FIT, "--model.reward", "[{class_path: FunctionReward}]"),
        "model.reward takes one Reward, as class_path",
    ),
    "help without the class": (
        ("fit", "--model.reward.help", "ModelReward"),
        "needs the class that has it first, such as --model ReMax --model.reward.help ModelReward",
    ),
    "no data": (
        ("fit", "--config", "dataless.yaml"),
        "data.train is not set; give a file, a folder or a hub data set: --",
    ),
    "no model": (
        ("fit", "--config", "modelless.yaml"),
        "model.policy.path is not set; give a folder or a hub name: --mod",
    ),
    "no file": (("fit", "--config", "nowhere.yaml"), "--config nowhere.yaml: there is no such file in /"),
    "YAML": (("fit", "--config", "open.yaml"), "open.yaml, line 2, column 6: not valid YAML: expected ',' or '}'"),
    "tab": (("fit", "--config", "tab.yaml"), "tab.yaml, line 2, column 1: not valid YAML: found character"),
    "list": (
        ("fit", "--config", "list.yaml"),
        "list.yaml: a configuration must be a mapping such as model: ..., got list",
    ),
    "argument in a file": ((*FIT, "--config", "misspelt.yaml"), "misspelt.yaml: model.kl_coeff: ReMax has no argument"),
    "key in a file": ((*FIT, "--config", "modle.yaml"), "there is no modle.class_path; did you mean model.class_path?"),
    "package": ((*FIT, "--trainer.logger", "WandbLogger"), "pip install -U 'wandb"),
    "devices": ((*FIT, "--trainer.devices", "x"), "`devices` selected with `CPUAccelerator` should be an int > 0."),
    "accelerator": ((*FIT, "--trainer.accelerator", "gpuu"), "You selected an invalid accelerator name"),
    "chat template": (
        (*FIT, "--model.policy.chat_template", "nowhere.jinja"),
        "chat_template: there is no file nowhere.jinja; give an existing one, or its text",
    ),
    "KL penalty": ((*FIT, "--model.kl_coef", "-1"), "kl_coef must be 0 (no reference) or positive, got -1.0"),
    "tokens": ((*FIT, "--model.sampling.max_new_tokens", "-3"), "max_new_tokens must be at least 1, got -3"),
    "model's folder": ((*FIT, "--model.policy.path", "/nowhere/model"), "/nowhere/model does not exist; give"),
    "accumulation": (
        (*FIT, "--trainer.accumulate_grad_batches", "2"),
        "set data.batch_size to the rows of an optimizer step, on each rank, and model.micro_batch_size to those of",
    ),
    "clipping": ((*FIT, "--trainer.gradient_clip_val", "0.5"), "set model.max_grad_norm (now 1.0)"),
    "precision": (
        (*FIT, "--trainer.precision", "bf17"),
        "trainer.precision must be one of 32-true, bf16-mixed, got bf17",
    ),
    "strategy": ((*FIT, "--trainer.strategy", "fsdp"), "must be auto, ddp or fsdp2, got fsdp; to shard a model"),
    "strategy's argument": (
        (*FIT, "--trainer.strategy", "fsdp2", "--trainer.strategy.compute_dtyp", "float32"),
        "FSDP2Strategy has no argument compute_dtyp; did you mean compute_dtype?",
    ),
    "plan without GPUs": (("plan", "--config", "base.yaml"), "--gpus must be given"),
    "report": (("report",), "--run_dir must be given"),
    "report's argument": (("report", "--respones", "x"), "there is no --respones; did you mean --responses?"),
}
RUNNING: dict[str, tuple[tuple[str, ...], str]] = {
    "columns": ((*FIT, "--data.train", "columns.jsonl"), "train: the rows have the columns ['foo'], none of the known"),
    "no rows": (
        (*FIT, "--data.train", "nowhere.jsonl"),
        "no data at 'nowhere.jsonl': there is no such file or folder; give",
    ),
    "empty file": ((*FIT, "--data.train", "empty.jsonl"), "data.train: cannot read empty.jsonl: the file is empty"),
    "corrupt line": ((*FIT, "--data.train", "corrupt.jsonl"), "corrupt.jsonl, line 2: not valid JSON"),
    "reward's column": (
        (*FIT, "--model.reward.function", "reward_functions.matches"),
        "reward_functions.matches needs the columns answer, which the data does not have; it has prompts, responses",
    ),
    "reward's file": ((*FIT, "--model.reward.function", "/a/b.py"), "/a/b.py needs its name: /a/b.py:exact_match"),
    "reward's module": (
        (*FIT, "--model.reward.function", "nowhere.f"),
        "nowhere.f cannot be imported: No module named",
    ),
    "reward's name": (
        (*FIT, "--model.reward.function", "f"),
        "is given as my_rewards.exact_match or path/to/file.py:exact",
    ),
    "reward model's folder": (
        (
            "fit",
            "--config",
            "rewardless.yaml",
            "--model.reward",
            "ModelReward",
            "--model.reward.path",
            "/nowhere/model",
        ),
        "/nowhere/model does not exist; a Hugging Face folder or a hub name was expected there",
    ),
    "no checkpoint": (("test", *FIT[1:], "--data.test", "prompts.jsonl", "--ckpt_path", "last"), "run fit first"),
    "no checkpoint file": (
        ("test", *FIT[1:], "--data.test", "prompts.jsonl", "--ckpt_path", "a.ckpt"),
        "no checkpoint a.",
    ),
    "self-check": ((*FIT, "--model.reward.function", "raising_rewards.nothing"), "self-check: none of"),
    "failing reward": ((*FIT, "--model.reward.function", "raising_rewards.failing"), "out of order"),
    "no responses": (
        ("report", "--responses", "x.jsonl", "--run_dir", "x", "--output_dir", "y"),
        "no responses file x.jsonl",
    ),
}

REWARDS = """
def nothing(prompts, responses):
    return [None] * len(responses)

def failing(prompts, responses):
    raise RuntimeError("out of order")
"""


@pytest.fixture
def files(config: dict[str, Any]) -> None:
    """Files with something wrong in the working directory."""
    init = config["model"]["init_args"]
    for name, model in (
        ("rewardless", {each: value for each, value in init.items() if each != "reward"}),
        ("modelless", {**init, "policy": {"dtype": "float32"}}),
    ):
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**config, "model": {**config["model"], "init_args": model}}))
    Path("dataless.yaml").write_text(yaml.safe_dump({**config, "data": {"class_path": "PromptDataModule"}}))
    Path("open.yaml").write_text("trainer: {max_steps: 2\nmodel: x\n")
    Path("tab.yaml").write_text("trainer:\n\tmax_steps: 2\n")
    Path("list.yaml").write_text("- trainer\n")
    Path("misspelt.yaml").write_text("model: {init_args: {kl_coeff: 1}}\n")
    Path("modle.yaml").write_text("modle: {class_path: ReMax}\n")
    Path("raising_rewards.py").write_text(REWARDS)
    tiny.write_rows(Path("columns.jsonl"), [{"foo": "x"}] * 3)
    Path("empty.jsonl").touch()
    Path("corrupt.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}\n')


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("arguments", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_arguments(arguments: tuple[str, ...], told: str, shell: Shell) -> None:
    status, message = shell(*arguments)
    assert told in message
    assert status == 2


@pytest.mark.usefixtures("files")
def test_an_unknown_class_lists_the_known_ones(shell: Shell) -> None:
    _, message = shell(*FIT, "--model", "ReMaxx")
    listed = message.partition("Known are ")[2].partition(";")[0].split(", ")
    assert {*listed} >= KNOWN  # other tests of the same process may have defined methods
    assert not {"TrainableModule", "PolicyGradientModule", "BaselineModule"} & {*listed}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("arguments", "told"), RUNNING.values(), ids=RUNNING)
def test_a_mistake_that_shows_later(arguments: tuple[str, ...], told: str, shell: Shell) -> None:
    status, message = shell(*arguments)
    assert told in message
    assert status == 1


def test_a_bug_has_its_traceback(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(sys, "argv", ["cli.py", *FIT])
    monkeypatch.setattr("remax_lightning.callbacks.hf_export.export_module", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli.main()


def test_a_traceback_is_shown_when_asked_for(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    monkeypatch.setattr(sys, "argv", ["cli.py", *FIT, "--data.train", "nowhere.jsonl"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_a_machine_without_a_gpu() -> None:
    error = MisconfigurationException("No supported gpu backend found!")
    assert sentence(error) == "No supported gpu backend found! Set trainer.accelerator to auto or cpu."


def test_a_protocol_is_no_known_class(shell: Shell) -> None:
    _, message = shell(*FIT, "--model.reward", "FuncReward")
    assert "ModelReward" in message
    assert "RewardFunction" not in message


def test_only_errors_with_a_sentence_are_told() -> None:
    for raising in (lambda: torch.zeros(2) @ torch.zeros(3), lambda: {}["key"], lambda: int("x")):
        with pytest.raises(Exception, match=r".+") as raised:
            raising()
        assert sentence(raised.value) is None


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17326. GLHF!",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_rank_that_is_gone_is_said_in_one_sentence(message: str) -> None:
    assert sentence(RuntimeError(message)) == (
        "the connection to another rank is lost: it has ended or does not answer; its own message says why"
    )


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *arguments], env=environment, **pipes, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("config")
def test_the_process_ends_with_the_sentence_alone() -> None:
    process = python(*FIT, "--data.train", "nowhere.jsonl")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: data.train: no data at 'nowhere.jsonl'")


@pytest.mark.slow
@pytest.mark.usefixtures("config")
def test_an_interrupted_process_says_so() -> None:
    endless = ("--trainer.max_steps", "1000000", "--trainer.max_epochs", "-1", "--progress_lines.every_n_steps", "1")
    process = python(*FIT, *endless, "--self_check.enabled", "false")
    assert process.stdout is not None
    assert any(line.startswith("step 2") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("cause", "status"), [(KeyboardInterrupt(), 130), (OSError("disk"), "error: no space")])
def test_an_error_that_sigint_has_caused(cause: BaseException, status: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is interrupted fails by an error of its own."""

    def interrupted(args: object) -> None:
        try:
            raise cause
        except BaseException:
            raise ValueError("no space")  # noqa: B904 (the cause is its context)

    monkeypatch.setattr(cli, "run", interrupted)
    monkeypatch.setattr(cli, "sentence", str)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == status
