"""Who goes where: the router contract and one file per published method. Needs torch only."""

from evomoe.routing.base_layer import BASELayer
from evomoe.routing.contract import (
    Balance,
    Router,
    Routing,
    RoutingInput,
    ScheduleValues,
    SoftRouting,
    SparseRouting,
    StepStatistics,
)
from evomoe.routing.dense import DenseMoE
from evomoe.routing.dts import DTSGate
from evomoe.routing.forced import ForcedBalance
from evomoe.routing.schedule import Schedule
from evomoe.routing.stable_moe import StableMoE
from evomoe.routing.switch import Switch
from evomoe.routing.topk import TopK

__all__ = [
    "BASELayer",
    "Balance",
    "DTSGate",
    "DenseMoE",
    "ForcedBalance",
    "Router",
    "Routing",
    "RoutingInput",
    "Schedule",
    "ScheduleValues",
    "SoftRouting",
    "SparseRouting",
    "StableMoE",
    "StepStatistics",
    "Switch",
    "TopK",
]
