"""Experiments, one folder each: base.gin, sweep.py, table.py, expected.json."""
