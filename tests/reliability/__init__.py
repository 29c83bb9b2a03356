"""Faults on purpose and endurance: each row of the page on reliability names one of these or other tests."""
