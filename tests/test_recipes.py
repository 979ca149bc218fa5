"""The paper's recipes build the models they say, and run: each for two steps, with every model at a toy size."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ReadInstruction

from remax_lightning.cli import main
from remax_lightning.data.toy import make_toy_data
from remax_lightning.models.language_model import load_language_model
from remax_lightning.models.scalar_model import load_reward_model
from remax_lightning.models.source import ModelSource

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted((CONFIGS / "paper").glob("*.yaml"))
STAGES = ("sft", "reward_model", "remax")
HH_ROWS = 112052  # of Dahoas/full-hh-rlhf

POLICIES = {  # published numbers of parameters
    "gpt2": 124_439_808,
    "opt-1.3b": 1_315_758_080,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
}
REWARD_MODELS = {  # the same less the head over the vocabulary, which OPT has tied, plus the scalar head
    "opt-350m": 331_196_416 + 512,
    "llama-2-7b": 6_738_415_616 - 32_000 * 4096 + 4096,
    "ultrarm-13b": 13_015_864_320 + 5120 - 32_000 * 5120 + 5120,  # Llama-2-13B with one token more
    "distilbert-imdb": 66_955_010,  # with both labels
}


def name(path: Path) -> str:
    return path.stem


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def stage(path: Path) -> str:
    return next(stage for stage in STAGES if path.stem.endswith(stage))


def sources(values: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every model that a recipe names, and the key it stands under."""
    if isinstance(values, dict):
        if "architecture" in values:
            yield key, values
        for inner, value in values.items():
            yield from sources(value, inner)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root, with the toy data that the overlays read."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "configs").symlink_to(CONFIGS)
    make_toy_data(
        str(root / "runs/tiny/data"), num_demonstrations=20, num_preferences=20, num_prompts=20, num_held_out=8
    )
    return root


@pytest.fixture
def at_root(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def test_there_are_recipes() -> None:
    published = {"opt_1.3b_sft", "opt_1.3b_reward_model", "opt_1.3b_remax", "llama2_7b_sft", "llama2_7b_reward_model"}
    assert published | {"llama2_7b_remax", "mistral_7b_remax", "gpt2_imdb_remax"} == {name(path) for path in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_models_have_the_published_sizes(recipe: Path, at_root: Path) -> None:
    found = dict(sources(read(recipe)))
    assert found
    for key, values in found.items():
        folder = values["architecture"]
        source = ModelSource(path=folder, architecture=folder, tokenizer="runs/tiny/data/tokenizer")
        if key == "policy":
            model, published = load_language_model(source, on_meta=True), POLICIES
        else:
            label = values.get("label")
            model, published = load_reward_model(source, trained=False, label=label, on_meta=True), REWARD_MODELS
        number = sum(parameter.numel() for parameter in model.parameters())
        assert number == published[Path(folder).name]


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_runs(recipe: Path, at_root: Path) -> None:
    overlay = f"configs/overlays/tiny/{stage(recipe)}.yaml"
    main(["fit", "--config", f"configs/paper/{recipe.name}", "--config", overlay])
    folder = at_root / "runs/tiny" / stage(recipe)
    lines = (folder / "logs").glob("version_*/metrics.csv")
    rows = max(lines, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8").splitlines()
    columns = rows[0].split(",")
    steps = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
    norms = [float(step["train/grad_norm"]) for step in steps if step["train/grad_norm"]]
    assert len(norms) == 2
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)

    exported = json.loads((folder / "hf/config.json").read_text(encoding="utf-8"))
    (_, trained), *_ = sources(read(recipe))
    planned = json.loads((CONFIGS.parent / trained["architecture"] / "config.json").read_text(encoding="utf-8"))
    assert exported["model_type"] == planned["model_type"]
    ending = "ForSequenceClassification" if stage(recipe) == "reward_model" else planned["architectures"][0][-8:]
    assert exported["architectures"][0].endswith(ending)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("model", ["opt_1.3b", "llama2_7b"])
def test_the_stages_share_the_rows_without_overlap(model: str, split: str) -> None:
    slices = [read(CONFIGS / f"paper/{model}_{each}.yaml")["data"]["init_args"][split] for each in STAGES]
    names, splits = zip(*(each.split(":", 1) for each in slices), strict=True)
    assert set(names) == {"Dahoas/full-hh-rlhf"}
    kind = splits[0].partition("[")[0]
    ranges = [ReadInstruction.from_spec(each).to_absolute({kind: HH_ROWS})[0] for each in splits]
    bounds = [(each.from_ or 0, HH_ROWS if each.to is None else each.to) for each in ranges]
    assert [start for start, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert [round((end - start) / HH_ROWS, 3) for start, end in bounds] == [0.2, 0.4, 0.4]


def test_ultrarm_reads_its_own_template(at_root: Path) -> None:
    reward = read(CONFIGS / "paper/mistral_7b_remax.yaml")["model"]["init_args"]["reward"]["init_args"]
    source = ModelSource(
        path=reward["path"], tokenizer="runs/tiny/data/tokenizer", chat_template=reward["chat_template"]
    )
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    words = source.load_tokenizer()
    words.bos_token = words.eos_token
    whole = words.apply_chat_template([*messages, *messages], tokenize=False)
    assert whole == f"{words.eos_token}Human: Hi.\nAssistant: Hello.\nHuman: Hi.\nAssistant: Hello."
    prompt = words.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"{words.eos_token}Human: Hi.\nAssistant:"
