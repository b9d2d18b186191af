"""Train a model:  python train.py experiment=gpt_dts"""

from pathlib import Path

from evomoe.cli import run_main
from evomoe.run import train

if __name__ == "__main__":
    run_main(train, Path(__file__).resolve().parent / "configs", "train")
