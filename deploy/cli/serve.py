"""`shoal serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from model_shards.errors import ConfigError

if TYPE_CHECKING:
    from deploy.launch.signals import StopSignals

_Value = str | int | float | bool | None


@click.command()
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="YAML file; the other options override it."
)
@click.option("--model", help="Checkpoint directory in Hugging Face layout. Default: the small one in the package.")
@click.option("--name", help="What clients call the model. Default: the directory's name.")
@click.option("--attention-replicas", type=int, metavar="M", help="Attention ranks.  [default: 1]")
@click.option("--expert-shards", type=int, metavar="N", help="Expert ranks.  [default: 2]")
@click.option("--device", help="cpu or cuda; each rank takes one GPU.  [default: cpu]")
@click.option("--dtype", help="float32 or bfloat16.  [default: float32 on cpu, bfloat16 on cuda]")
@click.option("--host", help="Interface to listen on.  [default: 127.0.0.1]")
@click.option("--grpc-port", type=int, help="0 picks a free port.  [default: 9000]")
@click.option("--http-port", type=int, help="0 picks a free port.  [default: 8000]")
@click.option("--address", metavar="RAY", help="Run on this Ray cluster instead of starting Ray here.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key, as engine.max_num_seqs=8.")
def serve(
    config_path: Path | None,
    model: str | None,
    name: str | None,
    attention_replicas: int | None,
    expert_shards: int | None,
    device: str | None,
    dtype: str | None,
    host: str | None,
    grpc_port: int | None,
    http_port: int | None,
    address: str | None,
    settings: tuple[str, ...],
) -> None:
    """Start a cell and its gateway, and serve until Ctrl-C or SIGTERM.

    Prints one line on stdout when, and only when, a real token has passed through every expert shard:

    \b
    shoal: ready grpc=127.0.0.1:9000 http=127.0.0.1:8000 model=NAME

    The first Ctrl-C lets running requests end (at most server.drain_timeout_s), a second one stops at once.
    Without --config the file named by SHOAL_CONFIG is read, if that is set.

    \b
    shoal serve
    shoal serve --model /models/DeepSeek-V2-Lite-Chat --device cuda --attention-replicas 1 --expert-shards 2
    shoal serve --config shoal.yaml --grpc-port 0 --http-port 0
    """
    # Before anything slow: from here on a signal stops the start in order, wherever it stands.
    from deploy.launch.signals import StartInterrupted, StopSignals

    flags: dict[str, _Value] = {
        "model.path": model,
        "model.name": name,
        "cell.attention_replicas": attention_replicas,
        "cell.expert_shards": expert_shards,
        "cell.device": device,
        "cell.dtype": dtype,
        "server.host": host,
        "server.grpc_port": grpc_port,
        "server.http_port": http_port,
        "ray.address": address,
    }
    signals = StopSignals()
    with signals.installed():
        try:
            _serve(config_path, flags, settings, signals)
        except StartInterrupted:
            click.echo("shoal: stopped before it was ready", err=True)


def _serve(config_path: Path | None, flags: dict[str, _Value], settings: tuple[str, ...], signals: StopSignals) -> None:
    """Returns once a signal has stopped the service. Raises StartInterrupted when it came before `ready`."""
    with signals.interrupting():
        from cluster.logs import configure_logging
        from deploy.cli.progress import make_serve_ui
        from deploy.config import ShoalConfig, default_config_path
        from deploy.preflight import preflight

        overrides = dict(parse_setting(text) for text in settings)
        overrides |= {key: value for key, value in flags.items() if value is not None}
        loaded = ShoalConfig.load(config_path or default_config_path(), overrides)
        configure_logging("serve", "-", loaded.log.level)
    if loaded.ray.address is None:
        # Read when Ray is first imported: a Ray of our own listens on loopback alone, as no other machine may join it.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    with make_serve_ui() as ui:
        with signals.interrupting():
            ui.stage("checking checkpoint, ports and devices")
            ready_to_start = preflight(loaded)
            # Imported late: Ray takes seconds, and what preflight refuses should be told before that.
            ui.stage("importing Ray")
            from deploy.launch.service import run_service
        run_service(ready_to_start, ui, signals)


def parse_setting(text: str) -> tuple[str, _Value]:
    """`engine.max_num_seqs=8` to a key and a value, which is read as YAML reads it."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"--set must be SECTION.KEY=VALUE, got {text!r}")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {key} must have a plain value, got {value!r}") from error
    if not isinstance(parsed, str | int | float | bool | None):
        raise ConfigError(f"--set {key} must have a plain value, got {value!r}")
    return key, parsed
