"""`rehearsal seed --chat`: the tokens of the tokenizer's chat template, with labels on the assistant's alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from rehearsal_plugin.checkpoint.convert import load_chat_encoder, read_packed_chats
from rehearsal_plugin.errors import DataError
from tests.checkpoint.test_convert import call, joined, rows_in
from tests.helpers.language import tokenizer_in

LENGTH = 16
GROWN = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FORGETS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ '<' + m.role + '>' }}{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""Leaves the answers of earlier turns out, as templates of models that reason do with the reasoning."""


def chat(number: int, turns: int = 1) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "the cat"}] if number % 2 else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"dogs \u00e9 {number} {turn}?"})
        messages.append({"role": "assistant", "content": f"it was raining \u20ac {number} cats {turn}"})
    return messages


CHATS = [chat(number, 1 + number % 3) for number in range(30)]


def tokenizer_with(folder: Path, template: str | None) -> Any:
    return tokenizer_in(folder, chat_template=template) if template else tokenizer_in(folder)


def lines_of(path: Path, chats: list[Any], key: str = "messages") -> Path:
    text = "\n".join(json.dumps({key: messages}) for messages in chats)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def expected_streams(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels, from the parts of each chat: no token goes over the end of a part in this tokenizer."""
    ids, labels = [], []
    for messages in CHATS:
        for message in messages:
            head = tokenizer(f"<{message['role']}>")["input_ids"]
            body = [*tokenizer(message["content"])["input_ids"], tokenizer.eos_token_id]
            ids += head + body
            answered = message["role"] == "assistant"
            labels += [-100] * len(head) + (body if answered else [-100] * len(body))
    return ids, labels


@pytest.mark.parametrize("template", [GROWN, MARKED], ids=["grown", "marked"])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_labels_are_the_assistants_tokens(template: str, form: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path / "model", template)
    path = tmp_path / f"chats.{form}"
    if form == "parquet":
        parquet.write_table(pa.table({"messages": CHATS}), path)
    else:
        lines_of(path, CHATS)
    out = tmp_path / "out"
    call("--data", path, "--chat", "--tokenizer", tmp_path / "model", "--length", LENGTH, "--out", out)
    ids, labels = (torch.tensor(stream) for stream in expected_streams(tokenizer))
    count = len(ids) // LENGTH
    ids, labels = ids[: count * LENGTH].reshape(-1, LENGTH), labels[: count * LENGTH].reshape(-1, LENGTH)
    kept = (labels != -100).any(1)
    rows = rows_in(out)
    assert list(rows) == ["input_ids", "attention_mask", "labels"]
    assert torch.equal(rows["input_ids"], ids[kept])
    assert torch.equal(rows["labels"], labels[kept])
    assert rows["labels"].dtype == torch.int64


def test_both_ways_give_the_same(tmp_path: Path) -> None:
    path = lines_of(tmp_path / "chats.jsonl", CHATS)
    found = []
    for name, template in (("a", GROWN), ("b", MARKED)):
        tokenizer_with(tmp_path / name, template)
        found.append(joined(list(read_packed_chats([path], load_chat_encoder(tmp_path / name), LENGTH))))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_ids_are_those_of_training(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, GROWN)
    encode = load_chat_encoder(tmp_path)
    for messages in CHATS:
        ids, _ = encode(list(messages))
        assert list(ids) == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def test_rows_without_an_answer_are_left_out(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, GROWN)
    question = [{"role": "user", "content": "cats and dogs " * 100}, {"role": "assistant", "content": "it was"}]
    path = lines_of(tmp_path / "chats.jsonl", [question, question])
    batch = joined(list(read_packed_chats([path], load_chat_encoder(tmp_path), LENGTH)))
    assert bool((batch["labels"] != -100).any(1).all())
    assert len(batch["labels"]) <= 4


def test_another_key_and_a_single_turn_of_a_template_that_forgets(tmp_path: Path) -> None:
    tokenizer_with(tmp_path / "model", FORGETS)
    path = lines_of(tmp_path / "chats.jsonl", [chat(number) for number in range(0, 30, 2)], "turns")
    more = ["--chat", "--text-key", "turns", "--tokenizer", tmp_path / "model", "--length", LENGTH]
    call("--data", path, *more, "--out", tmp_path / "out")
    assert bool((rows_in(tmp_path / "out")["labels"] != -100).any())


@pytest.mark.parametrize(
    ("message", "chats"),
    [
        ("the chat template changes earlier turns", [chat(0, 2)]),
        ("row 2 of .* has a message without a role", [chat(0), [{"from": "human", "value": "cats"}]]),
        ("row 1 of .* has no list of messages", ["cats"]),
        ("row 1 of .* has no list of messages", [[]]),
        ("row 1 of .* has a message whose content is no text", [[{"role": "user", "content": ["cats"]}]]),
        ("cannot be rendered by the tokenizer's chat template: no system here", [chat(1)]),
    ],
)
def test_chats_that_cannot_be_followed_are_named(message: str, chats: list[Any], tmp_path: Path) -> None:
    tokenizer_with(tmp_path, FORGETS)
    path = lines_of(tmp_path / "chats.jsonl", chats)
    with pytest.raises(DataError, match=message):
        list(read_packed_chats([path], load_chat_encoder(tmp_path), LENGTH))


def test_marks_that_mark_nothing_are_named(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, MARKED.replace("m.role == 'assistant'", "m.role == 'model'"))
    path = lines_of(tmp_path / "chats.jsonl", CHATS)
    with pytest.raises(DataError, match=r"row 1 of .* has an answer, and the chat template marks no token of it"):
        list(read_packed_chats([path], load_chat_encoder(tmp_path), LENGTH))


def test_the_key_of_the_messages_is_asked_for(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, GROWN)
    path = lines_of(tmp_path / "chats.jsonl", CHATS, "turns")
    with pytest.raises(DataError, match=r"has no 'messages'; it has \['turns'\]; name the key that holds the messages"):
        list(read_packed_chats([path], load_chat_encoder(tmp_path), LENGTH))


def test_a_chat_template_is_needed(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, None)
    with pytest.raises(DataError, match=r"has no chat template; add chat_template\.jinja"):
        load_chat_encoder(tmp_path)
    with pytest.raises(DataError, match="is no folder of a tokenizer; chats need its chat template"):
        load_chat_encoder(tmp_path / "tokenizer.json")


def test_chats_read_as_texts_are_told_of_the_option(tmp_path: Path) -> None:
    tokenizer_with(tmp_path / "model", GROWN)
    path = lines_of(tmp_path / "chats.jsonl", CHATS, "text")
    arguments = ["--data", path, "--tokenizer", tmp_path / "model", "--length", 4, "--out", tmp_path / "out"]
    with pytest.raises(AssertionError, match="chats need --chat"):
        call(*arguments)
    assert "texts and chats need --tokenizer" in call("--data", path, "--chat", "--out", tmp_path / "out", code=2)
