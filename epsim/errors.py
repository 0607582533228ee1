"""The exceptions of epsim, split by what the user can do about them (`EpsimError` is the root).

The command line turns `InputError` into one line on stderr and exit code 2, any other `EpsimError` into one line
and exit code 1.
"""


class EpsimError(Exception):
    """Anything that epsim raises on purpose."""


class InputError(EpsimError):
    """Something that the user wrote is wrong; the message says where, what was found, the rule, and the mend."""


class ScenarioError(InputError):
    """A field of a scenario or a training file (or of a file that it names) is wrong: edit the YAML."""


class ClusterError(InputError):
    """The cluster is well-formed but cannot work, e.g. two devices have no route between them."""


class PlacementError(InputError):
    """A placement file or policy does not fit the model, the trace or the cluster."""


class TraceError(InputError):
    """A routing trace is damaged, foreign, inconsistent, or lacks what was asked of it."""


class FormatError(InputError):
    """A file of another system is not what its format says, or does not say what is needed of it."""


class CapacityError(InputError):
    """The deployment does not fit into the memory of a device."""


class OutputError(InputError):
    """A file cannot be written where the user wants it: name another path, or free it."""
