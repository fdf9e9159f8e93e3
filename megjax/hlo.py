"""Reads the text of a compiled XLA module: collectives, and loops with their trip counts and the work of their bodies.

XLA's own cost analysis counts the body of a loop once. Here everything is counted from the text, by the rules of XLA's
HloCostAnalysis: two operations for each valid multiply-add of a product or convolution, one for each element of
anything else; the bytes of operands and result of each instruction outside fusions, slices and gathers at the size of
what they read. Unlike there, each operand of a fusion counts once, and what lies in a memory on the chip not at all. A
Pallas kernel counts with the operations that it states, and with its operands and result once: it may do and move more,
so that a roofline of these numbers stays a bound.
"""

import dataclasses
import functools
import math
import re

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
    + ("opt-barrier", "add-dependency", "async-update", "while", "conditional", "call", "domain")
)
_MOVES = _FREE | frozenset(
    ("copy", "copy-start", "broadcast", "reshape", "transpose", "slice", "dynamic-slice", "dynamic-update-slice")
    + ("concatenate", "pad", "gather", "reverse", "iota", "custom-call", "async-start", "send", "recv", "infeed")
    + ("outfeed", "bitcast-convert")
)
_RUNS = frozenset(("while", "call", "conditional", "async-start"))
_READS = frozenset(("slice", "dynamic-slice", "gather"))
"""Instructions that read of their first operand as much as they return."""
# XLA counts these apart from operations.
_TRANSCENDENTAL = frozenset(
    ("exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "power", "sqrt", "rsqrt")
    + ("cbrt", "sine", "cosine", "tan", "erf", "atan2")
)
_ITEM_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(
    r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]"
    r"(?:\{([0-9,]*)(?::(?:T\(([0-9,]*)\))?(?:[A-RT-Z#*]?\([^)]*\))*(?:S\(([0-9]+)\))?)?)?"
)
_STATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_KERNELS = {"flash_mha_bwd_dkv": 4, "flash_mha_bwd_dq": 3}
"""Matrix products in the two kernels of the gradient of JAX's flash attention: logits and dP in both, dV and dK, dQ."""
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `rest` is what follows its operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations, bytes of main memory and collectives (kind, bytes of the larger side, devices in a group).

    `unseen` are those operations, all of kernels, that XLA's own analysis leaves out.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: tuple[tuple[str, float, float, int], ...] = ()
    """(kind, bytes, devices in a group, how many)."""
    unseen: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.collectives + other.collectives,
            self.unseen + other.unseen,
        )

    def __mul__(self, times: int) -> "Work":
        repeated = tuple((kind, size, group, count * times) for kind, size, group, count in self.collectives if times)
        return Work(self.flops * times, self.bytes * times, repeated, self.unseen * times)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop: its trip count (None where the text does not tell) and the work of one pass, inner loops once."""

    name: str
    trip_count: int | None
    body: Work


class Module:
    """The computations of a compiled module."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.shapes: dict[str, str] = {}
        self.entry, current = None, []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match[2], [])
                self.entry = match[2] if match[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                operands, rest = _split_operands(match[5])
                named = tuple(_NAME.findall(operands))
                current.append(Instruction(match[2], match[3], match[4], named, operands, rest))
                self.shapes[match[2]] = match[3]
        self._known: dict[tuple[str | None, bool], Work] = {}

    def loops(self) -> list[Loop]:
        """Every loop of the module, inner ones too."""
        return [
            Loop(i.name, self.trip_count(i), self.work(_called(i)[0], repeat=False))
            for computation in self.computations.values()
            for i in computation
            if i.opcode == "while"
        ]

    def trip_count(self, loop: Instruction) -> int | None:
        """From XLA's own note, or from a condition that compares a counter with a constant."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(match[1])
        condition = self.computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], ())
        limits = [int(i.text) for i in condition if i.opcode == "constant" and i.text.isdigit()]
        compares = [i for i in condition if "direction=LT" in i.rest or i.opcode == "fusion"]
        return limits[0] if len(limits) == 1 and compares else None

    def work(self, name: str | None = None, *, repeat: bool) -> Work:
        """Work of a computation (default: the program), its loops run once, or with `repeat` as often as they do."""
        name = self.entry if name is None else name
        if (name, repeat) not in self._known:
            total = Work()
            for i in self.computations.get(name, ()):
                total = total + Work(self._flops(i), self._bytes(i), self._collectives(i), self._unseen(i))
                if i.opcode in _RUNS:
                    times = (self.trip_count(i) or 1) if repeat and i.opcode == "while" else 1
                    for called in self._run(i):
                        total = total + self.work(called, repeat=repeat) * times
            self._known[name, repeat] = total
        return self._known[name, repeat]

    def _run(self, i: Instruction) -> list[str]:
        """Computations that an instruction runs: of a conditional's branches the one that moves the fewest bytes."""
        called = _called(i)
        return (
            [min(called, key=lambda name: self.work(name, repeat=True).bytes)] if i.opcode == "conditional" else called
        )

    def _flops(self, i: Instruction) -> float:
        if i.opcode == "fusion":
            return 0.0 + sum(self._flops(inner) for name in _called(i) for inner in self.computations.get(name, ()))
        if i.opcode == "dot":
            dims = _dimensions(self.shapes[i.operands[0]])
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
            return 2.0 * _elements(i.shape) * math.prod(dims[int(n)] for n in contracted.split(",") if n)
        if i.opcode == "convolution":
            return _convolution_flops(i, *(_dimensions(self.shapes[name]) for name in i.operands[:2]))
        if i.opcode == "custom-call" and (stated := _STATED.search(i.rest)):
            return float(stated[1])
        if i.opcode in ("reduce", "all-reduce"):
            # Half of a reduction's operands are its initial values.
            reduced = i.operands[: max(1, len(i.operands) // 2)]
            return float(sum(_elements(self.shapes.get(name, "")) for name in reduced))
        if (
            i.opcode in _MOVES | _TRANSCENDENTAL
            or i.opcode.endswith("-done")
            or i.opcode.removesuffix("-start") in COLLECTIVES
        ):
            return 0.0
        return float(_elements(i.shape))

    def _unseen(self, i: Instruction) -> float:
        """Operations of a kernel of `_KERNELS`, whose first operands are [b h q d] and [b h k d], if it states none."""
        products = next((number for name, number in _KERNELS.items() if name in i.name), 0)
        if i.opcode != "custom-call" or not products or _STATED.search(i.rest):
            return 0.0
        query, key = (_dimensions(self.shapes[name]) for name in i.operands[:2])
        return 2.0 * products * math.prod(query) * key[-2]

    def _bytes(self, i: Instruction) -> float:
        if i.opcode in _FREE or i.opcode.endswith("-done") or i.opcode == "async-start":
            return 0.0
        if 'custom_call_target="ConcatBitcast"' in i.rest:  # XLA:TPU's name for neighbours in memory
            return 0.0
        inputs, result = [array_bytes(self.shapes.get(name, "")) for name in i.operands], array_bytes(i.shape)
        gathers = i.opcode.endswith("-start") and i.opcode.removesuffix("-start") in COLLECTIVES
        if i.opcode == "copy-start" or (gathers and i.opcode != "all-reduce-start"):
            return result  # which holds the operand too
        if i.opcode == "slice-start":  # the result is (operand, slice, context)
            given, sliced, *_ = _ARRAY.finditer(i.shape)
            return sum(_array_bytes(sliced, place=of[5]) for of in (given, sliced))
        if i.opcode in _READS:
            return result + sum(inputs[1:]) + self._slice_bytes(i.operands[0], i.shape)
        if i.opcode == "dynamic-update-slice":
            return inputs[1] + self._slice_bytes(i.name, self.shapes[i.operands[1]])
        if i.opcode == "fusion":
            return self._fusion_bytes(_called(i)[0], inputs, result)
        return result + sum(inputs)

    def _slice_bytes(self, name: str, shape: str) -> float:
        """Bytes of a slice of this shape of the array `name`, in the memory where that lies."""
        whole = _ARRAY.search(self.shapes.get(name, ""))
        return _array_bytes(_ARRAY.search(shape), place=whole and whole[5])

    def causes(self) -> dict[str, float]:
        """Bytes of the program, its loops repeated, by the JAX operation that an instruction belongs to, largest first.

        A fusion belongs to the operation that it ends in; copies, transpositions and reshapes, most of which XLA adds
        for another layout or memory, are `copy`, and gradients are apart from what they are the gradients of.
        """
        found: dict[str, float] = {}

        def add(name: str, times: int) -> None:
            for i in self.computations.get(name, ()):
                if size := self._bytes(i) * times:
                    found[_cause(i)] = found.get(_cause(i), 0.0) + size
                if i.opcode in _RUNS:
                    for called in self._run(i):
                        add(called, times * ((self.trip_count(i) or 1) if i.opcode == "while" else 1))

        add(self.entry, 1)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _fusion_bytes(self, name: str, inputs: list[float], result: float) -> float:
        """Operands and result of a fusion; where it only reads or writes a slice of one, the slice."""
        body = self.computations.get(name, [])
        for i in body:
            if i.opcode == "dynamic-update-slice":
                result -= max(array_bytes(i.shape) - array_bytes(self.shapes[i.operands[1]]), 0.0)
        read = sum(min(size, self._read_bytes(name, index, size)) for index, size in enumerate(inputs))
        return max(result, 0.0) + read

    def _read_bytes(self, name: str, index: int, size: float) -> float:
        """What a fused computation reads of its parameter `index` of `size` bytes."""
        body = self.computations.get(name, [])
        parameter = next((i.name for i in body if i.opcode == "parameter" and i.text == str(index)), None)
        total = 0.0
        for use in body:
            for position, operand in enumerate(use.operands):
                if operand != parameter:
                    continue
                if use.opcode in _READS and position == 0:
                    total += array_bytes(use.shape)
                elif use.opcode == "fusion":
                    total += self._read_bytes(_called(use)[0], position, size)
                elif use.opcode != "dynamic-update-slice" or position:
                    total += size
        return total

    def _collectives(self, i: Instruction) -> tuple[tuple[str, float, float, int], ...]:
        kind = i.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return ()
        given = sum(array_bytes(self.shapes.get(name, ""), tiled=False) for name in i.operands)
        result = array_bytes(i.shape, tiled=False)
        if i.opcode.endswith("-start") and kind != "all-reduce":  # the result is (inputs, outputs, contexts)
            result = max(result - given, 0.0)
        return ((kind, max(given, result), group_size(i.rest), 1),)


def _called(i: Instruction) -> list[str]:
    """Names of the computations that an instruction runs, a loop's condition left out."""
    names = _CALLED.findall(i.rest)
    if match := re.search(r"branch_computations=\{([^}]*)\}", i.rest):
        names += _NAME.findall(match[1])
    return names


def _split_operands(text: str) -> tuple[str, str]:
    """What is inside the first parenthesis, already open, and what follows."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:position], text[position + 1 :]
    return text, ""


def _dimensions(shape: str) -> list[int]:
    match = _ARRAY.search(shape)
    return _numbers(match[2]) if match else []


def _elements(shape: str) -> int:
    return math.prod(_dimensions(shape)) if _ARRAY.search(shape) else 0


def array_bytes(shape: str, *, tiled: bool = True) -> float:
    """Bytes of main memory of all arrays in the text of a shape, such as `(bf16[8,128]{1,0:T(8,128)(2,1)}, s32[])`.

    An array that lies in tiles, as on a TPU, takes whole ones, and none of main memory if it lies in another, as S(1)
    says. Without `tiled` its elements count, wherever it lies.
    """
    if not tiled:
        return sum(math.prod(_numbers(x[2])) * _item_bits(x[1]) / 8 for x in _ARRAY.finditer(shape))
    return sum(_array_bytes(x, place=x[5]) for x in _ARRAY.finditer(shape))


def _array_bytes(array: re.Match, place: str | None) -> float:
    """Bytes of an array in whole tiles; 0 for a `place` other than main memory."""
    kind, dims, order, tile = array.groups()[:4]
    padded = _tiled(*(_numbers(text or "") for text in (dims, order, tile)))
    return 0.0 if place and int(place) else math.prod(padded) * _item_bits(kind) / 8


def _cause(i: Instruction) -> str:
    """The JAX operation of an instruction, by the name that XLA keeps of it."""
    name = re.search(r'op_name="([^"]*)"', i.rest)
    last = re.sub(r"\.\d+$", "", name[1].split("/")[-1]) if name else i.opcode
    if i.opcode.removesuffix("-start") in ("copy", "reshape", "transpose"):
        return "copy"
    return f"gradient of {last}" if name and "transpose(" in name[1] else last


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _tiled(dims: list[int], order: list[int], tile: list[int]) -> list[int]:
    """The sizes of an array with whole tiles; `order` has its axes from the innermost on, `tile` ends with that one."""
    padded = list(dims)
    for axis, side in zip(order, reversed(tile), strict=False):  # tiles may have fewer axes
        padded[axis] = -(-dims[axis] // side) * side
    return padded


def _item_bits(kind: str) -> int:
    """Bits of one element: the number in its name, as in f32, s4 and f8e4m3fn."""
    digits = re.match(r"[a-z]+(\d+)", kind)
    return _ITEM_BITS.get(kind, int(digits[1]) if digits else 0)


def group_size(text: str) -> float:
    """Devices in one group of a collective, from its attributes; infinite where they do not tell."""
    if match := re.search(r"replica_groups=\{\{([0-9,]*)\}", text):
        return float(len(match[1].split(",")))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return float(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        return float(math.prod(sizes[name] for name in re.findall(r"'([^']*)'", match[2])))
    return math.inf


def _convolution_flops(i: Instruction, lhs: list[int], rhs: list[int]) -> float:
    """Two operations for each pair of input and kernel values that meet: padding and dilation meet nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    left, kernel, out = labels.groups()
    window, output = _window(i.rest), _dimensions(i.shape)
    total = 2.0 * output[out.index("b")] * output[out.index("f")] * rhs[kernel.index("i")]
    for axis in (label for label in out if label.isdigit()):
        size, n, m = lhs[left.index(axis)], rhs[kernel.index(axis)], output[out.index(axis)]
        stride, low, left_dilation, dilation = (window[key][int(axis)] for key in ("stride", "pad", "lhs", "rhs"))
        total *= _valid(size, n, m, stride, low, left_dilation, dilation)
    return total


def _window(text: str) -> dict[str, list[int]]:
    """Stride, low padding and dilations of each spatial axis, from the attribute `window={...}`."""
    match = re.search(r"window=\{([^}]*)\}", text)
    given = dict(part.split("=") for part in match[1].split()) if match else {}
    axes = len(given["size"].split("x")) if "size" in given else 0
    numbers = {
        name: [int(n) for n in given[key].split("x")] if key in given else [1] * axes
        for name, key in (("stride", "stride"), ("lhs", "lhs_dilate"), ("rhs", "rhs_dilate"))
    }
    pads = [int(pad.split("_")[0]) for pad in given["pad"].split("x")] if "pad" in given else [0] * axes
    return {**numbers, "pad": pads}


@functools.cache
def _valid(size: int, kernel: int, out: int, stride: int, low: int, left_dilation: int, dilation: int) -> int:
    """Pairs of output and kernel positions of one axis that fall on an input value."""
    count = 0
    for k in range(kernel):
        first = k * dilation - low
        positions = range(first, first + stride * out, stride) if stride else ()
        count += sum(0 <= p < size * left_dilation and p % left_dilation == 0 for p in positions)
    return count
