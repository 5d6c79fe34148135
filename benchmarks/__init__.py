"""Benchmarks and experiments: `python -m benchmarks --help`, from the root of the repository; see also the Makefile.

They make the pages of `docs/results`, and are no part of the package.
"""
