"""Templates are rendered as transformers renders them, and cannot take more than their limits."""

import multiprocessing
import os
import threading

import pytest
import tiny
from jinja2 import TemplateError

from remax_lightning.models import chat_template
from remax_lightning.models.chat_template import TemplateLimit, render
from remax_lightning.models.tokenizer import encode_prompt

CHAT = [
    {"role": "system", "content": "Be kind. é\u2028\ud83d"},
    {"role": "user", "content": "Hello <b>", "name": None},
    {"role": "assistant", "content": " hi ", "reasoning_content": "a"},
]
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "prompt": "{{ messages[1].content }}{% if add_generation_prompt %}assistant:{% endif %}",
    "keys": "{% for m in messages %}{{ m | tojson }}{% if m.name is defined %}!{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "state": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops on a long conversation": "{% if messages | length > 2 %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
    "text": "{{ 'x' * 10 ** 10 }}",
    "text of a length from elsewhere": "{{ messages[0].content * 10 ** 9 }}",
    "power": "{{ 7 ** (3 ** 18) }}",
    "filter": "{{ 'x' | center(10 ** 11) }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "output": "{{ 'x' * 30_000_000 }}",
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renderer with a limit of one second."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1)
    monkeypatch.setattr(chat_template, "_local", threading.local())


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, add_generation_prompt: bool) -> None:
    words = tiny.tokenizer()
    words.chat_template = TEMPLATES[name]
    expected = words.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add_generation_prompt)
    options = {"add_generation_prompt": add_generation_prompt}
    assert render(words.chat_template, CHAT, words.special_tokens_map, **options) == expected


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_end_is_refused(name: str) -> None:
    words = tiny.tokenizer()
    words.chat_template = BOMBS[name]
    with pytest.raises(TemplateLimit, match=r"needs more than .* for a conversation of 3 messages; set chat_template"):
        encode_prompt(words, CHAT)
    words.chat_template = "{{ 1 }}"
    assert render("{{ 1 }}", CHAT, {}, add_generation_prompt=False) == "1"  # the next one is rendered again


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_what_a_template_refuses_is_said(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(template, CHAT, {}, add_generation_prompt=False)


def _render_in_a_fork(connection: "multiprocessing.connection.Connection") -> None:
    connection.send([render("{{ messages[0].role }}", CHAT, {}, add_generation_prompt=False) for _ in range(20)])


def test_a_forked_process_has_a_renderer_of_its_own() -> None:
    render("{{ 1 }}", CHAT, {}, add_generation_prompt=False)
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_render_in_a_fork, args=(theirs,))
    worker.start()
    mine = [render("{{ messages[1].role }}", CHAT, {}, add_generation_prompt=False) for _ in range(20)]
    assert ours.recv() == ["system"] * 20
    assert mine == ["user"] * 20
    worker.join()


def test_a_renderer_ends_with_its_thread() -> None:
    found: list[int] = []

    def in_a_thread() -> None:
        render("{{ 1 }}", CHAT, {}, add_generation_prompt=False)
        found.append(chat_template._local.renderer.process.pid)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)
