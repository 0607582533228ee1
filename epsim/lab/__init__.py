"""The placement lab: policies fitted to some requests of a trace and judged on the others (`compare_policies`).

`replay_policies`: in time, fitted once or again and again.
"""
