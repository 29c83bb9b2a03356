"""Questions about the English LibreOffice help, each with the fact that answers it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUESTIONS", "Question"]


@dataclass(frozen=True)
class Question:
    """A question, the fact that a right answer contains, and the page on which it stands."""

    text: str
    fact: str
    page: str


QUESTIONS = (
    Question("How many individual sheets can a spreadsheet document contain?", "10,000", "scalc/guide/rename_table"),
    Question("What is the maximum value of a proxy port number?", "65535", "shared/optionen/01020100"),
    Question(
        "What is the longest time in seconds after which a pooled connection can be freed?",
        "600",
        "shared/optionen/01160100",
    ),
    Question("Up to how many cells of a column does AutoInput scan?", "2000", "scalc/01/06130000"),
    Question("What is the default guess of the function IRR?", "10%", "scalc/01/04060118"),
    Question("With which year does the default range for two-digit years begin?", "1930", "scalc/guide/year2000"),
    Question("What is the largest radix that the function BASE accepts?", "36", "scalc/01/04060110"),
    Question(
        "How many percent of missing data points does FORECAST.ETS.ADD support?", "30%", "scalc/01/func_forecastetsadd"
    ),
    Question("What is the largest number that the function ROMAN converts?", "3999", "scalc/01/func_roman"),
    Question("How many places can the binary number given to BIN2DEC have?", "10", "scalc/01/04060115"),
    Question("From a list of up to how many values does CHOOSE return one?", "30", "scalc/01/04060109"),
    Question("Up to how many arguments can the function MAXIFS have?", "255", "scalc/01/func_maxifs"),
    Question(
        "To how many gradations are colors converted when printing in grayscale?",
        "256",
        "shared/guide/print_blackwhite",
    ),
    Question("Which value means full color component in the function COLOR?", "255", "scalc/01/func_color"),
    Question("What is the default confidence level of FORECAST.ETS.PI.ADD?", "0.95", "scalc/01/func_forecastetspiadd"),
    Question("Which number does WEEKDAY return for a Saturday if no type is given?", "7", "scalc/01/func_weekday"),
    Question("Between which numbers is a value that the function RAND returns?", "0 and 1", "scalc/01/04060106"),
    Question("What is the first four-digit year that the function DATE accepts?", "1583", "scalc/01/func_date"),
    Question("Which key do I press after typing the shortcut of an AutoText?", "F3", "swriter/guide/autotext"),
    Question("Which key switches a cell to edit mode in Calc?", "F2", "scalc/04/01020000"),
)
