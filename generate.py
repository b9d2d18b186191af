"""Continue, fill in, classify or translate:  python generate.py ckpt_path=last prompt="The function returns" ."""

from pathlib import Path

from evomoe.cli import run_main
from evomoe.prediction import predict

if __name__ == "__main__":
    run_main(predict, Path(__file__).resolve().parent / "configs", "generate")
