"""`shoal check-config`."""

from pathlib import Path

import click


@click.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
def check_config(file: Path) -> None:
    """Check a configuration FILE and print the settings that are in effect, defaults filled in.

    The checkpoint, ports and devices are not looked at: that is for the machine that serves.

    \b
    shoal check-config shoal.yaml
    shoal check-config shoal.yaml > complete.yaml
    """
    from deploy.config import ShoalConfig

    click.echo(ShoalConfig.dump(ShoalConfig.load(file, {})), nl=False)
