"""Every option that the documents name is run once by the command line, with ReMax.

The options are read from the documents, and as many as go together are run together. A new one that needs a value, or
that cannot run here, makes a test fail until it is in SAMPLES or in NOT_RUN.
"""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from test_documents import DOCUMENTS, ROOT, arguments, blocks, commands, read

from remax_lightning.cli import main

Options = dict[str, str]
STAGES = ("fit", "validate", "test", "predict")
ANY = ""  # of an option that is named without a value

NOT_RUN = {
    "trainer.devices": "several processes: tests/distributed",
    "trainer.num_nodes": "several machines",
    "trainer.strategy=fsdp2": "several processes: tests/distributed",
    "trainer.plugins": "a cluster",
    "checkpoint.async_save": "fsdp2: tests/distributed",
    "trainer.logger=WandbLogger": "wandb is not installed",
    "trainer.logger=TensorBoardLogger": "tensorboard is not installed",
    "model.optimizer=torchao.optim.AdamW8bit": "torchao is not installed: tests/modules/test_optimizers.py",
    "model.policy.quantization": "bitsandbytes is not installed: tests/models/test_lora.py",
    "model.engine.compile": "needs a C++ compiler: tests/rollout/test_transformers_engine.py",
    "data.chosen_column": "preferences: tests/data",
    "data.rejected_column": "preferences: tests/data",
    "model.model.path": "a reward model: tests/test_configs.py",
    "model": "a class of the reader's own: tests/test_documents.py",
    "trainer.accumulate_grad_batches": "refused: tests/test_cli_errors.py",
    "trainer.gradient_clip_val": "refused: tests/test_cli_errors.py",
}
"""Options, or some of their values, that are not run here, and why."""

SAMPLES = {
    "data.train": ["prompts.jsonl"],
    "data.validation": ["held_out.jsonl"],
    "data.test": ["prompts.jsonl"],
    "data.predict": ["prompts.jsonl"],
    "data.batch_size": ["1"],
    "data.seed": ["3"],
    "data.limit": ["4"],
    "data.weights": ["[2]"],
    "data.shuffle_window": ["3"],
    "data.skip_bad_rows": ["1"],
    "data.prompt_column": ["prompt"],
    "data.max_prompt_length": ["64"],
    "data.long_prompts": ["drop", "truncate", "keep_start"],
    "data.validation_fraction": ["0.5"],
    "model.policy.path": ["policy"],
    "model.policy.dtype": ["float32"],
    "model.policy.chat_template": ["template.jinja"],
    "model.reference": ["policy"],
    "model.reward.path": ["reward"],
    "model.reward.batch_size": ["2"],
    "model.reward.max_length": ["64"],
    "model.reward.chat_template": ["template.jinja"],
    "model.reward.function": ["reward_functions.letter_values"],
    "model.judge": ["FunctionReward"],
    "model.judge.function": ["reward_functions.halves"],
    "model.sampling.max_new_tokens": ["5"],
    "model.sampling.num_samples": ["2"],
    "model.sampling.temperature": ["0.9"],
    "model.sampling.top_p": ["0.9"],
    "model.sampling.top_k": ["5"],
    "model.seed": ["3"],
    "model.optimizer.lr": ["1e-3"],
    "model.max_grad_norm": ["0.5"],
    "model.micro_batch_size": ["1"],
    "model.micro_batch_tokens": ["32"],
    "model.missing_stop_penalty": ["0.1"],
    "model.lora.target_modules": ["[q_proj]"],
    "checkpoint.mode": ["min"],
    "checkpoint.save_top_k": ["2"],
    "checkpoint.every_n_train_steps": ["1"],
    "self_check.max_new_tokens": ["3"],
    "progress_lines.every_n_steps": ["1"],
    "progress_lines.every_n_seconds": ["5"],
    "response_writer.path": ["rows.json"],
    "seed_everything": ["3"],
    "trainer.max_steps": ["1"],
    "trainer.max_epochs": ["1"],
    "trainer.default_root_dir": ["elsewhere"],
}
"""Values of options that are named without one, or with a file or a model of the reader's, or N."""

CLASSES = {
    "model.reward.function": {"model.reward": "FunctionReward"},
    "model.reward.penalty": {"model.reward.path": "reward"},
    "model.reward.label": {"model.reward": "ModelReward", "model.reward.path": "two_labels"},
    "model.reward.": {"model.reward": "ModelReward", "model.reward.path": "reward"},
    "model.judge.": {"model.judge": "FunctionReward", "model.judge.function": "reward_functions.halves"},
    "model.engine.": {"model.engine": "TransformersEngine"},
    "model.kl.in_loss": {"model.kl.estimator": "k2"},
    "model.lora.": {"model.lora.rank": "2"},
    "data.validation_fraction": {"data.validation": "null"},
    "checkpoint.mode": {"checkpoint.monitor": "val/reward"},
    "data.shuffle_window": {"data.streaming": "true"},
}
"""What an option, or all below a dot, needs beside it; the first that fits counts."""

APART = (
    {"data.streaming", "data.weights"},
    {"data.streaming", "data.validation_fraction"},
    {"data.validation=null", "checkpoint.monitor"},
    {"self_check.enabled=false", "self_check.skip"},
    {"self_check.enabled=false", "data.streaming"},
    {"self_check.enabled=false", "model.lora.rank"},
)


def is_placeholder(value: str) -> bool:
    """Whether a documented value is a thing of the reader's: a file, a model, a function, a number N."""
    return value in ("N", "MODEL") or re.search(r"\.(jsonl?|jinja)\b|^runs/|^my_", value) is not None


# what the documents name


def documented_lines() -> Iterator[tuple[str, Options]]:
    """A sub-command and options that are given together: of each command, and of each line or span of options."""
    for command in commands():
        stage, *words = shlex.split(command)
        if stage in STAGES and "configs/remax.yaml" in words:
            yield stage, options_of(words)
    for line in arguments():
        yield "", options_of(shlex.split(line))
    for path in DOCUMENTS:
        for span in re.findall(r"`--([\w.+]+(?:[= ][^`\s]+)?)`", read(path)):
            name, _, value = span.replace("=", " ").partition(" ")
            if name in known():
                yield "", {name: value}


def options_of(words: list[str]) -> Options:
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    return {name.removeprefix("--"): value for name, value in pairs.items() if not value.startswith("configs/")}


def documented_names() -> Iterator[tuple[str, Options]]:
    """Options that the text names in backticks, by the end of their name, with a value or without."""
    for path in DOCUMENTS:
        text = read(path)
        for block in re.findall(r"^```.*?^```$", text, flags=re.DOTALL | re.MULTILINE):
            text = text.replace(block, "")
        for name, value in re.findall(r"`([a-z_][\w.]*)(?:(?:: |=)([^`\s.]+))?`", text):
            for option in known():
                if option == name or option.endswith(f".{name}"):
                    yield "", {option: value.lower() if value in ("True", "False") else value}


@cache
def known() -> list[str]:
    """All options of ReMax with prompts, a reward model, a judge and adapters."""
    output = io.StringIO()
    given = ["--model.reward", "ModelReward", "--model.reward.path", "x", "--model.engine", "TransformersEngine"]
    given += ["--model.judge", "FunctionReward", "--model.judge.function", "x", "--model.lora.rank", "2"]
    names: dict[str, None] = {"ckpt_path": None}
    for stage in ("fit", "predict"):
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main([stage, "--config", str(ROOT / "configs" / "remax.yaml"), *given, "--print_config"])
        names |= dict.fromkeys(flat(yaml.safe_load(output.getvalue())))
        output.truncate(output.seek(0))
    return list(names)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, prefix if name == "init_args" else f"{prefix}{name}.")
        elif name != "class_path":
            yield f"{prefix}{name}"


def units() -> list[tuple[str, Options]]:
    """What has to be run, each together; values of the reader's are replaced by samples."""
    found = []
    documented = [*documented_lines(), *documented_names()]
    valued = {name for _, options in documented for name, value in options.items() if value and not reason(name, value)}
    for stage, options in documented:
        if all(value == ANY and name in valued for name, value in options.items()):
            continue
        left = {name: value for name, value in options.items() if not reason(name, value)}
        is_whole = len(left) == len(options)
        if not is_whole:  # what depends on an option that is not run is not run, either
            left = {name: v for name, v in left.items() if not any(name.startswith(f"{o}.") for o in options)}
        values = {
            name: SAMPLES.get(name, [value]) if value == ANY or is_placeholder(value) else [value]
            for name, value in left.items()
        }
        if "data.weights" in options and "data.train" in options:
            values["data.train"] = [json.dumps(["prompts.jsonl", "held_out.jsonl"])]
        for number in range(max(map(len, values.values()), default=0)):
            found.append((stage, {name: each[min(number, len(each) - 1)] for name, each in values.items()}))
    return found


def reason(name: str, value: str) -> str:
    """Why an option is not run; empty if it is."""
    return NOT_RUN.get(f"{name}={value}", NOT_RUN.get(name, ""))


def with_classes(options: Options) -> Options:
    """The options with what they need, and classes before their arguments."""
    needed: Options = {}
    for name in options:
        for key, values in CLASSES.items():
            if name == key or (key.endswith(".") and name.startswith(key)):
                needed |= {each: value for each, value in values.items() if each not in options}
                break
    both = {**needed, **options}
    return dict(sorted(both.items(), key=lambda item: item[0].count(".")))


def stage_of(stage: str, options: Options) -> str:
    if stage or not options:
        return stage or "fit"
    special = {"response_writer": "predict", "data.predict": "predict", "data.test": "test", "ckpt_path": "test"}
    return next((value for key, value in special.items() if any(name.startswith(key) for name in options)), "fit")


def runs() -> list[tuple[str, Options]]:
    """Sub-commands with options: each unit is in one of them."""
    packed: list[tuple[str, Options]] = []
    for stage, options in units():
        own, own_stage = with_classes(options), stage_of(stage, options)
        for other_stage, run in packed:
            if own_stage == other_stage and go_together(run, own):
                run |= own
                break
        else:
            packed.append((own_stage, dict(own)))
    return packed


def go_together(one: Options, other: Options) -> bool:
    both = {**one, **other}
    names = {*both, *(f"{name}={value}" for name, value in both.items())}
    return all(both[name] == value for name, value in one.items()) and not any(pair <= names for pair in APART)


# running them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a base configuration, models, data and a checkpoint."""
    root = tmp_path_factory.mktemp("options")
    tiny.save_model(root / "policy")
    tiny.save_reward_model(root / "reward")
    tiny.save_reward_model(root / "two_labels", num_labels=2)
    for name in ("prompts", "held_out"):
        tiny.write_rows(root / f"{name}.jsonl", [{"prompt": each, "question": each} for each in tiny.PROMPTS])
    (root / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (root / "my_rewards.py").write_text("\n".join(blocks(read("docs/rewards.md"), "python")))
    trainer = {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False}
    reward = {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}}
    model = {"policy": {"path": "policy", "chat_template": "template.jinja"}, "reward": reward}
    model |= {"sampling": {"max_new_tokens": 4}}
    model |= {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}}
    data = {"train": "prompts.jsonl", "validation": "held_out.jsonl", "test": "prompts.jsonl", "batch_size": 2}
    config = {
        "trainer": trainer,
        "model": {"class_path": "ReMax", "init_args": model},
        "data": {"class_path": "PromptDataModule", "init_args": data},
    }
    (root / "base.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["fit", "--config", "base.yaml"])
    return root


def test_every_option_has_a_value_to_run_with() -> None:
    lacking = {name for _, options in units() for name, value in options.items() if value == ANY}
    assert not lacking, "give them values in SAMPLES, or say in NOT_RUN why they cannot run"


def test_every_documented_option_is_in_a_run() -> None:
    run = {(name, value) for _, options in runs() for name, value in options.items()}
    every = [*documented_lines(), *documented_names()]
    literal = {item for _, options in every for item in options.items() if not is_placeholder(item[1])}
    for name, value in literal:
        is_run = any(each == name and value in (ANY, given) for each, given in run)
        assert is_run or reason(name, value) or any(reason(o, v) for o, v in literal if name.startswith(f"{o}.")), name
    assert ("data.streaming", "true") in run
    assert len({name for name, _ in run}) > 60


def test_a_reason_is_of_an_option_that_is_documented() -> None:
    every = {item for _, options in [*documented_lines(), *documented_names()] for item in options.items()}
    every |= {("model", ANY)} if any("--model my_methods" in command for command in commands()) else set()
    named = {name for name, _ in every} | {f"{name}={value}" for name, value in every}
    named |= set(re.findall(r"--([\w.]+)", " ".join(commands())))
    assert set(NOT_RUN) <= named
    assert set(SAMPLES) <= {name for name, _ in every} | {"seed_everything"}


@pytest.mark.slow
def test_every_documented_option_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    failed = {}
    for number, (stage, options) in enumerate(runs()):
        given = {"trainer.default_root_dir": f"run{number}", "trainer.logger": "false", **options}
        if stage == "fit":
            given = {"hf_export.enabled": "false", **given}
        else:
            given = {"ckpt_path": "last", **given, "trainer.default_root_dir": "."}
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        try:
            main([stage, "--config", "base.yaml", *words])
        except BaseException as error:
            failed[f"{stage} {shlex.join(words)}"] = repr(error)
    assert failed == {}
