"""The commands `epsim validate published | exchange | measured`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from epsim.console import print_in_full

validate_app = typer.Typer(name="validate", help="Hold predictions to measurements.", no_args_is_help=True)


@validate_app.command()
def published(
    docs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the document, and its figures to images/ beside it.")
    ] = None,
    device: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the device that fits table S11 best (YAML).")
    ] = None,
    scenarios: Annotated[Path, typer.Option(metavar="DIR", help="The folder of s10/ and s11/.")] = Path("scenarios"),
    json_output: Annotated[bool, typer.Option("--json", help="Print all values instead of tables.")] = False,
) -> None:
    """Predictions beside SMoES tables S10, S11 and S12: reproduced, fitted, held out. Takes some minutes."""
    from epsim.atomic import check_folder, check_outputs
    from epsim.calibrate.profile import check_profile_path, write_profile
    from epsim.report.figure import require_matplotlib
    from epsim.report.files import to_json
    from epsim.report.validation import validation_tables
    from epsim.validate.document import write_document
    from epsim.validate.report import files_read, published_report

    if docs is not None:
        require_matplotlib()
        check_folder(docs.parent / "images")
    check_outputs({"--docs": docs, "--device": device}, files_read(scenarios))
    check_profile_path(device)
    report, profile = published_report(scenarios, lambda text: typer.echo(text, err=True))
    if device is not None:
        write_profile(device, profile)
        typer.echo(
            f"wrote {device}; with it go: " + " ".join(f"--set '{line}'" for line in report["s11"]["set"]), err=True
        )
    written = write_document(docs, report) if docs is not None else []
    for path in written:
        typer.echo(f"wrote {path}", err=True)
    if json_output:
        typer.echo(to_json(report), nl=False)
    else:
        print_in_full(validation_tables(report))


@validate_app.command()
def exchange(
    docs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the document, and its figure to images/ beside it.")
    ] = None,
    cells: Annotated[bool, typer.Option("--cells", help="Also print every row.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print all values instead of tables.")] = False,
) -> None:
    """Predictions beside published times of DeepEP's dispatch and combine and of NCCL: fitted, held out."""
    from epsim.atomic import check_folder, check_outputs
    from epsim.report.exchange import exchange_tables
    from epsim.report.figure import require_matplotlib
    from epsim.report.files import to_json
    from epsim.validate.exchange_document import write_exchange_document
    from epsim.validate.exchange_report import exchange_report

    if docs is not None:
        require_matplotlib()
        check_folder(docs.parent / "images")
    check_outputs({"--docs": docs}, ())
    report = exchange_report()
    written = write_exchange_document(docs, report) if docs is not None else []
    for path in written:
        typer.echo(f"wrote {path}", err=True)
    if json_output:
        typer.echo(to_json(report), nl=False)
    else:
        print_in_full(exchange_tables(report, with_cells=cells))


@validate_app.command()
def measured(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR]...", help="Folders of epsim measure run (default: those that ship).", readable=False
        ),
    ] = None,
    device_profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Predict real runs from this, not from the profile kept with them."),
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the page, and its figure to images/ beside it.")
    ] = None,
    cells: Annotated[bool, typer.Option("--cells", help="Also print every cell.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write every cell as CSV.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print all values instead of tables.")] = False,
) -> None:
    """Predictions from micro-benchmarks alone beside measured runs: errors of times and of changes, and their signs."""
    from epsim.atomic import check_file, check_folder
    from epsim.report.figure import require_matplotlib
    from epsim.report.files import to_json, write_csv
    from epsim.report.measured import cell_rows, measured_tables
    from epsim.validate.measured import measured_report
    from epsim.validate.measured_document import write_measured_document
    from epsim.validate.shipped import shipped_folders

    if docs is not None:
        require_matplotlib()
        check_folder(docs.parent / "images")
    if csv is not None:
        check_file(csv)
    reports = [measured_report(folder, device_profile) for folder in folders or shipped_folders()]
    if docs is not None:
        for path in write_measured_document(docs, reports):
            typer.echo(f"wrote {path}", err=True)
    if csv is not None:
        write_csv(csv, [row for report in reports for row in cell_rows(report)])
    if json_output:
        typer.echo(to_json(reports), nl=False)
    else:
        for report in reports:
            print_in_full(measured_tables(report, with_cells=cells))
