"""Tables on a terminal are never cut, however narrow it is."""

from __future__ import annotations

import pytest

from scripts.common.tables import markdown_table, print_table

HEADS = ["case", "a ratio", "low", "high", "a long heading that nobody needs"]
LINES = [[f"case {row}", "1.234 (1.001 to 2.345)", "131.25", "98,765,432.10", f"{row}.123456789"] for row in range(3)]


@pytest.mark.parametrize("columns", ["20", "80", "400"])
def test_no_number_is_cut(columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_table("A title", HEADS, LINES)
    printed = capsys.readouterr().out
    assert all(cell in printed for line in [HEADS, *LINES] for cell in line)
    assert "\u2026" not in printed


def test_markdown_has_a_rule_below_the_heads() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
