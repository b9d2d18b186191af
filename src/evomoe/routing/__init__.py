"""Who goes where: the router contract and in methods/ one file per published method. Needs torch, numpy and scipy."""

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
from evomoe.routing.methods.adamoe import AdaMoE
from evomoe.routing.methods.base_layer import BASELayer
from evomoe.routing.methods.cosine import CosineRouter
from evomoe.routing.methods.dense import DenseMoE
from evomoe.routing.methods.dts import DTSGate
from evomoe.routing.methods.expert_choice import (
    ExpertChoice,
    SinkhornExpertChoice,
    SoftmaxExpertChoice,
    SparsityConstrainedExpertChoice,
)
from evomoe.routing.methods.forced import ForcedBalance
from evomoe.routing.methods.hash_layer import HashLayer
from evomoe.routing.methods.locmoe import LocMoE
from evomoe.routing.methods.locmoe_plus import LocMoEPlus
from evomoe.routing.methods.loss_free import LossFreeBias
from evomoe.routing.methods.moe_plus_plus import MoEPlusPlus
from evomoe.routing.methods.remoe import ReMoE
from evomoe.routing.methods.soft_moe import SoftMoE
from evomoe.routing.methods.stable_moe import StableMoE
from evomoe.routing.methods.switch import Switch
from evomoe.routing.methods.token_choice import SinkhornTokenChoice, SoftmaxTokenChoice
from evomoe.routing.methods.topk import TopK
from evomoe.routing.schedule import Schedule

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
