"""What comes from others - configurations, data, models - runs no code, fetches nothing and does not hang."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import tiny
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_info

from remax_lightning import cli, cli_errors
from remax_lightning.cli_arguments import Parser
from remax_lightning.cli_errors import _classes_in, _concrete
from remax_lightning.cli_limits import load_bounded_yaml
from remax_lightning.models.visible_text import visible

CANARY = """
from pathlib import Path

def touch(path):
    Path(path).touch()

class Touching:
    def __init__(self, path: str):
        Path(path).touch()

    def __call__(self, *args):
        return args
"""
MARK = "code_ran"
SUBCOMMANDS = {
    "fit": (),
    "validate": (),
    "test": (),
    "predict": (),
    "export": ("--ckpt_path", "x.ckpt", "--output_dir", "out"),
    "plan": ("--gpus", "1"),
}


def calls(folder: Path) -> dict[str, dict[str, Any]]:
    """Functions and classes that a configuration must not have called, with arguments that leave a mark if it has."""
    mark = str(folder / MARK)
    code = f"open({mark!r}, 'w').close()"
    return {
        "os.system": {"command": f"touch {mark}"},
        "os.mkdir": {"path": mark},
        "subprocess.Popen": {"args": ["touch", mark]},
        "subprocess.run": {"args": ["touch", mark]},
        "subprocess.check_output": {"cmd": ["touch", mark]},
        "runpy.run_path": {"path_name": str(folder / "evil.py")},
        "builtins.eval": {"source": code},
        "builtins.exec": {"source": code},
        "importlib.import_module": {"name": "evil"},
        "pathlib.Path.write_text": {"self": mark, "data": "x"},
        "pathlib.Path.touch": {"self": mark},
        "shutil.copy": {"src": str(folder / "evil.py"), "dst": mark},
        "shutil.rmtree": {"path": str(folder / "kept")},
        "webbrowser.open": {"url": mark},
        "timeit.timeit": {"stmt": code, "number": 1},
        "logging.FileHandler": {"filename": mark},
        "remax_lightning.data.toy.make_toy_data": {"output_dir": mark},
        "canary.touch": {"path": mark},
        "canary.Touching": {"path": mark},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a model, prompts, a run's configuration and code that leaves a mark."""
    folder = tmp_path_factory.mktemp("security")
    tiny.save_model(folder / "policy")
    prompts = tiny.write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(folder / MARK)!r}).touch()\n")
    (folder / "canary.py").write_text(CANARY)
    (folder / "kept").mkdir()
    trainer = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False}
    rows = dict.fromkeys(("train", "validation", "test", "predict"), prompts)
    reward = {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}}
    values = {
        "trainer": {**trainer, "enable_model_summary": False},
        "model": {
            "class_path": "ReMax",
            "init_args": {
                "policy": {"path": str(folder / "policy")},
                "reward": reward,
                "sampling": {"max_new_tokens": 4},
            },
        },
        "data": {"class_path": "PromptDataModule", "init_args": {**rows, "batch_size": 2}},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def nothing_ran(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test has tried, no mark is left and nothing is deleted."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BROWSER", "touch")
    yield
    ran = (folder / MARK).exists() or not (folder / "kept").exists()
    (folder / "kept").mkdir(exist_ok=True)
    if (folder / MARK).is_file():
        (folder / MARK).unlink()
    assert not ran


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command ends with, with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["cli.py", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    errors = capsys.readouterr().err
    assert end.value.code == 2, errors
    last = errors[errors.rindex("error: ") :]
    assert len(last.strip().splitlines()) == 1
    return last


def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Parser]:
    """The parser of each sub-command, set up as a run sets it up."""
    found: list[Any] = []

    def found_it(self: cli.CLI, parser: Parser, args: object) -> None:
        found.append(parser)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cli.CLI, "parse_arguments", found_it)
        with pytest.raises(KeyboardInterrupt):
            cli.run(["fit"])
    (choices,) = (action.choices for action in found[0]._actions if action.dest == "subcommand")
    return dict(choices)


def slots(parser: Parser, prefix: str, seen: set[type]) -> Iterator[tuple[str, Any]]:
    """Names and types of all arguments, those of every class of Lightning's and of this package that one may be."""
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest.endswith(".help"):
            continue
        yield f"{prefix}{action.dest}", hint
        for base in {each for each in _classes_in(hint) if each.__module__ != "torch.nn.modules.module"}:
            for known in {each for each in _concrete(base) if each.__module__.startswith(("lightning.", "remax_"))}:
                if known not in seen:
                    seen.add(known)
                    inner = Parser(exit_on_error=False)
                    inner.add_class_arguments(known, fail_untyped=False)
                    yield from slots(inner, f"{prefix}{action.dest}={known.__name__}.", seen)


def test_no_slot_of_the_configuration_runs_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[type] = set()
    found = {name: hint for each in parsers(monkeypatch).values() for name, hint in slots(each, "", seen)}
    for expected in ("data=PromptDataModule.train", "model=ReMax.optimizer", "model=ReMax.policy", "trainer.plugins"):
        assert expected in found
    distinct = {str(hint): (name, hint) for name, hint in found.items()}.values()
    assert len(found) > 500
    assert len(distinct) > 100
    for name, hint in distinct:
        parser = Parser(exit_on_error=False)
        parser.add_argument("--slot", type=hint)
        for path, arguments in calls(folder).items():
            spec = {"class_path": path, "init_args": arguments}
            for value in (path, spec, [spec], {"x": spec}, {"config": {"x": [spec]}}, [{"prompt": spec}]):
                with suppress(Exception):  # by which most slots refuse it
                    parser.instantiate(parser.parse_object({"slot": value}))
                assert not (folder / MARK).exists(), (name, value)
                assert (folder / "kept").exists(), (name, value)


CONFIGURATIONS: dict[str, Any] = {
    "optimizer": lambda spec: {"model": {"init_args": {"optimizer": spec}}},
    "model's config": lambda spec: {"model": {"init_args": {"policy": {"path": None, "config": {"x": spec}}}}},
    "callback": lambda spec: {"trainer": {"callbacks": [spec]}},
}


@pytest.mark.parametrize(
    ("path", "slot", "subcommand"),
    [
        *(("os.system", "optimizer", subcommand) for subcommand in SUBCOMMANDS),
        *((path, slot, "fit") for path in ("subprocess.Popen", "canary.touch") for slot in CONFIGURATIONS),
    ],
)
def test_a_call_in_a_file_is_refused(
    path: str,
    slot: str,
    subcommand: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = CONFIGURATIONS[slot]({"class_path": path, "init_args": calls(folder)[path]})
    Path("evil.yaml").write_text(yaml.safe_dump(values))
    arguments = [subcommand, "--config", "base.yaml", "--config", "evil.yaml", *SUBCOMMANDS[subcommand]]
    told = refused(arguments, monkeypatch, capsys)
    assert path in told
    assert refused([*arguments, "--print_config"], monkeypatch, capsys) == told


def test_a_class_with_a_name_of_its_own_is_still_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = Parser(exit_on_error=False)
    parser.add_argument("--slot", type=Callback)
    built = parser.instantiate(parser.parse_object({"slot": {"class_path": "LearningRateMonitor"}}))
    assert isinstance(built.slot, LearningRateMonitor)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and what was asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/config.yaml", asked
        listening.shutdown()


@pytest.mark.parametrize("option", ["--config", "--model", "--trainer", "--data", "--checkpoint", "--self_check"])
def test_no_configuration_is_fetched(
    option: str,
    server: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, asked = server
    for each in (url, f"simplecache::{url}", "s3://bucket/config.yaml"):
        told = refused(["fit", "--config", "base.yaml", option, each], monkeypatch, capsys)
        assert each in told
        assert "a local file, not a URL" in told
    Path("remote.yaml").write_text(f"{option.strip('-')}: {url}\n")
    refused(["fit", "--config", "base.yaml", "--config", "remote.yaml"], monkeypatch, capsys)
    assert not asked


TENFOLD = {new: ",".join([f"*{old}"] * 10) for old, new in zip("abcdefgh", "bcdefghi", strict=True)}
BOMBS = {
    "aliases": "a: &a [x]\n" + "".join(f"{name}: &{name} [{ten}]\n" for name, ten in TENFOLD.items()),
    "merges": "a: &a {x: 1}\n" + "".join(f"{name}: &{name} {{<<: [{ten}]}}\n" for name, ten in TENFOLD.items()),
    "of itself": "model: &a {x: *a}\n",
    "depth": f"model: {'[' * 200_000}{']' * 200_000}\n",
    "tag": "model: !!python/object/apply:os.system ['touch code_ran']\n",
}
BOMBS["in text"] = "model:\n  init_args:\n    kl_coef: |\n" + "".join(
    f"      {line}\n" for line in BOMBS["aliases"].splitlines()
)
BOMBS["depth in text"] = f"model: {{init_args: {{kl_coef: '{'[' * 200_000}{']' * 200_000}'}}}}\n"


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_cannot_grow_without_bound(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bomb.yaml").write_text(BOMBS[name])
    said = "not valid YAML: could not determine a constructor" if name == "tag" else "a configuration must "
    assert said in refused(["fit", "--config", "base.yaml", "--config", "bomb.yaml"], monkeypatch, capsys)
    Path("outer.yaml").write_text("model: bomb.yaml\n")  # a file that a file names
    refused(["fit", "--config", "base.yaml", "--config", "outer.yaml"], monkeypatch, capsys)
    refused(["fit", "--config", "base.yaml", "--config", BOMBS[name]], monkeypatch, capsys)  # the text itself


def test_aliases_and_merges_are_read() -> None:
    text = "a: &a {x: [1, 2]}\nb: {<<: *a, y: *a}\n"
    assert load_bounded_yaml(text) == {"a": {"x": [1, 2]}, "b": {"x": [1, 2], "y": {"x": [1, 2]}}}


HARMFUL = "\x1b]0;title\x07\x1b[2J\r\x9b1m\u202eabc\u2028\ud83d"
WRITTEN_OUT = r"\x1b]0;title\x07\x1b[2J\r\x9b1m\u202eabc\u2028\ud83d"


def test_harmless_text_stays_as_it_is() -> None:
    assert visible(HARMFUL) == WRITTEN_OUT
    for text in ("line\n\ttab", "für Ελλάδα 日本 नमस्ते", "👩\u200d👩\u200d👧 \u200c"):
        assert visible(text) == text


def test_nothing_that_is_said_controls_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    factory = logging.getLogRecordFactory()
    cli_errors.escape_output()
    try:
        told = [warnings.formatwarning(UserWarning(HARMFUL), UserWarning, "x.py", 1)]
        handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("lightning.pytorch").addHandler(handler)
        rank_zero_info(f"%s {HARMFUL}", HARMFUL)
        logging.getLogger("lightning.pytorch").removeHandler(handler)
        told.append(capsys.readouterr().err)
        sys.excepthook(ValueError, ValueError(HARMFUL), None)
        told.append(capsys.readouterr().err)
    finally:
        logging.setLogRecordFactory(factory)
    for each in told:
        assert WRITTEN_OUT in each
        assert visible(each) == each


@pytest.mark.parametrize("option", ["--config", "--model", "--trainer.max_steps", "--data.batch_size", "--unknown"])
def test_no_error_controls_the_terminal(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(["fit", "--config", "base.yaml", f"{option}={HARMFUL[:-1]}"], monkeypatch, capsys)
    assert visible(told) == told


def test_no_error_of_a_run_controls_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": [{"role": "user", "content": HARMFUL[:-1]}]}]
    template = "{{ raise_exception(messages[0].content) }}"
    data = tiny.write_rows(folder / "chats.jsonl", rows)
    options = ["--model.policy.chat_template", template, "--data.train", data]
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", "base.yaml", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert r"refused by the chat template: \x1b]0;title" in str(end.value.code)
    assert visible(str(end.value.code)) == end.value.code
    errors = capsys.readouterr().err.replace("\r", "")  # of a progress bar
    assert visible(errors) == errors


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "subprocess.run", "runpy.run_path", "builtins.exec", "shutil.rmtree"]
)
def test_a_function_of_python_is_no_reward(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", "base.yaml", "--model.reward.function", name])
    with pytest.raises(SystemExit, match=r"^error: (a reward function needs the parameters|the reward raised TypeErr)"):
        cli.main()
