"""Faults on purpose and endurance: each row of `docs/results/reliability.md` names one of these tests or of the others."""
