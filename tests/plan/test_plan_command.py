"""The sub-command: from a configuration to a table and advice that holds."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from remax_lightning import cli
from remax_lightning.functional import fused_head
from remax_lightning.plan.cache import DryRunCache
from remax_lightning.plan.memory import MemoryPoint, usable
from remax_lightning.plan.phases import as_ppo, plan
from remax_lightning.plan.recipe import Recipe, read
from remax_lightning.plan.search import changes, proposals, with_argument
from remax_lightning.rollout import next_logits

VOCABULARY, HIDDEN, INNER, LAYERS = 16000, 1024, 2816, 2
PARAMETERS = 2 * VOCABULARY * HIDDEN + LAYERS * (3 * HIDDEN**2 + 3 * HIDDEN * INNER + 2 * HIDDEN) + HIDDEN
SCORER = PARAMETERS - VOCABULARY * HIDDEN + HIDDEN
GIB = 2**30
GPUS = 2


def configuration(folder: Path) -> dict[str, Any]:
    values = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    AutoConfig.for_model("llama", **values, num_attention_heads=8, num_key_value_heads=4).save_pretrained(folder)
    reward = {"path": "someone/reward", "architecture": str(folder), "dtype": "bfloat16"}
    module = {
        "policy": {"path": "someone/policy", "architecture": str(folder)},
        "reward": {"class_path": "ModelReward", "init_args": reward},
        "sampling": {"max_new_tokens": 256},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-6}},
        "micro_batch_size": 4,
    }
    data = {"train": "none", "batch_size": 16, "max_prompt_length": 256}
    return {
        "trainer": {"strategy": {"class_path": "FSDP2Strategy"}},
        "model": {"class_path": "ReMax", "init_args": module},
        "data": {"class_path": "PromptDataModule", "init_args": data},
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration(folder / "architecture")), encoding="utf-8")
    return str(folder / "config.yaml")


@pytest.fixture(scope="module")
def parsed(file: str) -> dict[str, Any]:
    """The configuration as the sub-command hands it on."""
    return parse(file)


def parse(file: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        found: list[Any] = []
        patch.setattr(cli, "print_plan", lambda config, *_: found.append(config))
        cli.main(["plan", "--config", file, "--gpus", str(GPUS)])
    return found[0]


@pytest.fixture(scope="module")
def cache() -> DryRunCache:
    return DryRunCache()


@pytest.fixture
def recipe(parsed: dict[str, Any]) -> Callable[..., Recipe]:
    def changed(path: str = "", value: object = None, gpus: int = GPUS) -> Recipe:
        config: Any = copy.deepcopy(parsed)
        *parents, name = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        if name:
            node[name] = value
        return read(config, gpus)

    return changed


@pytest.fixture
def printed(file: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        cli.main(["plan", "--config", file, "--gpus", str(GPUS), *arguments])
        return capsys.readouterr().out

    return run


def gpu_memory(peak: float) -> str:
    """Memory of a GPU of which this many bytes are usable, GiB: all but 5 % and 2 GiB."""
    return f"{(peak / GIB + 2) / 0.95:.3f}"


def peaks(recipe: Recipe, cache: DryRunCache) -> dict[str, MemoryPoint]:
    return plan(recipe, cache).peaks


def test_the_table(printed: Callable[..., str]) -> None:
    text = printed()

    def row(term: str) -> list[float]:
        line = next(line for line in text.splitlines() if line.startswith(f"│ {term} "))
        return [float(cell) if cell.strip() else 0.0 for cell in line.split("│")[2:-1]]

    weights, close = 4 * PARAMETERS / GPUS / GIB, {"abs": 0.011}
    assert row("master weights") == pytest.approx([weights] * 6, **close)
    assert row("optimizer states") == pytest.approx([2 * weights] * 6, **close)
    assert row("reference") == pytest.approx([weights / 2] * 6, **close)  # two bytes
    assert row("reward model") == pytest.approx([2 * SCORER / GPUS / GIB] * 6, **close)
    assert row("compute copy")[0] == pytest.approx(weights, **close)  # two bytes, but all of them
    assert row("gradients")[2] > 2 * weights  # those of several micro-batches are added up before they are split
    cache = LAYERS * 2 * (HIDDEN // 2) * 512 * 2 / GIB  # of a row: keys and values, their numbers, columns, bytes
    assert row("KV cache") == pytest.approx([32 * cache, 0, 0, 16 * cache, 0, 0], **close)
    assert row("value model")[:3] == [0, 0, 0]
    assert row("value model")[3] == pytest.approx(12 * SCORER / GPUS / GIB, **close)
    terms = (
        "master weights",
        "gradients",
        "optimizer states",
        "compute copy",
        "reference",
        "reward model",
        "activations",
        "head",
    )
    assert row("total")[2] == pytest.approx(sum(row(term)[2] for term in terms), abs=0.05)
    found = {name: float(peak) for name, peak in re.findall(r"^(\w+): peak ([\d.]+) GiB", text, re.MULTILINE)}
    assert found["ReMax"] == pytest.approx(max(row("total")[:3]), abs=0.06)
    assert found["PPO"] == pytest.approx(max(row("total")[3:]), abs=0.06)
    assert found["PPO"] > found["ReMax"]


@pytest.mark.slow
def test_memory_and_the_micro_batch_decide(
    printed: Callable[..., str], recipe: Callable[..., Recipe], cache: DryRunCache
) -> None:
    four, eight = (plan(recipe("model.init_args.micro_batch_size", rows), cache).peak for rows in (4, 8))
    memory = ["--gpu_memory", gpu_memory((four + eight) / 2)]
    text = printed(*memory)
    assert "\nReMax: largest micro-batch that fits: --model.micro_batch_size 4 " in text
    assert re.search("^PPO: largest micro-batch that fits: --model.micro_batch_size [12] ", text, re.MULTILINE)
    assert re.search("^ReMax: .*: fits$", text, re.MULTILINE)
    assert re.search("^ReMax: .*: does not fit$", printed(*memory, "--model.micro_batch_size", "8"), re.MULTILINE)
    less = printed("--gpu_memory", gpu_memory(four - 1e7))
    assert re.search("^ReMax: .*: does not fit$", less, re.MULTILINE)
    assert "fits: --model.micro_batch_tokens 2048 " in printed(*memory, "--model.micro_batch_tokens", "512")


@pytest.mark.slow
def test_every_proposal_fits(printed: Callable[..., str], recipe: Callable[..., Recipe], cache: DryRunCache) -> None:
    smallest = plan(recipe("model.init_args.micro_batch_size", 1), cache).peak
    memory = ["--gpu_memory", gpu_memory(0.93 * smallest)]
    lines = [line for line in printed(*memory).splitlines() if line.startswith("  --")]
    assert len(lines) > 2
    for line in [line for line in lines if "torchao" not in line][:3]:
        changes = line.partition(" (peak")[0].split()
        assert re.search("^ReMax: .*: fits$", printed(*memory, *changes), re.MULTILINE), line


def test_changes_that_only_fit_together(parsed: dict[str, Any], cache: DryRunCache) -> None:
    (found,) = proposals(parsed, GPUS, cache, 2.7)
    assert found.peak <= usable(2.7)
    assert found.arguments.count("--") > 2
    assert proposals(parsed, GPUS, cache, 2.15) == []


@pytest.mark.parametrize(
    ("path", "value", "phase", "term"),
    [
        ("model.init_args.activation_checkpointing", True, "training", "activations"),
        ("trainer.strategy.init_args.sync_every_micro_batch", True, "training", "gradients"),
        ("trainer.strategy.init_args.offload_frozen", True, "rollout", "reference"),
        ("trainer.strategy.init_args.offload_frozen", True, "rollout", "reward model"),
        ("model.init_args.kl_coef", 0.0, "scoring", "reference"),
        ("model.init_args.lora", {"rank": 8}, "training", "optimizer states"),
        ("model.init_args.lora", {"rank": 8}, "training", "reference"),
        ("model.init_args.lora", {"rank": 8}, "training", "gradients"),
        ("model.init_args.optimizer.class_path", "torchao.optim.AdamW8bit", "rollout", "optimizer states"),
        ("data.init_args.batch_size", 8, "rollout", "KV cache"),
        ("model.class_path", "remax_lightning.modules.PolicyGradientModule", "rollout", "KV cache"),
        ("model.init_args.micro_batch_size", 2, "training", "activations"),
    ],
)
def test_a_lever_lowers_what_it_is_for(
    path: str, value: object, phase: str, term: str, recipe: Callable[..., Recipe], cache: DryRunCache
) -> None:
    before, after = (peaks(each, cache)[phase].terms[term] for each in (recipe(), recipe(path, value)))
    assert after < 0.7 * before


def test_replicas_hold_whole_copies(recipe: Callable[..., Recipe], cache: DryRunCache) -> None:
    two, four = (peaks(recipe(gpus=gpus), cache)["rollout"] for gpus in (2, 4))
    hybrid = peaks(recipe("trainer.strategy.init_args.replicas", 2, gpus=4), cache)["rollout"]
    assert four.terms["master weights"] == pytest.approx(two.terms["master weights"] / 2, rel=0.01)
    assert hybrid.terms == two.terms
    with pytest.raises(ValueError, match="replicas must divide"):
        recipe("trainer.strategy.init_args.replicas", 3, gpus=4)


def test_without_splitting(recipe: Callable[..., Recipe], cache: DryRunCache) -> None:
    single, ddp = (peaks(recipe("trainer.strategy", "auto", gpus=gpus), cache)["training"].terms for gpus in (1, 2))
    assert single["master weights"] == 4 * PARAMETERS
    assert ddp["gradients"] == 2 * single["gradients"] == 8 * PARAMETERS  # and DDP's buckets
    assert single["compute copy"] == 0
    assert recipe("trainer.strategy", "fsdp2").layout == recipe().layout
    assert {"trainer.strategy": "fsdp2", "trainer.precision": "32-true"} in changes(recipe("trainer.strategy", "ddp"))


def test_autocast_keeps_copies_of_the_trained_weights(parsed: dict[str, Any], cache: DryRunCache) -> None:
    config = copy.deepcopy(parsed)
    config["trainer"].update(strategy="auto", precision="bf16-mixed")
    found = peaks(read(config, 1), cache)
    assert found["rollout"].terms["compute copy"] == 2 * (PARAMETERS - VOCABULARY * HIDDEN - HIDDEN * (2 * LAYERS + 1))
    assert found["scoring"].terms["compute copy"] == 0


def test_the_default_optimizer(file: str, tmp_path: Path, recipe: Callable[..., Recipe], cache: DryRunCache) -> None:
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    del config["model"]["init_args"]["optimizer"]
    changed = tmp_path / "config.yaml"
    changed.write_text(yaml.safe_dump(config), encoding="utf-8")
    default = read(parse(str(changed)), GPUS)
    assert "AdamW" in default.optimizer.class_path
    assert default.optimizer.init_args["lr"] == 1e-6
    assert peaks(default, cache)["rollout"].terms == peaks(recipe(), cache)["rollout"].terms


def test_a_compiled_rollout_keeps_its_cache(recipe: Callable[..., Recipe], cache: DryRunCache) -> None:
    engine = {"class_path": "remax_lightning.rollout.TransformersEngine", "init_args": {"compile": True}}
    kept, freed = recipe("model.init_args.engine", engine), recipe()
    assert peaks(kept, cache)["training"].terms["KV cache"] == peaks(freed, cache)["rollout"].terms["KV cache"] > 0
    assert peaks(freed, cache)["training"].terms["KV cache"] == 0


def test_the_other_stages(parsed: dict[str, Any], cache: DryRunCache) -> None:
    config = copy.deepcopy(parsed)
    module, data = config["model"]["init_args"], config["data"]["init_args"]
    data["max_length"] = 512
    del module["reward"]
    config["model"]["class_path"] = "remax_lightning.modules.SFT"
    sft = peaks(read(config, GPUS), cache)
    config["model"] = {
        "class_path": "remax_lightning.modules.RewardModel",
        "init_args": {**module, "model": module["policy"]},
    }
    pairs = peaks(read(config, GPUS), cache)
    assert set(sft) == set(pairs) == {"training"}
    assert pairs["training"].terms["activations"] == pytest.approx(2 * sft["training"].terms["activations"], rel=0.3)
    assert pairs["training"].terms["head"] == 0
    assert sft["training"].terms["reference"] == sft["training"].terms["reward model"] == 0


def test_a_reward_that_is_no_model_takes_nothing(recipe: Callable[..., Recipe], cache: DryRunCache) -> None:
    reward = {"class_path": "FunctionReward", "init_args": {"function": "os.path.join"}}
    without = recipe("model.init_args.reward", reward)
    assert peaks(without, cache)["rollout"].terms["reward model"] == 0
    value = peaks(as_ppo(without), cache)["rollout"]
    assert value.terms["value model"] == pytest.approx(12 * SCORER / GPUS, rel=1e-4)  # of the policy's architecture


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.micro_batch_sise", "4"], "micro_batch_sise"),
        (["--model.policy.architecture", "null"], "give model.policy.architecture"),
        (["--trainer.strategy", "deepspeed"], "must be auto, ddp or fsdp2, got deepspeed"),
        (["--trainer.precision", "bf16-mixed"], "under fsdp2 trainer.precision must be 32-true"),
        (["--trainer.precision", "bf16-true"], "trainer.precision bf16-true stores Adam's moments"),
        (["--gpus", "0"], "gpus must be at least 1, got 0"),
        (["--gpu_memory", "2"], "gpu_memory"),
        (["--model.policy.quantization", "4bit"], "4bit"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--config", file, "--gpus", str(GPUS), *arguments])
    assert message in capsys.readouterr().err


def test_what_is_usable_of_a_gpu() -> None:
    assert usable(80) == 74 * GIB
    assert usable(24) / GIB == pytest.approx(20.8)


def test_the_plan_follows_the_chunks_of_the_head(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def heads() -> list[int]:
        step = plan(recipe("model.init_args.micro_batch_size", 16), DryRunCache())
        points = [point for phase in ("scoring", "training") for point in step.phases[phase]]
        return [point.terms["head"] for point in points if point.name in ("reference", "head")]

    before = heads()
    monkeypatch.setattr(fused_head, "BLOCK_SIZE", fused_head.BLOCK_SIZE // 64)
    fewer_logits = heads()
    monkeypatch.setattr(fused_head, "CHUNK_SIZE", fused_head.CHUNK_SIZE // 8)
    fewer_tokens = heads()
    assert len(before) == 2
    for large, middle, small in zip(before, fewer_logits, fewer_tokens, strict=True):
        assert large > 1.2 * middle > 1.2 * 1.2 * small


def test_the_plan_follows_the_length_of_a_compiled_cache(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"class_path": "remax_lightning.rollout.TransformersEngine", "init_args": {"compile": True}}
    short = peaks(recipe("model.init_args.engine", engine), DryRunCache())["rollout"].terms["KV cache"]
    monkeypatch.setattr(next_logits, "LENGTH_STEP", 1024)  # for 512 tokens
    long = peaks(recipe("model.init_args.engine", engine), DryRunCache())["rollout"].terms["KV cache"]
    assert long == 2 * short


class Sampler:
    """Somebody's own method."""

    decodes_greedy = False


def test_a_method_is_known_by_its_arguments(recipe: Callable[..., Recipe]) -> None:
    assert recipe().decoded_rows == 2 * 16
    other = recipe("model.class_path", f"{__name__}.Sampler")
    assert (other.decoded_rows, other.name) == (16, "Sampler")
    with pytest.raises(ValueError, match="train a policy or a model, got Sampler"):
        recipe("model", {"class_path": f"{__name__}.Sampler", "init_args": {}})


def test_an_argument_is_set_where_the_command_line_sets_it() -> None:
    rewards = [{"class_path": "R", "init_args": {"dtype": "float32"}}, {"class_path": "S"}]
    config = {"model": {"class_path": "M", "init_args": {"rewards": rewards, "lora": None}}, "strategy": "fsdp2"}
    before = copy.deepcopy(config)

    def model(key: str, value: object) -> dict[str, Any]:
        return with_argument(config, f"model.{key}", value)["model"]["init_args"]

    assert model("lora.rank", 4) == {"rewards": rewards, "lora": {"rank": 4}}
    assert model("rewards.0.dtype", "bfloat16")["rewards"][0] == {"class_path": "R", "init_args": {"dtype": "bfloat16"}}
    assert model("rewards.0.dtype", "bfloat16")["rewards"][1] == rewards[1]
    assert with_argument(config, "model", "N")["model"] == {**config["model"], "class_path": "N"}
    assert with_argument(config, "strategy", "ddp") == {**config, "strategy": "ddp"}
    replicas = with_argument(config, "strategy.replicas", 2)["strategy"]
    assert replicas == {"class_path": "fsdp2", "init_args": {"replicas": 2}}
    assert config == before


def test_several_files(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "overlay.yaml").write_text("data: {init_args: {batch_size: 2}}", encoding="utf-8")
    cli.main(["plan", "--config", file, "--config", str(tmp_path / "overlay.yaml"), "--gpus", "2"])
    assert "trains on 1 x 2 rows of 512 tokens" in capsys.readouterr().out
