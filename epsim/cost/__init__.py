"""Costs on a device: `RooflineCost` (seconds of each part) and `MemoryAccount` (bytes)."""

from epsim.cost.memory import MemoryAccount, account_memory
from epsim.cost.roofline import HomeWork, RooflineCost

__all__ = ["HomeWork", "MemoryAccount", "RooflineCost", "account_memory"]
