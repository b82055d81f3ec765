"""`asynception attach`, `asynception stop` and `asynception scale`."""

import click

_run = click.argument("run")
_address = click.option(
    "--ray.address",
    "address",
    help="Cluster that RUN goes on at; what its folder says, or auto, if left out.",
)


@click.command()
@_run
@_address
def attach(run: str, address: str | None) -> None:
    """Show the detached RUN, a folder or a name, until it ends. Ctrl-C leaves it alone."""
    from asynception import attached

    result = attached.attach(run, address)
    click.echo(result if isinstance(result, str) else result.to_json(), nl=False)


@click.command()
@_run
@_address
@click.option("--force", is_flag=True, help="Kill it, with the checkpoint that it wrote last.")
def stop(run: str, address: str | None, force: bool) -> None:
    """End the detached RUN, a folder or a name, once it has saved a checkpoint."""
    from asynception import attached

    attached.stop(run, address, force=force)
    click.echo(f"{run} was stopped; `asynception train --resume` with its folder goes on")


@click.command()
@_run
@_address
@click.option(
    "--num-workers", required=True, type=click.IntRange(min=1), help="Workers that it is to have."
)
def scale(run: str, address: str | None, num_workers: int) -> None:
    """Change the number of workers of RUN, the folder of a run that goes on, or a detached one's
    name.

    More begin as there is room for them; of fewer, those that are too many finish their push and
    leave.
    """
    from asynception import scale

    click.echo(scale.scale(run, address, num_workers))
