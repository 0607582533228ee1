"""The trained model as a checkpoint that `epsim trace --model` reads: `export`."""

import shutil

from epsim.atomic import write_errors
from epsim.capture.model import MoeModel
from epsim.capture.models.device import quiet
from epsim.capture.models.load import NAME_KEY
from epsim.capture.models.processor import Processor
from epsim.specialize.methods import Method
from epsim.specialize.run_folder import RunFolder


def export(model: MoeModel, processor: Processor, method: Method | None, folder: RunFolder, name: str) -> None:
    """Write weights, config, tokenizer, image processor and the method's gate to `folder.model`, whole or not."""
    new = folder.path / f".{folder.model.name}.part"
    shutil.rmtree(new, ignore_errors=True)
    eos_token_id = processor.tokenizer.eos_token_id
    model.module.generation_config.eos_token_id = eos_token_id
    setattr(model.module.config, NAME_KEY, name)
    with quiet(), write_errors(folder.model):
        model.module.save_pretrained(new)
        processor.tokenizer.save_pretrained(new)
        processor.image_processor.save_pretrained(new)
    if method is not None and method.gate is not None:
        method.gate.save(new)
    folder.replace_model(new)
