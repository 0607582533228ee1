"""Costs on a device: seconds of each part from a spec, `RooflineCost`, or measured, `MeasuredCost`; `MemoryAccount`."""

from epsim.cost.measured import MeasuredCost
from epsim.cost.memory import MemoryAccount, account_memory
from epsim.cost.roofline import HomeWork, RooflineCost

Cost = RooflineCost | MeasuredCost

__all__ = ["Cost", "HomeWork", "MeasuredCost", "MemoryAccount", "RooflineCost", "account_memory"]
