"""One LightningModule per task."""

from evomoe.tasks.language_modeling import LanguageModeling
from evomoe.tasks.optimization import Optimization

__all__ = ["LanguageModeling", "Optimization"]
