"""Benchmarks: what README's figures come from. `make bench` runs them; each module says how it measures."""
