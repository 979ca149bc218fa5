"""Chat templates, rendered within limits: a template comes with a tokenizer, which may be anybody's."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

MAX_SECONDS = 10
"""CPU time for one conversation; templates take less than a thousandth of a second."""

MAX_BYTES = 2 * 1024**3
"""Memory for conversations, beside what Python and its libraries take."""

MAX_CHARACTERS = 10_000_000
"""Length of a rendered conversation, some two million tokens."""

WORKER = """
import sys
sys.path[:] = sys.argv[4:]
import json, resource, signal
from contextlib import suppress
from transformers.utils.chat_template_utils import render_jinja_template
seconds, size, length = map(int, sys.argv[1:4])
with suppress(ValueError, OSError):  # macOS has no such limit
    with open("/proc/self/statm") as file:
        size += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # then SIGPROF ends the process, whatever it is doing
    try:
        answer = {"text": render_jinja_template(**json.loads(line))[0][0]}
    except MemoryError:
        answer = {"limit": "memory"}
    except Exception as error:
        answer = {"refusal": str(error) or type(error).__name__}
    if len(answer.get("text", "")) > length:
        answer = {"limit": f"{length} characters"}
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(json.dumps(answer) + "\\n")
    sys.stdout.flush()
"""
"""The process that renders: it is started afresh, so it shares nothing with this one and imports no torch."""


class TemplateLimit(ValueError):
    """A chat template that takes too much time or memory."""


class Renderer:
    """A process that renders chat templates as transformers does, in jinja's sandbox, with limits.

    The sandbox keeps a template from the rest of Python, but not from loops, powers and repeated text, some of which
    nothing but the end of the process can stop. It ends by itself with the process that started it.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        limits = map(str, (MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS))
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *limits, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            start_new_session=True,  # Ctrl-C is for this process
        )
        weakref.finalize(self, _end, self.process, self.owner)

    def render(self, arguments: Mapping[str, Any]) -> str:
        """One conversation as text.

        Args:
            arguments: Those of transformers' ``render_jinja_template``, as JSON has them.

        Raises:
            jinja2.TemplateError: If the template refuses the conversation or fails on it.
            TemplateLimit: If it takes too much time or memory.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(arguments) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it ended of is said below
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            if status == -signal.SIGPROF:
                raise TemplateLimit(f"{MAX_SECONDS} seconds of CPU time")
            raise RuntimeError(f"the process that renders chat templates ended with status {status}")
        answer: dict[str, str] = json.loads(line)
        if "limit" in answer:
            raise TemplateLimit(answer["limit"])
        if "refusal" in answer:
            raise TemplateError(answer["refusal"])
        return answer["text"]


def _end(process: "subprocess.Popen[str]", owner: int) -> None:
    """End a renderer, in the process that started it; a forked one has the same object, but no child."""
    if os.getpid() == owner:
        process.kill()
        process.communicate()


_local = threading.local()  # a renderer for each thread, so that answers are not mixed up


def _renderer() -> Renderer:
    """The renderer of this thread of this process."""
    renderer: Renderer | None = getattr(_local, "renderer", None)
    if renderer is None or renderer.owner != os.getpid() or renderer.process.poll() is not None:
        renderer = _local.renderer = Renderer()
    return renderer


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """A conversation as text, as transformers' ``apply_chat_template`` writes it.

    Args:
        template: Chat template.
        messages: Messages; keys without a value are left out, as templates expect.
        special_tokens: Special tokens by their names.
        add_generation_prompt: Whether the text ends where the assistant's turn begins.

    Raises:
        jinja2.TemplateError: If the template refuses the conversation or fails on it.
        TemplateLimit: If it takes more than ``MAX_SECONDS`` of CPU time, ``MAX_BYTES`` of memory, or writes more than
            ``MAX_CHARACTERS``.
    """
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    arguments = {
        **special_tokens,
        "conversations": [given],
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
    }
    return _renderer().render(arguments)
