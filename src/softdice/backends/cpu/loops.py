"""Loops over one class of a block, written from the declared statistics and compiled for what a loop must know (Numba).

`Kind` is settled when compiling: a bundle of statistics, the activation, the kind of target, whether the exponents are
the usual ones. Each loop works out the symbols of `softdice.statistics.declared` that its expressions read, and no
others; it keeps its sums in registers, or writes the gradient.

Names in the texts: i is the voxel; at_x, at_e, at_m, at_y, at_u are addresses of the class's rows; `job` and `k` are
records of `softdice.backends.cpu.walk`, whose fields are read in front of a loop; k0, k1... are dL/dstatistics.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from softdice.backends.cpu.arithmetic import ONE, SMALL, ZERO, complement, exp, log, log1p, minus, power_of, ratio
from softdice.backends.cpu.compiler import each, jit
from softdice.backends.cpu.convert import NO_CLASS
from softdice.backends.cpu.intrinsics import LANES, add, read, read_label, reread, write
from softdice.statistics.declared import BY_NAME, FIELDS, MAPPED, NAMES, READERS, Statistic, function

RUN = np.uint64(256 if LANES > 4 else 64)  # voxels whose sums stay in registers, in float32, before float64 takes them
MANY = 12  # classes: beyond, a voxel's own class is done by itself, since a comparison per class costs more

_SHARED = {
    "w": "read(at_w, i)",
    "y": "keep * t + share",
    "n": "ONE - y",
    "m": "read(at_u, i)",
    "far": "abs(p - y)",
    "sign": "(ONE if p > y else ZERO) - (ONE if p < y else ZERO)",
}
_BY_ACTIVATION = {
    "softmax": {
        "x": "read(at_x, i)",
        "p": "read(at_e, i) * read(at_r, i)",
        "q": "complement(p)",
        "a": "ZERO if y == ZERO else minus(read(at_ls, i), minus(x, read(at_m, i)))",
        "b": "ZERO",
        "j": "p",
        "s": "ONE",
        "r": "ZERO",
        "f": "ZERO if p == ZERO else p * ratio(a, q)",
        "g": "ZERO",
    },
    "sigmoid": {
        "x": "read(at_x, i)",
        "z": "exp(-abs(x))",
        "large": "ONE / (ONE + z)",
        "small": "z * large",
        "p": "large if x >= ZERO else small",
        "q": "small if x >= ZERO else large",
        "both": "log1p(z)",
        "a": "ZERO if y == ZERO else both + (-x if x < ZERO else ZERO)",
        "b": "ZERO if y == ONE else both + (x if x > ZERO else ZERO)",
        "j": "p * q",
        "s": "q",
        "r": "p",
        "f": "p * a",
        "g": "q * b",
    },
    "none": {
        "p": "read(at_x, i)",
        "q": "complement(p)",
        "a": "ZERO if y == ZERO else -log(SMALL if p < SMALL else p)",
        "b": "ZERO",
        "j": "ONE",
        "s": "ZERO if p < SMALL else ONE / p",
        "r": "ZERO",
        "f": "ZERO if p < SMALL else ratio(a, q)",
        "g": "ZERO",
    },
}
_USUAL_GAMMA = {"u": "q * q", "v": "p * p"}
_ANY_GAMMA = {"u": "power_of(q, gamma)", "v": "power_of(p, gamma)"}
_USUAL_POWER = {"d": "far", "e": "sign"}
_ANY_POWER = {"d": "power_of(far, power)", "e": "sign * power * (d / (SMALL if far < SMALL else far))"}

_FIELDS = {
    **{name: f"job.{name}" for name in ("gamma", "power", "keep", "share", "row_low", "row_high")},
    **{f"at_{name}": f"k.{name}" for name in ("w", "t", "r", "ls", "dot")},
    "label": "np.int32(c)",
}
"""Fields of the records that texts read, by the names that they have there."""

_NAMES = {
    "np": np, "ZERO": ZERO, "ONE": ONE, "SMALL": SMALL, "RUN": RUN, "NO_CLASS": NO_CLASS, "exp": exp, "log": log,
    "log1p": log1p, "minus": minus, "power_of": power_of, "complement": complement, "ratio": ratio, "add": add,
    "read": read, "reread": reread, "read_label": read_label, "write": write,
}  # fmt: skip


class Kind(NamedTuple):
    """What the compiler has to know of a call."""

    bundle: tuple[str, ...]
    activation: str
    target: str  # "labels", "own" (labels of MANY classes of a softmax) or "values" (of each class or region)
    weighted: bool = True  # whether voxels have weights, or do not count
    usual_gamma: bool = False  # 2; else any, at run time
    usual_power: bool = False  # 1

    @property
    def summed(self) -> list[Statistic]:
        """Statistics that are summed: T and the voxels follow from others, T = keep L + share N."""
        return [BY_NAME[name] for name in self.bundle if name not in ("target", "voxels")]

    @property
    def sloped(self) -> list[Statistic]:
        """Statistics with a slope, in the order of the coefficients: P first, which the softmax reads."""
        sloped = [BY_NAME[name] for name in self.bundle if BY_NAME[name].slope != "0"]
        return sorted(sloped, key=lambda statistic: statistic.name != "prediction")

    @property
    def logs(self) -> bool:
        """Whether the logarithm of a softmax's sum is read."""
        return any(s.names("a") or s.names("f", slope=True) for s in self.summed)

    @property
    def fused(self) -> bool:
        """Whether the other classes' slopes are a constant times p, so that their sum comes with the exponentials."""
        return self.target == "own" and [s.name for s in self.sloped if s.elsewhere[1]] == ["prediction"]

    @property
    def kept(self) -> bool:
        """Whether slopes are kept for the second loop: those that are dear to compute twice."""
        dear = any(s.names("f", slope=True) or (s.names("e", slope=True) and not self.usual_power) for s in self.sloped)
        return dear and self.activation == "softmax" and self.target != "own"

    @property
    def mapped(self) -> bool:
        """Whether a map is read."""
        return not set(MAPPED).isdisjoint(self.bundle)


def kind_of(bundle: tuple[str, ...], activation: str, target: str, weighted: bool, gamma: float, power: float) -> Kind:
    """Return the kind for a bundle.

    What costs a bundle for few losses much is compiled in: the usual exponents where they are read, and no weights
    where there are none. The two that hold everything are for the rest, and take all of it at run time.
    """
    small = bundle not in (FIELDS, NAMES)
    weighted = weighted or not small
    usual_gamma = small and gamma == 2.0 and not READERS["gamma"].isdisjoint(bundle)
    usual_power = small and power == 1.0 and not READERS["power"].isdisjoint(bundle)
    return Kind(bundle, activation, target, weighted, usual_gamma, usual_power)


def _symbols(kind: Kind, truth: str | None) -> dict[str, str]:
    """Return the expression of each symbol; truth: that of t, None where t is a parameter."""
    table = _SHARED | _BY_ACTIVATION[kind.activation]
    table |= (_USUAL_GAMMA if kind.usual_gamma else _ANY_GAMMA) | (_USUAL_POWER if kind.usual_power else _ANY_POWER)
    table |= {} if kind.weighted else {"w": "ONE"}
    return table if truth is None else table | {"t": truth}


def _lines(table: dict[str, str], *expressions: str) -> list[str]:
    """Return the assignments that the expressions need, each behind those it reads."""
    lines: dict[str, str] = {}

    def need(expression: str) -> None:
        for name in _names_in(expression):
            if name in table and name not in lines:
                need(table[name])
                lines[name] = f"{name} = {table[name]}"

    for expression in expressions:
        need(expression)
    return list(lines.values())


def _names_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])[a-z]\w*(?![\w(])", text)


def _compiled(name: str, parameters: str, text: Sequence[str], inline: bool = False, **names: Any) -> Any:
    """Compile a function from lines, with the records' fields that they read in front."""
    used = set(_names_in("\n".join(text))) - set(re.findall(r"\w+", parameters))
    used -= {"label"} if "    label = read_label(at_t, i)" in text else set()
    fields = [f"{field} = {value}" for field, value in _FIELDS.items() if field in used]
    function_ = function(f"{name}({parameters})", "\n    ".join([*fields, *text]), {**_NAMES, **names})
    return (each if inline else jit)(function_)


def _truth(kind: Kind) -> str:
    return {"labels": "ONE if read_label(at_t, i) == label else ZERO", "own": "ZERO", "values": "read(at_y, i)"}[
        kind.target
    ]


def _checks(kind: Kind) -> list[str]:
    """Return the conditions for a value out of range."""
    checks = ["(t < ZERO) | (t > ONE)"] if kind.target == "values" else []
    return checks + (["(p < row_low) | (p > row_high)"] if kind.activation == "none" else [])


CLASS = "at_x, at_e, at_m, at_y, at_u, c, job, k"
"""Parameters of every loop over a class."""


_OWN_CLASS = [
    "for i in range(k.n):",
    "    label = read_label(at_t, i)",
    "    if label > NO_CLASS:",
    "        c, w = np.uint64(label), read(at_w, i)",
    "        at_x, at_e = k.x + c * k.ld, k.e + c * k.row",
]
"""The beginning of a loop over the voxels' own classes."""


@cache
def class_sums(kind: Kind) -> Any:
    """Return the loop that adds the sums of a class to `out`; it returns how many values are out of range.

    For target "own", the sums as if no voxel were of the class.
    """
    chosen = [(row, s) for row, s in enumerate(kind.summed) if kind.target != "own" or s.elsewhere[0]]
    checks = _checks(kind)
    inner = _lines(_symbols(kind, _truth(kind)), *(s.term for _, s in chosen), *checks, "w")
    inner += [f"sum{row} += ({s.term}) * w" for row, s in chosen]
    inner += [f"bad += ONE if {check} else ZERO" for check in checks]
    outer = [f"sum{row} = ZERO" for row, _ in chosen]
    outer += ["for i in range(begin, min(begin + RUN, k.n)):", *(f"    {line}" for line in inner)]
    outer += [f"add(out, np.uint64({row}) * job.slot_stride + c, sum{row})" for row, _ in chosen]
    text = ["bad = ZERO", "for begin in range(np.uint64(0), k.n, RUN):", *(f"    {line}" for line in outer)]
    return _compiled("class_sums", f"{CLASS}, out", [*text, "return np.int64(bad)"])


@cache
def _at(kind: Kind, slopes: bool) -> Any:
    """Return a function of one voxel and class, for a truth t: its terms, or the slopes weighted with coefficients."""
    if slopes:
        names = [f"k{row}" for row in range(len(kind.sloped))]
        result = " + ".join(f"{name} * ({s.slope})" for name, s in zip(names, kind.sloped, strict=True))
        unpack, expressions = [f"{', '.join(names)}, = coefs"], [s.slope for s in kind.sloped]
    else:
        unpack, expressions = [], [s.term for s in kind.summed]
        result = f"({', '.join(f'np.float32({term})' for term in expressions)},)"
    text = [*unpack, *_lines(_symbols(kind, None), *expressions), f"return {result}"]
    return _compiled("at", f"at_x, at_e, at_m, at_u, i, t, job, k{', coefs' if slopes else ''}", text, inline=True)


@cache
def own_sums(kind: Kind) -> Any:
    """Return the loop that adds what `class_sums` of all classes lack: at each voxel, its own class."""
    text = [f"# {kind}", *_OWN_CLASS]
    for name, t in (("there", "ONE"), ("absent", "ZERO")):
        text += [f"        {name} = terms(at_x, at_e, k.m, k.zero, i, {t}, job, k)"]
    text += [
        f"        add(out, np.uint64({row}) * job.slot_stride + c, (there[{row}] - absent[{row}]) * w)"
        for row in range(len(kind.summed))
    ]
    return _compiled("own_sums", "job, k, out", text, terms=_at(kind, slopes=False))


def _load(row: int) -> str:
    return f"read(coefs, np.uint64({row}) * job.coef_stride + c)"


@cache
def class_slope(kind: Kind, kept: bool) -> Any:
    """Return the loop that adds a class's slope to dot, and keeps it in `at_h` where it is wanted later."""
    chosen = [(row, s) for row, s in enumerate(kind.sloped) if kind.target != "own" or s.elsewhere[1]]
    inner = _lines(_symbols(kind, _truth(kind)), *(s.slope for _, s in chosen))
    inner += [f"step = {' + '.join(f'k{row} * ({s.slope})' for row, s in chosen) or 'ZERO'}"]
    inner += ["write(at_dot, i, reread(at_dot, i) + step)"]
    inner += ["write(at_h, i, step)"] if kept else []
    text = [f"k{row} = {_load(row)}" for row, _ in chosen]
    text += ["for i in range(k.n):", *(f"    {line}" for line in inner)]
    return _compiled("class_slope", f"{CLASS}, coefs, at_h", text)


@cache
def own_slope(kind: Kind) -> Any:
    """Return the loop over what the own class's slope has beyond `class_slope`: onto dot, and times w into k.spare."""
    text = [f"# {kind}", *_OWN_CLASS]
    text += [f"        of_class = ({', '.join(map(_load, range(len(kind.sloped))))},)"]
    there, absent = (f"slope(at_x, at_e, k.m, k.zero, i, {t}, job, k, of_class)" for t in ("ONE", "ZERO"))
    text += [f"        step = {there} - {absent}", "        write(at_dot, i, reread(at_dot, i) + step)"]
    text += ["        write(k.spare, i, w * step)"]
    return _compiled("own_slope", "job, k, coefs", text, slope=_at(kind, True))


@cache
def class_gradient(kind: Kind) -> Any:
    """Return the loop that writes a class's gradient: w (slope - p dot) of a softmax, w slope elsewhere."""
    chosen = [(row, s) for row, s in enumerate(kind.sloped) if kind.target != "own" or s.elsewhere[1]]
    step = " + ".join(f"k{row} * ({s.slope})" for row, s in chosen) or "ZERO"
    step = "read(at_h, i)" if kind.kept else step
    step = f"({step}) - p * read(at_dot, i)" if kind.activation == "softmax" else step
    text = [] if kind.kept else [f"k{row} = {_load(row)}" for row, _ in chosen]
    inner = [*_lines(_symbols(kind, _truth(kind)), step, "w"), f"write(at_g, i, w * ({step}))"]
    text += ["for i in range(k.n):", *(f"    {line}" for line in inner)]
    return _compiled("class_gradient", f"{CLASS}, coefs, at_h, at_g", text)


@cache
def class_terms(kind: Kind) -> Any:
    """Return the loop that adds a class's term of a single statistic to the map `out`; it counts like `class_sums`."""
    (statistic,) = kind.summed
    checks = _checks(kind)
    inner = _lines(_symbols(kind, _truth(kind)), statistic.term, *checks, "w")
    inner += [f"write(out, i, reread(out, i) + ({statistic.term}) * w)"]
    inner += [f"bad += ONE if {check} else ZERO" for check in checks]
    text = ["bad = ZERO", "for i in range(k.n):", *(f"    {line}" for line in inner), "return np.int64(bad)"]
    return _compiled("class_terms", f"{CLASS}, out", text)


@cache
def own_terms(kind: Kind) -> Any:
    """Return the loop that writes the term of each voxel's own class to the map `out`, where no other class has one."""
    text = [f"# {kind}", *_OWN_CLASS, "        write(out, i, terms(at_x, at_e, k.m, k.zero, i, ONE, job, k)[0] * w)"]
    return _compiled("own_terms", "job, k, out", text, terms=_at(kind, slopes=False))
