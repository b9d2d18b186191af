"""Lightning callbacks: evolution, monitoring, progress, and the guards of a run."""

from evomoe.callbacks.console.progress import EvolutionProgress
from evomoe.callbacks.console.summary import RunSummary, print_closing
from evomoe.callbacks.evolution import Evolution
from evomoe.callbacks.guards import FiniteGuard
from evomoe.callbacks.held_evolution import HeldEvolution
from evomoe.callbacks.monitoring.expert_similarity import ExpertSimilarity
from evomoe.callbacks.monitoring.few_shot_probe import FewShotProbe
from evomoe.callbacks.monitoring.history import History
from evomoe.callbacks.monitoring.patch_pictures import PatchPictures
from evomoe.callbacks.monitoring.routing_monitor import RoutingMonitor
from evomoe.callbacks.monitoring.routing_report import RoutingReport
from evomoe.callbacks.monitoring.samples import TextSamples
from evomoe.callbacks.monitoring.throughput import Throughput
from evomoe.callbacks.monitoring.translations import TranslationSamples
from evomoe.callbacks.resuming.checkpoint import SafeCheckpoint
from evomoe.callbacks.resuming.random_state import RandomState
from evomoe.callbacks.weight_average import WeightAverage

__all__ = [
    "Evolution",
    "EvolutionProgress",
    "ExpertSimilarity",
    "FewShotProbe",
    "FiniteGuard",
    "HeldEvolution",
    "History",
    "PatchPictures",
    "RandomState",
    "RoutingMonitor",
    "RoutingReport",
    "RunSummary",
    "SafeCheckpoint",
    "TextSamples",
    "Throughput",
    "TranslationSamples",
    "WeightAverage",
    "print_closing",
]
