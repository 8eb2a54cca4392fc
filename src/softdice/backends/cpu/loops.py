"""Loops over one class of a block, written from the declared statistics and compiled for what a loop must know (Numba).

`Kind` is settled when compiling: a bundle of statistics, the activation, the kind of target, whether the exponents are
the usual ones. Each loop works out the symbols of `softdice.statistics.declared` that its expressions read, and no
others; it keeps its sums in registers, or writes the gradient. Functions of this file return compiled loops, or lines
of their text.

Own classes: a voxel's own class is the one of its label. With MANY classes, a loop over one class takes every voxel as
one of another class (t = 0), and one loop over the voxels then adds, for each voxel's own class, t = 1 less t = 0.

Names in the texts; all addresses are uint64, and a row is the address of block.n float32 (labels: int32):

    i                   the voxel of a block; c, label: the class (uint64, int32)
    CLASS               at_x, at_e, at_m, at_y, at_u, c, job, block: the first arguments of each loop over one class
    at_x, at_e, at_m    rows of logits (or probabilities), exp(x - m), their largest m
    at_y, at_u          rows of targets and map of the class, where there are values of them
    job, block          the records JOB and BLOCK of `softdice.backends.cpu.walk`; fields are read before a loop
    block.x, block.e    rows at_x and at_e of class 0; block.x_stride and block.row_stride bytes from class to class
    block.zeros, .spare rows of zeros, and for the loops to use
    out                 address of the task's sums, float64, job.slot_stride numbers from row to row; or of a map's row
    coefs               address of the sample's dL/dsums, float32, job.coef_stride numbers from row to row
    coef0, coef1...     those of the class
    slope               of a class: the sum of its coefs times slopes of the statistics; dL/dx, of a softmax p dL/dp
    at_h, at_g          rows that keep the class's slope, and take its gradient
    block.dot, at_dot   row of the sum of the slopes over the classes of a softmax
    bad                 how many values are out of range
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
MANY = 12  # classes: with more, own classes have a loop of their own, since a comparison per class costs more

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
"""Symbol -> expression in other symbols, rows and fields. w weight, x logit, m map, z to both: parts of a sigmoid."""
_USUAL_GAMMA = {"u": "q * q", "v": "p * p"}
_ANY_GAMMA = {"u": "power_of(q, gamma)", "v": "power_of(p, gamma)"}
_USUAL_POWER = {"d": "far", "e": "sign"}
_ANY_POWER = {"d": "power_of(far, power)", "e": "sign * power * (d / (SMALL if far < SMALL else far))"}

_TRUTH = {"labels": "ONE if read_label(at_t, i) == label else ZERO", "own": "ZERO", "values": "read(at_y, i)"}
"""Kind of target -> expression of t; for "own", of a class that the voxel does not belong to."""

_FIELDS = {
    **{name: f"job.{name}" for name in ("gamma", "power", "keep", "share", "row_low", "row_high")},
    **{f"at_{name}": f"block.{name}" for name in ("w", "t", "r", "ls", "dot")},
    "label": "np.int32(c)",
}
"""Name in the texts -> the record's field that is read in front of a loop."""

_NAMES = {
    "np": np, "ZERO": ZERO, "ONE": ONE, "SMALL": SMALL, "RUN": RUN, "NO_CLASS": NO_CLASS, "exp": exp, "log": log,
    "log1p": log1p, "minus": minus, "power_of": power_of, "complement": complement, "ratio": ratio, "add": add,
    "read": read, "reread": reread, "read_label": read_label, "write": write,
}  # fmt: skip


class Kind(NamedTuple):
    """What the compiler has to know of a call."""

    bundle: tuple[str, ...]  # names of the statistics
    activation: str
    # "labels": class numbers, compared with each class. "own": class numbers of a softmax of MANY classes, with a loop
    # over own classes. "values": a value for each class or region
    target: str
    weighted: bool = True  # whether voxels have weights, or do not count
    usual_gamma: bool = False  # 2; else any, at run time
    usual_power: bool = False  # 1

    @property
    def summed(self) -> list[Statistic]:
        """Statistics that are summed, in the order of the slots' rows. Not the target's sum, which follows from the
        labels' and the weights', nor the number of voxels, which is the sum of the weights in the last row."""
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
        """Whether a class's slope, at voxels of other classes, is a constant times p; the softmax then adds them up."""
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
    """Return the kind of loops for a bundle of statistics and an activation ("none", "softmax", "sigmoid").
    target: as in `Kind`. weighted: whether voxels have weights, or some are ignored. gamma, power: exponents.
    Small bundles have loops for gamma 2 and power 1, if a statistic reads them, and for no weights. The bundles of all
    statistics, FIELDS and NAMES, take long to compile: one loop each reads exponents and weights at run time."""
    small = bundle not in (FIELDS, NAMES)
    weighted = weighted or not small
    usual_gamma = small and gamma == 2.0 and not READERS["gamma"].isdisjoint(bundle)
    usual_power = small and power == 1.0 and not READERS["power"].isdisjoint(bundle)
    return Kind(bundle, activation, target, weighted, usual_gamma, usual_power)


def _lines(kind: Kind, *expressions: str, truth: bool = True) -> list[str]:
    """Return lines that assign all symbols that the expressions read, each after the symbols that it reads itself.
    truth: whether t is assigned, too; else it is a parameter of the function."""
    table = _SHARED | _BY_ACTIVATION[kind.activation]
    table |= (_USUAL_GAMMA if kind.usual_gamma else _ANY_GAMMA) | (_USUAL_POWER if kind.usual_power else _ANY_POWER)
    table |= ({} if kind.weighted else {"w": "ONE"}) | ({"t": _TRUTH[kind.target]} if truth else {})
    lines: dict[str, str] = {}

    def need(expression: str) -> None:
        """Add the lines for the symbols of an expression, depth first."""
        for name in _names_in(expression):
            if name in table and name not in lines:
                need(table[name])
                lines[name] = f"{name} = {table[name]}"

    for expression in expressions:
        need(expression)
    return list(lines.values())


def _names_in(text: str) -> list[str]:
    """Return the lower-case names in a text of Python, without attributes and called functions."""
    return re.findall(r"(?<![\w.])[a-z]\w*(?![\w(])", text)


def _compiled(name: str, parameters: str, text: Sequence[str], inline: bool = False, **names: Any) -> Any:
    """Return the compiled function `name(parameters)` whose body is `text`, lines of Python; names: what they call,
    beside `_NAMES`. The fields of job and block that they name (`_FIELDS`) are read into variables in front of them.
    inline: whether callers inline it: a function of one voxel."""
    used = set(_names_in("\n".join(text))) - set(re.findall(r"\w+", parameters))
    used -= {"label"} if _LABEL in text else set()  # a loop over own classes reads the label of each voxel
    fields = [f"{field} = {value}" for field, value in _FIELDS.items() if field in used]
    function_ = function(f"{name}({parameters})", "\n    ".join([*fields, *text]), {**_NAMES, **names})
    return (each if inline else jit)(function_)


def _checks(kind: Kind) -> list[str]:
    """Return expressions that are true where a target or a probability is out of range."""
    checks = ["(t < ZERO) | (t > ONE)"] if kind.target == "values" else []
    return checks + (["(p < row_low) | (p > row_high)"] if kind.activation == "none" else [])


CLASS = "at_x, at_e, at_m, at_y, at_u, c, job, block"
"""The first parameters of every loop over a class."""
_LABEL = "    label = read_label(at_t, i)"


def _own_classes(kind: Kind) -> list[str]:
    """Return the first lines of a loop over the voxels' own classes: they assign c, w, at_x and at_e of a voxel.
    A comment names the kind. A function's symbol is a digest of its text, so two kinds need two texts, even where only
    the functions that they call differ."""
    return [
        f"# {kind}",
        "for i in range(block.n):",
        _LABEL,
        "    if label > NO_CLASS:",
        "        c, w = np.uint64(label), read(at_w, i)",
        "        at_x, at_e = block.x + c * block.x_stride, block.e + c * block.row_stride",
    ]


def _by_class(kind: Kind, slopes: bool = False) -> list[tuple[int, Statistic]]:
    """Return (row, statistic) for all that a loop over a class has to add: rows of coefs with `slopes`, else of slots.
    For target "own" the loop takes t = 0, where most terms and slopes are 0 and left out (`Statistic.elsewhere`)."""
    rows = enumerate(kind.sloped if slopes else kind.summed)
    return [(row, s) for row, s in rows if kind.target != "own" or s.elsewhere[slopes]]


@cache
def class_sums(kind: Kind) -> Any:
    """Return the loop (CLASS, out) that adds to out, for one class, the sum over the block of w times each statistic's
    term, and returns bad. For target "own" it takes t = 0 at all voxels; `own_sums` adds the rest. Sums of RUN voxels
    stay in float32 registers, and are then added to float64."""
    chosen = _by_class(kind)
    checks = _checks(kind)
    inner = _lines(kind, *(s.term for _, s in chosen), *checks, "w")
    inner += [f"sum{row} += ({s.term}) * w" for row, s in chosen]
    inner += [f"bad += ONE if {check} else ZERO" for check in checks]
    outer = [f"sum{row} = ZERO" for row, _ in chosen]
    outer += ["for i in range(begin, min(begin + RUN, block.n)):", *(f"    {line}" for line in inner)]
    outer += [f"add(out, np.uint64({row}) * job.slot_stride + c, sum{row})" for row, _ in chosen]
    text = ["bad = ZERO", "for begin in range(np.uint64(0), block.n, RUN):", *(f"    {line}" for line in outer)]
    return _compiled("class_sums", f"{CLASS}, out", [*text, "return np.int64(bad)"])


@cache
def _at(kind: Kind, slopes: bool) -> Any:
    """Return a compiled function of one voxel i and one class that takes t, 0 or 1, as an argument:
    (at_x, at_e, at_m, at_u, i, t, job, block) -> the tuple of all terms. With `slopes` it has one more argument, the
    tuple (coef0, coef1...), and returns the sum of coefficients times slopes."""
    if slopes:
        names = [f"coef{row}" for row in range(len(kind.sloped))]
        result = " + ".join(f"{name} * ({s.slope})" for name, s in zip(names, kind.sloped, strict=True))
        unpack, expressions = [f"{', '.join(names)}, = of_class"], [s.slope for s in kind.sloped]
    else:
        unpack, expressions = [], [s.term for s in kind.summed]
        result = f"({', '.join(f'np.float32({term})' for term in expressions)},)"
    text = [*unpack, *_lines(kind, *expressions, truth=False), f"return {result}"]
    parameters = "at_x, at_e, at_m, at_u, i, t, job, block" + (", of_class" if slopes else "")
    return _compiled("at", parameters, text, inline=True)


@cache
def own_sums(kind: Kind) -> Any:
    """Return the loop (job, block, out) that adds for each voxel, in the column of its own class, w times the terms for
    t = 1 less those for t = 0, which `class_sums` took."""
    text = _own_classes(kind)
    for name, t in (("there", "ONE"), ("absent", "ZERO")):
        text += [f"        {name} = terms(at_x, at_e, block.m, block.zeros, i, {t}, job, block)"]
    text += [
        f"        add(out, np.uint64({row}) * job.slot_stride + c, (there[{row}] - absent[{row}]) * w)"
        for row in range(len(kind.summed))
    ]
    return _compiled("own_sums", "job, block, out", text, terms=_at(kind, slopes=False))


def _load(row: int) -> str:
    """Return the expression that loads the coefficient of class c in a row of coefs."""
    return f"read(coefs, np.uint64({row}) * job.coef_stride + c)"


@cache
def class_slope(kind: Kind, kept: bool) -> Any:
    """Return the loop (CLASS, coefs, at_h) that computes the slope of one class at each voxel: the sum of its coefs
    times the statistics' slopes. It adds the slope to block.dot and, if `kept`, writes it to at_h."""
    chosen = _by_class(kind, slopes=True)
    inner = _lines(kind, *(s.slope for _, s in chosen))
    inner += [f"step = {' + '.join(f'coef{row} * ({s.slope})' for row, s in chosen) or 'ZERO'}"]
    inner += ["write(at_dot, i, reread(at_dot, i) + step)"]
    inner += ["write(at_h, i, step)"] if kept else []
    text = [f"coef{row} = {_load(row)}" for row, _ in chosen]
    text += ["for i in range(block.n):", *(f"    {line}" for line in inner)]
    return _compiled("class_slope", f"{CLASS}, coefs, at_h", text)


@cache
def own_slope(kind: Kind) -> Any:
    """Return the loop (job, block, coefs) that adds to block.dot, for each voxel's own class, the slope for t = 1 less
    the slope for t = 0, which `class_slope` took. It also writes this difference, times the weight, to block.spare."""
    text = _own_classes(kind)
    text += [f"        of_class = ({', '.join(map(_load, range(len(kind.sloped))))},)"]
    voxel = "at_x, at_e, block.m, block.zeros, i"
    there, absent = (f"slope({voxel}, {t}, job, block, of_class)" for t in ("ONE", "ZERO"))
    text += [f"        step = {there} - {absent}", "        write(at_dot, i, reread(at_dot, i) + step)"]
    text += ["        write(block.spare, i, w * step)"]
    return _compiled("own_slope", "job, block, coefs", text, slope=_at(kind, True))


@cache
def class_gradient(kind: Kind) -> Any:
    """Return the loop (CLASS, coefs, at_h, at_g) that writes a class's gradient to at_g: w (slope - p dot) of a
    softmax, else w slope. Of a softmax, block.dot is complete: `class_slope` (the softmax, if `kind.fused`) and
    `own_slope` have added the slopes of all classes. If `kind.kept`, at_h holds the slope of the class."""
    chosen = _by_class(kind, slopes=True)
    step = " + ".join(f"coef{row} * ({s.slope})" for row, s in chosen) or "ZERO"
    step = "read(at_h, i)" if kind.kept else step
    step = f"({step}) - p * read(at_dot, i)" if kind.activation == "softmax" else step
    text = [] if kind.kept else [f"coef{row} = {_load(row)}" for row, _ in chosen]
    inner = [*_lines(kind, step, "w"), f"write(at_g, i, w * ({step}))"]
    text += ["for i in range(block.n):", *(f"    {line}" for line in inner)]
    return _compiled("class_gradient", f"{CLASS}, coefs, at_h, at_g", text)


@cache
def class_terms(kind: Kind) -> Any:
    """Return the loop (CLASS, out) that adds w times the term of one class, of the kind's one statistic, to the map's
    row `out`, and returns bad."""
    (statistic,) = kind.summed
    checks = _checks(kind)
    inner = _lines(kind, statistic.term, *checks, "w")
    inner += [f"write(out, i, reread(out, i) + ({statistic.term}) * w)"]
    inner += [f"bad += ONE if {check} else ZERO" for check in checks]
    text = ["bad = ZERO", "for i in range(block.n):", *(f"    {line}" for line in inner), "return np.int64(bad)"]
    return _compiled("class_terms", f"{CLASS}, out", text)


@cache
def own_terms(kind: Kind) -> Any:
    """Return the loop (job, block, out) that writes w times the term of each voxel's own class to a map of zeros."""
    term = "terms(at_x, at_e, block.m, block.zeros, i, ONE, job, block)[0]"  # of the one statistic
    text = [*_own_classes(kind), f"        write(out, i, {term} * w)"]
    return _compiled("own_terms", "job, block, out", text, terms=_at(kind, slopes=False))
