"""One step on 16 prompts: TRL's ``RLOOTrainer`` with two samples a prompt against ReMax and RLOO of this project.

A Llama with random weights (hidden 256, 4 layers, untied), fp32, one thread; prompts of 32 to 64 tokens, 128 new tokens
for every row (the stop token is too unlikely to be drawn), a reward function over text, a reference model for the KL
penalty, AdamW, every step logged; both start from the same Hugging Face folder, ours from the command line. A step
lasts from the end of one to the end of the next, so it has all that a trainer does around it: data, logging, callbacks.
The first is a warm-up, then the fastest counts. Memory is the peak up to the end of the last step, beyond that of the
imports. Loading, the self-check, evaluation, checkpoints and the export are left out of the time.

Both train in micro-batches of 16 rows: for ReMax that is the whole batch, its default, and TRL was fastest with it (4,
8, 16 and 32 rows were tried; 8 is its default, and ``--micro_batch_size`` changes both). TRL draws the 32 responses of
a step at once; gradient checkpointing, which it has on by default, is off, since that is faster. ReMax draws 32
responses as well, but half of them, the greedy ones, are not trained on.

In the cases named same algorithm ours is RLOO with two samples too: the same rows, the same objective, advantages
neither normalised nor clipped. What differs: TRL computes the sampler's log-probs again, ours has them from the
sampler; TRL takes the KL of a whole response from its reward, ours from each token for those from itself on, which
costs the same and has the same expected gradient; TRL divides by responses, ours by tokens, here a constant.
``tests/test_parity_trl.py`` holds the two gradients against each other.

The second table compares the phases of the step and takes the time ratio apart: the factor of the algorithm (fewer
rows), that of the log-prob head (TRL's runs without its Triton kernels on a CPU), and the rest.

    pip install -e '.[bench]'
    python benchmarks/step.py --output benchmarks/results/step.json
"""

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from harness import argument_parser, chosen, conclude, contend, one_thread, peak_mib
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from remax_lightning.cli import main as command_line
from remax_lightning.models import next_token

try:
    from trl import RLOOConfig, RLOOTrainer
    from trl.kernels import ChunkedLogProbFunction
except ImportError:
    RLOOTrainer = None

CASES = [
    {"name": "remax 8k", "vocabulary": 8192, "method": "ReMax"},
    {"name": "remax 50k", "vocabulary": 50304, "method": "ReMax"},
    {"name": "same algorithm 8k", "vocabulary": 8192, "method": "RLOO"},
    {"name": "same algorithm 50k", "vocabulary": 50304, "method": "RLOO"},
]
PROMPTS, NEW_TOKENS, LONGEST_PROMPT = 16, 128, 64
OPTIMIZER = {
    "lr": 1e-6,
    "betas": [0.9, 0.95],
    "weight_decay": 0.1,
    "fused": True,
}  # TRL has the fused one as its default
KL_COEF = 0.05
ROWS = {
    "rollout": (32, 32),
    "reward": (32, 32),
    "old log-probs": (32, 0),  # ours has them from its sampler
    "reference": (32, 16),
    "update": (32, 16),
    "other": (32, 32),
}
"""Responses of the peer and of ReMax that each phase of a step works on; ``other`` is what is in none of them."""
RLOO_ROWS = ROWS | {"reference": (32, 32), "update": (32, 32)}
"""The same of RLOO."""


class Clock:
    """CPU seconds of each step by its innermost phase, and the words that it scored."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.step: dict[str, float] = defaultdict(float)
        self.running = ["other"]
        self.last, self.peak = 0.0, 0.0

    def note(self) -> None:
        """Give the time since the last event to the innermost phase; the head is a part of each phase that has it."""
        now = time.process_time()
        phase = self.running[-1]
        self.step[f"{self.running[-2]}, {phase}" if phase == "head" else phase] += now - self.last
        self.last = now

    def start(self, phase: str) -> None:
        """Enter a phase."""
        self.note()
        self.running.append(phase)

    def stop(self) -> None:
        """Leave a phase."""
        self.note()
        self.running.pop()

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, noted as a phase."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return timed

    def end_step(self) -> None:
        """Note a step, and begin the next one."""
        self.note()
        self.steps.append(dict(self.step))
        self.step.clear()
        self.peak = peak_mib()


CLOCK = Clock()


def distinct_words(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """Reward: the share of a response's words that are distinct."""
    words = [response.split() for response in responses]
    CLOCK.step["words"] += sum(map(len, words))
    return [len(set(each)) / max(len(each), 1) for each in words]


class Phases(Profiler):
    """Tells the clock of the phases and steps of a Lightning trainer."""

    def start(self, action_name: str) -> None:
        """Enter a phase; Lightning has many actions that are none."""
        if action_name in ROWS:
            CLOCK.start(action_name)

    def stop(self, action_name: str) -> None:
        """Leave a phase or a step."""
        if action_name in ROWS:
            CLOCK.stop()
        if action_name == "run_training_batch":
            CLOCK.end_step()


class StepEnds(TrainerCallback):
    """Tells the clock of the steps of a transformers trainer, and writes its log."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin with what is no other phase."""
        CLOCK.start("update")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        CLOCK.stop()
        CLOCK.end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Add a line to the log."""
        with open(Path(args.output_dir) / "log.jsonl", "a") as file:
            file.write(json.dumps(logs) + "\n")


def ours(case: dict[str, Any]) -> None:
    """ReMax or RLOO, from the command line."""
    path = Path(case["folder"]) / "ours.yaml"
    path.write_text(yaml.safe_dump(our_config(case, Path(case["folder"]))))
    for name in [each for each in vars(next_token) if each.startswith("fused_")]:
        setattr(next_token, name, CLOCK.during("head", getattr(next_token, name)))
    command_line(["fit", "--config", str(path)])


def our_config(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What configs/remax.yaml or rloo.yaml has, for this model, without what is not measured."""
    return {
        "trainer": {
            "default_root_dir": str(folder / "ours"),
            "accelerator": "cpu",
            "max_steps": case["steps"],
            "profiler": {"class_path": "__main__.Phases"},
        },
        "model": {
            "class_path": case["method"],
            "init_args": {
                "policy": {"path": str(folder / "model")},
                "reward": {"class_path": "FunctionReward", "init_args": {"function": "__main__.distinct_words"}},
                "sampling": {
                    "max_new_tokens": case["max_new_tokens"],
                    "num_samples": 2 if case["method"] == "RLOO" else 1,
                },
                "kl_coef": KL_COEF,
                "micro_batch_size": case.get("micro_batch_size"),
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": OPTIMIZER},
            },
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {
                "train": str(folder / "prompts.jsonl"),
                "batch_size": PROMPTS,
                "max_prompt_length": LONGEST_PROMPT,
            },
        },
        "hf_export": {"enabled": False},
    }


def peer(case: dict[str, Any]) -> None:
    """RLOO, by TRL."""
    folder = Path(case["folder"])
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    trainer = RLOOTrainer(
        model=str(folder / "model"),
        reward_funcs=lambda prompts, completions, **columns: distinct_words(prompts, completions),
        args=rloo_config(case, folder),
        train_dataset=Dataset.from_list(rows),
        callbacks=[StepEnds()],
    )
    note_phases(trainer)
    trainer.train()


def rloo_config(case: dict[str, Any], folder: Path) -> Any:
    """All 32 responses of a step are drawn at once: without ``steps_per_generation`` TRL does so."""
    return RLOOConfig(
        output_dir=str(folder / "peer"),
        max_steps=case["steps"],
        num_generations=2,
        num_iterations=1,
        per_device_train_batch_size=case["micro_batch_size"],
        gradient_accumulation_steps=2 * PROMPTS // case["micro_batch_size"],
        max_completion_length=case["max_new_tokens"],
        beta=KL_COEF,
        learning_rate=OPTIMIZER["lr"],
        adam_beta1=OPTIMIZER["betas"][0],
        adam_beta2=OPTIMIZER["betas"][1],
        weight_decay=OPTIMIZER["weight_decay"],
        lr_scheduler_type="cosine",
        disable_dropout=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )


def note_phases(trainer: Any) -> None:
    """Wrap what is a phase of an RLOOTrainer, and its head; the rest of a training step is the update."""
    log_probs = trainer._get_per_token_logps_and_entropies

    def of_a_phase(model: Any, *args: Any, **kwargs: Any) -> Any:
        phase = "reference" if model is trainer.ref_model else "old log-probs"
        return CLOCK.during("update" if torch.is_grad_enabled() else phase, log_probs)(model, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = of_a_phase
    trainer._prepare_inputs = CLOCK.during("other", trainer._prepare_inputs)
    trainer._generate = CLOCK.during("rollout", trainer._generate)
    trainer._calculate_rewards = CLOCK.during("reward", trainer._calculate_rewards)
    for name in ("forward", "backward"):
        head = CLOCK.during("head", getattr(ChunkedLogProbFunction, name))
        setattr(ChunkedLogProbFunction, name, staticmethod(head))


def work(case: dict[str, Any], contender: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train; the fastest step after the first one."""
    before = peak_mib()
    contender(case)
    words = [step.pop("words") for step in CLOCK.steps][1:]
    phases = min(CLOCK.steps[1:], key=lambda step: sum(step.values()))
    return {
        "cpu_seconds": sum(phases.values()),
        "peak_mib": CLOCK.peak - before,
        "phases": phases,
        "answer": words,
    }


def prepare(case: dict[str, Any], folder: Path) -> None:
    """Write the model with its tokenizer, a word a token, and the prompts."""
    torch.manual_seed(0)
    size = case["vocabulary"]
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0").save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    make_unlikely(model, token=0)
    model.save_pretrained(folder / "model")
    lengths = torch.randint(32, LONGEST_PROMPT + 1, (PROMPTS * case["steps"],)).tolist()
    prompts = [" ".join(f"w{index}" for index in torch.randint(1, size, (length,))) for length in lengths]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


@torch.no_grad()
def make_unlikely(model: LlamaForCausalLM, token: int) -> None:
    """Give a token a log-prob of -16 or less everywhere: one hidden value is much the same at all positions."""
    model.model.embed_tokens.weight[:, 0] = 3.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[token] = 0.0
    model.lm_head.weight[token, 0] = -0.7


def compare_phases(case: dict[str, Any]) -> dict[str, Any]:
    """The case with its phases side by side, and the time ratio as a product.

    ``algorithm_ratio`` is how much longer our step would take with the peer's rows at our own seconds a row,
    ``head_ratio`` how much longer again with the peer's log-prob head; ``rest_ratio`` is what remains.
    ``algorithm_share`` is the first one's part, in logarithms.
    """
    seconds = {contender: case[contender].pop("phases") for contender in ("peer", "ours")}
    rows = RLOO_ROWS if case["method"] == "RLOO" else ROWS
    phases = {name: compare(name, rows[name], **seconds) for name in rows}
    for contender in seconds:
        case[contender]["prompts_per_cpu_second"] = PROMPTS / case[contender]["cpu_seconds"]
    with_rows = sum(at_peer_rows(each, "ours") for each in phases.values())
    with_head = with_rows + sum(each["peer_head"] - at_peer_rows(each, "ours_head") for each in phases.values())
    algorithm_ratio = with_rows / case["ours"]["cpu_seconds"]
    return {
        **{key: value for key, value in case.items() if key != "method"},
        "algorithm_ratio": algorithm_ratio,
        "head_ratio": with_head / with_rows,
        "rest_ratio": case["peer"]["cpu_seconds"] / with_head,
        "algorithm_share": math.log(algorithm_ratio) / math.log(case["time_ratio"]),
        "phases": phases,
    }


def compare(phase: str, rows: tuple[int, int], peer: dict[str, float], ours: dict[str, float]) -> dict[str, Any]:
    """CPU seconds of a phase of both, and those of the log-prob head in it."""
    peer_rows, ours_rows = rows
    each: dict[str, Any] = {"peer_rows": peer_rows, "ours_rows": ours_rows}
    for contender, seconds in (("peer", peer), ("ours", ours)):
        head = seconds.get(f"{phase}, head", 0.0)
        each |= {contender: seconds.get(phase, 0.0) + head, f"{contender}_head": head}
    return {**each, "ratio_per_row": each["peer"] / at_peer_rows(each, "ours") if ours_rows else None}


def at_peer_rows(phase: dict[str, Any], seconds: str) -> float:
    """What our seconds of a phase would be with the peer's rows."""
    return phase[seconds] * phase["peer_rows"] / phase["ours_rows"] if phase["ours_rows"] else 0.0


def phase_table(cases: list[dict[str, Any]]) -> Table:
    """A line for each phase of each case, and one for the factors of its time ratio."""
    table = Table("case", "phase", "rows", "peer, CPU s (head)", "ours, CPU s (head)", "time per row, peer / ours")
    for case in cases:
        for name, each in case["phases"].items():
            rows = f"{each['peer_rows']} / {each['ours_rows']}"
            seconds = (f"{each[who]:.2f} ({each[f'{who}_head']:.2f})" for who in ("peer", "ours"))
            ratio = "" if each["ratio_per_row"] is None else f"{each['ratio_per_row']:.2f}"
            table.add_row(case["name"], name, rows, *seconds, ratio)
        factors = (f"{case[f'{name}_ratio']:.2f} ({name})" for name in ("algorithm", "head", "rest"))
        table.add_row(case["name"], f"time ratio {case['time_ratio']:.2f}", "=", *factors, end_section=True)
    return table


def run_case(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Run a case in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(case, Path(folder))
        return compare_phases({**contend(__file__, {**case, "folder": folder}, repeats), "method": case["method"]})


def main() -> None:
    """Run all cases, or one of them as a worker."""
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, the first of which is a warm-up")
    parser.add_argument("--micro_batch_size", type=int, default=16, help="rows of each forward and backward pass")
    arguments = parser.parse_args()
    if RLOOTrainer is None:
        raise SystemExit("trl, the peer, is not installed; install it by: pip install -e '.[bench]'")
    if arguments.worker:
        one_thread()
        print(json.dumps(work(arguments.case, {"peer": peer, "ours": ours}[arguments.worker])))
        return
    settings = {"steps": arguments.steps, "micro_batch_size": arguments.micro_batch_size, "max_new_tokens": NEW_TOKENS}
    cases = [run_case(case, arguments.repeats) for case in chosen(CASES, arguments, **settings)]
    Console().print(phase_table(cases))
    conclude("step", cases, arguments.output, packages=("trl",))


if __name__ == "__main__":
    main()
