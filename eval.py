"""Measure a checkpoint:  python eval.py ckpt_path=last split=test"""

from pathlib import Path

from evomoe.cli import run_main
from evomoe.evaluation import evaluate

if __name__ == "__main__":
    run_main(evaluate, Path(__file__).resolve().parent / "configs", "eval")
