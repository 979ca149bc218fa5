from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import reward_functions
import tiny
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from remax_lightning import cli
from remax_lightning.callbacks import GradientVariance
from remax_lightning.models.lora import LoRA
from remax_lightning.models.next_token import log_probs_of
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import PPO, RLOO, SFT, Reinforce, ReMax
from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.rewards import FunctionReward
from remax_lightning.rewards.scorer import Scorer
from remax_lightning.rollout import Responder, Sampling

RATIOS = [f"diagnostics/variance_ratio_{name}" for name in ("greedy", "leave_one_out", "batch_mean")]
HELPS = "diagnostics/greedy_helps"


def method(kind: type[PolicyGradientModule], policy: str, **options: Any) -> PolicyGradientModule:
    defaults: dict[str, Any] = {
        "sampling": Sampling(max_new_tokens=6, num_samples=2),
        "kl_coef": 0.1,
        "optimizer": tiny.adam(),
        "lr_schedule": "constant",
    }
    reward = FunctionReward("reward_functions.letter_values")
    return kind(policy=ModelSource(path=policy), reward=reward, **{**defaults, **options})


class NoGradients(Callback):
    """Looks at what the callback before it leaves behind."""

    num_looks = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert all(parameter.grad is None for parameter in pl_module.parameters())
        assert all(module.training for module in pl_module.modules())
        self.num_looks += 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ReMax, {"activation_checkpointing": True, "greedy_max_new_tokens": 3}),
        (ReMax, {"lora": LoRA(rank=2)}),
        (Reinforce, {"baseline": "batch_mean"}),
        (RLOO, {}),
        (PPO, {"num_epochs": 2}),
    ],
    ids=["remax", "lora", "reinforce", "rloo", "ppo"],
)
def test_training_is_bitwise_the_same(
    kind: type[PolicyGradientModule], options: dict[str, Any], policy: str, tmp_path: Path
) -> None:
    weights, histories = [], []
    data = tiny.prompt_data(tmp_path)
    for callbacks in ([], [GradientVariance(every_n_train_steps=1, num_prompts=2, num_samples=2), NoGradients()]):
        torch.manual_seed(0)
        module = method(kind, policy, **options)
        steps = 2 * module.updates_per_batch
        history = tiny.fit(module, data, tmp_path, steps, callbacks=callbacks, precision="bf16-mixed")
        weights.append(tiny.weights(module))
        histories.append(
            [{name: value for name, value in step.items() if name.startswith("train/")} for step in history.steps]
        )
    assert tiny.are_equal(*weights)
    for step in histories[0] + histories[1]:
        step.pop("train/tokens_per_second")
    assert str(histories[0]) == str(histories[1])  # not-a-number equals itself
    assert callbacks[1].num_looks == 2
    assert {*RATIOS, HELPS} <= history.steps[0].keys()


def whole_gradients(module: PolicyGradientModule, batch: dict[str, Any], num_samples: int) -> Any:
    """Texts of sampled and greedy responses that the callback sees at the first step, and the samples' gradients."""
    sampling = replace(module.sampling, num_samples=num_samples)
    sampled, greedy = module.responder.sample_and_greedy(module.policy, batch, sampling, step=-1)
    gradients = []
    for row in range(len(sampled.response_ids)):
        module.zero_grad()
        response = sampled.rows(torch.tensor([row]))
        log_probs_of(module.policy, *response.sequences(), temperature=module.sampling.temperature).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.policy.parameters()]).double())
    module.zero_grad()
    return module.responder.texts(sampled), module.responder.texts(greedy), torch.stack(gradients)


class Peek(Callback):
    """Keeps the first batch, on its way to training."""

    batch: dict[str, Any]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch


def test_the_estimates_are_those_of_whole_gradients(policy: str, tmp_path: Path) -> None:
    num_prompts, num_samples = 3, 3
    module = method(ReMax, policy, optimizer=tiny.sgd(0.0), sampling=Sampling(max_new_tokens=6, temperature=0.4))
    peek = Peek()
    callback = GradientVariance(num_prompts=num_prompts, num_samples=num_samples, dimensions=2**20)
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, callbacks=[callback, peek])
    batch = {name: column[:num_prompts] for name, column in peek.batch.items()}
    texts, greedy, scores = whole_gradients(module, batch, num_samples)
    rewards = [reward_functions.letter_value(text) for text in texts]

    second = torch.zeros(4).double()
    terms = torch.zeros(len(texts), len(scores[0])).double()
    for i, reward in enumerate(rewards):
        first = i - i % num_samples
        siblings = [rewards[j] for j in range(first, first + num_samples) if j != i]
        others = [rewards[j] for j in range(len(rewards)) if j != i]
        base = [0.0, reward_functions.letter_value(greedy[i // num_samples])]
        base += [sum(siblings) / len(siblings), sum(others) / len(others)]
        second += (reward - torch.tensor(base).double()).square() * scores[i].square().sum()
        terms[i] = (reward - base[1]) * scores[i]
    products = terms @ terms.T - (terms @ terms.T).diag().diag()
    same = torch.arange(len(texts)) // num_samples
    within = products[same[:, None] == same].sum()
    variances = second - within / (num_samples - 1)
    variances[2] += within / (num_samples - 1) ** 2
    variances[3] += products.sum() / (len(texts) - 1) ** 2
    expected = (variances / variances[0])[1:].tolist()
    assert [history[name][0] for name in RATIOS] == pytest.approx(expected, rel=0.005)
    assert len({round(value, 3) for value in expected}) == 3


def test_one_token_responses_against_every_token(policy: str, tmp_path: Path) -> None:
    """What a large sample says of a prompt is what all tokens with their probabilities do."""
    module = method(ReMax, policy, optimizer=tiny.sgd(0.0), sampling=Sampling(max_new_tokens=1, temperature=3.0))
    callback, peek = GradientVariance(num_prompts=1, num_samples=250, dimensions=4096), Peek()
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, callbacks=[callback, peek])
    ids = peek.batch["prompt_ids"][:1][peek.batch["prompt_mask"][:1]]
    log_probs = (module.policy(ids[None]).logits[0, -1] / 3.0).log_softmax(-1)
    probs, size = log_probs.exp().double(), len(log_probs)
    scores = []
    for token in range(size):
        gradients = torch.autograd.grad(log_probs[token], list(module.policy.parameters()), retain_graph=True)
        scores.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    values = [
        reward_functions.letter_value(module.responder.texts(one_token(module, token))[0]) for token in range(size)
    ]
    rewards, stacked = torch.tensor(values).double(), torch.stack(scores)
    mean = (probs * rewards) @ stacked
    norms = probs * stacked.square().sum(1)
    plain, greedy = (norms @ (rewards - b).square() - mean @ mean for b in (0.0, rewards[log_probs.argmax()]))
    assert history[RATIOS[0]][0] == pytest.approx(float((greedy / plain).detach()), rel=0.15)


def one_token(module: PolicyGradientModule, token: int) -> Any:
    class Response:
        response_ids = torch.tensor([[token]])
        response_mask = torch.ones(1, 1, dtype=torch.bool)
        is_finite = torch.ones(1, dtype=torch.bool)

    return Response()


def fit_with(
    reward: Any, policy: str, folder: Path, rows: Sequence[dict[str, Any]] | None = None, **options: Any
) -> dict[str, float]:
    """Metrics of a step whose reward is another one."""
    module = method(ReMax, policy, optimizer=tiny.sgd(0.0), **options)
    callback = GradientVariance(num_prompts=4, num_samples=3, dimensions=64)
    with pytest.MonkeyPatch.context() as patch:
        scored = lambda _, columns, *texts, device: [reward(columns, each) for each in texts]  # noqa: E731
        patch.setattr(Scorer, "score", scored)
        return tiny.fit(module, tiny.prompt_data(folder, rows), folder, callbacks=[callback]).steps[0]


def test_a_constant_reward(policy: str, tmp_path: Path) -> None:
    found = fit_with(lambda batch, texts: torch.full((len(texts),), 0.3), policy, tmp_path)
    assert [found[name] for name in RATIOS] == pytest.approx([0, 0, 0], abs=1e-20)
    assert found[HELPS] == 1
    found = fit_with(lambda batch, texts: torch.zeros(len(texts)), policy, tmp_path)
    assert all(found[name] != found[name] for name in RATIOS)
    assert found[HELPS] == 0


def test_the_penalty_of_a_missing_stop_counts(policy: str, tmp_path: Path) -> None:
    """With no other reward, the ratio is that of rewards 0 and -1."""

    def nothing(batch: dict[str, Any], texts: list[str]) -> Tensor:
        return torch.zeros(len(texts))

    options = {"sampling": Sampling(max_new_tokens=3), "missing_stop_penalty": 1.0}
    found = fit_with(nothing, policy, tmp_path, **options)
    assert all(found[name] == found[name] for name in RATIOS)


def test_rows_without_a_reward_are_left_out(policy: str, tmp_path: Path) -> None:
    """Prompts 1 and 2 lose their greedy reward or all but one; prompt 3 loses one row: the rest alone counts."""
    plain = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, 1.0, 2.0, 2.0, 1.0, 3.0, 1.0, 2.0])
    gaps = plain.index_fill(0, torch.tensor([6, 8, 10]), torch.nan)

    def rewards(samples: Tensor, greedy: list[float]) -> Callable[[dict[str, Any], list[str]], Tensor]:
        return lambda batch, texts: samples if len(texts) == 12 else torch.tensor(greedy * 2)[: len(texts)]

    rows = [{"prompt": prompt} for prompt in tiny.PROMPTS[:4]]
    some = fit_with(rewards(gaps, [2.0, float("nan"), 1.0, 2.0]), policy, tmp_path, rows)
    none = fit_with(rewards(gaps * torch.nan, [2.0, 1.0, 1.0, 2.0]), policy, tmp_path, rows)
    # other numbers in the rows that do not count
    changed = gaps.index_fill(0, torch.tensor([3, 4, 5, 7]), 9.0)
    same = fit_with(rewards(changed, [2.0, float("inf"), 1.0, 2.0]), policy, tmp_path, rows)
    assert [some[name] for name in RATIOS] == [same[name] for name in RATIOS]
    assert all(some[name] == some[name] for name in [*RATIOS, HELPS])
    assert all(none[name] != none[name] for name in [*RATIOS, HELPS])


def draws(module: PolicyGradientModule, folder: Path, steps: int, every: int) -> list[dict[str, Any]]:
    """How the callback asks for responses, one entry for each estimate."""
    asked: list[dict[str, Any]] = []
    respond = Responder.sample_and_greedy

    def watched(*inputs: Any, **options: Any) -> Any:
        if options["step"] < 0:
            asked.append({**options, "num_prompts": len(inputs[2]["prompt_index"]), "sampling": inputs[3]})
        return respond(*inputs, **options)

    callback = GradientVariance(every, num_prompts=3, num_samples=2, dimensions=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Responder, "sample_and_greedy", watched)
        tiny.fit(module, tiny.prompt_data(folder), folder, steps, callbacks=[callback])
    return asked


def test_what_is_drawn_and_when(policy: str, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=0.7)
    asked = draws(method(ReMax, policy, sampling=sampling, greedy_max_new_tokens=3), tmp_path, 4, every=2)
    expected = {"greedy_max_new_tokens": 3, "num_prompts": 3, "sampling": replace(sampling, num_samples=2)}
    assert asked == [{**expected, "step": -1}, {**expected, "step": -3}]
    module = method(PPO, policy, num_epochs=2)  # two updates for each batch
    assert [each["step"] for each in draws(module, tmp_path, 8, every=2)] == [-1, -5]


def test_refusals(policy: str, tmp_path: Path) -> None:
    for name in ("every_n_train_steps", "num_prompts", "dimensions"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            GradientVariance(**{name: 0})
    with pytest.raises(ValueError, match=r"num_samples must be at least 2, .*, got 1"):
        GradientVariance(num_samples=1)
    module = method(ReMax, policy)
    module.sharding = object()  # type: ignore[assignment]
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(ValueError, match=r"GradientVariance does not work under fsdp2, .* use trainer.strategy=ddp"):
        GradientVariance().setup(trainer, module, "fit")
    GradientVariance().setup(trainer, module, "validate")
    sft = SFT(policy=ModelSource(path=policy), sampling=Sampling(max_new_tokens=1))
    with pytest.raises(ValueError, match="needs a policy that learns from rewards, got SFT; leave it out"):
        GradientVariance().setup(trainer, sft, "fit")


def test_the_command_line(policy: str, tmp_path: Path) -> None:
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    reward = {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}}
    model = {"policy": {"path": policy}, "reward": reward, "sampling": {"max_new_tokens": 4}, "kl_coef": 0.0}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": "Reinforce", "init_args": model},
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {"train": prompts, "validation": prompts, "batch_size": 2},
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    added = ["--trainer.callbacks+=GradientVariance", "--trainer.callbacks.every_n_train_steps=3"]
    cli.main(["fit", "--config", str(path), *added, "--trainer.callbacks.num_samples=2"])
    table = pandas.read_csv(tmp_path / "run" / "logs" / "version_0" / "metrics.csv")
    for name in [*RATIOS, HELPS, "time/gradient_variance"]:
        assert table.loc[table[name].notna(), "step"].tolist() == [0, 3], name
    saved = tmp_path / "run" / "logs" / "version_0" / "config.yaml"
    cli.main(["validate", "--config", str(saved), "--ckpt_path", "last"])
