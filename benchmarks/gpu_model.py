"""What a pass over the voxels should take on a GPU, from its machine code: `python -m benchmarks.gpu_model`.

Nothing is measured, and no GPU is needed: the kernels of a step are compiled for each card, their instructions counted
(`benchmarks.gpu_machine_code`), and four times worked out for each pass:

    bytes   logits and labels read, gradient written / the bandwidth of the card
    issue   instructions of the busiest multiprocessor / (4 schedulers x clock), one instruction of a warp each a cycle
    units   the same for its busiest sort of unit, where a sort takes less than an instruction a cycle and scheduler
    wait    each turn of a program's loop waits for memory once and issues an instruction a cycle at best; programs that
            find no room on a multiprocessor begin when others end

    predicted = the largest of them + the cost of a launch        share of the bandwidth = bytes / predicted

A step adds the small kernels of torch between the passes: what they cost on the device, or on the host where that takes
longer. Not modelled: logits that the cache still holds in the backward pass, clocks that fall under load, a bandwidth
below that of the datasheet, instructions that wait for each other.

Writes results/gpu_model.csv and docs/gpu_model.md, where it stands beside what was kept as `--before`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import gpu_machine_code, peers, publish
from benchmarks.gpu_machine_code import Launch, Recorded

DOCUMENT = publish.DOCS / "gpu_model.md"
NAME, BEFORE = "gpu_model", "gpu_model_before"
DETAILED = "H100 SXM"

SHAPES = {3: (8, 3, 512, 512), 14: (2, 14, 96, 96, 96), 21: (4, 21, 512, 512)}
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "channels-last")
LOSSES: dict[str, Callable[[int], peers.Loss]] = {"Dice": peers.ours, "Dice + CE": peers.ours_with_cross_entropy}


class Card(NamedTuple):
    """A GPU as its maker describes it."""

    name: str
    device: str  # what torch.cuda.get_device_name() calls it
    capability: int
    processors: int
    clock_ghz: float
    gb_per_s: int
    warps: int  # that a multiprocessor holds at most
    programs: int  # likewise
    shared_kib: int  # of a multiprocessor
    source: str


CARDS = (
    Card("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 80, 108, 1.410, 2039, 64, 32, 164,
         "datasheet 1758950 r4 (bandwidth); A100 Tensor Core GPU Architecture, v1.0"),
    Card("RTX 4090", "NVIDIA GeForce RTX 4090", 89, 128, 2.520, 1008, 48, 24, 100,
         "Ada GPU Architecture, appendix A"),
    Card("H100 SXM", "NVIDIA H100 80GB HBM3", 90, 132, 1.980, 3350, 64, 32, 228,
         "datasheet 2287922 r7 (bandwidth); H100 Tensor Core GPU Architecture, v1.04, table 3"),
    Card("H200 SXM", "NVIDIA H200", 90, 132, 1.980, 4800, 64, 32, 228,
         "datasheet 3002446 (bandwidth); otherwise as the H100"),
    Card("B200", "NVIDIA B200", 100, 148, 1.965, 8000, 64, 32, 228,
         "datasheet 3384703 (bandwidth); multiprocessors and clock are not NVIDIA's, but TechPowerUp's (b200.c4210)"),
    Card("RTX 5090", "NVIDIA GeForce RTX 5090", 120, 170, 2.407, 1792, 48, 24, 100,
         "RTX Blackwell GPU Architecture, v1.1, pages 46 and 47"),
)  # fmt: skip
"""Multiprocessors, boost clock (of code without tensor cores) and bandwidth; the source is NVIDIA's unless said. Warps,
programs and shared memory: CUDA Programming Guide 13.4, "Compute Capabilities"."""

SCHEDULERS = 4
REGISTERS, PORTION = 65536, 8
RESERVED_KIB = 1
LANES = {"multiply-add": 128, "integer": 64, "special": 16, "exchange": 32}
OTHER_LANES = {80: {"multiply-add": 64}, 120: {"integer": 128}}
WAIT_NS = 400
SMALL_US, OPERATION_US, TRITON_US = 2.5, 4, 27

COMPUTE = 'CUDA Programming Guide 13.4, "Compute Capabilities"'
GRAPHS = 'NVIDIA\'s "Getting Started with CUDA Graphs" (2019)'
CONSTANTS = (
    ("schedulers of a multiprocessor; each issues an instruction of a warp in a cycle", f"{SCHEDULERS}", COMPUTE),
    ("registers of a multiprocessor", f"{REGISTERS}, in portions of {PORTION} for each lane", COMPUTE),
    ("shared memory that the system takes for each program", f"{RESERVED_KIB} KiB", COMPUTE),
    (
        "results of a multiprocessor in a cycle: float32 multiply-add; int32 addition, comparison, selection; special "
        "functions and conversions; exchange with other lanes, here also with memory",
        "; ".join(
            f"{rate}" + "".join(f" ({cc / 10:.1f}: {o[name]})" for cc, o in OTHER_LANES.items() if name in o)
            for name, rate in LANES.items()
        ),
        'CUDA C++ Best Practices Guide, 12.1.1, "Throughput of Native Arithmetic Instructions"',
    ),
    ("from a load to its number", f"{WAIT_NS} ns", "assumed; more under load"),
    (
        "a kernel on the device, whatever it does, passes too", f"{SMALL_US} µs",
        f"assumed; {GRAPHS} measured 3.4 µs from one kernel of 2.9 µs to the next on a V100",
    ),
    ("an operation of torch on the host", f"{OPERATION_US} µs", f"assumed; {GRAPHS}: 3.8 µs with its kernel"),
    ("a launch by Triton on the host", f"{TRITON_US} µs", "assumed, for some 40 arguments"),
)  # fmt: skip
"""What is the same for all cards: meaning, value, source."""


@dataclass
class Row:
    """One pass of one case on one card."""

    card: str
    classes: int
    dtype: str
    layout: str
    loss: str
    direction: str
    programs: int
    tiles: int  # that a program walks
    registers: int  # of a lane
    resident_warps: int  # of a multiprocessor
    loop: int  # instructions of a warp in one turn of the loop over the tiles
    outside: int
    loop_per_value: float  # instructions of a lane for each voxel and class
    outside_per_value: float
    megabytes: float
    bytes_us: float
    issue_us: float
    units_us: float
    wait_us: float
    predicted_us: float
    share: float  # of the bandwidth
    operations: int  # of torch, each a small kernel
    triton_launches: int
    small_kernels: int  # all that walk no voxels, torch's and Triton's


def unit(instruction: str) -> str | None:
    """Return the sort of unit that an instruction takes; None for those that only take their turn to be issued."""
    name = instruction.split(".")[0]
    if name in ("MUFU", "I2F", "F2I", "F2F", "FRND"):
        return "special"
    if name in ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "IMAD"):
        return "multiply-add"
    if name in ("SHFL", "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDL", "STL", "LDGSTS"):
        return "exchange"
    if name.startswith(("U", "S2", "CS2", "R2U", "LDC", "B", "WARP", "EXIT", "CALL", "RET", "DEP", "VOTE", "MEMBAR")):
        return None
    return "integer"


def cycles_of_units(instructions: Iterable[str], capability: int) -> float:
    """Return how long a multiprocessor's busiest sort of unit takes for one warp's instructions."""
    lanes = LANES | OTHER_LANES.get(capability, {})
    counts = Counter(unit(each) for each in instructions)
    return max(32 * counts[name] / rate for name, rate in lanes.items())


def resident_programs(launch: Launch, card: Card) -> int:
    """Return how many programs of a launch a multiprocessor holds, as far as there are so many."""
    of_lane = -(-launch.code.registers // PORTION) * PORTION
    by_registers = REGISTERS // (of_lane * 32 * launch.warps)
    by_shared = card.shared_kib * 1024 // (launch.code.shared_bytes + RESERVED_KIB * 1024)
    return min(card.warps // launch.warps, card.programs, by_registers, by_shared, share_of(launch, card))


def share_of(launch: Launch, card: Card) -> int:
    """Return the programs of the multiprocessor that gets most."""
    return -(-launch.programs // card.processors)


def turns(launch: Launch) -> int:
    """Return how often a program of a launch runs its loop."""
    assert launch.tiles is not None
    return -(-launch.tiles // launch.code.tiles_per_turn)


class Times(NamedTuple):
    """Microseconds of a launch without its memory traffic."""

    issue_us: float
    units_us: float
    wait_us: float


def times_of(launch: Launch, card: Card) -> Times:
    """Return what the instructions of a launch take, of the multiprocessor with most programs."""
    code, warps, capability = launch.code, share_of(launch, card) * launch.warps, card.capability
    issued = turns(launch) * len(code.loop) + len(code.outside)
    units = turns(launch) * cycles_of_units(code.loop, capability) + cycles_of_units(code.outside, capability)
    rounds = -(-share_of(launch, card) // resident_programs(launch, card))
    waited = rounds * (issued + turns(launch) * WAIT_NS * card.clock_ghz)
    return Times(*(cycles / card.clock_ghz / 1e3 for cycles in (warps * issued / SCHEDULERS, warps * units, waited)))


def row_of(case: dict[str, Any], values: int, moved_bytes: int, record: Recorded, card: Card) -> Row:
    """Return the prediction for what one pass starts.

    Args:
        case: the first fields of a row. values: voxels times classes. moved_bytes: the least that it reads and writes.
        record: launches and operations of the pass.
    """
    walks = [launch for launch in record.launches if launch.tiles is not None]
    if not walks:
        names = [launch.name for launch in record.launches]
        raise ValueError(f"gpu_model: expected a kernel launched with `steps`, the tiles of a program, got {names}.")
    main = max(walks, key=lambda launch: launch.programs * turns(launch) * len(launch.code.loop))
    times = Times(*map(sum, zip(*(times_of(launch, card) for launch in walks), strict=True)))
    bytes_us = moved_bytes / card.gb_per_s / 1e3
    predicted_us = max(bytes_us, *times) + SMALL_US * len(walks)
    code, lanes = main.code, 32 * main.programs * main.warps
    return Row(
        **case,
        programs=main.programs,
        tiles=turns(main) * code.tiles_per_turn,
        registers=code.registers,
        resident_warps=resident_programs(main, card) * main.warps,
        loop=len(code.loop),
        outside=len(code.outside),
        loop_per_value=lanes * turns(main) * len(code.loop) / values,
        outside_per_value=lanes * len(code.outside) / values,
        megabytes=moved_bytes / 1e6,
        bytes_us=bytes_us,
        **times._asdict(),
        predicted_us=predicted_us,
        share=bytes_us / predicted_us,
        operations=len(record.operations),
        triton_launches=len(record.launches),
        small_kernels=len(record.operations) + len(record.launches) - len(walks),
    )


def moved(shape: tuple[int, ...], dtype: torch.dtype, label: torch.dtype) -> tuple[int, int]:
    """Return the least bytes that the forward and the backward pass move: S + L and 2 S + L."""
    logits = prod(shape) * dtype.itemsize
    labels = prod(shape) // shape[1] * label.itemsize
    return logits + labels, 2 * logits + labels


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = LAYOUTS[0], label: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor]:
    """Return logits and labels with shapes and strides, but without memory."""
    logits = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "channels-last":
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        logits = logits.contiguous(memory_format=last)
    return logits.requires_grad_(), torch.empty((shape[0], *shape[2:]), dtype=label, device="meta")


def passes(
    function: peers.Loss, shape: tuple[int, ...], dtype: torch.dtype, card: Card, label: torch.dtype, **case: str
) -> list[Row]:
    """Return the rows of a step's two passes. case: layout of the logits and name of the loss."""
    records = gpu_machine_code.step(
        function, *inputs(shape, dtype, case["layout"], label), card.capability, card.processors
    )
    case |= {"card": card.name, "dtype": str(dtype).removeprefix("torch.")}
    return [
        row_of({**case, "classes": shape[1], "direction": direction}, prod(shape), moved_bytes, record, card)
        for direction, moved_bytes, record in zip(
            ("forward", "backward"), moved(shape, dtype, label), records, strict=True
        )
    ]


def rows_of(card: Card) -> list[Row]:
    """Return all cases on a card."""
    return [
        row
        for C, shape in SHAPES.items()
        for dtype in DTYPES
        for layout in LAYOUTS
        for name, make in LOSSES.items()
        for row in passes(make(C), shape, dtype, card, torch.int64, layout=layout, loss=name)
    ]


class StepTime(NamedTuple):
    """Microseconds of a step, forward and backward: what the device needs, and what the host needs to start it."""

    device_us: float
    host_us: float
    kernels: int

    @property
    def us(self) -> float:
        """The longer of the two, since the host runs ahead."""
        return max(self.device_us, self.host_us)


def step_time(forward: Row, backward: Row) -> StepTime:
    """Return the prediction for a step from those for its passes."""
    both = forward, backward
    operations, launches = (sum(getattr(row, name) for row in both) for name in ("operations", "triton_launches"))
    return StepTime(
        sum(row.predicted_us + SMALL_US * row.small_kernels for row in both),
        OPERATION_US * operations + TRITON_US * launches,
        operations + launches,
    )


def predicted_ms(
    loss: peers.Loss, shape: tuple[int, ...], dtype: torch.dtype, label: torch.dtype, device: str
) -> float | None:
    """Return the milliseconds of a step, or None for a device that is not in the table.

    Args:
        device: what torch.cuda.get_device_name() calls it.
    """
    card = next((card for card in CARDS if card.device == device), None)
    if card is None:
        return None
    forward, backward = passes(loss, shape, dtype, card, label, layout=LAYOUTS[0], loss="")
    return step_time(forward, backward).us / 1e3


Key = tuple[Any, ...]


def key(row: Row) -> Key:
    """Return what a row is found by."""
    return row.card, row.classes, row.dtype, row.layout, row.loss, row.direction


def titles(rows: Iterable[Row]) -> list[Key]:
    """Return the cases and passes, without the card, in the order of the rows."""
    return list(dict.fromkeys(key(row)[1:] for row in rows))


def change(now: Any, before: Any, name: str, form: str) -> str:
    """Return a number of `now` by its name, behind that of `before` where there is one and it looks different."""
    texts = [format(getattr(each, name), form) for each in (before, now) if each is not None]
    return " → ".join(dict.fromkeys(texts))


def markdown(head: list[str], body: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def cards_table() -> str:
    """Return the constants of the cards, each with its source."""
    head = ["card", "compute capability", "multiprocessors", "clock, GHz", "bandwidth, GB/s", "warps", "source"]
    return markdown(
        head,
        [
            [c.name, f"{c.capability / 10:.1f}", str(c.processors), f"{c.clock_ghz:.3f}", str(c.gb_per_s),
             str(c.warps), c.source]
            for c in CARDS
        ],
    )  # fmt: skip


def cells(title: Key) -> list[str]:
    """Return the first columns of a row: the case and the pass."""
    C, dtype, layout, loss, direction = title
    return [f"{C}, {dtype}{'' if layout == LAYOUTS[0] else ', ' + layout}, {loss}", direction]


def shares_table(rows: list[Row], before: list[Row]) -> str:
    """Return the predicted microseconds of each pass on each card, and its share of the bandwidth."""
    new, old = ({key(row): row for row in each} for each in (rows, before))
    names = list(dict.fromkeys(row.card for row in rows))

    def cell(name: str, title: Key) -> str:
        row, was = new[(name, *title)], old.get((name, *title))
        us, share = change(row, was, "predicted_us", ".1f"), change(row, was, "share", ".0%")
        return f"{us} µs, {share.replace('%', ' %')}"

    return markdown(
        ["case", "pass", *names], [[*cells(title), *(cell(name, title) for name in names)] for title in titles(rows)]
    )


def details_table(rows: list[Row], before: list[Row], card: str = DETAILED) -> str:
    """Return for one card what the prediction is made of."""
    old = {key(row): row for row in before}
    columns: dict[str, tuple[str, str]] = {
        "registers": ("registers", ".0f"),
        "resident warps": ("resident_warps", ".0f"),
        "in the loop": ("loop_per_value", ".1f"),
        "outside": ("outside_per_value", ".1f"),
        "bytes, µs": ("bytes_us", ".1f"),
        "issue, µs": ("issue_us", ".1f"),
        "units, µs": ("units_us", ".1f"),
        "wait, µs": ("wait_us", ".1f"),
    }
    body = []
    for row in rows:
        if row.card == card:
            was = old.get(key(row))
            body.append([*cells(key(row)[1:]), *(change(row, was, *column) for column in columns.values())])
    return markdown(["case", "pass", *columns], body)


def steps_table(rows: list[Row], before: list[Row], card: str = DETAILED) -> str:
    """Return for one card what a whole step should take, logits contiguous."""
    new, old = ({key(row): row for row in each if row.card == card} for each in (rows, before))
    body = []
    for title in titles(rows):
        *_, layout, _loss, direction = title
        if layout == LAYOUTS[0] and direction == "forward":
            now, was = (step_of(each, (card, *title[:-1])) for each in (new, old))
            columns = ("kernels", "device_us", "host_us")
            body.append([cells(title)[0], *(change(now, was, name, ".0f") for name in columns)])
    return markdown(["case", "kernels", "device, µs", "host, µs"], body)


def step_of(rows: dict[Key, Row], case: Key) -> StepTime | None:
    """Return the prediction for a case's step, or None where its passes are not known."""
    both = [rows[(*case, direction)] for direction in ("forward", "backward") if (*case, direction) in rows]
    return step_time(*both) if both else None


def kept(name: str) -> list[Row]:
    """Return the rows of results/NAME.csv."""
    return [Row(**row) for row in publish.kept(name)]


def tables(rows: list[Row], before: list[Row]) -> dict[str, str]:
    """Return the tables of the page by name."""
    return {
        "constants": markdown(["constant", "value", "source"], [list(each) for each in CONSTANTS]),
        "cards": cards_table(),
        "shares": shares_table(rows, before),
        "details": details_table(rows, before),
        "steps": steps_table(rows, before),
    }


def marks(part: str) -> tuple[str, str]:
    """Return what stands before and after a table of the page."""
    return f"<!-- gpu model: {part} -->", "<!-- end of gpu model -->"


def write(rows: list[Row], before: list[Row]) -> None:
    """Keep the rows, and show them on the page."""
    publish.keep(NAME, [asdict(row) for row in rows])
    for part, table in tables(kept(NAME), before).items():
        publish.show(table, DOCUMENT, marks(part))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help=f"NAME of results/NAME.csv to compare with ({BEFORE})")
    parser.add_argument("--keep-as-before", action="store_true", help="keep today's kernels as results/BEFORE.csv, too")
    parser.add_argument("--card", choices=[card.name for card in CARDS], help="one card, printed and not written")
    options = parser.parse_args()
    cards = [card for card in CARDS if options.card in (None, card.name)]
    rows = [row for card in cards for row in rows_of(card)]
    if options.keep_as_before:
        publish.keep(options.before, [asdict(row) for row in rows])
    before = kept(options.before)
    if options.card is None:
        write(rows, before)
    detailed = options.card or DETAILED
    for table in (shares_table(rows, before), *(make(rows, before, detailed) for make in (details_table, steps_table))):
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
