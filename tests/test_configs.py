"""Every configuration is one that the command line takes: each key exists and has a value of its type."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from remax_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = sorted(path for path in CONFIGS.rglob("*.yaml") if "overlays" not in path.parts)
OVERLAYS = sorted(CONFIGS.glob("overlays/**/*.yaml"))
EXTRAS = {"adam8bit": ("torchao", "adam8bit")}  # what an overlay needs, and the extra that installs it


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def parsed(*arguments: str) -> dict[str, Any]:
    """What ``--print_config`` says of the arguments."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        main(["fit", *arguments, "--print_config"])
    assert end.value.code in (0, None)
    return yaml.safe_load(output.getvalue())


def missing(given: Any, resolved: Any, path: str = "") -> list[str]:
    """Keys and values of a file that did not arrive; class paths may be given by their short names."""
    if isinstance(given, dict) and isinstance(resolved, dict):
        return [
            key
            for name, value in given.items()
            for key in (missing(value, resolved[name], f"{path}.{name}") if name in resolved else [f"{path}.{name}"])
        ]
    if path.endswith(".class_path"):
        return [] if str(resolved).rpartition(".")[2] == str(given).rpartition(".")[2] else [path]
    return [] if given == resolved else [f"{path}: {given!r} became {resolved!r}"]


def test_there_are_configurations() -> None:
    assert {"quickstart/sft.yaml", "quickstart/reward_model.yaml", "quickstart/remax.yaml"} <= {name(p) for p in BASES}


@pytest.mark.parametrize("path", BASES, ids=name)
def test_a_configuration_arrives_whole(path: Path) -> None:
    assert missing(yaml.safe_load(path.read_text(encoding="utf-8")), parsed("--config", str(path))) == []


STARTING = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", STARTING, ids=name)
def test_a_starting_configuration_names_no_data_and_one_seed(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not {"train", "validation", "test", "predict", "seed"} & set(config["data"]["init_args"])
    assert "seed" not in config["model"]["init_args"]
    assert f"--config configs/{path.name}" in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory where the first two stages have run, by the commands that their files give."""
    root = tmp_path_factory.mktemp("stages")
    model = tiny.save_model(root / "model")
    prompts = [f"{prompt} {letter}" for prompt in tiny.PROMPTS for letter in "abcdefg"]  # one batch of 32, and a few
    tiny.write_rows(root / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    tiny.write_rows(root / "demonstrations.jsonl", [{"prompt": prompt, "response": " c d"} for prompt in prompts])
    pairs = [{"prompt": prompt, "chosen": " c d", "rejected": " e"} for prompt in prompts]
    tiny.write_rows(root / "pairs.jsonl", pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(
            [
                "fit",
                "--config",
                f"{CONFIGS}/sft.yaml",
                "--model.policy.path",
                model,
                "--data.train",
                "demonstrations.jsonl",
            ]
        )
        main(
            [
                "fit",
                "--config",
                f"{CONFIGS}/reward_model.yaml",
                "--model.model.path",
                model,
                "--data.train",
                "pairs.jsonl",
            ]
        )
    return root


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_the_first_command_on_data_of_ones_own(stage: str, stages: Path) -> None:
    assert (stages / "runs" / stage / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["remax", "reinforce", "rloo", "ppo"])
def test_a_method_from_the_stages_before(method: str, stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stages)
    main(["fit", "--config", str(CONFIGS / f"{method}.yaml"), "--data.train", "prompts.jsonl"])
    assert (stages / "runs" / method / "hf" / "model.safetensors").exists()


def base_of(overlay: Path) -> Path:
    """A configuration that an overlay is made for: the tiny ones have the name of their stage."""
    is_tiny = overlay.parent.name == "tiny"
    return CONFIGS / (f"paper/opt_1.3b_{overlay.stem}.yaml" if is_tiny else "quickstart/remax.yaml")


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_an_overlay_arrives_whole(path: Path) -> None:
    if path.stem in EXTRAS:
        package, extra = EXTRAS[path.stem]
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[{extra}]'")
    config = parsed("--config", str(base_of(path)), "--config", str(path))
    assert missing(yaml.safe_load(path.read_text(encoding="utf-8")), config) == []


def test_a_misspelt_key_would_be_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((CONFIGS / "quickstart" / "remax.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"]["kl_coeff"] = 0.1
    path = tmp_path / "misspelt.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(path), "--print_config"])
    assert end.value.code == 2
    assert "kl_coeff" in capsys.readouterr().err
