"""One LightningModule per task."""

from evomoe.tasks.evaluated_task import EvaluatedTask
from evomoe.tasks.image_classification import ImageClassification
from evomoe.tasks.language_modeling import LanguageModeling
from evomoe.tasks.masked_lm import MaskedLanguageModeling
from evomoe.tasks.moe_task import Coefficient, MoETask
from evomoe.tasks.optimization import Optimization
from evomoe.tasks.sequence_classification import SequenceClassification
from evomoe.tasks.translation import Translation

__all__ = [
    "Coefficient",
    "EvaluatedTask",
    "ImageClassification",
    "LanguageModeling",
    "MaskedLanguageModeling",
    "MoETask",
    "Optimization",
    "SequenceClassification",
    "Translation",
]
