"""Every command in the table of formats runs as it stands."""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from rehearsal_plugin import cli
from rehearsal_plugin.checkpoint import tools
from tests.helpers.data_sets import save_to_disk, write_mds, write_megatron, write_tar
from tests.helpers.language import tokenizer_in
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "guides" / "preloading.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\| .* \| `rehearsal (seed .*?)` \|$", PAGE, re.MULTILINE)
TEXTS = [f"the cat sat on mat number {number}. " * 4 for number in range(60)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the commands name."""
    folder = tmp_path_factory.mktemp("seeding")
    tokenizer_in(folder / "model", chat_template=TEMPLATE)
    objects = [{"text": text} for text in TEXTS]
    lines = "\n".join(map(json.dumps, objects)).encode()
    (folder / "old.json").write_text(json.dumps(objects))
    (folder / "old.jsonl.gz").write_bytes(gzip.compress(lines))
    turns = [[{"role": "user", "content": "cats?"}, {"role": "assistant", "content": text}] for text in TEXTS]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    for name in ("books", "hub"):
        (folder / name).mkdir()
    (folder / "books" / "one.txt").write_text("".join(TEXTS))
    for split, texts in {"train": TEXTS, "test": TEXTS[:1]}.items():
        save_to_disk(folder / "saved" / split, {"text": texts}, split=split)
        parquet.write_table(pa.table({"text": texts}), folder / "hub" / f"{split}-00000-of-00001.parquet")
    (folder / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    lists = [list(range(1 + number)) for number in range(40)]
    parquet.write_table(pa.table({"input_ids": lists}), folder / "tokens.parquet")
    write_megatron(folder / "corpus", lists)
    write_mds(folder / "shards", [{"text": text.encode()} for text in TEXTS], {"text": "str"})
    write_tar(folder / "web.tar", {f"{number}.txt": text.encode() for number, text in enumerate(TEXTS)})
    np.savez(folder / "arrays.npz", image=np.zeros((20, 4, 4)), label=np.arange(20), name=np.array("x"))
    save_file({"x": torch.zeros(20, 3)}, folder / "rows.safetensors")
    return folder


def test_the_table_has_a_command_for_each_format() -> None:
    assert len(COMMANDS) == len(re.findall(r"^\| .*rehearsal seed", PAGE, re.MULTILINE)) >= 13


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_table_runs(command: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    if ".zst" in command:
        zstandard = pytest.importorskip("zstandard")
        lines = gzip.decompress((data / "old.jsonl.gz").read_bytes())
        with (data / "old.jsonl.zst").open("wb") as file:
            zstandard.ZstdCompressor().copy_stream(io.BytesIO(lines), file)
    arguments = shlex.split(command)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert tools.inspect(data / arguments[-1])["rows"] >= 18
    assert "rows/s" not in result.output, "no bar where nobody looks"
