"""Files of other systems: placements, loads and routings, read and written; one module per system and file.

`PLACEMENTS` (epsim.formats.placements), `LOADS` (epsim.formats.loads) and `ROUTINGS` (epsim.formats.routings) hold the
formats by name; `epsim.formats.command` is what the command line calls. Nothing that is read is ever executed: no
pickled code, no YAML tags.
"""
