"""The default optimizers, those from a YAML file, in 8 bits too, and the course of the learning rate."""

import contextlib
import io
import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from processes import ROOT, run_python
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW

from remax_lightning.callbacks import Checkpoint
from remax_lightning.cli import main
from remax_lightning.data import DemonstrationDataModule
from remax_lightning.modules import SFT
from remax_lightning.modules.optimizers import adamw, can_be_fused

STEPS, LR = 4, 1e-2
SECONDS = 120
EIGHT_BIT = {
    "torchao": ("torchao.optim.AdamW8bit", "pip install -e '.[adam8bit]'"),
    "bitsandbytes": ("bitsandbytes.optim.AdamW8bit", "pip install -e '.[quantization]'"),
}


SCHEDULES = [("linear", 0.0), ("cosine", 0.0), ("cosine", 0.5), ("constant", 0.9)]


@pytest.fixture
def library(request: pytest.FixtureRequest) -> str:
    """A library of 8-bit optimizers, if it is there; the import says why, if it fails for another reason."""
    name: str = request.param
    pytest.importorskip(name, reason=f"{name} is not installed: {EIGHT_BIT[name][1]}", exc_type=ModuleNotFoundError)
    return EIGHT_BIT[name][0]


def config(folder: Path, optimizer: dict[str, Any] | None, **options: Any) -> Path:
    """The YAML file of a fit that saves after every step, of a model with matrices of 4096 and more parameters."""
    policy = tiny.save_model(folder / "policy", hidden_size=64, intermediate_size=64)
    rows = [{"prompt": "ab" * n, "response": " c" * (9 - n)} for n in range(1, 9)]
    given = {} if optimizer is None else {"optimizer": optimizer}
    values = {
        "model": {"class_path": "SFT", "init_args": {"policy": {"path": policy}, **given, **options}},
        "data": {
            "class_path": "DemonstrationDataModule",
            "init_args": {"train": tiny.write_rows(folder / "rows.jsonl", rows), "batch_size": 2},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "checkpoint": {"every_n_train_steps": 1, "save_top_k": -1},
        "hf_export": {"enabled": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(root: Path) -> pandas.DataFrame:
    return pandas.read_csv(root / "logs" / "version_0" / "metrics.csv")


def printed(*arguments: str) -> dict[str, Any]:
    """What ``--print_config`` says of the arguments of a fit."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(output.getvalue())


def plain(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nested state by its full name; 8-bit tensors of torchao as the plain ones they consist of."""
    if hasattr(value, "codes"):
        value = {"codes": value.codes, "scale": value.scale, "qmap": value.qmap}
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from plain(inner, f"{name}.{key}")
    else:
        yield name, value


def assert_bitwise(one: Any, other: Any) -> None:
    first, second = dict(plain(one)), dict(plain(other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        is_equal = torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        assert is_equal, name


def test_on_a_cpu_it_is_torch_adamw() -> None:
    ends = []
    for build in (
        lambda groups: adamw(groups, lr=LR, weight_decay=0.1),
        lambda groups: AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=0.1),
    ):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = build([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}])
        for _ in range(3):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
        ends.append({"weights": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert_bitwise(*ends)


def test_it_is_fused_only_on_a_gpu() -> None:
    with FakeTensorMode():
        gpu, cpu = (nn.Parameter(torch.empty(2, 3, device=device)) for device in ("cuda", "cpu"))
        number = torch.empty(2, dtype=torch.long, device="cuda")
        on_gpu = adamw(iter([{"params": [gpu]}, {"params": [], "weight_decay": 0.0}]), lr=LR, weight_decay=0.1)
        assert on_gpu.defaults["fused"] is True
        assert [group["weight_decay"] for group in on_gpu.param_groups] == [0.1, 0.0]
        assert adamw([gpu, cpu], lr=LR, weight_decay=0.1).defaults["fused"] is None
        assert adamw([cpu], lr=LR, weight_decay=0.1).defaults["fused"] is None
        assert not can_be_fused([{"params": [gpu, number]}])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fused_step_is_the_plain_step() -> None:
    weights = []
    for build in (lambda p: adamw(p, lr=LR, weight_decay=0.1), lambda p: AdamW(p, LR, (0.9, 0.95), weight_decay=0.1)):
        torch.manual_seed(0)
        model = nn.Linear(64, 64).cuda()
        optimizer = build(list(model.parameters()))
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 64).cuda()).square().sum().backward()
            optimizer.step()
        weights.append(tiny.weights(model))
    tiny.assert_close(*weights)


@pytest.mark.parametrize(
    ("method", "source", "lr", "weight_decay"),
    [("SFT", "policy", 1e-5, 0.0), ("RewardModel", "model", 1e-5, 0.1), ("ReMax", "policy", 1e-6, 0.1)],
)
def test_the_default_can_be_printed_and_read_again(
    method: str, source: str, lr: float, weight_decay: float, tmp_path: Path
) -> None:
    model: dict[str, Any] = {source: {"path": "somewhere"}}
    if method == "ReMax":
        model["reward"] = {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": method, "init_args": model}}))
    first = printed("--config", str(path))
    default = first["model"]["init_args"]["optimizer"]
    path.write_text(yaml.safe_dump(first))
    assert printed("--config", str(path)) == first

    module, _, name = default.rpartition(".")
    assert module == "remax_lightning.modules.optimizers"
    optimizer = getattr(__import__(module, fromlist=[name]), name)([nn.Parameter(torch.ones(2))])
    assert type(optimizer) is AdamW
    settings = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": weight_decay}
    assert {name: optimizer.defaults[name] for name in settings} == settings


def test_the_saved_configuration_of_a_run_runs(tmp_path: Path) -> None:
    main(["fit", "--config", str(config(tmp_path, None)), "--trainer.default_root_dir", str(tmp_path / "one")])
    saved = tmp_path / "one" / "logs" / "version_0" / "config.yaml"
    main(["fit", "--config", str(saved), "--trainer.default_root_dir", str(tmp_path / "two")])
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert list(one["train/loss"]) == list(two["train/loss"])


@pytest.mark.parametrize(
    ("schedule", "warmup_fraction", "expected"),
    [
        ("constant", 0.5, [0.0, 0.5, 1.0, 1.0]),
        ("linear", 0.25, [0.0, 1.0, 2 / 3, 1 / 3]),
        ("cosine", 0.0, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_a_schedule_from_yaml(schedule: str, warmup_fraction: float, expected: list[float], tmp_path: Path) -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": LR}}
    path = config(tmp_path, optimizer, lr_schedule=schedule, warmup_fraction=warmup_fraction)
    main(["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path / "run")])
    assert list(metrics(tmp_path / "run")["train/learning_rate"]) == pytest.approx([LR * part for part in expected])


@pytest.mark.parametrize(("schedule", "warmup_fraction"), SCHEDULES)
@pytest.mark.parametrize("then", [3, 8, 20])
def test_a_run_that_goes_on_with_another_number_of_steps(
    schedule: Any, warmup_fraction: float, then: int, tmp_path: Path
) -> None:
    """The rate is that of a run which had this number from the start, from the first step on."""

    def rates(steps: int, until: int, ckpt_path: str | None = None) -> list[float]:
        module = SFT(policy=tiny.save_model(tmp_path / "policy"), lr_schedule=schedule, warmup_fraction=warmup_fraction)
        rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab", "response": " c"}] * 2)
        history = tiny.History()
        saver = Checkpoint(str(tmp_path / str(steps)))
        trainer = tiny.trainer(tmp_path, steps, [history, Until(until), saver], enable_checkpointing=True)
        trainer.fit(module, datamodule=DemonstrationDataModule(train=rows, batch_size=2), ckpt_path=ckpt_path)
        return history["train/learning_rate"]

    whole = rates(then, then)
    assert rates(8, 2) == pytest.approx(rates(8, 8)[:2])
    path = str(tmp_path / "8" / "step=2.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert rates(then, then, path) == pytest.approx(whole[2:])
    told = [str(warning.message) for warning in caught if "learning rate" in str(warning.message)]
    if then == 8:
        assert told == []
    else:
        (message,) = told
        assert f"the learning rate of step 2 is {whole[2]:.4g}, where the checkpoint has" in message
        assert f"({then} steps; before: 8)" in message


class Until(Callback):
    """Ends a run in its midst."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize("library", EIGHT_BIT, indirect=True)
def test_eight_bits(library: str, tmp_path: Path) -> None:
    settings = {"lr": LR, "betas": [0.9, 0.95], "weight_decay": 0.1}
    path = config(tmp_path, {"class_path": library, "init_args": settings}, lr_schedule="linear", warmup_fraction=0.5)
    fit = [str(ROOT / "cli.py"), "fit", "--config", str(path), "--trainer.default_root_dir"]
    run_python([*fit, str(tmp_path / "whole")], SECONDS)
    saved = tmp_path / "whole" / "checkpoints"
    resumed = tmp_path / "resumed" / "checkpoints"
    resumed.mkdir(parents=True)
    for name in ("step=2.ckpt", "step=2.ckpt.json"):
        shutil.copy(saved / name, resumed / name)
    run_python([*fit, str(tmp_path / "resumed"), "--ckpt_path", "last"], SECONDS)  # a process that knows only the YAML

    before, whole, part = (
        torch.load(folder / name, weights_only=True)
        for folder, name in ((saved, "step=2.ckpt"), (saved, "step=4.ckpt"), (resumed, "step=4.ckpt"))
    )
    for part_of_state in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_bitwise(part[part_of_state], whole[part_of_state])
    moved = tiny.difference(before["state_dict"], whole["state_dict"])
    assert tiny.norm(moved) > LR
    (state,) = whole["optimizer_states"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    values = [value for _, value in plain(state["state"]) if isinstance(value, Tensor)]
    assert sum(value.numel() for value in values if value.dtype == torch.uint8) >= 2 * 64 * 64

    table = metrics(tmp_path / "whole")
    assert list(table["train/learning_rate"]) == pytest.approx([0.0, LR / 2, LR, LR / 2])
    assert table["train/loss"].iloc[-1] < table["train/loss"].iloc[0]
