"""what a call needs -> loops over one class of a block of voxels that do it and nothing else (Numba).

`Kind` is settled when compiling: which statistics, which activation, what sort of target. A loop reads each value once,
works out the symbols of `softdice.terms`, and keeps its sums in registers or writes the gradient. A softmax needs each
voxel's maximum and sum of exponentials first, and before any gradient the sum of its slopes over the classes.

`Rows` holds what is known of the n voxels of a block. Arrays come with an offset, since a slice costs a reference
count: x, the logits; e, exp(x - m); y, the target of a class; u, its map; h, its slope; g, its gradient.
"""

# mypy: allow-untyped-defs
# (Numba infers the types of what it compiles.)

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from softdice.kernels.cpu.arithmetic import exp, log, log1p, minus
from softdice.kernels.cpu.compiled import LANES, each, jit, memory, place, read_apart, shared, write_apart
from softdice.kernels.cpu.rows import prefetch
from softdice.terms import MAPPED, STATISTICS, SYMBOLS, Statistic, function

RUN = np.uint64(32 * LANES)  # voxels whose sums stay in registers, in the arithmetic's type, before float64 takes them
MANY = 12  # of more classes a voxel's own class is done by itself: a comparison per class costs more


class Kind(NamedTuple):
    """What the compiler has to know of a call."""

    double: bool  # the arithmetic is in float64, else in float32
    fields: tuple[str, ...]
    activation: str
    target: str  # "labels", "own" (labels of MANY classes of a softmax) or "values" (of every class)
    masked: bool  # weights, or voxels that do not count: nothing that stands there may reach a sum
    union: bool  # regions in the place of classes
    gamma: float | None  # 2, or None for any other exponent
    power: float | None  # 1, or None
    backward: bool = False

    def sloped(self, elsewhere: bool) -> set[str]:
        """Statistics with a slope; or with one of a class that a voxel does not belong to."""
        chosen = (s for s in STATISTICS if s.name in self.fields)
        return {s.name for s in chosen if (s.elsewhere[1] if elsewhere else s.slope != "0")}

    @property
    def logs(self) -> bool:
        """Whether the logarithm of a softmax is read."""
        return any(s.names("a", "f", slope=self.backward) for s in STATISTICS if s.name in self.fields)

    @property
    def fused(self) -> bool:
        """Whether the other classes' slopes are a constant times p, so that their sum comes with the exponentials."""
        return self.backward and self.target == "own" and self.sloped(elsewhere=True) == {"prediction"}

    @property
    def kept(self) -> bool:
        """Whether slopes are kept: those of regions, and those of a softmax that are dear to compute twice."""
        dear = any(s.names("f", slope=True) for s in STATISTICS if s.name in self.fields)
        dear = dear or (self.power is None and "difference" in self.fields)
        return self.union or (self.activation == "softmax" and dear and self.target != "own")

    @property
    def mapped(self) -> bool:
        """Whether a map is read."""
        return any(name in MAPPED for name in self.fields)

    @property
    def labels(self) -> bool:
        return self.target != "values"


class Rows(NamedTuple):
    """What is known of each voxel of a block."""

    w: np.ndarray  # weight
    t: np.ndarray  # class number; -1: none
    m: np.ndarray  # maximum of the logits
    r: np.ndarray  # 1 / sum of the exponentials
    ls: np.ndarray  # ln of that sum
    dot: np.ndarray  # sum over the classes of the slopes


def _generated(kind: Kind, chosen: list[Statistic], R: Any) -> tuple[Any, Any, Any]:
    """Statistics -> sums of zero; sums + w terms; sums into memory."""
    symbols = ", ".join(SYMBOLS)
    plus = "".join(f"sums[{i}] + R({s.term}) * w, " for i, s in enumerate(chosen))
    put = "; ".join(f"out[{kind.fields.index(s.name)}, c] += sign * sums[{i}]" for i, s in enumerate(chosen))
    return (
        each(function("nothing()", f"return ({'R(0), ' * len(chosen)})", {"R": R})),
        each(function(f"plus(sums, w, {symbols})", f"return ({plus})", {"R": R})),
        each(function("put(out, c, sign, sums)", put or "pass", {})),
    )


def _weighted(kind: Kind, chosen: list[Statistic], R: Any) -> tuple[Any, Any]:
    """Statistics -> dL/dstatistics of a class; their sum weighted with those: the slope of the class."""
    take = "".join(f"R(coef[{kind.fields.index(s.name)}, c]), " for s in chosen)
    total = " + ".join(f"k[{i}] * R({s.slope})" for i, s in enumerate(chosen)) or "R(0)"
    return (
        each(function("take(coef, c)", f"return ({take})", {"R": R})),
        each(function(f"total(k, {', '.join(SYMBOLS)})", f"return {total}", {"R": R})),
    )


@cache
def _symbols(activation: str, GAMMA: float | None, POWER: float | None, R: Any) -> Any:
    """-> a function of one voxel and class: logit x, ex = exp(x - m), target t -> the symbols."""
    ZERO, ONE, SMALL = R(0), R(1), R(np.finfo(R).tiny)

    @each
    def power_of(base, exponent):
        """The small whole exponents of the papers without the rounding of a logarithm."""
        value = exp(exponent * log(SMALL if base < SMALL else base))
        value = base * base if exponent == R(2) else value
        return ONE if exponent == ZERO else (base if exponent == ONE else value)

    @each
    def exponents(p, q, y, gamma, power):
        apart = p - y
        far = abs(apart)
        sign = (ONE if apart > ZERO else ZERO) - (ONE if apart < ZERO else ZERO)
        if GAMMA is None:
            u, v = power_of(q, gamma), power_of(p, gamma)
        else:
            u, v = q * q, p * p
        if POWER is None:
            d = power_of(far, power)
            e = sign * power * (d / (SMALL if far < SMALL else far))
        else:
            d, e = far, sign
        return u, v, d, e

    @each
    def complement(p):
        return ZERO if p >= ONE else ONE - p

    @each
    def ratio(a, q):
        """a / q for a = -ln p and q = 1 - p; its series where q has few digits left."""
        return a / q if q > R(0.01) else ONE + q * (R(0.5) + q * (R(1 / 3) + q * R(0.25)))

    @each
    def of_softmax(x, ex, m, r, ls, t, given, s):
        p = ex * r
        q, y = complement(p), s.keep * t + s.share
        a = ZERO if y == ZERO else minus(ls, minus(x, m))
        u, v, d, e = exponents(p, q, y, s.gamma, s.power)
        return p, q, y, ONE - y, t, a, ZERO, u, v, d, e, p, ONE, ZERO, p * ratio(a, q), ZERO, s.gamma, given

    @each
    def of_sigmoid(x, ex, m, r, ls, t, given, s):
        z = exp(-abs(x))
        large = ONE / (ONE + z)
        small = z * large
        p, q = (large if x >= ZERO else small), (small if x >= ZERO else large)
        y = s.keep * t + s.share
        both = log1p(z)
        a = ZERO if y == ZERO else both + (-x if x < ZERO else ZERO)
        b = ZERO if y == ONE else both + (x if x > ZERO else ZERO)
        u, v, d, e = exponents(p, q, y, s.gamma, s.power)
        return p, q, y, ONE - y, t, a, b, u, v, d, e, p * q, q, p, p * a, q * b, s.gamma, given

    @each
    def of_probability(p, ex, m, r, ls, t, given, s):
        q, y = complement(p), s.keep * t + s.share
        a = ZERO if y == ZERO else -log(SMALL if p < SMALL else p)
        slope, f = (ZERO, ZERO) if p < SMALL else (ONE / p, ratio(a, q))
        u, v, d, e = exponents(p, q, y, s.gamma, s.power)
        return p, q, y, ONE - y, t, a, ZERO, u, v, d, e, ONE, slope, ZERO, f, ZERO, s.gamma, given

    return {"softmax": of_softmax, "sigmoid": of_sigmoid, "none": of_probability}[activation]


@cache
def _value(MASKED: bool, R: Any) -> Any:
    """-> a function that reads the logit of a voxel: 0 where the voxel does not count."""

    @each
    def value(x, place, w, v):
        found = read_apart(x, place)
        return found if not MASKED or read_apart(w, v) > R(0) else R(0)

    return value


@each
def _larger(a, b):
    return b if b > a else a


@cache
def _largest(size: int, MASKED: bool, R: Any) -> Any:
    """-> m = the largest of m and the logits of `size` classes."""
    lines = [f"x{i} = xo + np.uint64({i}) * ld" for i in range(size)]
    lines += ["for v in range(n):", "    most = m[v]"]
    lines += [f"    most = larger(most, value(x, x{i} + v, w, v))" for i in range(size)]
    names = {"np": np, "larger": _larger, "value": _value(MASKED, R)}
    return jit(function("largest(x, xo, ld, w, n, m)", "\n    ".join([*lines, "    m[v] = most"]), names))


@cache
def _exponentials(size: int, MASKED: bool, FUSED: bool, R: Any) -> Any:
    """-> e = exp(x - m) of `size` classes, added to r; where it is fused, times k added to dot."""
    lines = [f"x{i}, e{i} = xo + np.uint64({i}) * ld, eo + np.uint64({i}) * eld" for i in range(size)]
    lines += [f"prefetch(x, x{i} + n, n)" for i in range(size)]  # the next block's rows, for later
    lines += [f"k{i} = k[c + np.uint64({i})]" for i in range(size if FUSED else 0)]
    lines += ["for v in range(n):", "    most, total = read_apart(m, v), r[v]"]
    lines += ["    slope = dot[v]"] if FUSED else []
    for i in range(size):
        lines += [f"    z{i} = exp(minus(value(x, x{i} + v, w, v), most))", f"    write_apart(e, e{i} + v, z{i})"]
    lines += [f"    write_apart(r, v, total + {' + '.join(f'z{i}' for i in range(size))})"]
    if FUSED:
        lines += [f"    write_apart(dot, v, slope + {' + '.join(f'k{i} * z{i}' for i in range(size))})"]
    names = {"np": np, "exp": exp, "minus": minus, "value": _value(MASKED, R), "prefetch": prefetch}
    names |= {"read_apart": read_apart, "write_apart": write_apart}
    return jit(function("exponentials(x, xo, ld, n, w, m, r, dot, e, eo, eld, k, c)", "\n    ".join(lines), names))


@cache
def _softmax(MASKED: bool, LOGS: bool, FUSED: bool, R: Any) -> Any:
    """-> what `softmax_loops` calls: four classes at a time, since passes over m and r cost, too."""
    LOWEST = R(-np.inf)
    largest1, largest2, largest3, largest4 = (_largest(size, MASKED, R) for size in range(1, 5))
    exponentials1, exponentials2, exponentials3, exponentials4 = (
        _exponentials(size, MASKED, FUSED, R) for size in range(1, 5)
    )

    @shared(types.void(*[types.uint64] * 12), MASKED, LOGS, FUSED, R.__name__)
    def softmax(at_x, ld, C, n, at_w, at_m, at_r, at_ls, at_dot, at_e, eld, at_k):
        x, w, m, r = memory(at_x, R), memory(at_w, R), memory(at_m, R), memory(at_r, R)
        ls, dot, e, k = memory(at_ls, R), memory(at_dot, R), memory(at_e, R), memory(at_k, R)
        zero, one, two, three, four = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
        left = C % four
        first = C - left
        fx, fe = first * ld, first * eld
        for v in range(n):
            m[v] = LOWEST
            r[v] = R(0)
        for c in range(zero, first, four):
            largest4(x, c * ld, ld, w, n, m)
        if left == one:
            largest1(x, fx, ld, w, n, m)
        elif left == two:
            largest2(x, fx, ld, w, n, m)
        elif left == three:
            largest3(x, fx, ld, w, n, m)
        for c in range(zero, first, four):
            exponentials4(x, c * ld, ld, n, w, m, r, dot, e, c * eld, eld, k, c)
        if left == one:
            exponentials1(x, fx, ld, n, w, m, r, dot, e, fe, eld, k, first)
        elif left == two:
            exponentials2(x, fx, ld, n, w, m, r, dot, e, fe, eld, k, first)
        elif left == three:
            exponentials3(x, fx, ld, n, w, m, r, dot, e, fe, eld, k, first)
        if LOGS:
            for v in range(n):
                ls[v] = log(r[v])
        for v in range(n):
            r[v] = R(1) / r[v]
        if FUSED:
            for v in range(n):
                dot[v] *= r[v]

    return softmax


@cache
def softmax_loops(MASKED: bool, LOGS: bool, P: int | None, R: Any) -> Any:
    """-> the loops that a softmax needs before anything else.

    P: where the slope of every class but the own is dL/dstatistics number P times p, that number.
    """
    run, row = _softmax(MASKED, LOGS, P is not None, R), P or 0

    @jit
    def softmax(x, xo, ld, C, n, rows, e, eld, coef):
        """logits -> e, m, r and (where read) ls; where it is fused, dot over the other classes' slopes, too."""
        z = np.uint64(0)
        w, m, r, ls, dot = place(rows.w, z), place(rows.m, z), place(rows.r, z), place(rows.ls, z), place(rows.dot, z)
        run(place(x, xo), ld, C, n, w, m, r, ls, dot, place(e, z), eld, place(coef[row], z))

    return softmax


class Loops(NamedTuple):
    """The loops of one kind."""

    sums: Any
    softmax: Any
    slope: Any
    gradient: Any
    own_sums: Any  # what `sums` lacks at each voxel's own class, where target = "own"
    own_slope: Any
    terms: Any  # of each voxel, where a single statistic is wanted
    own_terms: Any


def loops(kind: Kind) -> Loops:
    """What a call needs -> its loops."""
    R = np.float64 if kind.double else np.float32
    ZERO, ONE = R(0), R(1)
    SOFTMAX, MASKED, LABELS = kind.activation == "softmax", kind.masked, kind.labels and not kind.union
    WITH_MAP = kind.mapped
    wanted = [statistic for statistic in STATISTICS if statistic.name in kind.fields]
    nothing, plus, put = _generated(kind, wanted, R)
    nothing0, plus0, put0 = _generated(kind, [s for s in wanted if s.elsewhere[0]], R)
    take, slope = _weighted(kind, [s for s in wanted if s.slope != "0"], R)
    take0, slope0 = _weighted(kind, [s for s in wanted if s.elsewhere[1]], R)
    symbols = _symbols(kind.activation, kind.gamma, kind.power, R)
    softmax = softmax_loops(MASKED, kind.logs, kind.fields.index("prediction") if kind.fused else None, R)
    STORED = kind.kept
    CHECKED, RANGE = kind.target == "values" and not kind.union, kind.activation == "none" and not kind.union
    P, T = SYMBOLS.index("p"), SYMBOLS.index("t")

    OWN = kind.target == "own"  # what a class has as if no voxel were of it; `own_sums` and `own_slope` add the rest
    class_nothing, class_plus, class_put = (nothing0, plus0, put0) if OWN else (nothing, plus, put)
    class_take, class_total = (take0, slope0) if OWN else (take, slope)

    @each
    def at(x, xo, e, eo, rows, true, u, uo, v, s):
        """Weight and symbols of one voxel and class."""
        weight, value = ONE, read_apart(x, xo + v)
        given = read_apart(u, uo + v) if WITH_MAP else ZERO
        if MASKED:
            weight = read_apart(rows.w, v)
            live = weight > ZERO
            value, true, given = value if live else ZERO, true if live else ZERO, given if live else ZERO
        if SOFTMAX:
            ex, most = read_apart(e, eo + v), read_apart(rows.m, v)
            return weight, symbols(value, ex, most, read_apart(rows.r, v), read_apart(rows.ls, v), true, given, s)
        return weight, symbols(value, ZERO, ZERO, ZERO, ZERO, true, given, s)

    @each
    def truth(rows, c, y, yo, v):
        if OWN:
            return ZERO
        return (ONE if read_apart(rows.t, v) == c else ZERO) if LABELS else read_apart(y, yo + v)

    @each
    def outside(k, s):
        """1 where the probability or the target is out of range."""
        wrong = CHECKED and ((k[T] < ZERO) | (k[T] > ONE))
        return ONE if wrong or (RANGE and ((k[P] < s.low) | (k[P] > s.high))) else ZERO

    @jit
    def class_sums(x, xo, e, eo, rows, c, y, yo, u, uo, n, s, out):
        """The sums of one class, added to out (fields, K); returns how many values are out of range."""
        bad = ZERO
        for begin in range(np.uint64(0), n, RUN):
            sums = class_nothing()
            for v in range(begin, min(begin + RUN, n)):
                weight, k = at(x, xo, e, eo, rows, truth(rows, np.int32(c), y, yo, v), u, uo, v, s)
                sums = class_plus(sums, weight, *k)
                bad += outside(k, s)
            class_put(out, c, 1.0, sums)
        return np.int64(bad)

    @jit
    def own_sums(x, xo, ld, e, eld, rows, n, s, out):
        """What `class_sums` of all classes lack."""
        for v in range(n):
            if rows.t[v] >= 0:
                c = np.uint64(rows.t[v])
                weight, k = at(x, xo + c * ld, e, c * eld, rows, ONE, x, xo, v, s)
                _, k0 = at(x, xo + c * ld, e, c * eld, rows, ZERO, x, xo, v, s)
                put(out, c, 1.0, plus(nothing(), weight, *k))
                put0(out, c, -1.0, plus0(nothing0(), weight, *k0))

    @jit
    def class_terms(x, xo, e, eo, rows, c, y, yo, n, s, out):
        """What each voxel adds to the sum of one class, added to out; returns how many values are out of range."""
        bad = ZERO
        for v in range(n):
            weight, k = at(x, xo, e, eo, rows, truth(rows, np.int32(c), y, yo, v), x, xo, v, s)
            write_apart(out, v, out[v] + plus(nothing(), weight, *k)[0])
            bad += outside(k, s)
        return np.int64(bad)

    @jit
    def own_terms(x, xo, ld, e, eld, rows, n, s, out):
        """What each voxel adds to the sum of its own class."""
        for v in range(n):
            if rows.t[v] >= 0:
                c = np.uint64(rows.t[v])
                weight, k = at(x, xo + c * ld, e, c * eld, rows, ONE, x, xo, v, s)
                out[v] = plus(nothing(), weight, *k)[0]

    @jit
    def class_slope(x, xo, e, eo, rows, c, y, yo, u, uo, n, s, coef, h, ho):
        """dot += slope; the slope itself into h where it would be dear to compute it again."""
        k, dot = class_take(coef, c), rows.dot
        for v in range(n):
            _, z = at(x, xo, e, eo, rows, truth(rows, np.int32(c), y, yo, v), u, uo, v, s)
            step = class_total(k, *z)
            write_apart(dot, v, dot[v] + step)
            if STORED:
                write_apart(h, ho + v, step)

    @jit
    def own_slope(x, xo, ld, e, eld, rows, n, s, coef, h):
        """What the own class's slope has beyond that of `class_slope`, times w: into h, and without w onto dot."""
        for v in range(n):
            if rows.t[v] >= 0:
                c = np.uint64(rows.t[v])
                weight, z = at(x, xo + c * ld, e, c * eld, rows, ONE, x, xo, v, s)
                _, z0 = at(x, xo + c * ld, e, c * eld, rows, ZERO, x, xo, v, s)
                step = slope(take(coef, c), *z) - slope0(take0(coef, c), *z0)
                rows.dot[v] += step
                h[v] = weight * step

    @jit
    def class_gradient(x, xo, e, eo, rows, c, y, yo, u, uo, n, s, coef, h, ho, g, go):
        """w (slope - p dot) of a softmax, w slope elsewhere."""
        k = class_take(coef, c)
        for v in range(n):
            weight, z = at(x, xo, e, eo, rows, truth(rows, np.int32(c), y, yo, v), u, uo, v, s)
            step = read_apart(h, ho + v) if STORED else class_total(k, *z)
            if SOFTMAX:
                step -= z[0] * read_apart(rows.dot, v)
            write_apart(g, go + v, weight * step)

    return Loops(class_sums, softmax, class_slope, class_gradient, own_sums, own_slope, class_terms, own_terms)
