"""Lightning callbacks: evolution, monitoring, progress, and the guards of a run."""

from evomoe.callbacks.checkpoint import SafeCheckpoint
from evomoe.callbacks.evolution import Evolution
from evomoe.callbacks.expert_similarity import ExpertSimilarity
from evomoe.callbacks.few_shot_probe import FewShotProbe
from evomoe.callbacks.guards import FiniteGuard
from evomoe.callbacks.held_evolution import HeldEvolution
from evomoe.callbacks.history import History
from evomoe.callbacks.patch_pictures import PatchPictures
from evomoe.callbacks.progress import EvolutionProgress
from evomoe.callbacks.random_state import RandomState
from evomoe.callbacks.routing_monitor import RoutingMonitor
from evomoe.callbacks.routing_report import RoutingReport
from evomoe.callbacks.samples import TextSamples
from evomoe.callbacks.summary import RunSummary, print_closing
from evomoe.callbacks.throughput import Throughput
from evomoe.callbacks.translations import TranslationSamples
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
