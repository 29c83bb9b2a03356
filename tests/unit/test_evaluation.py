"""Transfer and forgetting, by hand."""

from __future__ import annotations

import pytest

from rehearsal_plugin.evaluation import Transfer


def test_losses_of_three_domains_after_three_phases() -> None:
    transfer = Transfer([5.0, 5.2, 5.4])
    for row in ([2.0, 4.0, 5.0], [2.6, 1.5, 4.4], [2.4, 1.9, 1.0]):
        transfer.add(row)
    assert transfer.figures() == pytest.approx(
        {
            "average": (2.4 + 1.9 + 1.0) / 3,
            "learned_loss": 1.0,
            "retained_loss": (2.4 + 1.9) / 2,
            "backward_transfer": -(0.4 + 0.4) / 2,
            "forgetting": (0.4 + 0.4) / 2,
            "forward_transfer": ((5.2 - 4.0) + (5.4 - 4.4)) / 2,
        }
    )


def test_forgetting_is_counted_from_the_best_and_transfer_from_the_own_phase() -> None:
    transfer = Transfer(lower_is_better=False)
    for row in ([0.8, 0.1], [0.9, 0.6], [0.7, 0.6]):
        transfer.add(row)
    found = transfer.figures()
    assert found["forgetting"] == pytest.approx(0.2)
    assert found["backward_transfer"] == pytest.approx(-0.1)
    assert "forward_transfer" not in found


def test_a_domain_that_was_never_better_is_forgotten_by_less_than_nothing() -> None:
    transfer = Transfer(lower_is_better=False)
    for row in ([0.5, 0.1], [0.9, 0.6]):
        transfer.add(row)
    assert transfer.figures()["forgetting"] == pytest.approx(-0.4)


def test_one_phase_has_nothing_to_forget() -> None:
    transfer = Transfer()
    assert transfer.figures() == {}
    transfer.add([1.5, 9.0])
    assert transfer.figures() == {"average": 1.5, "learned_loss": 1.5}


def test_another_number_of_domains_is_refused() -> None:
    transfer = Transfer([1.0, 2.0])
    with pytest.raises(ValueError, match="3 evaluations for 2 domains"):
        transfer.add([1.0, 2.0, 3.0])
