"""`shoal`: the command group, and how errors leave it."""

import click

from deploy.cli.bench import bench
from deploy.cli.chat import chat
from deploy.cli.config_check import check_config
from deploy.cli.failure import failure_of
from deploy.cli.serve import serve
from deploy.cli.shard import shard
from deploy.cli.status import status
from deploy.cli.version import version
from model_shards.errors import ShoalError


class ShoalGroup(click.Group):
    """Turns every ShoalError of a command into one clear line and an exit status."""

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command. Raises click.ClickException for what the user is told."""
        try:
            return super().invoke(ctx)
        except ShoalError as error:
            raise failure_of(error) from error
        except Exception as error:
            # Ray wraps what a remote method raised.
            cause = getattr(error, "cause", None)
            if isinstance(cause, ShoalError):
                raise failure_of(cause) from error
            raise


@click.group(cls=ShoalGroup, context_settings={"help_option_names": ["-h", "--help"]})
def shoal() -> None:
    """Serve DeepSeek-V2 with attention and experts on separate devices.

    \b
    shoal serve                   start a cell with the checkpoint inside the package
    shoal chat "What is a whale?" ask it
    shoal COMMAND --help          options and examples

    Exit status: 0 done, 2 something to change in the command, the configuration or the checkpoint, 1 any other failure.
    """


for command in (serve, chat, bench, shard, status, check_config, version):
    shoal.add_command(command)


def main() -> None:
    """The console script."""
    shoal(prog_name="shoal")


if __name__ == "__main__":
    main()
