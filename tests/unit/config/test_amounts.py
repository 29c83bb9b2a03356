"""How much is replayed: forgetting budgets, and what they do not go together with."""

from __future__ import annotations

from typing import Any

import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.config import RatioBudget
from rehearsal_plugin.config.differences import key_digests
from rehearsal_plugin.errors import ConfigError

BUDGET: dict[str, Any] = {"ratio": {"budget": 0.02}, "buffer": {"partition_by": "domain"}}
BY_NEED: dict[str, Any] = {"sampling": {"weights": "forgetting"}, "buffer": {"partition_by": "domain"}}


def refusal(block: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        RehearsalConfig.load(block)
    return str(refused.value)


def test_a_budget_alone_is_enough() -> None:
    config = RehearsalConfig.load(BUDGET)
    assert config.ratio_budget == RatioBudget(budget=0.02, min=0.005, max=0.5, window=1024, by="ratio")
    assert config.given_ratio is None
    assert config.ratio_budget.middle == pytest.approx(0.05)
    assert config.losses_every == 1, "nobody has to ask for the losses that it goes by"
    assert config.follows_losses


def test_the_losses_that_are_asked_for_stay() -> None:
    assert RehearsalConfig.load({**BUDGET, "losses_every": 7}).losses_every == 7
    assert RehearsalConfig.load(BY_NEED).losses_every == 1
    assert RehearsalConfig.load({}).losses_every == 0


def test_a_section_survives_json() -> None:
    config = RehearsalConfig.load(BUDGET)
    assert RehearsalConfig.model_validate(config.model_dump(mode="json")) == config


def test_ranks_find_another_budget() -> None:
    mine, theirs = (
        key_digests(RehearsalConfig.load({**BUDGET, "ratio": ratio})) for ratio in ({"budget": 0.02}, {"budget": 0.03})
    )
    assert [key for key in mine if mine[key] != theirs[key]] == ["rehearsal.ratio"]


@pytest.mark.parametrize(
    ("ratio", "complaint"),
    [
        ({"budget": 0.0}, "rehearsal.ratio.budget must be greater than 0"),
        ({"budget": "2 %"}, "rehearsal.ratio.budget must be a valid number"),
        ({"min": 0.1}, "rehearsal.ratio.budget is missing"),
        ({"budget": 0.1, "min": 0.5, "max": 0.1}, "rehearsal.ratio.min is 0.5 and rehearsal.ratio.max is 0.1"),
        ({"budget": 0.1, "max": 1.0}, "rehearsal.ratio.max must be less than 1"),
        ({"budget": 0.1, "maxi": 0.5}, "did you mean 'rehearsal.ratio.max'?"),
        ({"budget": 0.1, "by": "weight"}, "rehearsal.ratio.by must be 'ratio', 'loss_weight' or 'both'"),
        ({"budget": 0.1, "max_weight": 3.0}, "rehearsal.ratio.max_weight has no use with rehearsal.ratio.by 'ratio'"),
        (1.0, "rehearsal.ratio must be less than 1"),
        ("5 %", "rehearsal.ratio must be a valid number"),
    ],
)
def test_a_budget_that_is_none_is_refused_by_its_key(ratio: Any, complaint: str) -> None:
    assert complaint in refusal({**BUDGET, "ratio": ratio})


@pytest.mark.parametrize(("section", "user"), [(BUDGET, "rehearsal.ratio.budget"), (BY_NEED, "'forgetting'")])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"buffer": {}}, "rehearsal.buffer.partition_by is missing"),
        ({"losses_every": 0}, "set rehearsal.losses_every to 1 or more"),
        ({"scope": "local"}, "rehearsal.sampling.scope is 'local'"),
        ({"rows_per_sample": 2}, "goes by single rows"),
        ({"exchange": {"on_failure": "local"}}, "rehearsal.exchange.on_failure 'local' lets a rank go on"),
    ],
)
def test_what_keeps_the_losses_from_being_known_is_refused(
    section: dict[str, Any], user: str, change: dict[str, Any], complaint: str
) -> None:
    change = dict(change)
    sampling = {**section.get("sampling", {}), **({"scope": change.pop("scope")} if "scope" in change else {})}
    message = refusal({**section, "sampling": sampling, **change})
    assert complaint in message
    assert user in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ratio_schedule": {"to": 0.5, "steps": 10}}, "both change the ratio; keep one of them"),
        ({"guard": {"action": "raise_ratio"}}, "let the guard 'warn' or 'stop'"),
        ({"representatives": 3}, "keep one of them"),
    ],
)
def test_nothing_else_changes_the_ratio_beside_a_budget(change: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal({**BUDGET, **change})


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_the_guard_stays_for_what_is_past_saving(action: str) -> None:
    assert RehearsalConfig.load({**BUDGET, "guard": {"action": action}}).guard is not None


def test_weights_that_follow_the_losses_are_not_given_by_a_file() -> None:
    sampling = {"weights": "forgetting", "weights_file": "weights.json"}
    assert "rehearsal.sampling.weights_file changes" in refusal({**BY_NEED, "sampling": sampling})
