"""The sub-command: from a configuration to a table and advice that holds."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from remax_lightning.cli import main

ARCHITECTURE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
}
PARAMETERS = 2 * 16000 * 1024 + 4 * (3 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 1024
GIB = 2**30


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    folder = str(tmp_path / "architecture")
    AutoConfig.for_model("llama", **ARCHITECTURE).save_pretrained(folder)
    return {
        "trainer": {"strategy": {"class_path": "FSDP2Strategy"}, "precision": "32-true"},
        "model": {
            "class_path": "ReMax",
            "init_args": {
                "policy": {"path": "someone/policy", "architecture": folder},
                "reward": {
                    "class_path": "ModelReward",
                    "init_args": {"path": "someone/reward", "architecture": folder, "dtype": "bfloat16"},
                },
                "sampling": {"max_new_tokens": 256},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-6}},
                "micro_batch_size": 4,
            },
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"train": "none", "batch_size": 16, "max_prompt_length": 256}},
    }


class Output:
    """What the sub-command printed."""

    def __init__(self, text: str) -> None:
        self.text = text

    def row(self, term: str) -> list[float]:
        """Figures of a row of the table, GiB."""
        line = next(line for line in self.text.splitlines() if line.startswith(f"│ {term} "))
        return [float(cell) if cell.strip() else 0.0 for cell in line.split("│")[2:-1]]

    def peaks(self) -> dict[str, float]:
        return {name: float(peak) for name, peak in re.findall(r"^(\w+): peak ([\d.]+) GiB", self.text, re.MULTILINE)}

    def micro_batch(self) -> str:
        found = re.search(r"Largest micro-batch that fits: (--\S+ \d+)", self.text)
        assert found, self.text
        return found[1]


@pytest.fixture
def plan(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str, gpus: int = 2) -> Output:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        main(["plan", "--config", str(file), "--gpus", str(gpus), *arguments])
        return Output(capsys.readouterr().out)

    return run


def test_states_stand_in_the_table(plan: Any) -> None:
    output = plan()
    mine, theirs = slice(0, 3), slice(3, 6)
    assert output.row("weights") == pytest.approx([4 * PARAMETERS / 2 / GIB] * 6, abs=0.01)
    assert output.row("optimizer") == pytest.approx([8 * PARAMETERS / 2 / GIB] * 6, abs=0.01)
    assert output.row("reference") == pytest.approx([4 * PARAMETERS / 2 / GIB] * 6, abs=0.01)
    assert output.row("reward model") == pytest.approx([2 * (PARAMETERS - 16000 * 1024) / 2 / GIB] * 6, abs=0.01)
    assert output.row("gathered weights")[0] == pytest.approx(2 * PARAMETERS / GIB, abs=0.01)
    assert output.row("gradients")[2] > 4 * PARAMETERS / GIB  # micro-batches are added up before they are split
    cache = 4 * 2 * 512 * 512 * 2 / GIB  # of a row: layers, keys and values, tokens, numbers, bytes
    assert output.row("KV cache") == pytest.approx([32 * cache, 0, 0, 16 * cache, 0, 0], abs=0.01)
    assert output.row("value model")[mine] == [0, 0, 0]
    assert output.row("value model")[theirs][0] == pytest.approx(12 * (PARAMETERS - 16000 * 1024) / 2 / GIB, abs=0.01)
    total = sum(output.row(term)[2] for term in ("weights", "gradients", "optimizer", "gathered weights", "reference"))
    total += sum(output.row(term)[2] for term in ("reward model", "activations", "head"))
    assert output.row("total")[2] == pytest.approx(total, abs=0.05)
    assert output.peaks()["PPO"] > output.peaks()["ReMax"]
    assert output.peaks()["ReMax"] == pytest.approx(max(output.row("total")[mine]), abs=0.06)


def test_memory_decides(plan: Any) -> None:
    peak = plan().peaks()["ReMax"]
    reserved = 2.0
    enough, too_little = (f"{(peak + reserved + margin) / 0.95:.2f}" for margin in (0.1, -0.1))
    assert re.search(r"ReMax: .*: fits", plan("--gpu_memory", enough).text)
    assert re.search(r"ReMax: .*: does not fit", plan("--gpu_memory", too_little).text)


def test_the_proposed_micro_batch_fits_and_twice_of_it_does_not(plan: Any, config: dict[str, Any]) -> None:
    config["model"]["init_args"]["activation_checkpointing"] = False
    arguments = ["--gpu_memory", "7"]
    name, size = plan(*arguments).micro_batch().split()
    assert 1 < int(size) < 16
    assert re.search("ReMax: .*: fits", plan(*arguments, name, size).text)
    assert re.search("ReMax: .*: does not fit", plan(*arguments, name, str(2 * int(size))).text)
    assert plan(*arguments, "--model.micro_batch_tokens", "1024").micro_batch() == (
        f"--model.micro_batch_tokens {int(size) * 512}"
    )


def test_every_proposal_fits(plan: Any) -> None:
    arguments = ["--gpu_memory", "5"]
    output = plan(*arguments)
    lines = [line for line in output.text.splitlines() if line.startswith("  --")]
    assert lines, output.text
    for line in lines:
        if "torchao" not in line:
            changed = line.partition(" (peak")[0].split()
            assert re.search("ReMax: .*: fits", plan(*arguments, *changed).text), line
    assert "nothing that plan knows" in plan("--gpu_memory", "2.2").text


@pytest.mark.parametrize(
    ("arguments", "term", "column"),
    [
        (["--model.activation_checkpointing", "true"], "activations", 2),
        (["--trainer.strategy.sync_every_micro_batch", "true"], "gradients", 2),
        (["--trainer.strategy.offload_frozen", "true"], "reference", 0),
        (["--trainer.strategy.replicas", "1", "--gpus", "4"], "weights", 0),
        (["--model.kl_coef", "0"], "reference", 1),
        (["--model.lora.rank", "8"], "optimizer", 0),
        (["--model.optimizer", "torch.optim.SGD"], "optimizer", 2),
        (["--data.batch_size", "8"], "KV cache", 0),
    ],
)
def test_a_lever_lowers_what_it_is_for(plan: Any, arguments: list[str], term: str, column: int) -> None:
    def figure(output: Output) -> float:
        return output.row(term)[column] if f"│ {term} " in output.text else 0.0

    assert figure(plan(*arguments)) < 0.7 * figure(plan())
