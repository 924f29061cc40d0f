"""lm-eval task definitions; ``TASKS_DIR`` is given to its TaskManager."""

from pathlib import Path

TASKS_DIR = Path(__file__).parent
