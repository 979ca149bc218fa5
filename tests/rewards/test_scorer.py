"""Any reward, scored: each response once, its failures counted and said, nothing changed beside its rewards."""

import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python
from torch import Tensor

from remax_lightning.callbacks.signal_guard import Terminated
from remax_lightning.rewards import FunctionReward, Reward, failures
from remax_lightning.rewards.failures import MAX_CAUSES, FailureLog
from remax_lightning.rewards.scorer import LARGEST_REWARD, Scorer, checked_rewards

CPU = torch.device("cpu")


class Answering(Reward):
    """Does what it is told, and answers with what that returns."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Any:
        return self.answer(prompts, responses, **columns)


def scores(reward: Reward | Scorer, *texts: str | None, prompt: object = "p") -> Tensor:
    """Rewards of responses to one prompt."""
    scorer = reward if isinstance(reward, Scorer) else Scorer(reward)
    (rewards,) = scorer.score({"prompt": [prompt]}, list(texts), device=CPU)
    return rewards


class Noisy(Reward):
    """The last bits of a score depend on the row, as those of a model on a CPU do."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str], Mapping[str, Sequence[object]]]] = []

    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
        self.calls.append((list(prompts), list(responses), columns))
        return torch.tensor([len(each) + 1e-6 * row for row, each in enumerate(responses)], dtype=torch.float32)


def test_each_response_to_a_prompt_is_scored_once_so_equal_ones_tie() -> None:
    reward, columns = Noisy(), {"prompt": ["p", "q"], "answer": [1, 2]}
    sampled, greedy = Scorer(reward).score(columns, ["aa", "b", "aa", "aa"], ["aa", "b"], device=CPU)
    assert sampled.dtype == torch.float32
    assert sampled[0] == greedy[0]
    assert sampled[2] == sampled[3]
    assert len(reward.calls) == 1
    prompts, responses, others = reward.calls[0]
    assert list(zip(prompts, responses, others["answer"], strict=True)) == [
        ("p", "aa", 1),
        ("p", "b", 1),
        ("q", "aa", 2),
        ("q", "b", 2),
    ]


# results


def test_a_class_is_checked_as_a_function_is() -> None:
    for count in (1, 2, 4):
        with pytest.warns(match=f"ValueError: Answering must return one reward a response: 3, got {count}"):
            rewards = scores(Answering(lambda *_, count=count: torch.ones(count)), "a", "b", "c")
        assert rewards.isnan().all()
    assert scores(Answering(lambda *_: torch.tensor([[True], [False]])), "a", "b").tolist() == [1.0, 0.0]
    assert scores(Answering(lambda *_: [1, None]), "a", "b")[0] == 1
    assert scores(Answering(lambda *_: torch.ones(2, requires_grad=True)), "a", "b").requires_grad is False
    with pytest.warns(match="NotImplementedError"):
        assert scores(Answering(lambda *_: torch.ones(2, device="meta")), "a", "b").isnan().all()


def test_a_number_beyond_reason_is_nan_alone() -> None:
    values = [LARGEST_REWARD, -LARGEST_REWARD * 1.01, math.inf, 10**400, 1e300]
    with pytest.warns(match=r"the reward was beyond 1,000,000 for 4 of 5 responses, which are dropped"):
        rewards = scores(FunctionReward(lambda prompts, responses: values), *"abcde")
    assert rewards.isnan().tolist() == [False, True, True, True, True]
    with pytest.warns(match=r"the reward was None, NaN or no number for 2 of 3 responses, which are dropped"):
        rewards = scores(Answering(lambda *_: ["8", 1.0, None]), *"abc")
    assert rewards.isnan().tolist() == [True, False, True]


def test_a_response_that_is_none_has_no_reward_and_is_counted() -> None:
    reward = Noisy()
    with pytest.warns(match="the policy's logits were not finite for 1 of 3 responses, which are dropped"):
        rewards = scores(reward, "a", None, "")
    assert rewards.isnan().tolist() == [False, True, False]
    assert all(isinstance(text, str) for text in reward.calls[0][1])


# failures


class Failing(Reward):
    """Raises another error at each call, or None to score."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors = iter(errors)

    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
        if (error := next(self.errors)) is not None:
            raise error
        return torch.zeros(len(responses))


def said(reward: Reward, times: int, name: str = "reward") -> list[str]:
    """The warnings of so many calls under Python's own filter, which shows a text once."""
    scorer = Scorer(reward, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(times):
            scores(scorer, "a", "b")
    return [str(each.message) for each in caught]


def test_a_failure_is_said_the_first_the_tenth_and_the_hundredth_time() -> None:
    errors = [ConnectionError(f"no answer after {number} s\nand a second line") for number in range(250)]
    start = "the reward failed for 2 responses; their rows are dropped: ConnectionError: no answer after"
    expected = [
        f"{start} 0 s",
        f"{start} 9 s (10 times so far, 20 responses)",
        f"{start} 99 s (100 times so far, 200 responses)",
    ]
    assert said(Failing(*errors), 250) == expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):  # runs in the same process
            scores(Failing(errors[0]), "a", "b")
    assert [str(each.message) for each in caught] == expected[:1] * 2


def test_causes_are_counted_apart() -> None:
    errors = [KeyError("a"), ValueError("b"), KeyError("a"), KeyError("c")]
    texts = said(Failing(*errors), 4, "judge")
    assert [text.rpartition(": ")[0].rpartition(": ")[2] for text in texts] == ["KeyError", "ValueError", "KeyError"]
    assert all(text.startswith("the judge failed for 2 responses") for text in texts)
    texts = said(Answering(lambda *_: [None, 1e9]), 10)
    assert texts == [
        "the reward was None, NaN or no number for 1 of 2 responses, which are dropped",
        "the reward was beyond 1,000,000 for 1 of 2 responses, which are dropped",
        "the reward was None, NaN or no number for 1 of 2 responses, which are dropped (10 times so far, 10 responses)",
        "the reward was beyond 1,000,000 for 1 of 2 responses, which are dropped (10 times so far, 10 responses)",
    ]


def test_a_text_that_differs_each_time_does_not_flood() -> None:
    words = ["".join(chr(97 + number // 26**place % 26) for place in range(3)) for number in range(2000)]
    log = FailureLog()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for word in words:
            log.count(word, word, 1)
    assert len(caught) == MAX_CAUSES + 4
    assert log.times.total() == 2000


def test_control_characters_of_an_error_do_not_reach_the_terminal() -> None:
    (text,) = said(Failing(ValueError("\x1b]0;title\x07 \x1b[2J")), 1)
    assert text.endswith(r"ValueError: \x1b]0;title\x07 \x1b[2J")


def test_the_rank_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(failures.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(failures.dist, "get_world_size", lambda: 2)
    assert said(Failing(KeyError("a")), 1)[0].startswith("rank 1: the reward failed for 2 responses")
    monkeypatch.setattr(failures.dist, "get_world_size", lambda: 1)
    assert said(Failing(KeyError("a")), 1)[0].startswith("the reward failed for 2 responses")


# what a reward must not do


@pytest.mark.parametrize("code", [0, 3, "bye"])
def test_a_reward_cannot_end_the_run(code: Any) -> None:
    reward = Answering(lambda *_: sys.exit(code))
    with pytest.raises(RuntimeError, match=rf"Answering raised SystemExit\({code}\), which would end the run"):
        checked_rewards(reward, {"prompt": ["p"]}, ["a"])
    with pytest.warns(match=r"failed for 1 responses; .* RuntimeError: Answering raised SystemExit"):
        assert scores(reward, "a").isnan().all()


class Panic(BaseException):
    """As extensions in Rust raise."""


def test_what_is_no_exception_is_a_failure_all_the_same() -> None:
    with pytest.warns(match=r"RuntimeError: Failing raised Panic\(in a library\)"):
        assert scores(Failing(Panic("in a library")), "a").isnan().all()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated()])
def test_signals_to_the_run_pass(error: BaseException) -> None:
    with pytest.raises(type(error)):
        scores(Failing(error), "a")


def test_data_is_handed_out_as_copies() -> None:
    def greedy_hands(prompts: list[Any], responses: list[str], **columns: Any) -> Tensor:
        for number, prompt in enumerate(prompts):
            assert prompt == [{"role": "user", "content": "Hello"}], number  # rows of a prompt do not share it
            prompt.append({"role": "assistant", "content": responses[number]})
            prompt[0]["content"] = "other"
            columns["tests"][number]["cases"].pop()
        columns["answer"].clear()
        prompts.pop()
        responses.clear()
        return torch.zeros(3)

    columns = {
        "prompt": [[{"role": "user", "content": "Hello"}]],
        "answer": ["x"],
        "tests": [{"cases": [1, 2]}],
    }
    before, texts = deepcopy(columns), ["a", "b", "c"]
    (rewards,) = Scorer(Answering(greedy_hands)).score(columns, texts, device=CPU)
    assert rewards.tolist() == [0.0, 0.0, 0.0]
    assert (columns, texts) == (before, ["a", "b", "c"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_state_of_the_process_is_as_before(fails: bool, tmp_path: Path) -> None:
    def careless(prompts: Any, responses: Any, **columns: Any) -> Any:
        """Its body runs when the values are read."""
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float16)
        torch.set_default_device("meta")
        os.chdir(tmp_path)
        if fails:
            raise KeyError("a")
        yield from (0.5 for _ in responses)

    folder = os.getcwd()
    try:
        assert scores(Answering(careless), "a", "b").isnan().all() == fails
        assert torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float32
        assert torch.zeros(1).device.type == "cpu"
        assert os.getcwd() == folder
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        os.chdir(folder)


@pytest.mark.slow
def test_two_processes_one_of_which_fails(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    output = run_python(["-m", "torch.distributed.run", "--nproc_per_node=2", str(script), str(tmp_path)], 120)
    lines = [line for line in output.splitlines() if "the reward failed" in line]
    assert len(lines) == 2, output[-3000:]
    assert all("rank 1: the reward failed for " in line and "KeyError: 'gone'" in line for line in lines)
    assert "(10 times so far, " in lines[1]
    assert "dropped [2.0, 2.0" in output


SCRIPT = """
import os, sys
from pathlib import Path
sys.stderr = sys.stdout
import tiny
from lightning.pytorch import Trainer

def on_rank_1(prompts, responses):
    if os.environ["RANK"] == "1":
        raise KeyError("gone")
    return [float(len(response)) for response in responses]

from remax_lightning.rewards import FunctionReward
folder = Path(sys.argv[1]) / os.environ["RANK"]
folder.mkdir()
module = tiny.remax(tiny.save_model(folder / "policy"), FunctionReward(on_rank_1))
rows = [{"prompt": letter} for letter in "abcd"]
history = tiny.History()
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=12, default_root_dir=folder, callbacks=[history],
    logger=False, enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
)
trainer.fit(module, datamodule=tiny.prompt_data(folder, rows, batch_size=2))
print("dropped", history["train/rows_dropped"], flush=True)
"""
