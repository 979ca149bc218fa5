"""A whole step of ReMax takes what its plan says, measured on the CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback
from plan.measured import PeakMemory

from remax_lightning.models.source import ModelSource
from remax_lightning.modules import ReMax
from remax_lightning.plan.cache import DryRunCache
from remax_lightning.plan.models import ModelSpec, Optimizer
from remax_lightning.plan.phases import plan
from remax_lightning.plan.recipe import Layout, Recipe
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import Sampling

pytestmark = pytest.mark.slow

PROMPT, RESPONSE = 40, 60  # tokens


class Endless(ReMax):
    """Every response has its full length."""

    def configure_model(self) -> None:
        super().configure_model()
        self.responder = replace(self.responder, stop_token_ids=[10**6])
        self.collector = replace(self.collector, responder=self.responder)


class SecondStep(Callback):
    """The most memory of the second step beyond what is there all the time; from then on Adam has its states."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.memory = PeakMemory()
        if batch_idx == 1:
            self.memory.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.memory.__exit__()


@pytest.mark.parametrize(
    ("prompts", "micro_batch_size", "checkpointed", "worst"),
    [(6, 3, False, "training"), (6, 3, True, "training"), (24, 1, True, "rollout"), (6, 6, True, "training")],
)
def test_a_step_takes_what_is_planned(
    prompts: int, micro_batch_size: int, checkpointed: bool, worst: str, tmp_path: Path
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    folder = tiny.save_model(tmp_path / "policy", **shape)
    rows = [{"prompt": "a" * PROMPT} for _ in range(2 * prompts)]
    arguments = {
        "policy": ModelSource(path=folder),
        "sampling": Sampling(max_new_tokens=RESPONSE),
        "micro_batch_size": micro_batch_size,
        "activation_checkpointing": checkpointed,
    }
    module = Endless(
        **arguments,
        kl_coef=0.1,
        reward=FunctionReward("reward_functions.letter_values"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_schedule="constant",
    )
    measured = SecondStep()
    data = tiny.prompt_data(tmp_path, rows, batch_size=prompts, max_prompt_length=PROMPT)
    tiny.fit(module, data, tmp_path, steps=2, callbacks=[measured])

    recipe = Recipe(
        name="ReMax",
        model=ModelSpec(ModelSource(path=folder), "model.policy", is_trained=True, is_checkpointed=checkpointed),
        optimizer=Optimizer("torch.optim.AdamW", {"lr": 1e-6}),
        layout=Layout(1),
        batch_size=prompts,
        prompt_length=PROMPT,
        length=PROMPT + RESPONSE,
        micro_batch_size=micro_batch_size,
        sampling=Sampling(max_new_tokens=RESPONSE),
        decodes_greedy=True,
        has_reference=True,
    )
    planned = plan(recipe, DryRunCache())
    states = planned.peaks["rollout"].terms
    always = sum(states[term] for term in ("master weights", "optimizer states", "reference"))
    assert max(planned.peaks, key=lambda phase: planned.peaks[phase].total) == worst
    assert planned.peak - always == pytest.approx(measured.memory.peak, rel=0.1)
