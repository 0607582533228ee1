"""From a `ModelSource` to a `MoeModel`: `load_model`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from epsim.capture.modality_gate import FILE_NAME as MODALITY_GATE
from epsim.capture.modality_gate import ModalityGate
from epsim.capture.model import MoeModel
from epsim.capture.models import deepseek, hub
from epsim.capture.models.backbones import BACKBONES, backbone_card, text_config
from epsim.capture.models.checkpoint import Checkpoint, load_weights, one_line, open_checkpoint, through_host
from epsim.capture.models.device import check_memory, circumstances, quiet, resolve_device, resolve_dtype, weight_bytes
from epsim.capture.models.random_init import draw_weights, random_config
from epsim.capture.models.source import ModelSource
from epsim.errors import InputError

NAME_KEY = "epsim_name"  # in config.json: what a model that epsim trained is called


def load_model(source: ModelSource) -> MoeModel:
    """Return the model that `source` names, in evaluation mode on its device, its weights without gradients.

    A modality gate in the folder of a checkpoint is attached.

    Raises InputError, one line each, for everything that can be wrong with a source, and CapacityError before
    anything is allocated if the weights are larger than what is free on the device.
    """
    device = resolve_device(source.device)
    dtype = resolve_dtype(source.dtype, device)
    _check_experts(source.experts_implementation)
    deepseek.register()
    with quiet():
        model = _random(source, dtype, device) if source.random_init is not None else _checkpoint(source, dtype, device)
        model.module.eval().requires_grad_(False)
        _set_experts(model, source.experts_implementation)
        model = _with_modality_gate(model)
    chosen = {"experts_implementation": model.decoder.config._experts_implementation}
    return replace(model, source={**model.source, **chosen})


def known_name(config: PreTrainedConfig) -> str | None:
    """Return the name of the model card with this architecture, layers, experts, top-k and width; None without one."""
    shape = _shape(config.get_text_config())
    for backbone in BACKBONES:
        card = backbone_card(backbone)
        if _shape(text_config(backbone, card)) == shape:
            return card.name
    return None


def _shape(text: PreTrainedConfig) -> tuple[Any, ...]:
    experts = ("num_experts", "n_routed_experts", "num_local_experts")
    num_experts = next((getattr(text, name) for name in experts if hasattr(text, name)), 0)
    return text.model_type, text.num_hidden_layers, num_experts, text.num_experts_per_tok, text.hidden_size


def _random(source: ModelSource, dtype: torch.dtype, device: torch.device) -> MoeModel:
    assert source.random_init is not None
    config = random_config(source.random_init, reduced=source.reduced, text_only=source.text_only)
    name = backbone_card(source.random_init, reduced=source.reduced).name
    check_memory(_needed(config, dtype, name), device, name, "--reduced, a smaller --dtype, or another --device")
    how = {"random_init": source.random_init, "reduced": source.reduced, "text_only": source.text_only}
    return MoeModel(
        name=name,
        module=draw_weights(config, dtype, device, source.seed),
        random_weights=True,
        source=how | {"seed": source.seed} | circumstances(dtype, device),
    )


def _checkpoint(source: ModelSource, dtype: torch.dtype, device: torch.device) -> MoeModel:
    assert source.checkpoint is not None
    local = Path(source.checkpoint).expanduser()
    if local.is_file():
        raise InputError(f"{local}: is a file; write the folder of a checkpoint")
    if local.is_dir():
        if source.revision is not None:
            raise InputError(f'--revision "{source.revision}": {local} is a folder; leave the revision out')
        where: dict[str, Any] = {"checkpoint": local.resolve().name}
        checkpoint = open_checkpoint(local)
        _check_fits(checkpoint, dtype, device, str(local))
    else:
        checkpoint = _from_hub(source, dtype, device)
        where = {"checkpoint": source.checkpoint, "commit": checkpoint.folder.name}
    return MoeModel(
        name=known_name(checkpoint.config)
        or getattr(checkpoint.config, NAME_KEY, None)
        or Path(source.checkpoint).name,
        module=load_weights(checkpoint, dtype, device),
        random_weights=False,
        source=where | checkpoint.fingerprint() | circumstances(dtype, device),
        folder=checkpoint.folder,
    )


def _with_modality_gate(model: MoeModel) -> MoeModel:
    """Return the model with the gate that its checkpoint has, attached; without one, as it is."""
    if model.folder is None or not (model.folder / MODALITY_GATE).is_file():
        return model
    gate = ModalityGate.load(model.folder)
    gate.eval().requires_grad_(False)
    gate.attach(model)
    return replace(model, modality_gate=gate)


def _from_hub(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """Fetch config.json and the tokenizer, look whether the model can be run, and only then fetch its weights."""
    name = source.checkpoint
    assert name is not None
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f'"{name}": there is no such folder; write one, or a name on huggingface.co like owner/model')
    folder = hub.fetch(name, source.revision, hub.DESCRIPTIONS)
    checkpoint = open_checkpoint(folder)
    _check_fits(checkpoint, dtype, device, name)
    hub.fetch(name, folder.name, hub.WEIGHTS)
    return checkpoint


def _check_fits(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, what: str) -> None:
    needed = _needed(checkpoint.config, dtype, what)
    for place in {device, torch.device("cpu")} if through_host(device) else {device}:
        check_memory(needed, place, what, "a smaller --dtype, or another --device")


def _needed(config: PreTrainedConfig, dtype: torch.dtype, what: str) -> int:
    """Bytes of the weights, from the shapes alone; raises InputError if no layer has experts."""
    module = draw_weights(config, dtype, torch.device("meta"), 0)
    assert MoeModel(name=what, module=module, random_weights=True).layer_ids
    return weight_bytes(module)


def _check_experts(name: str | None) -> None:
    known = ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())]
    if name is not None and name not in known:
        raise InputError(f'--experts-implementation "{name}" is not known; write one of {", ".join(known)}')


def _set_experts(model: MoeModel, name: str | None) -> None:
    decoder: PreTrainedModel = model.decoder
    if name is None:
        return
    try:
        decoder.set_experts_implementation(name)
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f'--experts-implementation "{name}" cannot be used here: {one_line(error)}') from error
