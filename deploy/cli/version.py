"""`shoal version`."""

import click


@click.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        click.echo(f"shoal {installed_version('shoal')}")
    except PackageNotFoundError:
        click.echo("shoal, run from a directory that is not installed: `pip install -e .` gives it a version")
