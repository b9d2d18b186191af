"""The work: expert weights, their kernels, the MoE layer, and the spawning of experts. Needs torch, numpy and scipy."""

from evomoe.moe.experts import Experts
from evomoe.moe.layer import MoELayer, RouterFactory
from evomoe.moe.spawn import Spawn, spawn_experts

__all__ = ["Experts", "MoELayer", "RouterFactory", "Spawn", "spawn_experts"]
