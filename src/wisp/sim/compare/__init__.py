"""`wisp sim compare`: systems over a suite of scenarios, each baseline at its best, and a verdict for each cell.

    suite.toml, sampler  ->  cells  ->  tuning on seeds of its own  ->  runs on paired seeds  ->  verdicts

One scenario decides nothing about a policy: what is found in one cell is held against all others.
"""
