"""Every refusal and warning of the package has a row on the page on troubleshooting."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rehearsal_plugin import errors
from tests.docs.test_troubleshooting import ROWS, fragments
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "rehearsal_plugin"

INTERNAL = {
    "{}; see its log": "the word of a rank that failed, which is listed",
    "{} failed: {}": "the library's own error, of an exchange that the message names",
    "{} failed: {}: {}": "an error of no kind that is known",
    "an earlier search failed: {}": "the first search said it",
    "rehearsal.buffer.preload: {}": "another message, which is listed",
    "rows have no field '{}'; they have {}": "a call of RehearsalBuffer.update_fields itself",
    "process {} is a forked copy of process {}, in which": "the same as the row on forks, of the thread itself",
    "the transport was closed": "a call of a transport itself",
    "{} was given up because the rehearsal was closed": "the job has closed it",
    "%s; look for the first loss that is not finite": "the guard's message, which is listed",
    "%s": "the guard's message, which is listed",
}
"""Messages without a row of their own, by how they begin, and why."""


def text_of(node: ast.AST, file: ast.Module) -> list[str]:
    """The texts that a message is made of, `{}` for values; those of a function or a constant of the file, too."""
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.BinOp):
        return [" ".join([*text_of(node.left, file), *text_of(node.right, file)])]
    if isinstance(node, ast.IfExp):
        return [*text_of(node.body, file), *text_of(node.orelse, file)]
    name = node.func if isinstance(node, ast.Call) else node
    wanted = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")
    for part in ast.walk(file) if wanted else ():
        if isinstance(part, ast.FunctionDef) and part.name == wanted:
            returns = [end.value for end in ast.walk(part) if isinstance(end, ast.Return) and end.value is not None]
            return [text for end in returns for text in text_of(end, file)]
        if isinstance(part, ast.Assign) and any(getattr(target, "id", "") == wanted for target in part.targets):
            return text_of(part.value, file)
    return []


def messages_of(path: Path) -> Iterator[str]:
    """The messages of all errors that a file raises, and of its warnings."""
    file = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(file):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call, kind = node.exc, getattr(node.exc.func, "id", "")
            if kind not in errors.__all__:
                continue
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warning":
            call = node
        else:
            continue
        if call.args:
            yield from text_of(call.args[0], file)


ALL = sorted({
    (str(path.relative_to(PACKAGE)), message) for path in sorted(PACKAGE.rglob("*.py")) for message in messages_of(path)
})  # fmt: skip
ALTERNATIVES = [one for row in ROWS for one in re.split(r"`, `|; (?=batch field)", row)]


def is_listed(message: str) -> bool:
    """Whether the words of one row are all in a message."""
    plain = re.sub(r"%[sdr]", "{}", message)
    return any((words := fragments(one)) and all(word in plain for word in words) for one in ALTERNATIVES)


@pytest.mark.parametrize(("file", "message"), ALL, ids=[f"{file}-{message[:40]}" for file, message in ALL])
def test_a_refusal_is_on_the_page(file: str, message: str) -> None:
    assert is_listed(message) or any(message.startswith(begin) for begin in INTERNAL), (file, message)


@pytest.mark.parametrize("begin", INTERNAL)
def test_an_exception_is_needed(begin: str) -> None:
    assert any(message.startswith(begin) and not is_listed(message) for _, message in ALL)
