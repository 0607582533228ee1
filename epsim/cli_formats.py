"""The commands `epsim import` and `epsim export`: files of other systems. Parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

_Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")]


def import_command(
    files: Annotated[list[Path], typer.Argument(help="Files or a folder of another system.", metavar="FILE...")],
    source: Annotated[str, typer.Option("--from", metavar="FORMAT", help="Whose: see docs/formats.md.")],
    output: _Output,
    layer_ids: Annotated[
        str | None, typer.Option(metavar="IDS", help="Ids of the MoE layers in the model, e.g. 3-60.")
    ] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, max=65536, metavar="E", help="Experts of a layer.")] = None,
    topk: Annotated[int | None, typer.Option(min=1, metavar="K", help="Experts of a token in a layer.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, metavar="R", help="Devices of a placement.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Model card that says layers, experts and top-k.")
    ] = None,
    placement: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Placement (epsim's) that the server had: physical to logical.")
    ] = None,
    vision_token_id: Annotated[
        list[int] | None, typer.Option(min=0, metavar="ID", help="Token id that stands for an image token; repeat.")
    ] = None,
    iteration: Annotated[int | None, typer.Option(min=0, metavar="N", help="Checkpoint to take (flame-moe).")] = None,
    request_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="T", help="Rows that make a request (flame-moe).")
    ] = None,
    passes_as_requests: Annotated[
        bool, typer.Option("--passes-as-requests", help="Each forward pass is a request (sglang-per-token).")
    ] = False,
    drop_unrecorded_prefix: Annotated[
        bool,
        typer.Option("--drop-unrecorded-prefix", help="Requests begin where their record does (sglang-per-token)."),
    ] = False,
) -> None:
    """Bring a placement, loads or routings of another system in."""
    from epsim.formats.command import import_files
    from epsim.formats.options import Options, parse_layer_ids
    from epsim.model import ModelCard
    from epsim.placement.file import read_placement_file
    from epsim.scenario.load import load_model

    options = Options(
        layer_ids=None if layer_ids is None else parse_layer_ids(layer_ids),
        num_experts=num_experts,
        num_devices=devices,
        topk=topk,
        model=None if model is None else ModelCard.from_mapping(load_model(model, "--model").model_dump()),
        placement=None if placement is None else read_placement_file(placement),
        vision_token_ids=tuple(sorted(vision_token_id or ())),
        iteration=iteration,
        request_tokens=request_tokens,
        passes_as_requests=passes_as_requests,
        drop_unrecorded_prefix=drop_unrecorded_prefix,
    )
    beside = [placement] if placement is not None else []
    if model is not None and model.endswith((".yaml", ".yml")):  # else the name of a preset
        beside.append(Path(model))
    for line in import_files(files, source, output, options, beside):
        typer.echo(line, err=True)


def export_command(
    path: Annotated[Path, typer.Argument(help="Placement (epsim's), or routing trace.", metavar="FILE")],
    target: Annotated[str, typer.Option("--to", metavar="FORMAT", help="For whom: see docs/formats.md.")],
    output: _Output,
    num_layers: Annotated[
        int | None, typer.Option(min=1, max=10000, metavar="N", help="Layers of the model, dense ones too (SGLang).")
    ] = None,
) -> None:
    """Write a placement, or the loads of a trace, as another system reads them."""
    from epsim.formats.command import export_file

    for line in export_file(path, target, output, num_layers):
        typer.echo(line, err=True)
