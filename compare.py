"""Hold methods side by side:  python compare.py comparison=main"""

from functools import partial
from pathlib import Path

from evomoe.cli import run_main
from evomoe.reporting import compare

if __name__ == "__main__":
    root = Path(__file__).resolve().parent
    run_main(partial(compare, root=root), root / "configs", "compare")
