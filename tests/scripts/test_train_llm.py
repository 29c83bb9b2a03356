"""The recipe of continual pre-training: text, plan, numbers, page, and two phases under the launcher."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.buffer.policies import Offer
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.checkpoint.tools import inspect
from scripts.common.spread import Spread
from scripts.llm import data as llm_data
from scripts.llm import page as llm_page
from scripts.llm import train as train_llm
from scripts.llm.data import END_TOKEN, LANGUAGES, LENGTH, held_out, rows_of, text_of
from scripts.llm.first_language import FIRST_LANGUAGE, first_language
from scripts.llm.levers import (
    against_fixed,
    budgets,
    mixtures,
    more_for_the_same,
    seen_before,
    slow_weights,
    spaced,
    tried,
)
from scripts.llm.plan import BASE, BUDGET, JOINT, NEED, RISING, UNIFORM, Run, Setting, config_of, key_of, plan, variants
from scripts.llm.results import Row, cost_on_new, fixed_ratio, gap_closed, summarise
from tests.helpers.paths import ROOT

MADE_UP = "10 % of English, made up by the model"

CONFIG = json.loads((ROOT / "configs/llm_en_fr_de.json").read_text())
PAGE = """<html><head><title>menu</title></head><body><div>menu</div><div id="DisplayArea"><h1>Save
 As</h1><p>Choose <span>File</span> - Save.</p><div class="note"><p>Twice &amp; more</p></div></div><div>foot</div>"""


def folder_of_pages(folder: Path, pages: int = 60) -> Path:
    """As in the packages: the same pages in three languages, whose words differ."""
    for language, name in LANGUAGES.items():
        for page in range(pages):
            path = folder / name / "text" / f"{page}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            words = " ".join(f"{language}{(page * word) % 37}" for word in range(120))
            path.write_text(f'<div id="DisplayArea"><p>{words}</p></div>')
    return folder


def test_the_text_of_a_page_is_its_content_with_a_line_for_every_paragraph() -> None:
    assert text_of(PAGE) == "Save As\nChoose File - Save.\nTwice & more"


def test_a_page_is_held_out_in_all_languages_or_in_none(tmp_path: Path) -> None:
    pages = {language: llm_data.read(folder_of_pages(tmp_path) / name) for language, name in LANGUAGES.items()}
    sides = [[held_out(name) for name in texts] for texts in pages.values()]

    assert sides[0] == sides[1] == sides[2]
    assert 0 < sum(sides[0]) < 20


def test_pages_are_packed_to_rows_without_a_gap() -> None:
    rows = rows_of([[5, 6, 7], [8], [9, 10]], 4)

    assert rows.shape == (2, 4)
    assert rows.dtype == np.uint16
    assert sorted(rows.ravel().tolist())[:2] == [END_TOKEN, END_TOKEN]
    with pytest.raises(ValueError, match="3 tokens of 1 pages do not fill one row of 4"):
        rows_of([[5, 6]], 4)


def test_rows_are_made_once_and_hold_only_tokens_of_the_vocabulary(tmp_path: Path) -> None:
    pages = folder_of_pages(tmp_path / "pages")
    corpora = llm_data.load(tmp_path / "cache", 16, pages)
    (made,) = (tmp_path / "cache").glob("rows-*.safetensors")
    stamp = made.stat().st_mtime_ns
    cached = llm_data.load(tmp_path / "cache", 16, pages)

    assert made.stat().st_mtime_ns == stamp
    assert all(np.array_equal(corpora[language].train, cached[language].train) for language in LANGUAGES)
    assert max(int(corpus.train.max()) for corpus in corpora.values()) < llm_data.VOCABULARY
    assert all(len(corpus.train) > len(corpus.held_out) > 0 for corpus in corpora.values())


def test_a_machine_without_apt_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(FileNotFoundError, match=r"libreoffice-help-fr.* cannot be fetched.*--pages FOLDER"):
        llm_data.load(tmp_path, 16)


def runs(**settings: Any) -> dict[tuple[str, str], Run]:
    made = plan(Setting(steps=100, **settings), 0, (0, 5), german=True)
    return {(run.arm, run.learns[-1]): run for run in made}


def test_every_arm_goes_on_from_the_same_english_and_the_union_has_the_steps_of_all() -> None:
    made = runs()

    assert made["0", "french"].after == made["5", "french"].after == made["english", "english"]
    assert made["5", "german"].after == made["5", "french"]
    assert [made[JOINT, language].steps for language in ("french", "german")] == [200, 300]
    assert made["5", "german"].old == ("english", "french")


def test_the_block_of_an_arm_replays_old_languages_only() -> None:
    made = runs()
    french = config_of(made["5", "french"], CONFIG, 9000, 2, "rows")["rehearsal"]
    german = RehearsalConfig.load(config_of(made["5", "german"], CONFIG, 9000, 2, "rows")["rehearsal"])

    assert (french["ratio"], french["mode"], french["buffer"]["preload"]) == (0.05, "replace", "rows")
    assert french["sampling"]["weights"] == {"0": 1}
    assert german.sampling.mixture == {0: 1, 1: 1}


def test_arms_without_replay_have_no_buffer_and_english_only_fills_one() -> None:
    made = runs()
    blocks = {arm: config_of(made[arm], CONFIG, 9000, 2, None)["rehearsal"] for arm in made}

    assert blocks["0", "french"] == blocks[JOINT, "german"] == {"enabled": False}
    assert (blocks["english", "english"]["ratio"], blocks["english", "english"]["sampling"]["weights"]) == (
        0,
        "uniform",
    )


def test_a_variant_changes_what_it_says() -> None:
    small = runs(buffer=0.1, rewarm=0.5)["5", "french"]
    config = config_of(small, CONFIG, 9000, 2, "rows")

    assert config["rehearsal"]["buffer"]["capacity"] == 450
    assert config["optimizer"]["params"]["lr"] == CONFIG["optimizer"]["params"]["lr"] / 2
    assert len(set(variants(100).values())) == len(variants(100))


def test_a_ratio_that_rises_is_the_same_in_the_mean() -> None:
    block = config_of(runs(rising=True, weight=8.0)["5", "french"], CONFIG, 9000, 2, "rows")["rehearsal"]
    assert (block["ratio"], block["ratio_schedule"]) == (0.0, {"to": 0.1, "steps": 100})
    assert block["strategy"] == {"loss_weight": 8.0}


def test_a_budget_takes_the_place_of_the_ratio() -> None:
    made = runs(budget=0.02)
    assert ("5", "french") not in made
    block = config_of(made["budget", "french"], CONFIG, 9000, 2, "rows")["rehearsal"]
    budget = RehearsalConfig.load(block).ratio_budget
    assert budget is not None
    assert (budget.budget, budget.min, budget.max) == (0.02, 0.02, 0.5)
    assert made["budget", "french"].ratio == 0
    assert made["0", "french"].budget is None


def test_the_most_surprising_rows_are_kept_in_phase_one_and_replayed_in_the_next() -> None:
    made = runs(buffer=0.1, surprising=True)
    blocks = {
        arm: RehearsalConfig.load(config_of(made[arm, language], CONFIG, 9000, 2, "rows")["rehearsal"])
        for arm, language in (("english", "english"), ("5", "french"))
    }
    assert (blocks["english"].buffer.policy, blocks["english"].buffer.by_loss) == ("score", True)
    assert (blocks["5"].buffer.policy, blocks["5"].buffer.by_loss) == ("reservoir", False)
    assert {block.buffer.capacity for block in blocks.values()} == {450}
    assert made["5", "french"].after == made["english", "english"]
    assert made["0", "french"] == runs()["0", "french"], "without replay it is the same training"


def test_draws_by_loss_see_the_first_language_alone() -> None:
    made = runs(surprised=True)
    for arm in (("english", "english"), ("5", "french")):
        block = config_of(made[arm], CONFIG, 9000, 2, None)["rehearsal"]
        assert (block["buffer"]["policy"], block["buffer"]["score_by"]) == (FIRST_LANGUAGE, "loss")
        assert block["sampling"]["weights"] == "score"
    assert made["0", "french"] == runs()["0", "french"], "without replay it is the same training"

    index, rng = SlotIndex(3, partitioned=True), np.random.default_rng(0)
    assert first_language(index, Offer(np.array([1, 0, 0, 0, 0])), rng).tolist() == [-1, 0, 1, 2, -1]


def test_a_mixture_begins_with_the_second_old_language() -> None:
    made = runs(mixture="forgetting", german=True)
    assert made["5", "french"] == runs()["5", "french"]
    block = RehearsalConfig.load(config_of(made["5", "german"], CONFIG, 9000, 2, "rows")["rehearsal"])
    assert (block.sampling.weights, block.losses_every) == ("forgetting", 1)
    uniform = config_of(runs(mixture="uniform")["5", "german"], CONFIG, 9000, 2, "rows")["rehearsal"]
    assert RehearsalConfig.load(uniform).sampling.weights == "uniform"


def test_mixtures_are_compared_by_the_old_language_that_lost_most() -> None:
    rows = [row("english", "english", (3.0, 8.0, 9.0)), row("5", "french", (4.0, 3.0, 9.0))]
    rows += [row("5", "german", (4.0, 4.5, 3.0), variant=UNIFORM), row("5", "german", (4.2, 4.1, 3.0), variant=NEED)]
    assert summarise(rows, ())["worst_domain_vs_uniform"] == pytest.approx(1.2 / 1.5)
    assert "| as they are stored | 4.000 | 4.500 | 3.000 | 1.500 |" in "\n".join(mixtures(rows))
    assert mixtures(rows[:3]) == []


def test_another_setting_is_another_folder_and_a_shared_run_the_same() -> None:
    base, small = runs(), runs(buffer=0.1)
    keys = [key_of(made["5", "french"], CONFIG, 2) for made in (base, small)]
    changed = {**CONFIG, "gradient_clipping": 2.0}

    assert keys[0] != keys[1]
    assert key_of(base["0", "french"], CONFIG, 2) == key_of(small["0", "french"], CONFIG, 2)
    assert key_of(base["5", "french"], changed, 2) != keys[0]


def row(arm: str, after: str, losses: tuple[float, float, float], seed: int = 0, variant: str = BASE) -> Row:
    """A line of the report."""
    start = {"variant": variant, "seed": seed, "arm": arm, "learns": after, "after": after, "ratio": 0.0, "steps": 100}
    curve = [{"step": step, **dict(zip(LANGUAGES, losses, strict=True))} for step in (50, 100)]
    more = {"rate": 1.0, "tokens": 1e6, "epochs": 1.0, "curve": curve, "seconds": 1.0, "parameters": 1_300_000}
    return {**start, **dict(zip(LANGUAGES, losses, strict=True)), **more}


def mean(share: Spread | None) -> float:
    """That of one that there is."""
    assert share is not None
    return share.mean


def report_rows(seed: int = 0, variant: str = BASE, with_5: float = 4.0) -> list[Row]:
    """No replay ends at 6 on English, the union at 3."""
    ends = {"0": (6.0, 3.0, 7.0), "5": (with_5, 3.03, 7.0), "25": (3.3, 3.1, 7.0), JOINT: (3.0, 3.2, 7.0)}
    english = row("english", "english", (3.0, 8.0, 9.0), seed, variant)
    return [english, *(row(arm, "french", losses, seed, variant) for arm, losses in ends.items())]


def test_the_share_of_the_gap_lies_between_no_replay_and_the_union() -> None:
    rows = report_rows()

    assert mean(gap_closed(rows, "5")) == pytest.approx(2 / 3)
    assert mean(gap_closed(rows, "25")) == pytest.approx(0.9)
    assert mean(cost_on_new(rows, "5")) == pytest.approx(0.01)
    assert gap_closed(rows, "50") is None


def test_the_summary_is_of_the_base_variant_and_of_complete_seeds() -> None:
    rows = report_rows() + report_rows(seed=1, with_5=4.3) + report_rows(variant="other", with_5=6.0)
    rows += [row("english", "english", (3.0, 8.0, 9.0), seed=2), row("5", "french", (6.0, 3.0, 7.0), seed=2)]
    summary = summarise(rows, (0.0, 1.0, 5.0, 25.0))

    assert summary["seeds"] == 2
    assert summary["gap_closed_5"] == pytest.approx((2 / 3 + 1.7 / 3) / 2)
    assert summary["gap_closed_5_sd"] == pytest.approx(0.1 / 2**0.5)
    assert summary["gap_closed_25"] == pytest.approx(0.9)
    assert "gap_closed_1" not in summary
    assert "gap_closed_5_rising" not in summary
    rising = summarise(rows + report_rows(variant=RISING, with_5=3.6), (5.0,))
    assert rising["gap_closed_5_rising"] == pytest.approx(0.8)
    assert rising["cost_on_new_5_rising"] == pytest.approx(0.01)


def test_what_beats_the_line_of_fixed_ratios_is_named() -> None:
    rows = report_rows()  # the line goes from 6.0 without replay to 4.0 with 5 %
    assert against_fixed([*rows, *report_rows(variant=RISING, with_5=4.0)]).startswith("So far nothing beats")
    better = against_fixed([*rows, *report_rows(variant=RISING, with_5=3.6)])
    assert better.startswith(f"Below the line: 5 % with {RISING}.")


def test_the_page_does_not_need_the_union(tmp_path: Path) -> None:
    rows = [one for one in report_rows() if one["arm"] != JOINT]
    report = {"summary": {}, "rows": rows, "environment": {"ranks": 2, "cores": 2, "versions": {"torch": "2.13"}}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/train_llm.json").write_text(json.dumps(report))
    assert "- the union with 3 of 3 seeds in French" in llm_page.build(tmp_path).read_text()


def test_what_a_report_knows_is_not_trained_again(tmp_path: Path) -> None:
    known = {**row("0", "french", (6.0, 3.0, 7.0)), "key": ""}
    arguments = train_llm.parse(["--first-seed", "4", "--out", str(tmp_path)])
    wanted = {run.arm: run for _, run in train_llm.wanted_runs(arguments)}
    known["key"] = train_llm.Recipe(arguments).key(wanted["0"])
    (tmp_path / "known.json").write_text(json.dumps({"rows": [known]}))
    arguments.known = tmp_path / "known.json"
    recipe = train_llm.Recipe(arguments)

    assert {run.seed for run in wanted.values()} == {4}
    assert recipe.finished(wanted["0"])
    assert not recipe.finished(wanted["5"])
    assert recipe.row("another", wanted["0"]) == {**known, "variant": "another"}


def test_the_page_is_built_from_the_report_alone(tmp_path: Path) -> None:
    rows = report_rows() + report_rows(seed=1) + report_rows(variant="half the steps", with_5=5.0)
    place = {"ranks": 2, "cores": 2, "versions": {"torch": "2.13"}, "commit": "0" * 40}
    report = {"summary": summarise(rows, (5.0, 25.0)), "rows": rows, "environment": place}
    (tmp_path / "report.json").write_text(json.dumps(report))
    llm_page.main(["--docs", str(tmp_path / "docs"), "--report", str(tmp_path / "report.json")])
    page = llm_page.build(tmp_path / "docs").read_text()

    assert "| 5 % | 4.000 ± 0.000 | 3.030 ± 0.000 | 7.000 ± 0.000 | 66.7 ± 0.0 % | 1.0 ± 0.0 % | 2 |" in page
    assert "| half the steps | 3.000 | 6.000 | 3.000 | 33.3 % | 1.0 % | 3.030 |" in page
    assert "- 0 % replay with 1 of 3 seeds in French\n- 1 % replay with 3 of 3 seeds in French\n" in page
    assert "- the phase in German\n- the variant 'learning rate re-warmed to a third'\n" in page
    assert "variant 'half the steps'" not in page
    for picture in ("llm.png", "llm_old_against_new.png"):
        assert (tmp_path / "docs/images" / picture).read_bytes().startswith(b"\x89PNG")
        assert f"](../images/{picture})" in page
    with pytest.raises(FileNotFoundError, match=r"python -m scripts\.llm\.train --size full"):
        llm_page.build(tmp_path)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two phases of a few steps under the real launcher: English, then French with a quarter of replay."""
    out = tmp_path_factory.mktemp("train_llm")
    pages = folder_of_pages(out / "pages")
    options = ["--steps", "8", "--ratios", "25", "--pages", str(pages), "--out", str(out)]
    arguments = train_llm.parse(options)
    recipe = train_llm.Recipe(arguments)
    wanted = [one for one in train_llm.wanted_runs(arguments) if one[1].arm in ("english", "25")]
    for _, run in wanted:
        recipe.train(run)
    train_llm.publish(recipe, wanted, arguments)
    written: dict[str, Any] = json.loads((out / "report.json").read_text())
    (made_up,) = (run for run in plan(variants(arguments.steps)[MADE_UP], 0, (25.0,), german=False) if run.made_up)
    recipe.make_up(made_up)
    preload = recipe.deepspeed_config(made_up)["rehearsal"]["buffer"]["preload"]
    stored = recipe.folder(wanted[0][1]) / "buffer"
    return {**written, "made up": inspect(Path(preload)), "stored": inspect(stored)}


def test_a_phase_replays_its_share_and_only_the_language_before_it(results: dict[str, Any]) -> None:
    english, french = results["rows"]

    assert english["rehearsal"]["rows_replayed"] == 0
    # A quarter of four rows in each of eight steps; the first rows need some steps to come.
    assert 5 <= french["rehearsal"]["rows_replayed/0"] == french["rehearsal"]["rows_replayed"] <= 8
    assert french["rehearsal"].get("rows_replayed/1", 0) == 0


def test_the_buffer_of_a_phase_is_where_the_next_one_begins(results: dict[str, Any]) -> None:
    english, french = results["rows"]

    assert french["rehearsal"]["rows_stored/0"] == english["rehearsal"]["rows_stored/0"] == 32
    assert french["rehearsal"]["rows_stored/1"] > 0


def test_the_report_has_the_losses_of_all_languages(results: dict[str, Any]) -> None:
    assert all(0 < line[language] < 20 for line in results["rows"] for language in LANGUAGES)
    assert [(line["variant"], line["arm"]) for line in results["rows"]] == [
        ("base", "english"),
        ("base", "25"),
    ]


def test_a_phase_may_begin_with_what_the_model_before_it_says(results: dict[str, Any]) -> None:
    made_up = results["made up"]

    assert made_up["rows_by_partition"] == {0: made_up["rows"]}
    assert made_up["rows"] > 0
    assert sorted(made_up["fields"]) == sorted(results["stored"]["fields"])


def test_a_job_that_fails_ends_the_recipe_and_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = train_llm.parse(["--steps", "1", "--pages", str(folder_of_pages(tmp_path)), "--out", str(tmp_path)])
    recipe, (_, run) = train_llm.Recipe(arguments), next(train_llm.wanted_runs(arguments))
    failed: subprocess.CompletedProcess[str] = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)

    with pytest.raises(SystemExit, match="seed 0, english: the job ended with status 3"):
        recipe.train(run)


def test_a_budget_is_compared_with_the_ratio_that_ends_at_its_loss() -> None:
    rows = report_rows()
    assert fixed_ratio(rows, 3.3) == pytest.approx(0.25)
    assert fixed_ratio(rows, 3.65) == pytest.approx(0.15), "between 5 % at 4.0 and 25 % at 3.3"
    assert fixed_ratio(rows, 3.0) is None


def test_the_section_of_a_budget_counts_the_rows_of_both_ranks() -> None:
    controlled = row("budget", "french", (3.06, 3.1, 7.0), variant=BUDGET)
    controlled |= {"tokens": 100 * LENGTH, "rehearsal": {"rows_replayed": 10, "forgetting/0": 0.021}}
    rows = [*report_rows(), controlled]
    assert "| 0 | 2.1 % | 2.0 % | 20 % |" in "\n".join(budgets(rows))

    summary = summarise([*rows, row("50", "french", (3.0, 3.2, 7.0))], (5.0, 25.0))
    assert summary["budget_error"] == pytest.approx(0.05)
    assert summary["budget_vs_fixed"] == pytest.approx(0.2 / 0.45), "3.06 lies between 25 % at 3.3 and 50 % at 3.0"


def test_the_same_share_gets_more_where_the_ratio_rises() -> None:
    text = "\n".join(more_for_the_same(report_rows() + report_rows(variant=RISING, with_5=3.3)))
    assert "| 5 % | a constant ratio | 4.000 | 3.030 | 66.7 % | 1.0 % | 1 |" in text
    assert f"| 5 % | {RISING} | 3.300 | 3.030 | 90.0 % | 1.0 % | 1 |" in text
    assert f"| 25 % | {RISING} | 3.300 | 3.100 | 90.0 % | 3.3 % | 1 |" in text
    assert more_for_the_same(report_rows()) == []


def test_what_was_tried_on_another_seed_is_told_with_its_share() -> None:
    told = {"seed": 9, "english": 3.1, "ratio_at_end": 0.25, "rise_at_end": 0.032, "window": 256}
    told |= {"both_ratio_at_end": 0.06, "both_rise_at_end": 0.034}
    rows = [{"arm": "a budget of 2 %", "english": 3.08, "french": 2.83, "replayed": 0.39}]
    text = "\n".join(tried({"summary": told, "rows": rows}))
    assert "| a budget of 2 % | 3.080 | 2.830 | 39.0 % |" in text
    assert "risen by 3.2 % then, over a window of 256 rows" in text
    assert "risen by 3.4 % at the end, with a ratio of 0.06" in text


def test_slow_weights_are_compared_with_those_that_were_trained() -> None:
    rows = [{"weights": "as trained", "english": 3.5, "french": 2.7}]
    rows += [{"weights": "average over 100 steps", "english": 3.49, "french": 2.68}]
    text = "\n".join(slow_weights({"summary": {"seed": 9, "weight": 4}, "rows": rows}))
    assert "better by 0.010 and 0.020" in text


def test_the_share_of_rows_that_come_again_is_that_of_uniform_draws() -> None:
    drawn = np.random.default_rng(0).integers(1000, size=(200, 400))
    again = np.mean([1 - len(np.unique(one)) / 400 for one in drawn])
    assert seen_before(400, 1000) == pytest.approx(float(again), abs=0.01)
    assert spaced([]) == []
