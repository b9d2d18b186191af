"""Continue prompts with a checkpoint:  python generate.py ckpt_path=last prompt="The function returns"""

from pathlib import Path

from evomoe.cli import run_main
from evomoe.writing import write

if __name__ == "__main__":
    run_main(write, Path(__file__).resolve().parent / "configs", "generate")
