"""Where and when something was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def facts() -> dict[str, str]:
    """Machine, versions and date in words."""
    machine = f"{cpu_name()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    return {
        "machine": machine,
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }
