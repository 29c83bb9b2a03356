"""Builds `docs/guides/trainers/index.md` from the results of `scripts/test_clients.sh`.

python -m scripts.clients.page
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.clients.scenarios import CELLS, SCENARIOS, TOOLS, Cell, Tool
from scripts.common.paths import ROOT
from scripts.common.report import write_text
from scripts.common.tables import markdown_table

__all__ = ["build"]

Results = Mapping[str, Mapping[str, Any]]

HEAD = """\
# Trainers and how to start them

Put `python -m rehearsal_plugin.run` in front of the command that you use today:

```
python -m rehearsal_plugin.run --strict --rehearsal-config rehearsal.json <your command>
```

The section needs a buffer and the number of replayed rows in a batch. How rows of different length are padded is known
from the collator of each tool:

```json
{"buffer": {"capacity": 10000}, "representatives": 2}
```

Your script or config stays as it is. TRL, LLaMA-Factory, axolotl, ms-swift and `accelerate launch` start ranks of their
own, and the plugin reaches them. A program such as `trl` is looked for beside the interpreter and in `PATH`.

With `--strict`, a job that ends without a rehearsal has the exit status 3. So you notice a wrong path or section.

## Your tool

| tool | whole command, log lines, limits |
|---|---|
| TRL: `trl sft`, `trl dpo`, its trainers in a script | [TRL](trl.md) |
| LLaMA-Factory: `llamafactory-cli train` | [LLaMA-Factory](llama_factory.md) |
| axolotl: `axolotl train` | [axolotl](axolotl.md) |
| ms-swift: `swift sft`, `swift rlhf` | [ms-swift](ms_swift.md) |
| Hugging Face Trainer in a script of your own | [Hugging Face Trainer](hf_trainer.md) |
| `accelerate launch`, loops of Accelerate or Lightning Fabric | [Accelerate and Fabric](accelerate.md) |
| Lightning's Trainer | [Lightning](lightning.md) |
| a loop of your own, as of nanoGPT | [Plain loops](plain_loop.md) |

## What works

"""

FOOT = """\
An empty cell was never tried. *Not run* has a test without a result yet.

Each run trains a Llama of 0.1 million parameters on CPU, with the plugin and without. TRL, LLaMA-Factory, ms-swift and
the loops run on two gloo ranks, axolotl on one. *Works* means all of this:

- The new rows of every batch are those of the run without the plugin, and replayed rows are rows of training.
- From the fourth step on, each micro-batch has its two replayed rows.
- The Trainer divides by the labelled tokens of all ranks, replayed ones among them.
- The rows of the evaluations are the same, and so is the loss before the first step.

*Resumes* means the batches, losses and weights of a job that was not stopped, bit for bit.

## Run it yourself

```
bash scripts/test_clients.sh
python -m scripts.clients.page
```

The first command installs each tool into an environment of its own and runs `tests/clients`. With a name, such as
`trl`, it does so for one of them. The second builds this page from the outcomes in `docs/results/clients.json`.

It all takes an hour on two cores, as the tools start many processes with slow imports. That does not fit CI, which has
the tests of the Trainer itself. Run the clients by hand before a release.
"""


def main(argv: Sequence[str]) -> int:
    """Writes the page and says where it is."""
    parser = argparse.ArgumentParser(description="docs/guides/trainers/index.md from the results of the clients.")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages (default: %(default)s)")
    print(build(parser.parse_args(argv).docs))
    return 0


def build(docs: Path) -> Path:
    """Writes the page from `docs/results/clients.json`."""
    results: Results = json.loads((docs / "results" / "clients.json").read_text())
    heads = ["", *(heading(tool, results) for tool in TOOLS)]
    table = markdown_table(heads, (line(scenario, results) for scenario in SCENARIOS))
    return write_text(docs / "guides" / "trainers" / "index.md", f"{HEAD}{table}\n{FOOT}")


def heading(tool: Tool, results: Results) -> str:
    """The tool with its page and version."""
    version = results.get(tool.environment, {}).get("versions", {}).get(tool.package, "").partition("+")[0]
    prefix = "torch " if tool.package == "torch" else "transformers " if tool.package == "transformers" else ""
    return f"[{tool.name}]({tool.page}) {prefix}{version}".rstrip()


def line(scenario: str, results: Results) -> list[str]:
    """A line of the table."""
    cells = CELLS[scenario]
    return [scenario, *(outcome(cells[tool], tool, results) if tool in cells else "" for tool in TOOLS)]


def outcome(cell: Cell, tool: Tool, results: Results) -> str:
    """A cell of the table, from the outcomes of its tests."""
    tests = results.get(tool.environment, {}).get("tests", {})
    outcomes = [of_tests(name, tests) for name in cell.tests]
    if any(not one for one in outcomes):
        return "not run"
    return cell.word if all(set(one) <= {"passed", "skipped"} for one in outcomes) else "fails"


def of_tests(beginning: str, tests: Mapping[str, str]) -> list[str]:
    """The outcomes of the tests whose names begin so."""
    return [how for name, how in tests.items() if name.startswith(beginning)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
