"""What ranks differ in is said by its name, with the ranks; two processes are in tests/distributed/scenarios.py."""

from pathlib import Path

import pytest
import tiny

from remax_lightning import cli
from remax_lightning.callbacks import RankAgreement
from remax_lightning.callbacks.rank_agreement import CODE, ROWS, check_agreement, code_digest, disagreement


def test_a_difference_names_values_and_ranks() -> None:
    facts = [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "1", "b": "x"}]
    assert disagreement(facts) == "the ranks differ in b (x on ranks 0, 2, y on rank 1)"


def test_what_is_absent_on_a_rank_differs() -> None:
    assert disagreement([{"a": "1"}, {}]) == "the ranks differ in a (1 on rank 0, absent on rank 1)"


def test_code_and_rows_come_first_and_long_lists_are_cut() -> None:
    one = {**{f"a{n}": "1" for n in range(5)}, ROWS: "p", CODE: "q"}
    other = {name: f"{value}!" for name, value in one.items()}
    said = disagreement([one, *[other] * 6])
    assert said.startswith(f"the ranks differ in {CODE} (q on rank 0, q! on ranks 1, 2, 3, 4, ...); {ROWS} (p on")
    assert said.endswith("and 4 more")


def test_one_process_agrees_with_itself() -> None:
    check_agreement({"a": "1"})
    assert code_digest() == code_digest()


def test_where_files_are_is_not_compared() -> None:
    own = {"trainer.default_root_dir": "x", "data.init_args.train": "y", "checkpoint.dirpath": "z"}
    kept = {"data.init_args.validation_fraction": 0.5, "model.init_args.kl_coef": None}
    assert RankAgreement({**own, **kept}).configuration == {name: str(value) for name, value in kept.items()}


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_every_run_of_the_command_line_compares_its_whole_configuration(
    subcommand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    found: list[RankAgreement] = []
    monkeypatch.setattr(RankAgreement, "setup", lambda self, *_, **__: found.append(self))
    policy = tiny.save_model(tmp_path / "policy")
    splits = [f"--data.{split}={rows}" for split in ("train", "validation", "test", "predict")]
    model = ["--model=ReMax", f"--model.policy.path={policy}", "--model.sampling.max_new_tokens=2"]
    reward = ["--model.reward=FunctionReward", "--model.reward.function=reward_functions.letter_values"]
    trainer = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    cli.main(
        [
            subcommand,
            *model,
            *reward,
            "--data=PromptDataModule",
            "--data.batch_size=2",
            *splits,
            *trainer,
            "--trainer.logger=false",
        ]
    )
    (agreement,) = found
    expected = {"model.init_args.kl_coef", "data.init_args.batch_size", "trainer.max_steps", "self_check.num_prompts"}
    assert expected <= agreement.configuration.keys()
