"""The benchmark suite (`python -m bench --help`) and the traffic budget (`python -m bench.budget --help`)."""
