"""``python -m dream_pyg`` and the ``dream-pyg`` command."""

from dream_pyg import ranks
from dream_pyg.cli import main

if __name__ == "__main__":
    ranks.run_and_leave(main)
