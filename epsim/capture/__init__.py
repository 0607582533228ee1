"""Real MoE models leave routing traces: models, requests, the forward passes, what is recorded of them.

With `epsim.specialize` and `epsim.measure` the only part that imports torch (extra `[trace]`); nothing here is
imported by the simulator.
"""
