"""Who goes where: the router contract and one file per published method. Needs torch only."""

from evomoe.routing.contract import Router, Routing, RoutingInput, ScheduleValues, SoftRouting, SparseRouting

__all__ = ["Router", "Routing", "RoutingInput", "ScheduleValues", "SoftRouting", "SparseRouting"]
