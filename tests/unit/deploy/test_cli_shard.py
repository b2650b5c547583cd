"""`shoal shard`, and a cell that serves what it made."""

import asyncio
import dataclasses

import pytest
from click.testing import CliRunner

from deploy.cli.main import shoal
from deploy.cli.shard import shard
from deploy.config import ShoalConfig
from deploy.models import default_model_directory
from deploy.preflight import cell_needs
from tests.tiny_cell import greedy, tiny_cell

SOURCE = default_model_directory()


def run(*arguments):
    return CliRunner().invoke(shoal, ["shard", *map(str, arguments)])


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """The package's checkpoint, cut in each way."""
    made = {}
    for quantize in (None, "int8", "fp8"):
        made[quantize] = tmp_path_factory.mktemp("cuts") / "cut"
        flags = [] if quantize is None else ["--quantize", quantize]
        result = run("--model", SOURCE, "--out", made[quantize], *flags)
        assert result.exit_code == 0, result.output
    return made


def test_help_explains_the_command_with_examples():
    result = run("--help")
    assert result.exit_code == 0
    assert "\n  shoal shard --model" in result.output
    assert "--quantize [int8|fp8]" in result.output
    assert "  shard " in CliRunner().invoke(shoal, ["--help"]).output


def test_it_says_what_it_made_on_one_line_and_what_to_do_next_without_a_bar(tmp_path):
    first = run("--model", SOURCE, "--out", tmp_path / "cut", "--quantize", "int8")
    assert first.exit_code == 0
    (line,) = first.stdout.splitlines()
    assert line.startswith(f"shoal: {tmp_path / 'cut'}: ")
    assert line.endswith("experts in int8")
    assert first.stderr.splitlines() == [f"shoal: next: shoal serve --model {tmp_path / 'cut'}"]
    again = run("--model", SOURCE, "--out", tmp_path / "cut", "--quantize", "int8")
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert "files stood there already" in again.stderr


def test_what_it_refuses_is_one_line_and_a_next_step(cuts):
    result = run("--model", SOURCE, "--out", cuts["int8"], "--quantize", "fp8")
    assert result.exit_code == 2
    error, following = result.stderr.splitlines()
    assert error.startswith("shoal: error: ")
    assert "whose --quantize is int8, and fp8 is asked for: name another --out" in error
    assert following.startswith("shoal: next: ")
    assert result.stdout == ""
    missing = run("--model", cuts[None] / "none", "--out", cuts[None] / "out")
    assert missing.exit_code == 2
    assert "config.json is missing" in missing.stderr
    unknown = run("--model", SOURCE, "--out", cuts[None] / "out", "--quantize", "int4")
    assert unknown.exit_code == 2
    assert "'int4' is not one of 'int8', 'fp8'" in unknown.stderr


def test_interrupted_it_says_that_the_same_command_goes_on(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("model_shards.cut.cut_checkpoint", interrupt)
    result = run("--model", SOURCE, "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "shoal: stopped; the same command goes on where it was\n"
    assert shard.name == "shard"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_preflight_counts_what_quantized_weights_take(cuts, dtype):
    def needs(directory):
        return cell_needs(ShoalConfig.load(None, {"model.path": str(directory), "cell.dtype": dtype}))

    source, plain, int8 = needs(SOURCE), needs(cuts[None]), needs(cuts["int8"])
    assert plain == source
    assert needs(cuts["fp8"]) == int8
    assert dataclasses.replace(int8, expert_slices=source.expert_slices) == source
    shrunk = sum(int8.expert_slices) / sum(source.expert_slices)
    width = 4 if dtype == "float32" else 2
    assert 1 / width < shrunk < 1 / width + 0.1  # a byte an element, and the scales


def answer(directory):
    """Greedy tokens of a cell of one attention replica and one expert shard."""

    async def ask():
        async with tiny_cell(str(directory)) as cell:
            await cell.next_epoch()
            tokens = []
            async for output in cell.replica.generate(greedy("r", 12, 16)):
                tokens += output.token_ids
            return tokens

    return asyncio.run(ask())


def test_a_cell_serves_a_cut_checkpoint(cuts):
    expected = answer(SOURCE)
    assert len(expected) == 16
    assert answer(cuts[None]) == expected
    for quantize in ("int8", "fp8"):
        assert len(answer(cuts[quantize])) == 16
