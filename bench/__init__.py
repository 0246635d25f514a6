"""The benchmark suite and the traffic budget. `python -m bench --help`, `python -m bench.report --help`, `python -m bench.budget`."""
