"""What goes wrong in a run: a callback that strikes once at a place, and rewards that misbehave."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.rewards import Reward

SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sighup": signal.SIGHUP, "sigkill": signal.SIGKILL}
ONE_HOUR = 3600 * 10**9


class Inject(Callback):
    """Strikes once, at a place; and notes each finished optimizer step in ``steps<rank>.log`` of the run's folder.

    Args:
        at: The place: ``self_check``, ``rollout``, ``forward``, ``backward``, ``optimizer``, ``stepped``
            (within the optimizer's step, when it has changed the weights), ``batch_end``, ``validation``, ``test``,
            ``save`` and ``saved`` (before and after a checkpoint gets its name), ``export`` and ``exported``; or
            ``start``.
        action: What happens there.
        batch: The training batch of the places within one.
        rank: The process.
        forever: At each batch from then on.
    """

    def __init__(
        self, at: str = "", action: str = "error", batch: int = 3, rank: int = 0, forever: bool = False
    ) -> None:
        self.at, self.action, self.batch, self.rank, self.forever = at, action, batch, rank, forever
        self.current: int | None = None
        self.struck_in: int | None = -1

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Take the places outside Lightning's hooks."""
        self.trainer, self.module = trainer, pl_module
        os.replace = self._around(os.replace, "save", "saved", lambda source, *_: str(source).endswith(".ckpt.partial"))
        PreTrainedModel.save_pretrained = self._around(  # type: ignore[method-assign]
            PreTrainedModel.save_pretrained, "export", "exported", lambda *_: True
        )

    def _around(self, call: Any, before: str, after: str, counts: Callable[..., bool]) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if counts(*args):
                self._reach(before)
            result = call(*args, **kwargs)
            if counts(*args):
                self._reach(after)
            return result

        return wrapped

    def _reach(self, place: str) -> None:
        within = place not in ("start", "self_check", "validation", "test", "save", "saved", "export", "exported")
        if place != self.at or self.trainer.global_rank != self.rank or self.trainer.sanity_checking:
            return
        if within and (self.current is None or self.current < self.batch):
            return
        if self.struck_in == self.current or (self.struck_in != -1 and not self.forever):
            return
        self.struck_in = self.current
        getattr(self, self.action, partial(self.send, self.action))()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Watch the model."""
        self._reach("start")
        model = pl_module.trained_model

        def watch(*args: Any) -> None:
            if self.current is None:
                self._reach("self_check")
            else:
                self._reach("forward" if torch.is_grad_enabled() else "rollout")

        model.register_forward_pre_hook(watch)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count the steps."""
        path = Path(trainer.default_root_dir) / f"steps{trainer.global_rank}.log"

        def stepped(*args: Any) -> None:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{trainer.global_step + 1}\n")  # Lightning counts it next
            self._reach("stepped")

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *args: self._reach("optimizer"))
            optimizer.register_step_post_hook(stepped)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the batches."""
        self.current = 0 if self.current is None else self.current + 1

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        """After the gradients of a micro-batch are there."""
        self._reach("backward")

    def on_train_batch_end(self, *args: Any) -> None:
        """After a training batch."""
        self._reach("batch_end")

    def on_validation_batch_start(self, *args: Any) -> None:
        """In a validation."""
        self._reach("validation")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """In a test, after its second batch."""
        if batch_idx == 1:
            self._reach("test")

    # actions

    def send(self, name: str) -> None:
        """Send a signal to this process."""
        os.kill(os.getpid(), SIGNALS[name])

    def error(self) -> None:
        """An error of the user's code."""
        raise RuntimeError("injected")

    def oom(self) -> None:
        """What torch raises when a GPU's memory is full."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (injected)")

    def nan_gradient(self) -> None:
        """The gradient of this forward pass is not finite, before the ranks add theirs up."""
        self._spoil_gradient(torch.nan)

    def inf_gradient(self) -> None:
        """The gradient of this forward pass is not finite, before the ranks add theirs up."""
        self._spoil_gradient(torch.inf)

    def _spoil_gradient(self, value: float) -> None:
        parameter = next(self.module.trained_model.parameters())
        # a step is skipped for one micro-batch with such a gradient
        handle = parameter.register_hook(lambda gradient: (handle.remove(), torch.full_like(gradient, value))[1])

    def nan_weight(self) -> None:
        """A weight that is not a number."""
        with torch.no_grad():
            next(self.module.trained_model.parameters()).view(-1)[0] = torch.nan

    def triple_weights(self) -> None:
        """A loss spike."""
        with torch.no_grad():
            for parameter in self.module.trained_model.parameters():
                parameter.mul_(3)

    def full_disk(self) -> None:
        """No file can become longer than some bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    def read_only(self) -> None:
        """The file system cannot be written to any more."""
        import builtins
        import errno

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

        given = builtins.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and "checkpoints" in str(file):
                refuse(file)
            return given(file, mode, *args, **kwargs)

        builtins.open = opened
        os.unlink = os.replace = os.remove = os.mkdir = refuse  # type: ignore[assignment]

    def clock_back(self) -> None:
        """The clock steps back by an hour."""
        now, now_ns = time.time, time.time_ns
        time.time, time.time_ns = lambda: now() - 3600, lambda: now_ns() - ONE_HOUR

    def kill_worker(self) -> None:
        """A worker of the data loader dies."""
        import multiprocessing

        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        time.sleep(0.2)


# rewards

CALLS = 0


def length(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """A reward that responses differ in."""
    return [0.1 * len(response) - 0.3 * response.count("e") for response in responses]


def nth_call(number: int) -> bool:
    """Whether this is the n-th call of this process; the self-check makes the first ones."""
    global CALLS
    CALLS += 1
    return number == CALLS


ONCE = 8  # in the middle of training: the self-check takes two calls, each batch one, each batch of a validation one


def _row(value: object, prompts: Sequence[object], responses: Sequence[str]) -> list[Any]:
    rewards: list[Any] = length(prompts, responses)
    if nth_call(ONCE):
        rewards[0] = value
    return rewards


nan_row = partial(_row, float("nan"))
inf_row = partial(_row, float("inf"))
minus_inf_row = partial(_row, float("-inf"))
huge_row = partial(_row, 1e30)
overflow_row = partial(_row, 10**400)
none_row = partial(_row, None)
text_row = partial(_row, "abc")


def _batch(change: Callable[[list[float]], Any], prompts: Sequence[object], responses: Sequence[str]) -> Any:
    rewards = length(prompts, responses)
    return change(rewards) if nth_call(ONCE) else rewards


def _fail(rewards: list[float]) -> None:
    raise TimeoutError("the judge did not answer")


def _exit(rewards: list[float]) -> None:
    raise SystemExit(0)


none_batch = partial(_batch, lambda rewards: None)
meta_batch = partial(_batch, lambda rewards: torch.empty(len(rewards), device="meta"))
dict_batch = partial(_batch, lambda rewards: dict(enumerate(rewards)))
text_batch = partial(_batch, lambda rewards: "1" * len(rewards))
too_few = partial(_batch, lambda rewards: rewards[:-1])
too_many = partial(_batch, lambda rewards: [*rewards, 0.0])
raises_once = partial(_batch, _fail)
exits = partial(_batch, _exit)


def raises_later(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Works while the run is checked, then never again."""
    return _fail(length(prompts, responses)) if nth_call(0) or CALLS > 4 else length(prompts, responses)  # type: ignore[return-value]


def raises(prompts: Sequence[object], responses: Sequence[str]) -> None:
    """Never works."""
    raise TimeoutError("the judge did not answer")


def equal(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Tells nothing apart."""
    return [1.0] * len(responses)


def equal_later(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Tells nothing apart any more."""
    nth_call(0)
    return length(prompts, responses) if CALLS <= 4 else [1.0] * len(responses)


def generator(prompts: Sequence[object], responses: Sequence[str]) -> Iterator[float]:
    """The same rewards, one by one."""
    yield from length(prompts, responses)


def column_vector(prompts: Sequence[object], responses: Sequence[str]) -> Tensor:
    """The same rewards in another form, with a gradient and a lot of output."""
    print("\x1b]0;title\x07" + "x" * 20_000)
    return torch.tensor(length(prompts, responses), dtype=torch.float64, requires_grad=True)[:, None]


def mutates(prompts: list[Any], responses: list[str]) -> list[float]:
    """The same rewards; leaves nothing as it was."""
    rewards = length(prompts, responses)
    for prompt in prompts:
        if isinstance(prompt, list):
            prompt.append({"role": "user", "content": "more"})
    prompts.clear()
    responses.reverse()
    return rewards


def disturbs(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """The same rewards; changes the folder and all seeds."""
    import random

    torch.manual_seed(CALLS)
    random.seed(CALLS)
    os.chdir("/")
    return length(prompts, responses)


def no_grad(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """The same rewards; switches gradients off."""
    torch.set_grad_enabled(False)
    return length(prompts, responses)


def hangs(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Does not return any more."""
    if nth_call(ONCE):
        Path("hangs").touch()
        time.sleep(600)
    return length(prompts, responses)


def worse(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Rewards vowels, so that the policy runs away from where it started."""
    return [30.0 * sum(map(response.count, "aeiouAEIOU")) / max(len(response), 1) for response in responses]


def fails_on_rank_1(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Works in one process only."""
    nth_call(0)
    return _fail([]) if os.environ.get("RANK") == "1" and CALLS > 4 else length(prompts, responses)  # type: ignore[return-value]


class MiscountingReward(Reward):
    """A reward class that once returns another number of rewards than of responses.

    Args:
        extra: By how many.
    """

    def __init__(self, extra: int) -> None:
        self.extra = extra

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str], **columns: Sequence[object]) -> Tensor:
        """Rewards."""
        rewards = torch.tensor(length(prompts, responses))
        if not nth_call(ONCE):
            return rewards
        return rewards[: self.extra] if self.extra < 0 else torch.cat([rewards, torch.zeros(self.extra)])
