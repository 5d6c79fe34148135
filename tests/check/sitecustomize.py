"""Plants the defect that PLANTED names in every Python process that has this folder on PYTHONPATH (`planted`)."""

import os

if name := os.environ.get("PLANTED"):
    import planted

    planted.plant(name)
