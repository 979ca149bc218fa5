"""Model folders of others: broken files are named, and nothing that comes with a model is run or fetched."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny

from remax_lightning.models.language_model import load_language_model
from remax_lightning.models.scalar_model import load_reward_model
from remax_lightning.models.source import ModelSource


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.save_model(tmp_path_factory.mktemp("models") / "policy"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def change(file: Path, **values: Any) -> None:
    """Set values in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def load(folder: Path, **options: Any) -> Any:
    return load_language_model(ModelSource(path=str(folder), **options))


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[: len(text) // 3],
    "empty": lambda text: "",
    "binary": lambda text: "\x00\x01",
    "list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"]
)
def test_a_broken_file_is_named_in_one_sentence(name: str, damage: str, folder: Path) -> None:
    file = folder / name
    file.write_text(DAMAGES[damage](file.read_text() if file.exists() else '{"base_model_name_or_path": "x"}'))
    with pytest.raises(ValueError, match=r"is not valid JSON|must hold a JSON object") as raised:
        load(folder)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}; give the folder of a Hugging Face model"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"model_type": "foo"}, "configuration of .* has model type `foo`"),
        ("config.json", {"hidden_size": "x"}, "Field 'hidden_size' expected int, got str"),
        ("config.json", {"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ("tokenizer.json", {"model": {"type": "Foo"}}, "the tokenizer of .* cannot be loaded: data did not match"),
        (
            "generation_config.json",
            {"eos_token_id": "x"},
            "eos_token_id must be the id of a token, or a list .* got 'x'",
        ),
        ("generation_config.json", {"eos_token_id": [1, None, [2]]}, "eos_token_id must be the id of a token"),
    ],
)
def test_a_wrong_value_is_said_in_one_sentence(name: str, values: dict[str, Any], message: str, folder: Path) -> None:
    change(folder / name, **values)
    with pytest.raises(ValueError, match=message) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("loader", [load_language_model, partial(load_reward_model, trained=False)])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"attn_implementation": "kernels-community/flash-attn2"},
            "attn_implementation='kernels-community/flash-attn2'",
        ),
        (
            {"_attn_implementation": "anybody/attention:forward"},
            "attn_implementation='anybody/attention:forward', which",
        ),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2', which may be fetched"),
        ({"experts_implementation": "deepgemm"}, "asks for experts_implementation='deepgemm'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"are quantized \(gptq\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"are quantized \(fp8\)"),
    ],
)
def test_a_configuration_fetches_no_code(
    loader: Callable[[ModelSource], Any], values: dict[str, Any], message: str, folder: Path
) -> None:
    change(folder / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        loader(ModelSource(path=str(folder)))


def test_the_users_attention_takes_the_place_of_the_configurations(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="kernels-community/flash-attn2")
    assert load(folder, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="got kernels-community/flash-attn2, which would be fetched from the hub"):
        load(folder, attn_implementation="kernels-community/flash-attn2")


def test_random_weights_need_no_quantization(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "fp8"})
    assert load(folder, tiny=True).config.hidden_size == 64


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).touch()

class Evil(LlamaConfig):
    model_type = "evil"
"""


@pytest.mark.parametrize(
    ("name", "values", "refusal"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}}, None),
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "needs Python code"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}, None),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
            "needs Python code that comes with it",
        ),
    ],
)
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_for(
    name: str, values: dict[str, Any], refusal: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = folder / "ran"
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    change(folder / name, **values)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who says yes to whatever transformers asks
    if refusal is None:
        assert not hasattr(load(folder).config, "auto_map")
    else:
        with pytest.raises(ValueError, match=refusal):
            load(folder)
    assert not mark.exists()
