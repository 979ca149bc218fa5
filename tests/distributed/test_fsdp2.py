"""Two processes that split every model do what one process does; see scenarios.py for the runs."""

import hashlib
import math
import shutil
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch
import yaml
from distributed import scenarios
from processes import run_python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from remax_lightning.checkpoints.find_checkpoint import newest_complete
from remax_lightning.checkpoints.manifest import Manifest, UnusableCheckpoint, integrity_error, read_manifest
from remax_lightning.checkpoints.safe_checkpoint_io import read_checkpoint
from remax_lightning.cli import ExportingTrainer, main
from remax_lightning.models import parallelize
from remax_lightning.models.lora import LoRA
from remax_lightning.strategies import FSDP2Strategy

pytestmark = pytest.mark.slow

SECONDS = 240
SAME = ["full", "lora", "dropped", "uneven", "recomputed", "replicated", "tied", "sft", "reward_model", "saving"]
SAME += ["reinforce", "rloo", "ppo"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fsdp2")
    scenarios.make(path)
    return path


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """Results of one process."""
    return {scenario.__name__: scenario(folder, 1) for scenario in scenarios.BOTH}


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of each of two processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    run_python([*launcher, scenarios.__file__, str(folder)], SECONDS)
    return [torch.load(folder / f"result{rank}.pt") for rank in (0, 1)]


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("name", SAME)
def test_the_same_training(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    expected = one[name]
    for actual in (each[name] for each in two):
        assert len(actual["steps"]) == len(expected["steps"]) >= 5
        tiny.assert_close(actual["weights"], expected["weights"], atol=1e-6, rtol=0)
        for ours, theirs in zip(actual["steps"], expected["steps"], strict=True):
            assert ours.keys() == theirs.keys()
            for metric in theirs:
                if not metric.startswith(("time/", "train/tokens_per_second")):
                    assert ours[metric] == pytest.approx(theirs[metric], abs=1e-5), metric
            assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("name", ["full", "lora", "dropped", "uneven", "tied"])
def test_the_same_rollouts(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    split = zip(two[0][name]["responses"], two[1][name]["responses"], strict=True)
    assert [{**first, **second} for first, second in split] == one[name]["responses"]
    assert any(len(first) for first in one[name]["responses"])


def test_the_scenarios_are_what_they_say(folder: Path, two: list[dict[str, Any]]) -> None:
    first, second = two
    lengths = [{len(ids) for row in step.values() for ids in row} for step in first["full"]["responses"]]
    assert any(len(each) > 1 for each in lengths)
    assert any(
        min(pair) == 0 < max(pair) for pair in zip(*(each["dropped"]["num_scored"] for each in two), strict=True)
    )
    assert first["uneven"]["num_micro_batches"] != second["uneven"]["num_micro_batches"]
    start = dict(AutoModelForCausalLM.from_pretrained(folder / "policy").named_parameters())
    assert tiny.norm(tiny.difference(start, first["full"]["weights"])) > 0.01


def test_bfloat16_is_computed_with_and_float32_kept(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    half = two[0]["half"]
    assert half["dtypes"] == [{"torch.float32"}, {"torch.bfloat16"}]
    drift = [step["train/log_prob_drift"] for step in half["steps"]]
    assert 1e-5 < drift[0] < 0.3
    assert {value.dtype for value in half["weights"].values()} == {torch.float32}
    assert not tiny.are_equal(half["weights"], one["half"]["weights"])


def test_a_rollout_gathers_each_unit_once_whatever_its_length(two: list[dict[str, Any]]) -> None:
    for found in (each["collectives"] for each in two):
        assert found["4"] == found["10"] == {"_allgather_base_": found["units"]}


@pytest.mark.parametrize("name", [*scenarios.LOADED, "in_parts", "old_format"])
def test_a_model_is_loaded_as_from_pretrained_does(name: str, two: list[dict[str, Any]]) -> None:
    for found in (each["loading"][name] for each in two):
        expected = {"is_sliced": name != "old_format", "same_names": True, "equal": True, "stops": True}
        expected["same_sample"] = True
        assert found == {**expected, "difference": 0.0}


def test_a_model_is_split_again_when_something_raises(two: list[dict[str, Any]]) -> None:
    both = [each["broken"] for each in two]
    for found in both:
        assert found["before"] == found["after"]
        # each block twice, what is outside of them once, as it stays gathered until a backward pass
        assert found["gathers"] == {"_allgather_base_": 2 * found["blocks"] + 1}
    assert [sum(sizes) for sizes in zip(both[0]["before"], both[1]["before"], strict=True)] == both[0]["inside"]


def test_evaluation_is_the_same(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["saving"]["validation"] == pytest.approx(one["saving"]["validation"], abs=1e-5)
    rows = [row for found in two for row in found["saving"]["predictions"]]
    assert sorted(map(str, rows)) == sorted(map(str, one["saving"]["predictions"]))
    assert len(rows) == 5


@pytest.mark.parametrize("name", ["", "_lora"])
def test_a_resumed_run_is_bitwise_the_same(name: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        assert tiny.are_equal(found[f"resumed{name}"]["weights"], found[f"saving{name}"]["weights"])
        assert len(found[f"resumed{name}"]["steps"]) == 3


@pytest.mark.parametrize("name", ["", "_lora", "_file"])
def test_one_process_goes_on_from_two(name: str, folder: Path, two: list[dict[str, Any]]) -> None:
    path = folder / f"saving2{name}" / "checkpoints" / "step=3.ckpt"
    assert path.is_dir() == (name != "_file")
    found = scenarios.resumed(folder, 1, path, LoRA(rank=4) if name == "_lora" else None)
    tiny.assert_close(found["weights"], two[0][f"saving{name}"]["weights"], atol=1e-6, rtol=0)


def test_two_processes_go_on_from_one(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    tiny.assert_close(two[0]["resumed_from_one"]["weights"], one["saving"]["weights"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["", "_lora", "_file"])
def test_a_checkpoint_is_validated_as_the_live_model_was(name: str, two: list[dict[str, Any]]) -> None:
    for found in (each[f"saving{name}"] for each in two):
        assert found["validation of it"] == pytest.approx(found["validation"], abs=1e-6)


def test_a_checkpoint_has_what_is_trained(folder: Path, two: list[dict[str, Any]]) -> None:
    whole, adapters = (
        read_checkpoint(folder / f"saving2{name}" / "checkpoints" / "step=6.ckpt") for name in ("", "_lora")
    )
    for checkpoint in (whole, adapters):
        (optimizer,) = checkpoint["optimizer_states"]
        assert len(optimizer["state"]) == len(checkpoint["state_dict"])
    assert {name.removeprefix("policy.") for name in whole["state_dict"]} == two[0]["saving"]["weights"].keys()
    assert {".lora_" in name for name in adapters["state_dict"]} == {True}


def test_the_exported_model_is_the_live_one(folder: Path, two: list[dict[str, Any]]) -> None:
    live, exported = two[0]["saving"]["weights"], load_file(folder / "saving2" / "hf" / "model.safetensors")
    assert tiny.are_equal(exported, {name: live[name] for name in exported})
    assert type(AutoModelForCausalLM.from_pretrained(folder / "saving2" / "hf")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["", "_lora"])
def test_a_folder_is_exported_as_the_live_model_was(name: str, folder: Path, two: list[dict[str, Any]]) -> None:
    module = scenarios.remax(folder, lora=LoRA(rank=4) if name else None)
    trainer = ExportingTrainer(accelerator="cpu", devices=1, logger=False)
    trainer.export(
        module, str(folder / f"saving2{name}" / "checkpoints" / "step=6.ckpt"), str(folder / f"export{name}")
    )
    live, exported = (
        load_file(path / "model.safetensors") for path in (folder / f"saving2{name}" / "hf", folder / f"export{name}")
    )
    assert tiny.are_equal(exported, live)


def test_sigterm_to_one_process_saves_the_step_in_all(
    one: dict[str, Any], folder: Path, two: list[dict[str, Any]]
) -> None:
    for found in (each["terminated"] for each in two):
        assert found["status"] == 143
        assert found["files"] == ["step=2.ckpt", "step=2.ckpt.json"]
    saved = read_checkpoint(folder / "terminated" / "step=2.ckpt")["state_dict"]
    live = two[0]["terminated"]["weights"]
    assert tiny.are_equal({name.removeprefix("policy."): value for name, value in saved.items()}, live)


def test_a_save_that_fails_in_one_process_fails_in_all(two: list[dict[str, Any]]) -> None:
    for found in (each["full_disk"] for each in two):
        assert "step=2.ckpt could not be written" in found["message"]
        assert found["message"].startswith("the checkpoint ")
        assert "free some space" in found["message"]
        assert found["files"] == ["step=1.ckpt", "step=1.ckpt.json"]


def test_an_export_has_the_kept_weights_after_a_forward_pass(folder: Path, two: list[dict[str, Any]]) -> None:
    exported = load_file(folder / "evaluated_last" / "hf" / "model.safetensors")
    kept = two[0]["evaluated_last"]["weights"]
    assert tiny.are_equal(exported, {name: kept[name] for name in exported})
    assert any((value.bfloat16() != value).any() for value in exported.values())


def test_training_goes_on_during_a_save(folder: Path, two: list[dict[str, Any]]) -> None:
    for found in (each["in_background"] for each in two):
        assert found["while saving"] == ["step=1.ckpt", "step=1.ckpt.json", "step=2.ckpt.partial"]
        assert found["before the next save"] == ["step=1.ckpt", "step=1.ckpt.json", "step=2.ckpt", "step=2.ckpt.json"]
        assert found["paths"] == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt", "step=4.ckpt"]  # each is sent once
        assert found["at the end"] == [f"step={step}.ckpt{suffix}" for step in (3, 4) for suffix in ("", ".json")]
    for path in (folder / "saved_during_a_step" / "step=2.ckpt", folder / "in_background" / "step=4.ckpt"):
        manifest = read_manifest(path)  # of which the validation ended during the save
        assert manifest is not None
        assert math.isfinite(manifest.scores["val/reward"])


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 1), ("error", "error"), ("hanging", 143)])
def test_processes_that_end_together_save_together(
    name: str, status: object, folder: Path, two: list[dict[str, Any]]
) -> None:
    """A signal to one of them waits for the end of the step; in both, it and an error may come at any moment."""
    for found in (each["interrupted"][name] for each in two):
        assert found["status"] == status
        assert found["files"] == ["step=2.ckpt", "step=2.ckpt.json"]
        assert found["told"] == []
    saved = read_checkpoint(folder / "interrupted" / name / "checkpoints" / "step=2.ckpt")["state_dict"]
    for key, value in two[0]["interrupted"][name]["weights"].items():
        assert torch.equal(saved[f"policy.{key}"], value), key


def test_what_they_saved_together_is_resumed_bitwise(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert tiny.are_equal(found["from_error"]["weights"], found["in_background"]["weights"])
        assert len(found["from_error"]["steps"]) == 2


def test_what_is_lost_is_said_where_not_all_processes_come(two: list[dict[str, Any]]) -> None:
    first, second = (each["interrupted"]["apart"] for each in two)
    assert first["status"] == second["status"] == "error"
    assert first["files"] == second["files"] == []
    (message,) = first["told"]
    assert "ranks can only save together, and not all of them have come" in message
    assert message.endswith("there is no checkpoint")


@pytest.mark.parametrize("name", ["killed", "saved_during_a_step"])
def test_what_a_save_in_the_background_left_is_resumed_bitwise(name: str, two: list[dict[str, Any]]) -> None:
    """From what a kill during the second save leaves, and from the second save, which ended after the third step."""
    for found in two:
        assert tiny.are_equal(found[name]["weights"], found["in_background"]["weights"])
        assert len(found[name]["steps"]) == {"killed": 3, "saved_during_a_step": 2}[name]


def test_an_error_in_the_background_is_raised_by_the_next_save(two: list[dict[str, Any]]) -> None:
    for found in (each["background_error"] for each in two):
        assert found["message"].startswith("the checkpoint ")
        assert "step=1.ckpt could not be written (OSError: [Errno 28] No space left on device)" in found["message"]
        assert found["files"] == []


@pytest.mark.parametrize(("name", "steps"), [("terminated", [2]), ("raised", [2, 3]), ("ended", [2])])
def test_a_save_in_the_background_is_awaited(name: str, steps: list[int], two: list[dict[str, Any]]) -> None:
    for found in (each["awaited"] for each in two):
        assert found[name] == [f"step={step}.ckpt{suffix}" for step in steps for suffix in ("", ".json")]


def test_rank_0_alone_verifies_and_all_ranks_read_the_same(two: list[dict[str, Any]]) -> None:
    first, second = (each["verifying"] for each in two)
    assert (first["verified"], second["verified"]) == (["step=6.ckpt", "step=3.ckpt"], [])
    for found in (first, second):
        assert found["read"] == "step=3.ckpt"
        assert found["steps"] == 3
        assert "has no complete checkpoint" in found["message"]
        assert "step=6.ckpt cannot be read (ValueError: __1_0.distcp is not what was written)" in found["flipped"]


def test_last_skips_a_folder_with_a_damaged_shard(two: list[dict[str, Any]]) -> None:
    """All ranks do, though one alone cannot read its shard, and what was read before is overwritten."""
    for found in two:
        again = found["verifying"]["after a flipped bit"]
        assert (again["read"], len(again["steps"])) == ("step=3.ckpt", 3)
        assert tiny.are_equal(again["weights"], found["saving"]["weights"])


def test_bfloat16_is_announced_once(two: list[dict[str, Any]]) -> None:
    (message,) = two[0]["half"]["told"]
    assert "computes in bfloat16 and trains float32 weights, though trainer.precision is 32-true" in message


@pytest.mark.parametrize("name", ["write_synced", "sync_folder", "write_manifest"])
def test_no_process_waits_for_one_that_could_not_save(name: str, two: list[dict[str, Any]]) -> None:
    for found in (each["failing_saves"] for each in two):
        assert "could not be written (No space left on device)" in found[name]
        assert found[f"{name} left"] == []


def test_the_self_check_judges_the_rewards_of_all_processes(two: list[dict[str, Any]]) -> None:
    assert len(two[0]["agreed_rewards"]["steps"]) == 1


def test_what_cannot_work_is_refused_by_all(two: list[dict[str, Any]]) -> None:
    for found in (each["refused"] for each in two):
        assert "replicas must divide the number of ranks, 2, got replicas=3" in found["replicas"]
        assert "on a CPU set it to false" in found["offload"]
        assert "trainer.precision must be 32-true" in found["precision"]
        assert "is no trained reward model: it lacks ['score.weight']" in found["head"]
        assert "here (FSDP2Strategy) a checkpoint is one file; set checkpoint.async_save to false" in found["one_file"]
        assert "the checkpoint plugin AsyncCheckpointIO cannot be used" in found["plugin"]
        assert found["settings"].startswith(
            "the ranks differ in model.init_args.kl_coef (0.0 on rank 0, 0.25 on rank 1); give all ranks the same"
        )
        assert found["rows"].startswith("the ranks differ in the rows of the data (rows0 on rank 0, rows1 on rank 1);")
        assert (
            "all ranks must read the same checkpoint, but rank 0 would read run0 and rank 1 run1; put" in found["paths"]
        )


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "deepspeed_stage_3_offload"])
def test_other_strategies_are_refused(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model": {"class_path": "SFT", "init_args": {"policy": {"path": str(folder / "policy")}}},
        "data": {"class_path": "DemonstrationDataModule", "init_args": {"train": str(folder / "demonstrations.jsonl")}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.strategy", name])
    assert f"trainer.strategy must be auto, ddp or fsdp2, got {name}; to shard a model" in capsys.readouterr().err


def test_a_strategy_given_as_an_object_is_refused_too(folder: Path) -> None:
    module = scenarios.remax(folder)
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(), precision="32-true")
    with pytest.raises(ValueError, match="must be auto, ddp or fsdp2, got SimpleNamespace; to shard a model"):
        module.setup("fit")


def test_only_frozen_models_are_offloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(parallelize, "fully_shard", lambda module, **options: calls.append(options))
    model = tiny.language_model()
    sharding = parallelize.Sharding(
        mesh=cast(Any, None), device=torch.device("cpu"), compute_dtype=torch.bfloat16, offload_frozen=True
    )
    parallelize.shard(model, sharding)
    assert [type(call["offload_policy"]).__name__ for call in calls] == ["OffloadPolicy"] * 3
    parallelize.shard(model, sharding, frozen=True)
    assert [type(call["offload_policy"]).__name__ for call in calls[3:]] == ["CPUOffloadPolicy"] * 3
    assert {call["mp_policy"].reduce_dtype for call in calls} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"replicas": 0}, "replicas must be at least 1"), ({"timeout_minutes": 0}, "timeout_minutes must be positive")],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSDP2Strategy(**options)


def test_the_timeout_arrives() -> None:
    assert FSDP2Strategy(timeout_minutes=90)._timeout == timedelta(minutes=90)


def test_a_damaged_folder_is_skipped(folder: Path, tmp_path: Path, two: list[dict[str, Any]]) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder / "saving2" / "checkpoints", copy)
    newest = copy / "step=6.ckpt"
    manifest = read_manifest(newest)
    assert manifest is not None
    assert newest_complete(copy) == newest
    for name, reason in {
        ".metadata": "its content is not what was written",
        "rest.pt": "its content is not what was written",
        "__1_0.distcp": "bytes, not the",
    }.items():
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(flipped(content) if "content" in reason else content[:-1])
        assert reason in str(integrity_error(newest, manifest))
        with pytest.warns(UserWarning, match=r"step=6.ckpt is skipped"):
            assert newest_complete(copy) == copy / "step=3.ckpt"
        (newest / name).write_bytes(content)
        assert integrity_error(newest, manifest) is None
    (newest / "__1_0.distcp").unlink()
    assert "bytes, not the" in str(integrity_error(newest, manifest))


def flipped(content: bytes) -> bytes:
    """The content with one other bit, in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_flipped_bit_in_a_shard_is_an_error_when_it_is_read(
    folder: Path, tmp_path: Path, two: list[dict[str, Any]]
) -> None:
    path = tmp_path / "step=6.ckpt"
    shutil.copytree(folder / "saving2" / "checkpoints" / "step=6.ckpt", path)
    shard = path / "__1_0.distcp"
    shard.write_bytes(flipped(shard.read_bytes()))
    with pytest.raises(UnusableCheckpoint, match=r"cannot be read \(.*__1_0.distcp is not what was written"):
        read_checkpoint(path)


def test_a_folder_of_an_earlier_version_is_verified(folder: Path, tmp_path: Path, two: list[dict[str, Any]]) -> None:
    """Its manifest has no number, and the digest of all files' content."""
    path = tmp_path / "step=6.ckpt"
    shutil.copytree(folder / "saving2" / "checkpoints" / "step=6.ckpt", path)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    old = Manifest(
        size=sum(file.stat().st_size for file in path.iterdir()),
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        step=6,
    )
    assert integrity_error(path, old) is None
    shard = path / "__1_0.distcp"
    shard.write_bytes(flipped(shard.read_bytes()))
    assert integrity_error(path, old) == "its content is not what was written"
