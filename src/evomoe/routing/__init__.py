"""Who goes where: the router contract and one file per published method. Needs torch, numpy and scipy."""

from evomoe.routing.adamoe import AdaMoE
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
    Words,
)
from evomoe.routing.cosine import CosineRouter
from evomoe.routing.dense import DenseMoE
from evomoe.routing.dts import DTSGate
from evomoe.routing.expert_choice import (
    ExpertChoice,
    SinkhornExpertChoice,
    SoftmaxExpertChoice,
    SparsityConstrainedExpertChoice,
)
from evomoe.routing.forced import ForcedBalance
from evomoe.routing.hash_layer import HashLayer
from evomoe.routing.locmoe import LocMoE
from evomoe.routing.locmoe_plus import LocMoEPlus
from evomoe.routing.loss_free import LossFreeBias
from evomoe.routing.moe_plus_plus import MoEPlusPlus
from evomoe.routing.remoe import ReMoE
from evomoe.routing.schedule import Schedule
from evomoe.routing.soft_moe import SoftMoE
from evomoe.routing.stable_moe import StableMoE
from evomoe.routing.switch import Switch
from evomoe.routing.token_choice import SinkhornTokenChoice, SoftmaxTokenChoice
from evomoe.routing.topk import TopK

__all__ = [
    "AdaMoE",
    "BASELayer",
    "Balance",
    "CosineRouter",
    "DTSGate",
    "DenseMoE",
    "ExpertChoice",
    "ForcedBalance",
    "HashLayer",
    "LocMoE",
    "LocMoEPlus",
    "LossFreeBias",
    "MoEPlusPlus",
    "ReMoE",
    "Router",
    "Routing",
    "RoutingInput",
    "Schedule",
    "ScheduleValues",
    "SinkhornExpertChoice",
    "SinkhornTokenChoice",
    "SoftMoE",
    "SoftRouting",
    "SoftmaxExpertChoice",
    "SoftmaxTokenChoice",
    "SparseRouting",
    "SparsityConstrainedExpertChoice",
    "StableMoE",
    "StepStatistics",
    "Switch",
    "TopK",
    "Words",
]
