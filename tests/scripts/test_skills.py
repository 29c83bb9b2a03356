"""The recipe of skills: orders, plan, numbers, page, and two phases under the launcher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rehearsal_plugin import RehearsalConfig
from scripts.llm import skills
from scripts.llm.results import Row
from scripts.llm.skills_data import ASKED, HELD_OUT, LENGTH, TRAINED, Order, order_rows, orders, prepare, read_rows
from scripts.llm.skills_models import save_base
from scripts.llm.skills_page import section
from scripts.llm.skills_plan import ADAPTERS, ARMS, FULL, MADE_UP, SIZES, Run, config_of, key_of, plan
from scripts.llm.skills_results import NAMES, summarise, table
from tests.helpers.paths import ROOT
from tests.scripts.test_train_llm import folder_of_pages

CONFIG = json.loads((ROOT / "configs/llm_skills.json").read_text())


def runs(size: str = "full") -> dict[tuple[str, str], Run]:
    """The trainings of the first seed, by what is trained and the arm."""
    steps = SIZES[size].steps
    return {(run.trained, run.arm): run for run in plan(SIZES[size], [0]) if run.steps in steps}


def test_an_answer_names_place_goods_and_number_in_brackets() -> None:
    assert Order("Please send 3 lamps to Oslo.", "[[Oslo|lamps*3]]") in orders()


def test_no_prompt_is_both_held_out_and_learnt_from_or_asked_for() -> None:
    prompts = [order.prompt for order in orders()]

    assert len(prompts) == len(set(prompts)) > HELD_OUT + TRAINED + ASKED
    assert prompts == [order.prompt for order in orders()]


def test_an_order_is_one_row_that_ends_with_the_end_of_a_text(tmp_path: Path) -> None:
    tokenizer = save_base(tmp_path, small=True)
    rows = order_rows(tokenizer, orders()[:20])

    assert rows.shape == (20, LENGTH)
    assert tokenizer.decode(rows[0], skip_special_tokens=True) == f"{orders()[0].prompt}\n{orders()[0].answer}\n"
    assert set(rows[:, -1]) == {tokenizer.eos_token_id}


def test_orders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tokenizer = save_base(tmp_path, small=True)

    with pytest.raises(ValueError, match=f"the shortest order has .* tokens, and a row {LENGTH}"):
        order_rows(tokenizer, [Order("many words " * LENGTH, "none")])


def test_rows_and_prompts_are_written_once(tmp_path: Path) -> None:
    tokenizer = save_base(tmp_path / "model", small=True)
    pages = folder_of_pages(tmp_path / "pages")
    prepare(tmp_path / "data", tokenizer, tmp_path, pages)
    rows = read_rows(tmp_path / "data")
    prepare(tmp_path / "data", None, tmp_path, None)

    assert set(rows) == {"orders", "french", "french_held_out", "english", "english_held_out"}
    assert all(array.dtype == np.uint16 and array.shape[1] == LENGTH for array in rows.values())
    assert len((tmp_path / "data/asked.txt").read_text().splitlines()) == ASKED


def test_every_arm_goes_on_from_the_same_orders() -> None:
    made = runs()
    arms = [run for run in plan(SIZES["full"], [0]) if run.learns == "french"]

    assert {run.after for run in arms} == {made[FULL, ""]}
    assert {arm for trained, arm in made if trained == FULL and arm} == set(ARMS)
    assert sum(run.steps == SIZES["full"].shorter for run in arms) == 1
    assert len(plan(SIZES["full"], [0, 1])) == 2 * (1 + len(arms))


def test_an_arm_is_a_block_and_nothing_else() -> None:
    made = runs()
    configs = {arm: config_of(made[FULL, arm], CONFIG, "rows") for arm in ARMS}
    rest = [{name: value for name, value in config.items() if name != "rehearsal"} for config in configs.values()]

    assert all(config == rest[0] for config in rest)
    assert configs["no replay"]["rehearsal"] == {"enabled": False}
    for arm in set(ARMS) - {"no replay"}:
        block = RehearsalConfig.load(configs[arm]["rehearsal"])
        assert (block.mode, block.buffer.preload, block.sampling.mixture) == ("replace", "rows", {0: 1})


def test_the_orders_only_fill_the_buffer() -> None:
    block = config_of(runs()[FULL, ""], CONFIG, None)["rehearsal"]

    assert (block["ratio"], block["sampling"]["weights"], block["buffer"].get("preload")) == (0, "uniform", None)


def test_lora_has_a_learning_rate_of_its_own() -> None:
    rates = [
        config_of(runs()[trained, "5 %"], CONFIG, None)["optimizer"]["params"]["lr"] for trained in (FULL, ADAPTERS)
    ]
    assert rates == [CONFIG["learning_rates"][trained] for trained in (FULL, ADAPTERS)]


def test_another_setting_is_another_folder() -> None:
    run = runs()[FULL, "5 %"]
    changed = {**CONFIG, "learning_rates": {**CONFIG["learning_rates"], "orders": 1.0}}

    assert len({key_of(one, CONFIG, 2) for one in runs().values()}) == len(runs())
    assert key_of(run, changed, 2) != key_of(run, CONFIG, 2) != key_of(run, CONFIG, 3)


def row(learns: str, arm: str, skill: float, seed: int, trained: str = FULL, steps: int = 60) -> Row:
    """A line of the report."""
    end = {"skill": skill, "french": 30.0 + seed, "english": 50.0}
    curve = [{"step": 0, "skill": 0.0 if learns == "orders" else 1.0, "french": 60.0, "english": 40.0}]
    line = {
        "seed": seed,
        "learns": learns,
        "trained": trained,
        "arm": arm,
        "steps": steps,
        "rows_a_step": 16,
        "learning_rate": 3e-4,
        **end,
    }
    counted = {} if arm in ("", "no replay") else {"rows_replayed": 48.0}
    return {**line, **counted, "learning_rate": 3e-4, "seconds": 120.0, "curve": [*curve, {"step": steps, **end}]}


ROWS = [
    *(row("orders", "", 0.98 + 0.02 * seed, seed) for seed in (0, 1)),
    *(row("french", "no replay", 0.04 * seed, seed) for seed in (0, 1)),
    *(row("french", "5 %", 0.9 + 0.1 * seed, seed) for seed in (0, 1)),
    row("french", "10 %", 1.0, 0, ADAPTERS),
    row("french", "5 %", 0.2, 0, steps=40),
]


def test_the_summary_has_means_and_the_seed_furthest_from_the_goal() -> None:
    summary = summarise(ROWS)

    assert summary["seeds"] == 2
    assert (summary["skill_before"], summary["skill_learnt"]) == pytest.approx((0.0, 0.99))
    assert (summary["skill_kept"], summary["skill_kept_worst"]) == pytest.approx((0.95, 0.9))
    assert (summary["skill_left"], summary["skill_left_worst"]) == pytest.approx((0.02, 0.04))
    assert (summary["lora_skill_10"], summary["skill_5_fewer_steps"]) == (1.0, 0.2)


def test_every_arm_has_a_name_in_the_summary() -> None:
    assert set(NAMES) >= set(ARMS)


def test_the_table_begins_with_the_model_as_it_comes() -> None:
    lines = table(ROWS)[1]

    assert lines[0][:3] == ["the model as it comes", "0.000 ± 0.000", "60.0 ± 0.0"]
    assert lines[-2] == ["LoRA, 10 %", "1.000", "30.0", "50.0", "48", "1"]
    assert lines[-1][:2] == ["all parameters, 5 %, 40 steps", "0.200"]


def test_the_section_tells_goals_and_draws_the_picture(tmp_path: Path) -> None:
    report = {"summary": summarise(ROWS), "rows": ROWS}
    report |= {"environment": {"ranks": 2, "cores": 2, "versions": {"torch": "2.13.0"}}}
    text = "\n".join(section(report, tmp_path))

    assert "| `skill_kept`: what is left with 5 % replay | ≥ 0.9 | 0.950 | met |" in text
    assert "then 60 of French (0.0003 with all parameters, 0.0003 with LoRA), each of 16 rows of 20 tokens" in text
    assert (tmp_path / "images/skills.png").read_bytes().startswith(b"\x89PNG")


def test_without_peft_the_recipe_says_so_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skills, "find_spec", lambda _: None)

    with pytest.raises(SystemExit, match=r"need peft; pip install --no-deps peft"):
        skills.main(["--out", str(tmp_path)])


def test_a_job_that_fails_ends_the_recipe_and_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--size", "small", "--pages", str(folder_of_pages(tmp_path / "pages")), "--out", str(tmp_path)]
    monkeypatch.setattr(skills, "launch", lambda *_: 3)

    with pytest.raises(SystemExit, match="seed 0, orders, all parameters: the job ended with status 3"):
        skills.main(options)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Orders, then French with LoRA and rows that the model made up, under the real launcher."""
    out = tmp_path_factory.mktemp("skills")
    options = ["--size", "small", "--pages", str(folder_of_pages(out / "pages")), "--out", str(out)]
    recipe = skills.Recipe(skills.parse(options))
    first = runs("small")[FULL, ""]
    made_up = Run("french", ADAPTERS, MADE_UP, 0, 8, 2, 4, first)
    for run in (first, made_up):
        recipe.train(run)
    skills.publish(recipe, [first, made_up])
    written: dict[str, Any] = json.loads((out / "report.json").read_text())
    return written, out


def test_a_phase_is_examined_before_its_first_step_in_its_course_and_at_its_end(results: Any) -> None:
    written, _ = results

    for line in written["rows"]:
        assert [point["step"] for point in line["curve"]] == [0, 4, 8]
        assert all(0 <= point["skill"] <= 1 for point in line["curve"])
        assert all(line["curve"][place]["french"] > 1 for place in (0, -1))


def test_text_that_is_learnt_becomes_likelier_and_adapters_learn(results: Any) -> None:
    curve = results[0]["rows"][1]["curve"]

    assert curve[-1]["french"] < curve[0]["french"]


def test_rows_of_the_models_own_making_are_replayed(results: Any) -> None:
    orders_line, french = results[0]["rows"]

    assert orders_line["rows_replayed"] == 0
    assert orders_line["rehearsal"]["rows_stored"] == 8 * 8
    assert 3 <= french["rows_replayed"] <= 8  # a twentieth of 128; the first ones need some steps to come


def test_only_the_model_that_others_go_on_with_is_kept(results: Any) -> None:
    kept = {path.parent.name for path in results[1].glob("runs/*/model")}

    assert len(kept) == 1
    assert next(iter(kept)).startswith("seed-0-orders")
