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
@click.option("--num-workers", type=click.IntRange(min=1), help="Workers that it is to have.")
@click.option("--num-servers", type=click.IntRange(min=1), help="Servers that it is to have.")
def scale(run: str, address: str | None, num_workers: int | None, num_servers: int | None) -> None:
    """Change the number of workers, or of servers, of RUN, the folder of a run that goes on, or a
    detached one's name.

    More workers begin as there is room for them; of fewer, those that are too many finish their
    push and leave. For another number of servers all begin anew, from a checkpoint that is written
    first.
    """
    from asynception import scale
    from asynception.orders import Order

    click.echo(scale.scale(run, address, Order(num_workers, num_servers)))
