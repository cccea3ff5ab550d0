"""Steps as CUDA graphs: one launch for a whole step, at numbers of rows and pages rounded up to a few sizes.

A step is filled up with rows that nobody sees and pages of which nothing is seen, so that the same graph serves many
steps. Filling up is plain tensor work, tested on CPU; recording needs CUDA.

Shapes: R rows running, G groups, M pages in use, each rounded up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bridge_rl.rollout.cache import PagedCache
from bridge_rl.rollout.decode import Decoder, Inputs
from bridge_rl.rollout.layout import Layout
from bridge_rl.rollout.pages import PageTable
from bridge_rl.rollout.request import Row, ropes

NEVER = 2**40  # a column that no row reaches


def spare_pages(max_rows: int) -> int:
    """Pages beyond a cache's own that filling up may need: one for each row that does."""
    return rounded(max_rows + 1) - max_rows + (max_rows + 1) // 8


def rounded(n: int) -> int:
    """`n` or a little more: eight sizes from one power of two to the next."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


@dataclass
class Sizes:
    """What a graph is recorded for."""

    rows: int
    groups: int
    row_pages: int
    prompt_pages: int

    @classmethod
    def of(cls, layout: Layout, cache: PagedCache) -> "Sizes":
        """Room for one row and one group more than there are, and a page for each row that fills up."""
        rows, groups = len(layout.group_of_row), len(layout.prompt_lengths)
        padded_rows = rounded(rows + 1)
        row_pages = len(layout.rows.owner) + padded_rows - rows
        return cls(
            rows=padded_rows,
            groups=rounded(groups + 1),
            row_pages=min(rounded(row_pages), cache.rows.num_pages + cache.rows.spare),
            prompt_pages=min(rounded(len(layout.prompts.owner)), cache.prompts.num_pages),
        )


def fill_layout(layout: Layout, sizes: Sizes) -> Layout:
    """The same layout at those sizes: the rows that fill up are one group, without a prompt."""
    rows, groups = len(layout.group_of_row), len(layout.prompt_lengths)
    return Layout(
        group_of_row=_filled(layout.group_of_row, sizes.rows, sizes.groups - 1),
        circle_of_row=_filled(layout.circle_of_row, sizes.rows, -1),
        rows_of_group=F.pad(layout.rows_of_group, (0, 0, 0, sizes.groups - groups), value=rows),
        prompt_lengths=_filled(layout.prompt_lengths, sizes.groups, 0),
        rows=_fill_table(layout.rows, rows, sizes.rows, sizes.row_pages),
        prompts=_fill_table(layout.prompts, groups, sizes.groups, sizes.prompt_pages),
        num_heads=layout.num_heads,
    )


def _fill_table(table: PageTable, owners: int, num_owners: int, num_pages: int) -> PageTable:
    """Each owner that fills up gets one of the pages that fill up, as far as they go, and the last one the rest."""
    new = torch.arange(num_pages - len(table.owner), device=table.owner.device)
    return PageTable(
        owner=torch.cat([table.owner, (owners + new).clamp(max=num_owners - 1)]),
        column=F.pad(table.column, (0, 0, 0, len(new)), value=NEVER),
    )


def fill_inputs(inputs: Inputs, num_rows: int, scratch: int) -> Inputs:
    """Rows that fill up feed token 0 at column 0, write to page `scratch`, draw nothing and are seen by nobody."""
    fill = {"drawn": 1, "limits": 1, "pages": scratch}
    return Inputs(**{name: _filled(x, num_rows, fill.get(name, 0)) for name, x in vars(inputs).items()})


def _filled(x: Tensor, length: int, value: int) -> Tensor:
    """[n, ...] -> [length, ...]."""
    return torch.cat([x, x.new_full((length - len(x), *x.shape[1:]), value)])


class FilledDecoder(Decoder):
    """Runs steps at rounded sizes."""

    def steps(
        self, rows: Sequence[Row], inputs: Inputs, uniforms: Tensor, pages: Tensor, layout: Layout, cache: PagedCache
    ) -> list[tuple[Tensor, ...]]:
        sizes, scratch = Sizes.of(layout, cache), cache.rows.num_pages
        more = sizes.rows - len(rows)
        made = self.filled_steps(
            rows,
            fill_inputs(inputs, sizes.rows, scratch),
            F.pad(uniforms, (0, more)),
            F.pad(pages, (0, more), value=scratch),
            fill_layout(layout, sizes),
            cache,
        )
        return [tuple(x[: len(rows)] for x in step) for step in made]

    def filled_steps(
        self, rows: Sequence[Row], inputs: Inputs, uniforms: Tensor, pages: Tensor, layout: Layout, cache: PagedCache
    ) -> list[tuple[Tensor, ...]]:
        return super().steps(rows, inputs, uniforms, pages, layout, cache)


def why_not_recorded(model: PreTrainedModel, capability: tuple[int, int]) -> str | None:
    """What in a step of `model` waits for the host, on a device of this compute capability, if anything does."""
    config = model.config.get_text_config()
    if any(rope.get("rope_type") == "dynamic" for rope in ropes(config)):
        return "its `dynamic` rotary embeddings ask how long the rows are"
    if getattr(model, "is_loaded_in_8bit", False):
        return "its int8 weights ask for outliers"
    grouped = hasattr(config, "num_experts") and config._experts_implementation == "grouped_mm"
    # Elsewhere torch computes its experts one by one, at places that it fetches from the device.
    if grouped and not (model.dtype == torch.bfloat16 and capability[0] in (9, 10)):
        return f"its experts are computed one by one in {model.dtype} on compute capability {capability}"
    return None


class GraphDecoder(FilledDecoder):
    """Records a step of each size once, and replays it. The model's weights and the cache must stay where they are."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.graphs: dict[tuple[int, ...], Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(self.model.device)  # of the model's device, which need not be the current one

    def forget(self) -> None:
        self.graphs.clear()

    def filled_steps(
        self, rows: Sequence[Row], inputs: Inputs, uniforms: Tensor, pages: Tensor, layout: Layout, cache: PagedCache
    ) -> list[tuple[Tensor, ...]]:
        key = tuple(len(x) for x in (inputs.tokens, layout.prompt_lengths, layout.rows.owner, layout.prompts.owner))
        key += layout.rows_of_group.shape[1:]
        if key not in self.graphs:
            self.graphs[key] = Graph(self, rows, inputs, layout, cache)
        graph = self.graphs[key]
        copy_tensors(inputs, graph.inputs)
        copy_tensors(layout, graph.layout)
        return [graph.run(*step) for step in zip(uniforms, pages, strict=True)]


class Graph:
    """A recorded step: it reads `inputs` and `layout` in place, and leaves in `inputs` what the next one reads."""

    def __init__(
        self, decoder: GraphDecoder, rows: Sequence[Row], inputs: Inputs, layout: Layout, cache: PagedCache
    ) -> None:
        self.inputs = Inputs(**{name: x.clone() for name, x in vars(inputs).items()})
        self.layout = layout
        self.record = torch.cuda.CUDAGraph()
        with torch.cuda.device(decoder.stream.device):
            current = torch.cuda.current_stream()
            # Libraries set themselves up in a first call, which cannot be recorded; it writes what the step will write.
            decoder.stream.wait_stream(current)
            with torch.cuda.stream(decoder.stream):
                decoder.step(rows, Inputs(**vars(self.inputs)), layout, cache)
            current.wait_stream(decoder.stream)
            with torch.cuda.graph(self.record, pool=decoder.pool, stream=decoder.stream):
                self.made = step_in_place(decoder, rows, self.inputs, layout, cache)

    def run(self, uniforms: Tensor, pages: Tensor) -> tuple[Tensor, ...]:
        """One step: its tokens, log-probs, whether they end their rows, and which rows drew."""
        self.inputs.uniforms.copy_(uniforms)
        self.inputs.pages.copy_(pages)
        self.record.replay()
        return tuple(x.clone() for x in self.made)


def step_in_place(
    decoder: Decoder, rows: Sequence[Row], inputs: Inputs, layout: Layout, cache: PagedCache
) -> tuple[Tensor, ...]:
    """`Decoder.step` that writes what the next step reads into the very tensors of `inputs`."""
    after = Inputs(**vars(inputs))
    made = decoder.step(rows, after, layout, cache)
    # `drew` and `after.visible` are `inputs.drawing`, which is overwritten now.
    made, after.visible = tuple(x.clone() for x in made), after.visible.clone()
    copy_tensors(after, inputs)
    return made


def copy_tensors(source: Any, target: Any) -> None:
    """The tensors of one dataclass into those of another of its kind, and of the dataclasses in it."""
    for name, x in vars(source).items():
        if isinstance(x, Tensor):
            getattr(target, name).copy_(x)
        elif is_dataclass(x):
            copy_tensors(x, getattr(target, name))
