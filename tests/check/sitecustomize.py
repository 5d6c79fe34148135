"""Plants the defect that WISP_PLANTED names in every Python process that has this folder on PYTHONPATH (`planted`)."""

import os

if name := os.environ.get("WISP_PLANTED"):
    import planted

    planted.plant(name)
