"""Draws a run from its TensorBoard files: loss, active experts, temperature, and the balance of the load.

    python scripts/plot_run.py logs/gpt_dts/<run> --output run.png

Needs matplotlib: pip install -e ".[notebook]"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = tuple[list[int], list[float]]

PANELS: list[tuple[str, dict[str, str]]] = [
    (
        "loss",
        {
            "train/loss": "train",
            "val/loss": "validation, training rule",
            "val/loss_sparse": "validation, sparse rule",
        },
    ),
    ("experts per token", {"moe/active_experts": "active experts"}),
    ("temperature, noise scale", {"evolution/temperature": "temperature", "evolution/noise_scale": "noise scale"}),
    ("maximal violation of balance", {}),  # one curve per MoE layer
]


def read_curves(run: Path) -> dict[str, Curve]:
    """All scalars below a run's folder by key; of a step that was logged twice, as around a resume, the last.

    Raises:
        FileNotFoundError: there is no event file.
    """
    folders = sorted({path.parent for path in run.rglob("events.out.tfevents.*")})
    if not folders:
        raise FileNotFoundError(f"no TensorBoard file below {run}: give the folder of a run, logs/<experiment>/<run>")
    curves: dict[str, Curve] = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for key in events.Tags()["scalars"]:
            values = {event.step: event.value for event in events.Scalars(key)}
            steps = sorted(values)
            curves[key] = (steps, [values[step] for step in steps])
    return curves


def plot(curves: dict[str, Curve], title: str, output: Path) -> None:
    """Write one picture with a panel for each quantity that the run logged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys_of_load = [key for key in curves if key.endswith("/load_max_violation")]
    layers = sorted({key.split("/")[1] for key in keys_of_load})
    violations = {
        key: key.split("/")[1] + (", validation" if key.startswith("val_moe/") else "") for key in sorted(keys_of_load)
    }
    panels = [(name, keys or violations) for name, keys in PANELS]
    panels = [(name, {key: label for key, label in keys.items() if key in curves}) for name, keys in panels]
    panels = [(name, keys) for name, keys in panels if keys]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.4 * len(panels)), sharex=True, squeeze=False)
    for axis, (name, keys) in zip(axes[:, 0], panels, strict=True):
        for key, label in keys.items():
            style = {"marker": "o", "markersize": 3} if key.startswith("val") else {}
            if key in violations:  # a layer has one colour, in training and in validation
                style["color"] = f"C{layers.index(key.split('/')[1])}"
            axis.plot(*curves[key], label=label, linestyle="--" if key.startswith("val_moe/") else "-", **style)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel("optimizer step")
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> int:
    """Read the command line, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, default=Path("run.png"), help="picture to write (%(default)s)")
    options = parser.parse_args()
    try:
        curves = read_curves(options.run)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plot(curves, options.run.name, options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
