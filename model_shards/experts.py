"""The routed experts of one shard: stateless, one call per MoE layer and micro-batch.

Shapes: R rows received, K expert slots per row, H hidden size, I moe_intermediate_size, E experts held here, P pairs.

A row names up to K local experts; -1 means none. Pairs (row, slot) are sorted by expert, so that each expert's
weights are read once, and come back to their place before they are summed:

    local_ids   [[1, -1], [0, 1]]      pairs 0 1 2 3 with experts 1 - 0 1
    sorted      - 0 1 1                pairs 1 2 0 3
    rows        . 1 0 1                expert 0 computes row 1, expert 1 computes rows 0 and 1
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model_shards.compiled.expert_memory import LayerMatrices
from model_shards.compiled.experts import CompiledExperts, PreparedRows, serves
from model_shards.config import ModelConfig
from model_shards.expert_matrix import GroupedMatrix, make_expert_matrix
from model_shards.kernels.program import Halt
from model_shards.quantization import Quantization


class ExpertLayer(nn.Module):
    """Weights of one layer's experts, contiguous per expert; gate and up stand together for one product."""

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        # [E, 2I, H] and [E, H, I]
        self.gate_up_proj = make_expert_matrix(num_experts, hidden, 2 * width, dtype, device, quantization)
        self.down_proj = make_expert_matrix(num_experts, width, hidden, dtype, device, quantization)
        # Those that are multiplied by: a tuple, since what is laid out is no module.
        self._matrices: tuple[GroupedMatrix, GroupedMatrix] = (self.gate_up_proj, self.down_proj)

    def lay_out(self) -> None:
        """Lays the matrices out for this device, once, after they were filled; the parameters may be gone then."""
        gate_up = self.gate_up_proj.lay_out()
        self._matrices = (gate_up, self.down_proj.lay_out())

    def pack(self) -> LayerMatrices | None:
        """As `lay_out`, for compiled programs; None, and nothing has happened, where there are none."""
        gate_up = self.gate_up_proj.pack()
        if gate_up is None:
            return None
        down = self.down_proj.pack()
        assert down is not None, "both are of one dtype"
        return LayerMatrices(gate_up, down)

    def forward(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """SwiGLU of all experts, [P, H] -> [P, H] in rows' dtype or a wider one.

        Rows lie expert after expert, counts[e] of them for expert e. Each matrix is one pass over all its experts:
        what lies between the two products is then one call, however many experts have rows.
        """
        gate_up_proj, down_proj = self._matrices
        gate, up = gate_up_proj.grouped(rows, counts).chunk(2, dim=-1)
        return down_proj.grouped(F.silu(gate).mul_(up), counts)


class ExpertShardModel(nn.Module):
    """The same logical experts of every MoE layer; `experts[i]` is local id i.

    `dtype` is that of the activations, and of the weights unless these are quantized.
    """

    def __init__(
        self,
        config: ModelConfig,
        experts: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self._hidden_size = config.hidden_size
        self.moe_intermediate_size = config.moe_intermediate_size
        self.moe_layers = config.moe_layers
        self._index_of_layer = {layer: index for index, layer in enumerate(config.moe_layers)}
        self._compiled: CompiledExperts | None = None
        self.layers = nn.ModuleList(
            ExpertLayer(config, len(experts), dtype, device, quantization) for _ in config.moe_layers
        )

    def forward(self, layer: int, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum over each row's experts held here.

        Args:
            layer: index of the decoder layer; it must have routed experts.
            hidden: [R, H]. local_ids: [R, K] int32 or int64, -1 for none.
            weights: [R, K] float32; ignored where the id is -1.

        Returns [R, H] in hidden's dtype, summed in float32 in the order of the slots, so equal input gives equal
        output whatever the device. R may be 0.
        """
        if self._compiled is not None:
            return self._compiled.forward(self._index_of_layer[layer], hidden, local_ids, weights)
        num_rows, top_k = local_ids.shape
        flat_ids = local_ids.flatten()  # [R * K]
        # Forced host sync: the sizes of the products depend on the routing.
        counts = torch.bincount(flat_ids + 1, minlength=len(self.experts) + 1).tolist()
        if counts[0] == flat_ids.shape[0]:
            return torch.zeros_like(hidden)
        by_expert = flat_ids.argsort(stable=True)[counts[0] :]  # [P] pairs that name an expert
        rows = hidden.index_select(0, by_expert // top_k)  # [P, H]
        outputs = self._layer(layer)(rows, counts[1:]).float()
        # Pairs in the order of rows and slots, and where each one's output is: the pairs of a row are a bag.
        pairs, places = by_expert.sort()
        bags = torch.searchsorted(pairs, torch.arange(0, num_rows * top_k, top_k, device=pairs.device))  # [R]
        pair_weights = weights.flatten().index_select(0, pairs)
        total = F.embedding_bag(places, outputs, bags, mode="sum", per_sample_weights=pair_weights)
        return total.to(hidden.dtype)

    def prepare(
        self, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, halt: Halt
    ) -> PreparedRows | None:
        """`forward` to `out` of rows that lie there in every layer, as programs, in the order of `moe_layers`; an id
        beyond this shard's halts them by `halt`. None where layers are no programs, or rows are many."""
        return None if self._compiled is None else self._compiled.prepare(hidden, local_ids, weights, out, halt)

    def lay_out(self) -> None:
        """Lays every matrix out for this device, once, after it was filled; `hf_slices` is of no use then."""
        self._compiled = self._compile()
        if self._compiled is None:
            for layer in self.moe_layers:
                self._layer(layer).lay_out()

    def _compile(self) -> CompiledExperts | None:
        if not self.moe_layers or not serves(self._hidden_size, self.moe_intermediate_size):
            return None
        packed: list[LayerMatrices] = []
        for layer in self.moe_layers:
            matrices = self._layer(layer).pack()
            if matrices is None:
                return None
            packed.append(matrices)
        return CompiledExperts(len(self.experts), self._hidden_size, self.moe_intermediate_size, packed)

    def hf_slices(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face tensor name, writable view) for every tensor of this shard; scales have their weight's name
        and `_scale_inv`."""
        for name, stored, local, rows in self._hf_places():
            yield name, stored[local, rows]

    def hf_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(Hugging Face tensor name, its shape) for every tensor of this shard, in the order of `hf_slices`."""
        for name, stored, _, rows in self._hf_places():
            yield name, (rows.stop - rows.start, *stored.shape[2:])

    def _hf_places(self) -> Iterator[tuple[str, torch.Tensor, int, slice]]:
        """(name, tensor [E, O, ...] of a layer, the expert's index in it, its rows there)."""
        width = self.moe_intermediate_size
        for layer in self.moe_layers:
            weights = self._layer(layer)
            parts = [
                (f"{name}.weight{suffix}", stored, rows)
                for name, matrix, rows in (
                    ("gate_proj", weights.gate_up_proj, slice(0, width)),
                    ("up_proj", weights.gate_up_proj, slice(width, 2 * width)),
                    ("down_proj", weights.down_proj, slice(0, self._hidden_size)),
                )
                for suffix, stored in matrix.stored()
            ]
            for local, expert in enumerate(self.experts):
                for name, stored, rows in parts:
                    yield f"model.layers.{layer}.mlp.experts.{expert}.{name}", stored, local, rows

    def _layer(self, layer: int) -> ExpertLayer:
        module = self.layers[self._index_of_layer[layer]]
        assert isinstance(module, ExpertLayer)
        return module
