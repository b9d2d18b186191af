"""Who goes where: the router contract and one file per published method. Needs torch only."""

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
from evomoe.routing.switch import Switch
from evomoe.routing.topk import TopK

__all__ = [
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
    "StepStatistics",
    "Switch",
    "TopK",
]
