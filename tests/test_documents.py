"""The documents say what is there: links, tables, error messages, metrics, commands, code."""

import ast
import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

import remax_lightning
from remax_lightning import PPO, SFT, FunctionReward, PromptDataModule, ReMax, RewardModel, Sampling
from remax_lightning.callbacks import GradientVariance
from remax_lightning.cli import main
from remax_lightning.data import DemonstrationDataModule, PreferenceDataModule
from remax_lightning.rollout import Rollout

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = ("configs/remax.yaml", "configs/sft.yaml", "configs/reward_model.yaml")
PARTS = "model|data|trainer|checkpoint|self_check|response_writer|hf_export|progress_lines"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    """Fenced blocks in a language, without indentation."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for named, block in found if named == language]


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


def test_readme_fits_on_a_few_screens() -> None:
    assert len(read("README.md").splitlines()) <= 180


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", read(path)):
        file, _, anchor = target.partition("#")
        document = path.parent / file if file else path
        assert document.exists(), target
        if anchor:
            assert anchor in {slug(each) for each in re.findall(r"^#+ (.*)$", read(document), re.MULTILINE)}, target


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_guarantee_names_the_tests_that_hold_it() -> None:
    section = read("README.md").partition("## Guarantees")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "what holds" not in line]
    assert len(rows) >= 5
    for row in rows:
        tests = re.findall(r"\[`(\w+)`\]\(([^)]+)\)", row)
        assert tests, row
        for test, file in tests:
            assert f"def {test}(" in read(file), f"{file} has no {test}"


def test_every_fault_has_its_test() -> None:
    """The numbers of docs/faults.md are those of the tests that make the faults."""
    listed = {int(number) for number in re.findall(r"^\| (\d+) \|", read("docs/faults.md"), flags=re.MULTILINE)}
    assert listed == set(range(1, 63))
    tested = set()
    for path in (ROOT / "tests" / "chaos").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                tested |= set(map(int, re.findall(r"(?<=_)\d+(?=_)", node.name.partition("kill_9")[0])))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                is_fault = node.func.id in ("Fault", "reward_fault", "stopped")
                tested |= {node.args[0].value} if is_fault and isinstance(node.args[0], ast.Constant) else set()
    assert listed - tested == set()


def test_tables_are_those_of_the_results() -> None:
    update_docs = script("benchmarks/update_docs.py")
    for document, *_ in update_docs.TABLES:
        assert update_docs.with_tables(document, read(document)) == read(document), "run benchmarks/update_docs.py"


def texts_of_package() -> str:
    """All strings of the package, each in one line; of f-strings what is between the braces is left out."""
    package = Path(remax_lightning.__file__).parent
    nodes = [node for path in package.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_troubleshooting_quotes_messages_that_exist() -> None:
    texts = texts_of_package()
    headings = re.findall(r"^### `(.*)`$", read("docs/troubleshooting.md"), flags=re.MULTILINE)
    assert len(headings) > 20
    fragments = [fragment.strip() for heading in headings for fragment in heading.split("...")]
    assert [fragment for fragment in fragments if fragment not in texts] == []


# metrics

ROWS = {
    SFT: (DemonstrationDataModule, {"prompt": "ab", "response": "cd"}),
    RewardModel: (PreferenceDataModule, {"prompt": "ab", "chosen": "cd", "rejected": "ef"}),
}


def logged(module: LightningModule, data: LightningDataModule, folder: Path, **options: Any) -> set[str]:
    """Names of everything that two steps, a validation and a test log."""
    history = tiny.History()
    trainer = tiny.trainer(folder, 2, [history, *options.get("callbacks", ())], inference_mode=False)
    trainer.fit(module, datamodule=data)
    names = {each for step in history.steps for each in step} | set(trainer.callback_metrics)
    for evaluation in (trainer.validate, trainer.test):
        names |= set(evaluation(module, datamodule=data, verbose=False)[0])
    return names


def logged_by_all(policy: str, folder: Path) -> Iterator[set[str]]:
    rewards: dict[str, Any] = {
        "reward": FunctionReward("reward_functions.letter_values"),
        "judge": FunctionReward("reward_functions.letter_values"),
        "sampling": Sampling(max_new_tokens=4),
    }
    prompts = tiny.write_rows(folder / "prompts.jsonl", [{"prompt": each} for each in tiny.PROMPTS])
    for method, callbacks in ((ReMax, [GradientVariance(1, num_samples=2)]), (PPO, [])):
        data = PromptDataModule(train=prompts, validation=prompts, test=prompts, batch_size=5)
        yield logged(method(policy=policy, **rewards), data, folder, callbacks=callbacks)
    for module, (data_module, row) in {
        SFT(policy=policy): ROWS[SFT],
        RewardModel(model=policy): ROWS[RewardModel],
    }.items():
        path = tiny.write_rows(folder / f"{data_module.__name__}.jsonl", [row] * 4)
        yield logged(module, data_module(train=path, validation=path, test=path, batch_size=2), folder)


def test_every_metric_is_documented_and_logged(policy: str, tmp_path: Path) -> None:
    table_rows = [line for line in read("docs/metrics.md").splitlines() if line.startswith("| `")]
    documented = {each for row in table_rows for each in re.findall(r"`(\w+/\w+)`", row.split("|")[1])}
    assert set().union(*logged_by_all(policy, tmp_path)) == documented


# commands


def commands() -> list[str]:
    """Every command of cli.py in a document, less what continues on the next line."""
    found: dict[str, None] = {}
    for path in DOCUMENTS:
        text = read(path).replace("\\\n", " ")
        for command in re.findall(r"cli\.py ((?:fit|validate|test|predict|export|plan) --[^\"`\n]*)", text):
            found[command.partition("  #")[0].strip()] = None
    return list(found)


def arguments() -> list[str]:
    """Every line or span of arguments that is to be added to a command."""
    found: dict[str, None] = {}
    for path in DOCUMENTS:
        text = read(path)
        spans = re.findall(r"`(--[^`\n]+ [^`\n]+)`", text)
        lines = [line for block in blocks(text) for line in block.splitlines() if line.startswith("--")]
        found |= dict.fromkeys(each for each in [*spans, *lines] if re.match(rf"--(?:{PARTS})\b", each))
    return list(found)


def parses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    return end.value.code in (0, None)


def test_commands_and_arguments_are_found() -> None:
    assert len(commands()) > 15
    assert len(arguments()) > 15


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_commands_parse(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "my_methods.py").write_text(contributed_code())
    monkeypatch.syspath_prepend(tmp_path)
    if ".help " in command:
        with pytest.raises(SystemExit) as end:
            main(shlex.split(command))
        assert end.value.code in (0, None)
    elif command.startswith(("plan", "export")):
        assert command.split()[1] == "--config", command  # they have no --print_config
    else:
        assert parses(shlex.split(command), capsys), capsys.readouterr().err[-1000:]


@pytest.mark.slow
@pytest.mark.parametrize("given", arguments())
def test_arguments_parse(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "my_rewards.py").write_text("\n".join(blocks(read("docs/rewards.md"), "python")))
    monkeypatch.syspath_prepend(tmp_path)
    if "torchao" in given:
        pytest.importorskip("torchao")
    words = ["1" if word == "N" else word for word in shlex.split(given)]
    stage = "predict" if "response_writer" in given else "fit"
    assert any(parses([stage, "--config", config, *words], capsys) for config in CONFIGS), capsys.readouterr().err[
        -1000:
    ]


# code


def contributed_code() -> str:
    (block,) = blocks(read("CONTRIBUTING.md"), "python")
    return block


def grpo() -> type[Any]:
    names: dict[str, Any] = {"__name__": "my_methods"}
    exec(contributed_code(), names)
    return names["GRPO"]


def test_the_method_of_contributing_trains(policy: str, tmp_path: Path) -> None:
    module = grpo()(
        policy=policy, reward=FunctionReward("reward_functions.letter_values"), sampling=Sampling(8, num_samples=4)
    )
    data = tiny.prompt_data(tmp_path)
    module.configure_model()
    before = tiny.weights(module.policy)
    history = tiny.fit(module, data, tmp_path, steps=2)
    assert history["train/steps_skipped"] == [0.0, 0.0]
    assert history["train/grad_norm"][0] > 0
    assert not tiny.are_equal(before, tiny.weights(module.policy))


def test_its_advantages_are_normalized_over_each_prompt(policy: str) -> None:
    module = grpo()(
        policy=policy,
        reward=FunctionReward("reward_functions.letter_values"),
        sampling=Sampling(4, num_samples=3),
        kl_coef=0.0,
    )
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True], [False, False], [True, False]])
    zeros = torch.zeros(6, 2)
    rollout = Rollout(
        prompt_ids=torch.ones(6, 1, dtype=torch.long),
        prompt_mask=torch.ones(6, 1, dtype=torch.bool),
        response_ids=torch.ones(6, 2, dtype=torch.long),
        response_mask=mask,
        truncated=torch.zeros(6, dtype=torch.bool),
        log_probs=zeros,
        rewards=torch.tensor([1.0, 2.0, 6.0, 1.0, 0.0, 3.0]),  # the fifth row has no reward
        baselines=torch.tensor([3.0, 3.0, 3.0, 2.0, 0.0, 2.0]),
        ref_log_probs=None,
    )
    advantages = module.advantages(rollout)
    first, second = advantages[:, 0].view(2, 3)
    torch.testing.assert_close(first.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(first.std(correction=0), torch.tensor(1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(second, torch.tensor([-1.0, 0.0, 1.0]), atol=1e-3, rtol=0)
    assert bool((advantages[~mask] == 0).all())


def test_the_rewards_of_the_documents_score(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "my_rewards"}
    for block in blocks(read("docs/rewards.md"), "python"):
        exec(block, names)
    assert names["exact_match"](prompts=["a"] * 2, responses=["so 5", "so 6"], answer=["5", "5"]) == [1.0, 0.0]
    plain, reward = (
        names[each](tiny.save_reward_model(tmp_path / each)) for each in ("ModelReward", "HelpfulAndShort")
    )
    for each in (plain, reward):
        each.setup(torch.device("cpu"))
    prompts, responses = ["ab", "ab"], ["c", "c d e"]
    expected = plain(prompts, responses) - torch.tensor([0.01, 0.03])
    torch.testing.assert_close(reward(prompts, responses), expected)


def test_readme_code_runs(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks(read("README.md"), "python")
    assert len(block.splitlines()) <= 16
    code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", policy).replace("max_steps=100", "max_steps=2")
    code = code.replace(", as_chat=True", "").replace('"What is {a} + {b}?"', '"ab"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "__init__", _quiet(Trainer.__init__))
    exec(code, {"__name__": "readme"})
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def _quiet(init: Any) -> Any:
    def quiet(self: Trainer, **options: Any) -> None:
        init(self, **options, accelerator="cpu", devices=1, enable_progress_bar=False, logger=False)

    return quiet
