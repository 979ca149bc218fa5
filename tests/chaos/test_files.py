"""Files that are damaged, changed or hostile: checkpoints, models, data, configurations.

The numbers are those of the list in docs/faults.md.
"""

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from chaos.runs import Outcome, World, injected, rewarded
from safetensors.torch import load_file, save_file

from remax_lightning.checkpoints.manifest import manifest_path

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

EVERY_STEP = {"checkpoint.every_n_train_steps": 1}
LAST = ("--ckpt_path", "last")
CANARY = "pwned"
COMMAND = f"touch {CANARY}"


class Bomb:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (COMMAND,)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def clean(world: World) -> dict[str, torch.Tensor]:
    outcome = world.run("clean", EVERY_STEP)
    assert outcome.exit == 0, outcome.output
    return outcome.weights()


@pytest.fixture(scope="module")
def half(world: World) -> Path:
    """The folder of a run that was killed after six steps."""
    outcome = world.run("half", {**injected(at="batch_end", action="sigkill", batch=6), **EVERY_STEP})
    assert outcome.exit == -9
    assert outcome.saved[0] == ("step=6.ckpt", 6)
    return outcome.folder


@pytest.fixture
def copied(world: World, half: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of it with a name of its own."""
    name = "".join(character if character.isalnum() else "_" for character in request.node.name)
    folder = world.folder / name
    shutil.copytree(half, folder)
    for log in folder.glob("log*.txt"):
        log.unlink()
    return folder


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "step=6.ckpt"


def resume(world: World, folder: Path, changes: dict[str, Any] | None = None, *arguments: str) -> Outcome:
    return world.run(folder.name, {**EVERY_STEP, **(changes or {})}, *(arguments or LAST))


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(bytes(content))


def change_digest(path: Path) -> None:
    manifest = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps({**manifest, "sha256": "0" * 64}))


# checkpoints


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.write_bytes(b""), change_digest])
def test_36_the_newest_is_damaged(
    damage: Callable[[Path], None], world: World, copied: Path, clean: dict[str, torch.Tensor]
) -> None:
    damage(newest(copied))
    outcome = resume(world, copied)
    assert outcome.exit == 0, outcome.output
    assert "step=6.ckpt is skipped" in outcome.output
    assert tiny.are_equal(outcome.weights(), clean)


def test_37_the_newest_has_no_manifest(world: World, copied: Path, clean: dict[str, torch.Tensor]) -> None:
    manifest_path(newest(copied)).unlink()
    outcome = resume(world, copied)
    assert outcome.exit == 0, outcome.output
    assert "step=6.ckpt" in outcome.output
    assert "manifest" in outcome.output
    assert tiny.are_equal(outcome.weights(), clean)


def test_38_all_are_damaged(world: World, copied: Path) -> None:
    for path in (copied / "checkpoints").glob("*.ckpt"):
        truncate(path)
    outcome = resume(world, copied)
    assert outcome.exit == 1
    assert "has no complete checkpoint" in outcome.output


@pytest.mark.parametrize("command", ["fit", "validate", "export"])
@pytest.mark.parametrize("form", ["pickle", "torch", "nested"])
def test_39_a_pickle_that_runs_a_command(command: str, form: str, world: World) -> None:
    name = f"bomb_{command}_{form}"
    path = world.folder / f"{name}.ckpt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(Bomb() if form == "torch" else {"state_dict": {"w": Bomb()}, "global_step": 1}, path)
    arguments = ["--ckpt_path", str(path)] + (["--output_dir", "out"] if command == "export" else [])
    outcome = world.run(name, {}, *arguments, command=command)
    assert outcome.exit == 1, outcome.output
    assert "cannot be read as tensors and plain types" in outcome.output
    assert not (outcome.folder / CANARY).exists()


@pytest.mark.parametrize("command", ["fit", "validate", "export"])
def test_40_a_folder_whose_description_runs_a_command(command: str, world: World) -> None:
    name = f"folder_{command}"
    path = world.folder / f"{name}.ckpt"
    path.mkdir()
    # what pickle.dumps would not write: a dotted name of an admitted module
    dotted = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x94\x8c\x09os.system\x94\x93\x94"
    call = b"\x8c" + bytes([len(COMMAND)]) + COMMAND.encode() + b"\x94\x85\x94R\x94."
    (path / ".metadata").write_bytes(dotted + call)
    torch.save({"optimizers": [], "global_step": 1}, path / "rest.pt")
    arguments = ["--ckpt_path", str(path)] + (["--output_dir", "out"] if command == "export" else [])
    outcome = world.run(name, {}, *arguments, command=command)
    assert outcome.exit == 1, outcome.output
    assert not (outcome.folder / CANARY).exists()


def test_45_the_data_have_changed(world: World, copied: Path) -> None:
    rows = tiny.read_rows(world.prompts)
    other = tiny.write_rows(world.folder / "reversed.jsonl", rows[::-1])
    outcome = resume(world, copied, {"data.train": other})
    assert outcome.exit == 0, outcome.output
    assert "the rows of data.train are not those from before the checkpoint" in outcome.output


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.kl_coef", 0.1, "kl_coef: 0.05 -> 0.1"),
        ("model.sampling", {"max_new_tokens": 8, "temperature": 0.9}, "temperature"),
        ("data.batch_size", 2, "batch_size: 4 -> 2"),
        ("seed_everything", 2, "seed_everything: 1 -> 2"),
        ("trainer.precision", "bf16-mixed", "precision"),
    ],
)
def test_46_a_setting_has_changed(name: str, value: object, says: str, world: World, copied: Path) -> None:
    outcome = resume(world, copied, {name: value})
    assert outcome.exit == 0, outcome.output
    assert says in outcome.output


def test_47_the_base_of_lora_has_changed(world: World) -> None:
    base = tiny.save_model(world.folder / "base")
    changes = {**EVERY_STEP, "model.policy": {"path": base}, "model.lora": {"rank": 4}}
    killed = world.run("lora", {**changes, **injected(at="batch_end", action="sigkill", batch=4)})
    assert killed.exit == -9, killed.output
    tiny.save_model(world.folder / "base", seed=3)
    resumed = world.run("lora", changes, *LAST)
    assert resumed.exit == 1, resumed.output
    assert "lm_head.weight among them" in resumed.output
    exported = world.run("lora", changes, *LAST, "--output_dir", "out", command="export")
    assert exported.exit == 1, exported.output
    assert not (exported.folder / "out").exists()


def test_49_the_clock_of_another_host_is_behind(world: World, copied: Path) -> None:
    outcome = resume(world, copied, injected(at="start", action="clock_back"))
    assert outcome.exit == 0, outcome.output
    assert [step for _, step in outcome.saved[:2]] == [8, 7]


def test_56_more_steps_on_resume(world: World, copied: Path) -> None:
    outcome = resume(world, copied, {"trainer.max_steps": 12})
    assert outcome.exit == 0, outcome.output
    assert outcome.steps == 12
    schedule = {**EVERY_STEP, "model.lr_schedule": "cosine"}
    assert world.run("cosine", schedule).exit == 0
    longer = world.run("cosine", {**schedule, "trainer.max_steps": 12}, *LAST)
    assert "max_steps" in longer.output


# models


def changed(world: World, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A copy of the policy with other weights."""
    folder = world.folder / name
    shutil.copytree(world.policy, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def fill_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def reshape(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("change", "says"), [(fill_nan, "not finite|nan"), (drop, "up_proj.weight"), (reshape, "up_proj.weight")]
)
def test_41_weights_of_a_policy(change: Any, says: str, world: World) -> None:
    path = changed(world, f"policy_{change.__name__}", change)
    outcome = world.run(f"with_{change.__name__}", {"model.policy": {"path": path}})
    assert outcome.exit == 1, outcome.output
    assert any(each in outcome.output for each in says.split("|"))
    assert outcome.steps == 0


def test_41_a_truncated_file(world: World) -> None:
    shutil.copytree(world.policy, world.folder / "cut")
    truncate(world.folder / "cut" / "model.safetensors")
    outcome = world.run("with_cut", {"model.policy": {"path": str(world.folder / "cut")}})
    assert outcome.exit == 1, outcome.output
    assert outcome.output.strip().splitlines()[-1].startswith(f"error: the weights in {world.folder / 'cut'} cannot be")


def test_41_a_reward_model_as_policy(world: World) -> None:
    path = tiny.save_reward_model(world.folder / "reward_model")
    outcome = world.run("reward_model_as_policy", {"model.policy": {"path": path}})
    assert outcome.exit == 1, outcome.output
    assert "lm_head" in outcome.output


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_41_a_broken_file(file: str, world: World) -> None:
    folder = world.folder / f"broken_{file}"
    shutil.copytree(world.policy, folder)
    truncate(folder / file)
    outcome = world.run(f"with_broken_{file}".replace(".", "_"), {"model.policy": {"path": str(folder)}})
    assert outcome.exit not in (0, None)
    last = outcome.output.strip().splitlines()[-1]
    assert "error: " in last
    assert str(folder) in last
    assert "Namespace(" not in outcome.output


def test_42_another_tokenizer_on_resume(world: World, copied: Path) -> None:
    folder = world.folder / "swapped"
    shutil.copytree(world.policy, folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    outcome = resume(world, copied, {"model.policy": {"path": world.policy, "tokenizer": str(folder)}})
    assert outcome.exit == 1, outcome.output
    assert "tokenizer" in outcome.output


@pytest.mark.parametrize("way", ["auto_map", "trust_remote_code"])
def test_58_code_in_a_model_folder(way: str, world: World) -> None:
    folder = world.folder / f"code_{way}"
    shutil.copytree(world.policy, folder)
    (folder / "code.py").write_text(f"import os\nos.system({COMMAND!r})\nclass Model: pass\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"}}
    config |= {"trust_remote_code": True} if way == "trust_remote_code" else {}
    (folder / "config.json").write_text(json.dumps(config))
    outcome = world.run(f"with_code_{way}", {"model.policy": {"path": str(folder)}, "trainer.max_steps": 1})
    assert outcome.exit in (0, 1, 2), outcome.output
    assert not (outcome.folder / CANARY).exists()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|template"),
        ("{{ messages.__init__.__globals__ }}", "template"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "template"),
        ("{{ 'x' * 10**10 }}", "template"),
    ],
)
def test_57_a_chat_template(template: str, says: str, world: World, request: pytest.FixtureRequest) -> None:
    rows = [{"prompt": [{"role": "user", "content": "Go"}]}] * 8
    changes = {
        "model.policy": {"path": world.policy, "chat_template": template},
        "data.train": tiny.write_rows(world.folder / "messages.jsonl", rows),
        "data.validation": None,
        "data.test": None,
        "trainer.max_steps": 1,
    }
    name = f"template_{abs(hash(template))}"
    outcome = world.run(name, changes)
    assert outcome.exit in (1, 2), outcome.output
    assert any(each in outcome.output for each in says.split("|"))


# data

DATA: dict[str, tuple[bytes, int, str]] = {
    "corrupt_line": (b'{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}\n', 1, "line 2|Line 2|bad.jsonl"),
    "cut_line": (b'{"prompt": "a"}\n{"prompt": "b', 1, "bad.jsonl"),
    "utf_16": ('{"prompt": "a"}\n'.encode("utf-16"), 1, "bad.jsonl"),
    "nul": (b'{"prompt": "a\x00"}\n' * 8, 1, "bad.jsonl"),
    "bom_and_crlf": (b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n' * 8, 0, ""),
    "empty_prompts": (b'{"prompt": null}\n{"prompt": ""}\n' + b'{"prompt": "a"}\n' * 8, 0, "dropped|skip|without"),
    "surrogate": (b'{"prompt": "\\ud83d"}\n' + b'{"prompt": "a"}\n' * 8, 0, "surrogate|dropped"),
    "odd_line_ends": ('{"prompt": "a\u2028b\u0085c"}\n'.encode() * 8, 0, ""),
    "nested": (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", 1, "bad.jsonl"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.xfail(name == "nested", strict=True, reason="the datasets library ends the process")
        )
        for name in DATA
    ],
)
def test_43_and_44_a_file_of_rows(name: str, world: World) -> None:
    content, exit, says = DATA[name]
    folder = world.folder / f"data_{name}"
    folder.mkdir()
    path = folder / "bad.jsonl"
    path.write_bytes(content)
    changes = {"data.train": str(path), "data.batch_size": 2, "data.validation": None, "trainer.max_steps": 2}
    outcome = world.run(f"read_{name}", changes)
    assert outcome.exit == exit, outcome.output
    assert any(each in outcome.output for each in says.split("|")), outcome.output


@pytest.mark.parametrize("damage", [truncate, flip])
def test_43_and_44_a_compressed_file(damage: Callable[[Path], None], world: World) -> None:
    path = world.folder / f"{damage.__name__}.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"prompt": "number %d"}\n' % number for number in range(500))))
    damage(path)
    outcome = world.run(f"gz_{damage.__name__}", {"data.train": str(path), "trainer.max_steps": 1})
    assert outcome.exit == 1, outcome.output
    assert path.name in outcome.output.strip().splitlines()[-1]


# configurations

CALLABLES = ["os.system", "subprocess.run", "subprocess.Popen", "runpy.run_path", "builtins.exec", "builtins.eval"]


@pytest.mark.parametrize(
    "slot", ["model.policy.config", "model.optimizer", "model.reward", "model.engine", "trainer.logger"]
)
@pytest.mark.parametrize("callable", CALLABLES)
def test_59_a_class_path(slot: str, callable: str, world: World) -> None:
    name = f"{slot}_{callable}".replace(".", "_")
    script = world.folder / "script.py"
    script.write_text(f"import os; os.system({COMMAND!r})")
    argument = {
        "os.system": {"command": COMMAND},
        "subprocess.run": {"args": ["touch", CANARY]},
        "subprocess.Popen": {"args": ["touch", CANARY]},
        "runpy.run_path": {"path_name": str(script)},
    }.get(callable, {"source": script.read_text()})
    value: Any = {"class_path": callable, "init_args": argument}
    changes = {slot: value}
    if slot == "model.policy.config":
        changes = {"model.policy": {"config": {"model_type": "llama", "x": value}, "tokenizer": world.policy}}
    outcome = world.run(name, changes)
    assert outcome.exit in (1, 2), outcome.output
    assert not (outcome.folder / CANARY).exists()


def test_59_a_tag(world: World) -> None:
    (world.folder / "tag").mkdir()
    path = world.folder / "tag" / "tag.yaml"
    path.write_text(f"seed_everything: !!python/object/apply:os.system ['{COMMAND}']\n")
    outcome = world.run("tag", {}, "--config", str(path))
    assert outcome.exit == 2, outcome.output
    assert not (outcome.folder / CANARY).exists()


@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "subprocess.getoutput"])
def test_60_a_reward_that_is_no_reward(function: str, world: World) -> None:
    reward = {"class_path": "FunctionReward", "init_args": {"function": function}}
    outcome = world.run(f"reward_{function}".replace(".", "_"), {"model.reward": reward})
    assert outcome.exit in (1, 2), outcome.output
    assert "error: " in outcome.output.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ckpt_path", "http://localhost:9/x.ckpt"),
        ("--ckpt_path", "s3://bucket/x.ckpt"),
        ("--config", "http://localhost:9/x.yaml"),
        ("--config", "file:///etc/hostname"),
    ],
)
def test_61_an_address(arguments: tuple[str, ...], world: World) -> None:
    outcome = world.run(f"address_{abs(hash(arguments))}", {}, *arguments)
    assert outcome.exit in (1, 2), outcome.output
    assert arguments[1] in outcome.output.strip().splitlines()[-1]


def test_62_a_token_is_in_no_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (process,) = world.start("token", {"trainer.max_steps": 1}, environment={"HF_TOKEN": "hf_do_not_write_me"})
    outcome = world.finish("token", [process])
    assert outcome.exit == 0, outcome.output
    for path in outcome.folder.rglob("*"):
        assert path.is_dir() or b"hf_do_not_write_me" not in path.read_bytes(), path


def test_54_responses_that_cannot_end(world: World) -> None:
    outcome = world.run("no_end", {**rewarded("equal"), "trainer.max_steps": 1})
    assert outcome.exit == 1, outcome.output


def test_35_a_full_disk_at_the_export(world: World, clean: dict[str, torch.Tensor]) -> None:
    name = "full_export"
    assert world.run(name, EVERY_STEP).exit == 0
    outcome = world.run(
        name, {**EVERY_STEP, **injected(at="export", action="full_disk"), "trainer.max_steps": 9}, *LAST
    )
    assert outcome.exit == 1, outcome.output
    assert tiny.are_equal(outcome.weights(), clean)
