"""A cut checkpoint: the same weights in other files, for Shoal and for transformers; refused where it cannot be."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV2ForCausalLM

from model_shards.config import load_model_config
from model_shards.cut import cut_checkpoint
from model_shards.cut import disk as disk_module
from model_shards.cut.journal import JOURNAL_FILE, Journal
from model_shards.errors import CapacityError, CheckpointError, ConfigError
from model_shards.quantization import SCALE_SUFFIX, Quantization, quantize_rows
from model_shards.weights import (
    attention_slice_bytes,
    background,
    check_checkpoint,
    expert_slice_bytes,
    load_attention_model,
    load_expert_shard,
)
from tests.checkpoints import (
    INDEX_FILE,
    Extent,
    branchy_model,
    cut_state,
    header_extents,
    merged,
    save_model,
    stored_extents,
    stored_state,
    watched_reads,
    write_indexed,
    write_single,
)
from tests.reference import CPU, hf_logits, random_tokens

MODEL = branchy_model()
STATE = stored_state(MODEL)
KINDS = [None, Quantization.INT8, Quantization.FP8]
QUANTIZED = [Quantization.INT8, Quantization.FP8]
BIAS = "model.layers.0.self_attn.q_a_proj.bias"
ROUTED = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model over three files, with what stands beside weights on the Hub."""
    directory = tmp_path_factory.mktemp("source")
    save_model(MODEL, directory)
    (directory / "model.safetensors").unlink()
    write_indexed(directory, cut_state(STATE, 3))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "modeling_deepseek.py").write_text("# code of the checkpoint\n")
    (directory / "pytorch_model.bin").write_bytes(b"other weights")
    (directory / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def loaded(directory: Path, experts: tuple[int, ...] = tuple(range(8))) -> dict[str, torch.Tensor]:
    """What the roles load, in float32."""
    config = load_model_config(directory)
    attention = load_attention_model(directory, config, torch.float32, CPU).hf_slices()
    return dict(attention) | dict(load_expert_shard(directory, config, experts, torch.float32, CPU).hf_slices())


def is_routed(name: str) -> bool:
    return ".mlp.experts." in name


def test_the_cut_has_a_file_for_each_expert_and_all_that_stood_beside_the_weights(source: Path, tmp_path: Path) -> None:
    report = cut_checkpoint(source, tmp_path / "cut")
    experts = [f"expert-{expert:05d}.safetensors" for expert in range(8)]
    beside = ["config.json", "generation_config.json", "modeling_deepseek.py", "tokenizer.json"]
    names = ["attention-00000.safetensors", *experts, *beside, INDEX_FILE, "shoal.json"]
    assert [file.name for file in sorted((tmp_path / "cut").iterdir())] == sorted(names)
    assert (report.num_files, report.num_written) == (9, 9)
    for name in beside:
        assert (tmp_path / "cut" / name).read_bytes() == (source / name).read_bytes()
    held = load_file(tmp_path / "cut" / experts[5])
    assert held.keys() == {name for name in STATE if ".mlp.experts.5." in name}


def test_an_unquantized_cut_holds_every_tensor_bit_for_bit(source: Path, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path / "cut")
    check_checkpoint(tmp_path / "cut", load_model_config(source))
    tensors = loaded(tmp_path / "cut")
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)


def test_transformers_loads_an_unquantized_cut_as_it_is(source: Path, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path / "cut", attention_file_bytes=20_000)
    tokens = random_tokens(131, 24, seed=3)
    model, told = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(hf_logits(model.eval(), tokens), hf_logits(MODEL, tokens))


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_transformers_does_not_take_quantized_weights_for_weights(
    source: Path, tmp_path: Path, quantization: Quantization
) -> None:
    cut_checkpoint(source, tmp_path / "cut", quantization)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        DeepseekV2ForCausalLM.from_pretrained(tmp_path / "cut")


def test_attention_weights_are_cut_to_a_bounded_size(source: Path, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path / "cut", attention_file_bytes=20_000)
    files = sorted((tmp_path / "cut").glob("attention-*"))
    assert len(files) > 3
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert loaded(tmp_path / "cut").keys() == STATE.keys()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_quantized_cut_quantizes_the_routed_experts_and_nothing_else(
    source: Path, tmp_path: Path, quantization: Quantization, stored: torch.dtype
) -> None:
    write_single(tmp_path, {name: tensor.to(stored) for name, tensor in STATE.items()})
    shutil.copy(source / "config.json", tmp_path)
    cut_checkpoint(tmp_path, tmp_path / "cut", quantization)
    assert check_checkpoint(tmp_path / "cut", load_model_config(tmp_path)) is quantization
    tensors = loaded(tmp_path / "cut")
    for name, tensor in STATE.items():
        expected = tensor.to(stored)
        if is_routed(name):
            rows = quantize_rows(expected, quantization)
            assert tensors[name].dtype == quantization.dtype
            assert torch.equal(tensors[name].float(), rows.values.float()), name
            assert torch.equal(tensors[name + SCALE_SUFFIX], rows.scale_inv), name
        else:
            assert torch.equal(tensors[name], expected.float()), name
    assert len(tensors) == len(STATE) + sum(map(is_routed, STATE))


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_quantized_weights_take_one_byte_an_element_in_memory(
    source: Path, tmp_path: Path, quantization: Quantization
) -> None:
    cut_checkpoint(source, tmp_path / "cut", quantization)
    config = load_model_config(source)
    shard = load_expert_shard(tmp_path / "cut", config, (1, 4), torch.float32, CPU)
    held = sum(parameter.nbytes for parameter in shard.parameters())
    rows = 2 * config.moe_intermediate_size + config.hidden_size
    elements = 3 * config.moe_intermediate_size * config.hidden_size
    assert held == 2 * len(config.moe_layers) * (elements + 4 * rows)
    assert held == expert_slice_bytes(config, 2, torch.float32, quantization)
    assert held < 0.4 * expert_slice_bytes(config, 2, torch.float32)
    assert attention_slice_bytes(config, torch.float32, "cpu") > 0


@pytest.mark.parametrize("quantization", KINDS)
def test_an_expert_rank_reads_its_own_files_from_end_to_end_and_needs_no_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Quantization | None
) -> None:
    monkeypatch.setattr(background, "_THREADS", 1)  # so that there is an order
    cut_checkpoint(source, tmp_path, quantization)
    whole = loaded(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        if file.name not in ("expert-00002.safetensors", "expert-00006.safetensors"):
            file.unlink()
    config = load_model_config(tmp_path)
    with watched_reads() as log:
        shard = load_expert_shard(tmp_path, config, (6, 2), torch.float32, CPU)
    files = [tmp_path / f"expert-0000{expert}.safetensors" for expert in (2, 6)]
    assert merged(log) == [Extent(file.name, 0, file.stat().st_size) for file in files]
    tensors = log[2 * len(files) :]  # a header is two reads: its length, its text
    assert tensors == sorted(tensors, key=lambda extent: (extent.file, extent.start))
    assert all(torch.equal(view.float(), whole[name].float()) for name, view in shard.hf_slices())


def test_an_attention_rank_needs_no_expert_file(source: Path, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path, Quantization.INT8)
    for file in tmp_path.glob("expert-*"):
        file.unlink()
    with watched_reads() as log:
        load_attention_model(tmp_path, load_model_config(tmp_path), torch.float32, CPU)
    assert merged(log) == merged([*header_extents(tmp_path), *stored_extents(tmp_path).values()])


def test_a_cut_can_be_cut_again(source: Path, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path / "once")
    cut_checkpoint(tmp_path / "once", tmp_path / "twice", Quantization.INT8)
    cut_checkpoint(source, tmp_path / "direct", Quantization.INT8)
    twice, direct = contents(tmp_path / "twice"), contents(tmp_path / "direct")
    assert twice.pop("shoal.json") != direct.pop("shoal.json")  # another source by its files
    assert twice == direct
    with pytest.raises(ConfigError, match=r"must be a checkpoint that is not quantized, got .*direct in int8"):
        cut_checkpoint(tmp_path / "direct", tmp_path / "thrice")


def test_a_tied_head_and_a_model_without_experts_are_cut(tmp_path: Path) -> None:
    for name, overrides in (("tied", {"tie_word_embeddings": True}), ("dense", {"n_routed_experts": None})):
        model = branchy_model(**overrides)
        directory = tmp_path / name
        save_model(model, directory)
        cut_checkpoint(directory, directory / "cut")
        config = load_model_config(directory)
        check_checkpoint(directory / "cut", config)
        attention = dict(load_attention_model(directory / "cut", config, torch.float32, CPU).hf_slices())
        assert all(torch.equal(view, stored_state(model)[key]) for key, view in attention.items())


def test_progress_counts_the_source_and_begins_where_an_earlier_run_stopped(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    cut_checkpoint(source, tmp_path, Quantization.INT8, lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in STATE.values())
    assert (calls[0], calls[-1]) == ((0, total), (total, total))
    assert calls == sorted(calls)
    (tmp_path / "expert-00003.safetensors").unlink()
    calls.clear()
    cut_checkpoint(source, tmp_path, Quantization.INT8, lambda *call: calls.append(call))
    expert = sum(tensor.nbytes for name, tensor in STATE.items() if ".mlp.experts.3." in name)
    assert (calls[0], calls[-1]) == ((total - expert, total), (total, total))


@pytest.mark.parametrize("lost", ["expert-00003.safetensors", "tokenizer.json", "shoal.json"])
def test_the_same_command_brings_back_what_is_gone_and_rewrites_nothing_else(
    source: Path, tmp_path: Path, lost: str
) -> None:
    cut_checkpoint(source, tmp_path)
    before = contents(tmp_path)
    written = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert cut_checkpoint(source, tmp_path).num_written == 0
    (tmp_path / lost).unlink()
    if lost == "shoal.json":
        with pytest.raises(
            ConfigError, match=r"--out must be new, empty, or a cut that was begun; .* holds attention-"
        ):
            cut_checkpoint(source, tmp_path)
        return
    cut_checkpoint(source, tmp_path)
    assert contents(tmp_path) == before
    after = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert {name for name in after if after[name] != written[name]} == {lost} & after.keys()


def test_another_quantization_in_the_same_directory_is_refused(source: Path, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path, Quantization.INT8)
    before = contents(tmp_path)
    for other, name in ((None, "none"), (Quantization.FP8, "fp8")):
        with pytest.raises(ConfigError, match=f"whose --quantize is int8, and {name} is asked for: name another --out"):
            cut_checkpoint(source, tmp_path, other)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("changed", ["weights", "config.json"])
def test_another_source_in_the_same_directory_is_refused(source: Path, tmp_path: Path, changed: str) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    if changed == "weights":  # of the same names and sizes
        state = cut_state({**STATE, BIAS: STATE[BIAS] + 1, "lm_head.weight": STATE["lm_head.weight"] * 2}, 3)
        write_indexed(other, state)
    else:
        text = (other / "config.json").read_text()
        (other / "config.json").write_text(text + "\n")
    cut_checkpoint(source, tmp_path / "cut")
    before = contents(tmp_path / "cut")
    with pytest.raises(ConfigError, match=f"of another checkpoint than --model: the sum of its {changed} is"):
        cut_checkpoint(other, tmp_path / "cut")
    assert contents(tmp_path / "cut") == before


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"beach")
    with pytest.raises(ConfigError, match=rf"--out must be new, empty, or a cut .*{tmp_path} holds holiday\.jpg"):
        cut_checkpoint(source, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(ConfigError, match="--out must be another directory than --model"):
        cut_checkpoint(source, source)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: File exists"):
        cut_checkpoint(source, tmp_path / "file")


def test_two_runs_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    with (
        Journal.open(tmp_path),
        pytest.raises(ConfigError, match=f"another `shoal shard` writes to {tmp_path} now"),
    ):
        cut_checkpoint(source, tmp_path)


def test_a_damaged_journal_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text("not json\n")
    with pytest.raises(CheckpointError, match=rf"{JOURNAL_FILE} line 1 is damaged; remove the directory"):
        cut_checkpoint(source, tmp_path)


def test_too_little_disk_is_told_with_the_numbers_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_checkpoint(source, tmp_path / "whole")
    size = sum(len(content) for content in contents(tmp_path / "whole").values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(CapacityError, match=r"needs \d\.\d MiB on the disk of .*, which has \d\.\d MiB free: free \d"):
        cut_checkpoint(source, tmp_path / "cut")
    assert contents(tmp_path / "cut") == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size * 3 // 2))
    cut_checkpoint(source, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow past this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_meanwhile_leaves_nothing_that_looks_finished(source: Path, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path / "whole")
    with (
        largest_file(50_000),
        pytest.raises(
            CapacityError, match=r"attention-00000\.safetensors cannot be written, File too large: .* is free"
        ),
    ):
        cut_checkpoint(source, tmp_path / "cut")
    assert list((tmp_path / "cut").iterdir()) == []
    cut_checkpoint(source, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_write_that_fails_late_is_told_and_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_checkpoint(source, tmp_path / "whole")
    synced = disk_module.sync_directory
    renames: list[Path] = []

    def full_after_three(directory: Path) -> None:
        renames.append(directory)
        if len(renames) == 4:
            raise OSError(28, "No space left on device")
        synced(directory)

    monkeypatch.setattr(disk_module, "sync_directory", full_after_three)
    with pytest.raises(
        CapacityError, match=r"No space left on device: .* is free there.*the same command then goes on"
    ):
        cut_checkpoint(source, tmp_path / "cut")
    assert not (tmp_path / "cut" / "shoal.json").exists()
    assert not (tmp_path / "cut" / INDEX_FILE).exists()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        check_checkpoint(tmp_path / "cut", load_model_config(source))
    assert cut_checkpoint(source, tmp_path / "cut").num_written < 9
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_cannot_be_quantized_and_is_named(
    source: Path, tmp_path: Path, value: float
) -> None:
    bad = STATE[ROUTED].clone()
    bad[3, 7] = value
    write_single(tmp_path, {**STATE, ROUTED: bad})
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=rf"tensor {ROUTED} cannot be quantized: a value is not finite"):
        cut_checkpoint(tmp_path, tmp_path / "cut", Quantization.INT8)
    assert not (tmp_path / "cut" / "shoal.json").exists()
    cut_checkpoint(tmp_path, tmp_path / "plain")
    assert torch.equal(loaded(tmp_path / "plain")[ROUTED], bad) or value != value


def test_a_source_that_is_not_whole_is_refused_before_the_directory_is_made(source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    (other / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors is missing"):
        cut_checkpoint(other, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
