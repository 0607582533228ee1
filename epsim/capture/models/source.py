"""Which model to run, and how: `ModelSource`. Imports no torch."""

from dataclasses import dataclass

from epsim.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint, or a model card whose weights are drawn; exactly one of the two.

    Attributes:
        checkpoint: a folder, or a name "owner/model" of huggingface.co.
        revision: branch, tag or commit of a checkpoint of the hub; None is its main branch.
        random_init: a key of `backbones.BACKBONES`: random weights in the shapes of that card.
        reduced: of random weights: narrow, with the MoE layers, experts and top-k of the card.
        text_only: of random weights: the language model without vision encoder.
        seed: of random weights.
        dtype: one of `DTYPES`; None is bfloat16 on CUDA and float32 on the CPU.
        device: "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:1".
        experts_implementation: how transformers runs the experts, e.g. "grouped_mm" or "eager"; None is its default.
    """

    checkpoint: str | None = None
    revision: str | None = None
    random_init: str | None = None
    reduced: bool = False
    text_only: bool = False
    seed: int = 0
    dtype: str | None = None
    device: str = "auto"
    experts_implementation: str | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.random_init is None):
            raise InputError("model: name a checkpoint or --random-init with a model card, and not both")
        if self.checkpoint is not None and not self.checkpoint.strip():
            raise InputError('model: "" is no checkpoint; write a folder or a name such as allenai/OLMoE-1B-7B-0125')
        if self.checkpoint is not None and (self.reduced or self.text_only):
            option = "--reduced" if self.reduced else "--text-only"
            raise InputError(f"{option}: a checkpoint has the size that it has; leave it out or write --random-init")
        if self.random_init is not None and self.revision is not None:
            raise InputError(f'--revision "{self.revision}": random weights have no revision; leave it out')
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f'--dtype "{self.dtype}" cannot be run; write one of {", ".join(DTYPES)}')
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} is not from 0 to 2^63 - 1; write e.g. 0")
