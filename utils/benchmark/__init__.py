"""Benchmarks: `python3 -m utils.benchmark --help`. Nothing else imports them."""
