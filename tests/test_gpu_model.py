"""benchmarks/gpu_model.py and gpu_machine_code.py: counts and times by hand, a step compiled. No GPU is needed."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no triton; test_triton.py fails where it should be there")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("Triton is interpreted in this process", allow_module_level=True)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu_model")


@pytest.fixture
def machine_code(model: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.gpu_machine_code")


def card(model: ModuleType, name: str) -> Any:
    return next(each for each in model.CARDS if each.name == name)


def launch(machine_code: ModuleType, loop: int, outside: int, **changes: Any) -> Any:
    """A launch whose instructions are float32 additions."""
    code = machine_code.Code(("FADD",) * loop, ("FADD",) * outside, 1, 96, 2048)
    values = {"name": "forward_kernel", "programs": 1024, "warps": 4, "tiles": 4, "code": code}
    return machine_code.Launch(**values | changes)


SASS = """
.text.kernel:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P4 LDG.E.128 R24, desc[UR20][R56.64] ;
        /*0020*/                   FADD R26, R31, R56 ;
        /*0030*/                   MUFU.EX2 R84, R82 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/              @UP0 BRA `(.L_x_2) ;
        /*0070*/                   SHFL.BFLY PT, R9, R4, 0x10, 0x1f ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
        /*00a0*/                   NOP;
.L_x_4:
""".splitlines()


def test_the_longest_loop_and_what_stands_outside_it(machine_code: ModuleType) -> None:
    """A tail of single voxels counts once; the jump to itself at the end is no loop, what fills the end is nothing."""
    loop, outside = machine_code.parts(SASS)
    assert loop == ("LDG.E.128", "FADD", "MUFU.EX2", "BRA")
    assert outside == ("IMAD.MOV.U32", "FADD", "BRA", "SHFL.BFLY", "EXIT", "BRA")
    assert machine_code.parts(SASS[:3]) == ((), ("IMAD.MOV.U32",))


def test_a_loop_within_the_loop_is_refused(machine_code: ModuleType) -> None:
    inner = [".L_x_8:", *SASS[4:7], "        /*0040*/               @P1 BRA `(.L_x_8) ;"]
    with pytest.raises(ValueError, match="expected a loop over the tiles without another one in it"):
        machine_code.parts([*SASS[:5], *inner, *SASS[5:]])


def test_loads_in_the_loop(machine_code: ModuleType) -> None:
    """The assembler's loop with twice the loads of the text does two tiles in a turn."""
    ptx = [
        "$L__BB0_1:",
        "  ld.global.v4.b32 {%r1}, [%rd1];",
        "  add.f32 %f1;",
        "  @%p1 bra $L__BB0_1;",
        "  ld.global.b32",
    ]
    assert machine_code.loads(ptx, machine_code.PTX_JUMP, "ld.global") == 1
    assert machine_code.loads(SASS, machine_code.SASS_JUMP, "LDG") == 1
    assert machine_code.loads([*SASS[:4], SASS[4], *SASS[4:]], machine_code.SASS_JUMP, "LDG") == 2


@pytest.mark.parametrize(
    ("instruction", "sort"),
    [
        ("FFMA", "multiply-add"), ("IMAD.MOV.U32", "multiply-add"), ("MUFU.EX2", "special"),
        ("ISETP.GE.AND.EX", "integer"), ("FMNMX", "integer"), ("F2FP.BF16.PACK_AB", "integer"),
        ("LDG.E.128", "exchange"), ("SHFL.BFLY", "exchange"), ("BAR.SYNC.DEFER_BLOCKING", None),
        ("UIADD3", None), ("BRA", None), ("S2R", None),
    ],
)  # fmt: skip
def test_units(model: ModuleType, instruction: str, sort: str | None) -> None:
    assert model.unit(instruction) == sort


def test_the_busiest_unit(model: ModuleType) -> None:
    """12 multiply-adds take 12 x 32 / 128 = 3 cycles (6 on an A100), 4 selections 2 (1 on 12.0), 3 exponentials 6."""
    instructions = ["FFMA"] * 12 + ["FSEL"] * 4
    assert [model.cycles_of_units(instructions, each) for each in (80, 90, 120)] == [6, 3, 3]
    assert model.cycles_of_units(["FSEL"] * 4, 90) == 2
    assert model.cycles_of_units(["FSEL"] * 4, 120) == 1
    assert model.cycles_of_units([*instructions, *["MUFU.EX2"] * 3], 90) == 6


def test_resident_programs(model: ModuleType, machine_code: ModuleType) -> None:
    """96 registers: 65536 / (96 x 32 x 4) = 5 programs of 4 warps. 97 count as 104: 4. 40: 12. 8: 64 or 48 warps."""
    h100, rtx = card(model, "H100 SXM"), card(model, "RTX 4090")

    def programs(of: Any, registers: int, shared_bytes: int = 2048, warps: int = 4, programs: int = 10**6) -> int:
        code = machine_code.Code((), (), 1, registers, shared_bytes)
        return model.resident_programs(machine_code.Launch("kernel", programs, warps, 1, code), of)

    assert [programs(h100, registers) for registers in (96, 97, 40, 8)] == [5, 4, 12, 16]
    assert [programs(each, 8) for each in (h100, rtx)] == [16, 12]
    assert [programs(each, 8, warps=1) for each in (h100, rtx)] == [32, 24]  # however small they are
    assert programs(rtx, 8, 48 * 1024) == 2  # of 49 KiB in 100
    assert programs(h100, 8, programs=200) == 2  # 200 / 132


def test_bytes_by_hand(model: ModuleType) -> None:
    """8 x 3 x 512^2 = 6 291 456 numbers of 2 bytes, 2 097 152 labels of 8: 29.4 and 41.9 MB. uint8: 14.7 MB."""
    shape = 8, 3, 512, 512
    assert model.moved(shape, torch.bfloat16, torch.int64) == (29_360_128, 41_943_040)
    assert model.moved(shape, torch.bfloat16, torch.uint8)[0] == 14_680_064


def test_a_pass_by_hand(model: ModuleType, machine_code: ModuleType) -> None:
    """29 360 128 bytes / 3350 GB/s = 8.764 us.

    1024 programs on 132 multiprocessors: 8 on the busiest, 32 warps, each 4 x 378 + 444 = 1956 instructions; by four
    schedulers 32 x 1956 / 4 = 15 648 cycles, / 1.98 GHz = 7.903 us. Additions at 128 lanes take as long.
    5 programs have room, so the 8 come in two rounds of 4 x 0.4 us of waiting and 1956 cycles: 5.176 us.
    8.764 + 2.5 = 11.264 us, 77.8 % of the bandwidth.
    """
    record = machine_code.Recorded([launch(machine_code, 378, 444)], ["sum", "div"])
    case = {"classes": 3, "dtype": "bfloat16", "layout": "contiguous", "loss": "Dice", "direction": "forward"}
    row = model.row_of({**case, "card": "H100 SXM"}, 6_291_456, 29_360_128, record, card(model, "H100 SXM"))
    assert row.bytes_us == pytest.approx(8.764, abs=1e-3)
    assert row.issue_us == row.units_us == pytest.approx(7.903, abs=1e-3)
    assert row.wait_us == pytest.approx(5.176, abs=1e-3)
    assert row.predicted_us == pytest.approx(11.264, abs=1e-3)
    assert row.share == pytest.approx(0.778, abs=1e-3)
    assert row.resident_warps == 20
    assert row.loop_per_value == pytest.approx(1024 * 4 * 32 * 4 * 378 / 6_291_456)  # 31.5
    assert (row.operations, row.triton_launches, row.small_kernels) == (2, 1, 2)

    slow = machine_code.Recorded([launch(machine_code, 1000, 444), launch(machine_code, 0, 30, tiles=None)], [])
    row = model.row_of({**case, "card": "H100 SXM"}, 6_291_456, 29_360_128, slow, card(model, "H100 SXM"))
    assert row.predicted_us == pytest.approx(32 * 4444 / 4 / 1980 + 2.5)
    assert (row.operations, row.triton_launches, row.small_kernels) == (0, 2, 1)  # one that walks no voxels is small

    with pytest.raises(ValueError, match="expected a kernel launched with `steps`"):
        model.row_of(case, 1, 1, machine_code.Recorded([launch(machine_code, 0, 30, tiles=None)], []), model.CARDS[0])


def test_a_step_by_hand(model: ModuleType) -> None:
    """26 small kernels, 2 passes: 11.3 + 15 + 26 x 2.5 = 91.3 us on the device, 26 x 4 + 2 x 27 = 158 on the host."""
    numbers = dict.fromkeys(model.Row.__dataclass_fields__, 0)
    forward = model.Row(**numbers | {"predicted_us": 11.3, "operations": 15, "triton_launches": 1, "small_kernels": 15})
    backward = model.Row(
        **numbers | {"predicted_us": 15.0, "operations": 11, "triton_launches": 1, "small_kernels": 11}
    )
    time = model.step_time(forward, backward)
    assert time == pytest.approx((91.3, 158, 28))
    assert time.us == pytest.approx(158)


def test_a_change_is_shown_where_it_can_be_seen(model: ModuleType) -> None:
    now, slower, alike = (model.StepTime(us, 0, 0) for us in (20.12, 31.5, 20.09))
    assert model.change(now, slower, "device_us", ".1f") == "31.5 → 20.1"
    assert model.change(now, alike, "device_us", ".1f") == "20.1"
    assert model.change(now, None, "device_us", ".1f") == "20.1"


@pytest.fixture
def records(model: ModuleType, machine_code: ModuleType) -> tuple[Any, Any]:
    """A step of Dice on an H100, compiled."""
    loss, (logits, labels) = model.LOSSES["Dice"](3), model.inputs((8, 3, 512, 512), torch.bfloat16)
    return machine_code.step(loss, logits, labels, 90, 132)


def test_a_step_compiled(model: ModuleType, records: tuple[Any, Any]) -> None:
    assert not model.inputs((1, 3, 4, 4), torch.float32)[0].is_cuda  # nothing of the stand-in is left
    for record in records:
        walks = [each for each in record.launches if each.tiles is not None]
        assert len(walks) == 1
        assert {"LDG", "MUFU"} <= {name.split(".")[0] for name in walks[0].code.loop}
        assert walks[0].code.tiles_per_turn == 1
        assert 16 <= walks[0].code.registers <= 255
        assert len(walks[0].code.loop) > 100
        assert not {"view", "permute", "empty_like", "new_empty"} & set(record.operations)
    stores = [sum(name.startswith("STG") for name in record.launches[0].code.loop) for record in records]
    assert stores[0] == 0
    assert stores[1] > 0


def test_a_device_that_is_not_in_the_table(model: ModuleType) -> None:
    loss = model.LOSSES["Dice"](3)
    assert model.predicted_ms(loss, (2, 3, 64, 64), torch.float32, torch.int64, "NVIDIA T1000") is None


def test_the_page_shows_what_was_kept(model: ModuleType) -> None:
    page = model.DOCUMENT.read_text()
    assert "**Nothing on this page was measured.**" in page
    for part, table in model.tables(model.kept(model.NAME), model.kept(model.BEFORE)).items():
        begin, end = model.marks(part)
        assert page.split(begin)[1].split(end)[0].strip() == table, part


def test_measured_beside_predicted(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the device's name and its times: each contender takes 0.25 ms, a copy 0.01 ms."""
    gpu = importlib.import_module("benchmarks.gpu")
    names = {"softdice", "MONAI"}

    def interleaved(turns: dict[str, Any], logits: torch.Tensor) -> dict[str, Any]:
        return {name: gpu.measure.Time(*[0.01 if name == "copy" else 0.25] * 3) for name in turns}

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "interleaved", interleaved)
    monkeypatch.setattr(gpu, "peak_bytes", lambda *_: 0)
    monkeypatch.setattr(gpu.measure, "error", lambda *_: gpu.measure.Error(0.0, 0.0))
    monkeypatch.setattr(gpu, "twin", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    known = {(name, "eager"): (gpu.peers.ours, torch.int64) for name in names}
    rows = {row.contender: row for row in gpu.workload((2, 3, 32, 32), torch.float32, known)}
    assert math.isnan(rows["MONAI"].predicted_ms)
    predicted = rows["softdice"].predicted_ms
    loss = model.LOSSES["Dice"](3)
    assert predicted == model.predicted_ms(loss, (2, 3, 32, 32), torch.float32, torch.int64, "NVIDIA H100 80GB HBM3")
    assert 0.02 < predicted < 1
    table = gpu.table(list(rows.values()))
    assert f"| **softdice** | 0.250 (predicted {predicted:.3f}), " in table
    assert "| MONAI | 0.250, " in table

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T1000")
    (row,) = gpu.workload((2, 3, 32, 32), torch.float32, {("softdice", "eager"): (gpu.peers.ours, torch.int64)})
    assert math.isnan(row.predicted_ms)
