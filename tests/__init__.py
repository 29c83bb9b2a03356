"""Tests of `rehearsal_plugin`, of its scripts and of its documentation."""
