"""Quantised checkpoints of Hugging Face: which scheme a `quantization_config` means, and what its tensors are.

A scheme is a line of METHODS. Formats: https://github.com/vllm-project/compressed-tensors,
https://huggingface.co/docs/transformers/quantization/overview; AWQ and GPTQ: https://github.com/ModelCloud/GPTQModel.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.foreign import PathSource, damaged, read_json
from mpillama.formats.scaled_tensor import ScaledTensor
from mpillama.formats.stored_arrays import Integers, Scales, StoredArray, read_whole
from mpillama.models.router import MOST_EXPERTS
from mpillama.quant.coded import E2M1, E4M3
from mpillama.quant.types.fp8 import FP8
from mpillama.quant.types.int4 import INT4
from mpillama.quant.types.int4_bf16 import INT4_BF16
from mpillama.quant.types.int4_f16 import INT4_F16
from mpillama.quant.types.int8 import INT8
from mpillama.quant.types.mxfp4 import MXFP4
from mpillama.quant.types.nvfp4 import NVFP4
from mpillama.quant.types.q4_0 import Q4_0
from mpillama.quant.weight_type import WeightType

KEYS = ("quantization_config", "compression_config", "quantization")
BESIDE = "hf_quant_config.json"
"""Where older checkpoints of modelopt say how they are quantised."""
OF_ACTIVATIONS = (
    "input_scale", "input_global_scale", "input_zero_point", "k_scale", "v_scale", "q_scale", "output_scale",
    "activation_scale", "gate_up_proj_activation_scale", "down_proj_activation_scale", "gate_up_proj_input_scale",
    "down_proj_input_scale",
)  # fmt: skip
"""What engines need that quantise activations or the KV cache in the same way; the weights are what they are."""
BESIDE_CODES = (
    ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".qzeros", ".g_idx", ".scale", "_scales",
    "_proj_weight_scale",
)  # fmt: skip
"""What stands beside codes, in types that weights never have alone."""
LOW_FIRST = {4: tuple(range(8)), 8: tuple(range(4))}
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
TWO_IN_A_BYTE = (0, 1)
MOST_INDEX_BYTES = 1 << 24
"""Of numbers that are read to know what a tensor is."""


def quantization_of(path: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a folder's configuration says of the quantisation, None for weights that are not; UserError for others."""
    places = (config, _part(config, "text_config"))
    found = next((place[key] for place in places for key in KEYS if place.get(key)), None)
    if found is None and (Path(path) / BESIDE).exists():
        found = {"quant_method": "modelopt", **_part(read_json(Path(path) / BESIDE), "quantization")}
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(method, str) or method not in METHODS:
        name = repr(method) if method else "'mlx'" if "quantization" in config else "an unnamed method"
        raise UserError(
            f"{path}: the weights are quantised with {name}: give the model's original weights (F32, F16 or BF16), a "
            f"GGUF file of it, or one quantised with {', '.join(METHODS)}."
        )
    return found


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def assemble(
    files: Sequence[str], config: Mapping[str, Any], arrays: Sequence[StoredArray]
) -> Iterator[StoredArray | ScaledTensor]:
    """The tensors that some arrays make, and those that are whole by themselves; UserError for what does not fit."""
    schemes = METHODS[config["quant_method"]]
    table = {array.name: array for array in arrays}
    made: list[ScaledTensor] = []
    used: set[str] = set()
    for array in arrays:
        for scheme in schemes:
            if array.name.endswith(scheme.codes) and array.dtype in scheme.dtypes:
                module = Module(files, config, array.name.removesuffix(scheme.codes), table, {array.name})
                if not scheme.beside or module.find(*scheme.beside) is not None or len(schemes) == 1:
                    made.extend(scheme.make(module))
                    used |= module.used
                    break
    yield from made
    for array in arrays:
        if array.name in used or array.name.rpartition(".")[2] in OF_ACTIVATIONS:
            continue
        _refuse_alone(files, array, schemes, table)
        yield array


def _refuse_alone(
    files: Sequence[str], array: StoredArray, schemes: Sequence["Scheme"], table: Mapping[str, StoredArray]
) -> None:
    """UserError for scales and such of which the codes are missing."""
    ending = next((each for each in BESIDE_CODES if array.name.endswith(each)), "")
    module = array.name.removesuffix(ending)
    codes = {module + scheme.codes for scheme in schemes} | {module + ".weight"}
    if ending and array.dtype not in FLOATS and not codes & table.keys():
        raise UserError(
            f"{files[array.file]}: tensor {array.name} is there without the weights that it belongs to: the checkpoint "
            "is incomplete or quantization_config belongs to another model."
        )


@dataclass(frozen=True)
class Module:
    """The arrays of a file that belong to one matrix (or to stacked experts'): those whose names begin with `name`."""

    files: Sequence[str]
    config: Mapping[str, Any]
    name: str
    table: Mapping[str, StoredArray]
    used: set[str]

    def find(self, *endings: str) -> StoredArray | None:
        """The first of these that there is."""
        found = next((self.table[self.name + e] for e in endings if self.name + e in self.table), None)
        if found is not None:
            self.used.add(found.name)
        return found

    def need(self, *endings: str) -> StoredArray:
        """As find; UserError if there is none."""
        found = self.find(*endings)
        if found is None:
            codes = next(iter(self.used))
            raise UserError(
                f"{self.files[self.table[codes].file]}: tensor {self.name}{endings[0]} is missing, by which {codes} is "
                "scaled: the checkpoint is incomplete, download it again."
            )
        return found

    def expect(self, array: StoredArray, *shapes: tuple[int, ...], dtypes: Sequence[str] = ()) -> StoredArray:
        """UserError if an array has none of these shapes and types."""
        if array.shape not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            raise UserError(
                f"{self.files[array.file]}: tensor {array.name} has shape {list(array.shape)}, but quantization_config "
                f"and the tensors beside it ask for {allowed}: the checkpoint is damaged or of another kind."
            )
        if dtypes and array.dtype not in dtypes:
            raise UserError(
                f"{self.files[array.file]}: tensor {array.name} is stored as {array.dtype}, expected "
                f"{' or '.join(dtypes)}: the checkpoint is damaged or of another kind."
            )
        return array

    def numbers(self, array: StoredArray) -> np.ndarray:
        """The contents of a small array."""
        if array.bytes > MOST_INDEX_BYTES:
            raise damaged(self.files[array.file], f"tensor {array.name!r} has {array.bytes} bytes")
        return read_whole(PathSource(self.files), array)

    def refuse(self, what: str) -> UserError:
        """The refusal of a variant."""
        return UserError(
            f"{self.files[0]}: {self.name} is quantised with {what}, which mpillama does not read: give the model's "
            "original weights (F32, F16 or BF16), or a GGUF file of it."
        )

    def matrix(self, codes: Integers, **rest: Any) -> ScaledTensor:
        """The tensor of these codes, called as the type that holds its numbers."""
        name, array = self.name + ".weight", codes.array
        stored = IN_ANOTHER_ORDER.get(self.config["quant_method"], "")
        made = ScaledTensor(name, codes.shape, stored, array.file, array.offset, codes=codes, **rest)
        return replace(made, stored=made.held_as().name) if made.ordered else made


IN_ANOTHER_ORDER = {"gptq": "gptq with desc_act", "compressed-tensors": "compressed-tensors with actorder"}
"""What matrices are called that have an order of columns of their own."""
UNSET = 0xFFFFFFFF
"""-1 in an array of groups."""
FLOATS = ("F32", "BF16", "F16")


# -- floats of 8 bits -------------------------------------------------------------------------------------------------


def _float8(module: Module) -> Iterator[ScaledTensor]:
    """A scale for a tensor, for each row, or for each block of rows and columns."""
    codes = module.need(".weight")
    shape = _two(module, codes)
    scale = module.need(".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
    scales = _scales_of(module, scale, shape)
    yield module.matrix(Integers(codes, shape), scales=scales, kept=FP8, within=_within(scales), table=E4M3)


def _int8(module: Module) -> Iterator[ScaledTensor]:
    """Integers of 8 bits, each by itself."""
    codes = module.need(".weight")
    shape = _two(module, codes)
    scales, found = _scales_of(module, module.need(".weight_scale"), shape), module.find(".weight_zero_point")
    zeros = None
    if found is not None:
        module.expect(found, scales.array.shape, dtypes=("I8",))
        zeros = Integers(found, scales.count)
    yield module.matrix(Integers(codes, shape), scales=scales, kept=INT8, within=_within(scales), zeros=zeros)


def _two(module: Module, array: StoredArray, per: int = 1) -> tuple[int, int]:
    """The shape of a matrix whose array has `per` of its columns in each of its own."""
    if len(array.shape) != 2:
        raise module.refuse(f"tensor {array.name} of shape {list(array.shape)}")
    return array.shape[0], array.shape[1] * per


def _scales_of(module: Module, array: StoredArray, shape: tuple[int, int]) -> Scales:
    rows, columns = shape
    height, width = _block(module)
    blocks = -(-rows // height), -(-columns // width)
    shapes: dict[tuple[int, ...], tuple[int, int]] = {
        (): (rows, columns), (1,): (rows, columns), (1, 1): (rows, columns), (rows,): (1, columns),
        (rows, 1): (1, columns), blocks: (height, width), (blocks[0], 1, blocks[1], 1): (height, width),
    }  # fmt: skip
    module.expect(array, *shapes, dtypes=(*FLOATS, "F8_E8M0"))
    return Scales(array, shape, shapes[array.shape])


def _within(scales: Scales) -> int:
    """The columns that share a scale, 0 if all of a row do."""
    return 0 if scales.block[1] >= scales.shape[1] else scales.block[1]


def _block(module: Module) -> tuple[int, int]:
    """Rows and columns of a block that has a scale."""
    found = module.config.get("weight_block_size")
    for group in _weights_of_groups(module.config):
        found = found or group.get("block_structure")
    try:
        height, width = found or (128, 128)
        return max(1, int(height)), max(1, int(width))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{module.files[0]}: quantization_config has weight_block_size={found!r} for the scales of {module.name}, "
            "expected [rows, columns]."
        ) from error


def _weights_of_groups(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What each of compressed-tensors' config_groups says of weights."""
    for group in _part(config, "config_groups").values():
        if isinstance(group, Mapping):
            yield _part(group, "weights")


# -- packed integers --------------------------------------------------------------------------------------------------


def _pack_quantized(module: Module) -> Iterator[ScaledTensor]:
    """compressed-tensors: low bits first along the columns, zero points along the rows."""
    packed, scale = module.need(".weight_packed"), module.need(".weight_scale")
    stored_zeros, index = module.find(".weight_zero_point"), module.find(".weight_g_idx")
    bits, columns, group = _packed_group(module, packed, scale, module.find(".weight_shape"))
    shape = packed.shape[0], columns
    if index is not None and _is_plain(module, module.expect(index, (columns,), dtypes=("I32",)), group or columns):
        index = None
    codes = Integers(packed, shape, LOW_FIRST[bits])
    scales = Scales(scale, shape, (1, group or columns))
    zeros, offset = None, 0
    if stored_zeros is not None and stored_zeros.dtype == "I8":
        zeros, offset = Integers(module.expect(stored_zeros, scales.count), scales.count), 1 << bits - 1
    elif stored_zeros is not None:
        zeros = Integers(stored_zeros, scales.count, LOW_FIRST[bits], "rows")
        module.expect(stored_zeros, zeros.expected_shape(), dtypes=("I32",))
    kept = _kept_integers(bits, scale.dtype, group, zeros is None)
    yield module.matrix(
        codes, scales=scales, kept=kept, within=group, zero=1 << bits - 1, zeros=zeros,
        zero_offset=offset, middle=_middle(bits), group_index=index, ordered=index is None,
    )  # fmt: skip


def _packed_group(
    module: Module, packed: StoredArray, scale: StoredArray, stored_shape: StoredArray | None
) -> tuple[int, int, int]:
    """Bits, columns and group (0: all columns): the first in the configuration whose shapes are those found."""
    module.expect(packed, packed.shape if len(packed.shape) == 2 else (0, 0), dtypes=("I32",))
    rows, words = packed.shape
    known = module.numbers(stored_shape).reshape(-1) if stored_shape is not None and _ambiguous(module.config) else None
    expected = []
    for weights in _weights_of_groups(module.config):
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if not isinstance(bits, int) or bits not in LOW_FIRST:
            raise module.refuse(f"{bits!r} bits")
        columns = words * len(LOW_FIRST[bits])
        if known is not None and -(-int(known[-1]) // len(LOW_FIRST[bits])) != words:
            continue
        group = int(size) if isinstance(size, int) and 0 < size < columns else 0
        expected.append((rows, -(-columns // group) if group else 1))
        if scale.shape == expected[-1] or (not group and scale.shape == (rows,)):
            module.expect(scale, scale.shape, dtypes=FLOATS)
            return bits, columns, group
    if expected:
        module.expect(scale, *dict.fromkeys(expected), dtypes=FLOATS)
    raise module.refuse("config_groups that do not say how")


def _ambiguous(config: Mapping[str, Any]) -> bool:
    """Whether there are packed integers of several widths."""
    return len({str(weights.get("num_bits")) for weights in _weights_of_groups(config)}) > 1


def _middle(bits: int) -> int:
    """What is taken off from unsigned integers to be held: they become int8."""
    return 128 if bits == 8 else 0


def _kept_integers(bits: int, dtype: str, group: int, symmetric: bool) -> WeightType:
    """The type that has such integers and scales of such a type."""
    if bits == 8 or dtype == "F32":
        return INT8
    if symmetric and dtype == "BF16":
        return INT4
    if symmetric and group == 32:
        return Q4_0
    return INT4_F16 if dtype == "F16" else INT4_BF16


def _awq(module: Module) -> Iterator[ScaledTensor]:
    """Columns are the array's lines, eight rows lie in a word, in an order of its own; so are zero points."""
    version = str(module.config.get("version", "gemm")).lower()
    if version != "gemm" or module.config.get("bits", module.config.get("w_bit", 4)) != 4:
        raise module.refuse(f"AWQ's version {version} in {module.config.get('bits')} bits")
    packed = module.need(".qweight")
    columns, rows = _two(module, packed, 8)
    zeros_at, scale = module.need(".qzeros"), module.need(".scales")
    group = _group_size(module, columns)
    scales = Scales(scale, (rows, columns), (1, group or columns), transposed=True)
    codes = Integers(packed, (rows, columns), AWQ_ORDER, "rows", transposed=True)
    zeros = Integers(zeros_at, scales.count, AWQ_ORDER, "rows", transposed=True)
    _expect_transposed(module, codes, zeros, scales)
    kept = _kept_integers(4, scale.dtype, group, symmetric=False)
    yield module.matrix(codes, scales=scales, kept=kept, within=group, zeros=zeros)


def _gptq(module: Module) -> Iterator[ScaledTensor]:
    """Lines of the array are eight (or four) columns in a word; of zero points there are eight rows in one, less 1."""
    packed = module.need(".qweight")
    index, zeros_at, scale = module.find(".g_idx"), module.need(".qzeros"), module.need(".scales")
    words, rows = _two(module, packed)
    bits = module.config.get("bits")
    if index is not None and len(index.shape) == 1 and index.shape[0]:
        bits = 32 * words // index.shape[0]
    if not isinstance(bits, int) or bits not in LOW_FIRST:
        raise module.refuse(f"GPTQ in {bits!r} bits")
    columns = words * len(LOW_FIRST[bits])
    if index is not None:
        module.expect(index, (columns,), dtypes=("I32",))
    group = _group_size(module, columns)
    scales = Scales(scale, (rows, columns), (1, group or columns), transposed=True)
    codes = Integers(packed, (rows, columns), LOW_FIRST[bits], transposed=True)
    zeros = Integers(zeros_at, scales.count, LOW_FIRST[bits], "rows", transposed=True)
    _expect_transposed(module, codes, zeros, scales)
    offset = 0 if module.config.get("checkpoint_format") == "gptq_v2" else 1
    kept = _kept_integers(bits, scale.dtype, group, symmetric=False)
    ordered = index is None or not module.config.get("desc_act") or _is_plain(module, index, group or columns)
    yield module.matrix(
        codes, scales=scales, kept=kept, within=group, zeros=zeros, zero_offset=offset,
        middle=_middle(bits), group_index=index, ordered=ordered,
    )  # fmt: skip


def _is_plain(module: Module, index: StoredArray, group: int) -> bool:
    """Whether groups are runs of columns after all; compressed-tensors says so with -1, too."""
    numbers = module.numbers(index)
    return bool((numbers == UNSET).any()) or np.array_equal(numbers, np.arange(index.shape[0]) // group)


def _group_size(module: Module, columns: int) -> int:
    """What the configuration says, 0 for all columns; UserError if it is no number of columns."""
    found = module.config.get("group_size", module.config.get("q_group_size"))
    if found in (-1, None):
        return 0
    if not isinstance(found, int) or found < 1 or columns % found:
        raise UserError(
            f"{module.files[0]}: quantization_config has group_size={found!r}, which does not divide the {columns} "
            f"columns of {module.name}: the configuration belongs to another model."
        )
    return 0 if found == columns else found


def _expect_transposed(module: Module, codes: Integers, zeros: Integers, scales: Scales) -> None:
    module.expect(codes.array, codes.expected_shape(), dtypes=("I32",))
    module.expect(scales.array, scales.count[::-1], dtypes=FLOATS)
    module.expect(zeros.array, zeros.expected_shape(), dtypes=("I32",))


# -- floats of 4 bits -------------------------------------------------------------------------------------------------


def _mxfp4(module: Module) -> Iterator[ScaledTensor]:
    """Two in a byte, the first in its lower half; a power of two for every 32."""
    packed = module.need(".weight_packed", ".weight")
    shape = _two(module, packed, 2)
    scale = module.expect(
        module.need(".weight_scale", ".scale"), (shape[0], -(-shape[1] // 32)), dtypes=("U8", "F8_E8M0")
    )
    codes, scales = Integers(packed, shape, TWO_IN_A_BYTE), Scales(scale, shape, (1, 32))
    yield module.matrix(codes, scales=scales, kept=MXFP4, within=32, table=E2M1)


def _nvfp4(module: Module) -> Iterator[ScaledTensor]:
    """Two in a byte; a float of 8 bits for every 16, and one of 32 for all: a factor, or by another name a divisor."""
    packed = module.need(".weight_packed", ".weight")
    shape = _two(module, packed, 2)
    scale = module.expect(module.need(".weight_scale"), (shape[0], -(-shape[1] // 16)), dtypes=("F8_E4M3",))
    whole = module.expect(module.need(".weight_scale_2", ".weight_global_scale"), (), (1,), (1, 1), dtypes=("F32",))
    codes, scales = Integers(packed, shape, TWO_IN_A_BYTE), Scales(scale, shape, (1, 16))
    yield module.matrix(
        codes, scales=scales, kept=NVFP4, within=16, table=E2M1, whole=whole,
        reciprocal=whole.name.endswith("weight_global_scale"),
    )  # fmt: skip


HALVES_OF = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _mxfp4_experts(module: Module) -> Iterator[ScaledTensor]:
    """Stacked experts [experts, rows, groups, 16]; rows of gate and up alternate."""
    packed, scale = module.need("_blocks"), module.need("_scales")
    prefix, _, kind = module.name.rpartition(".")
    if len(packed.shape) != 4 or packed.shape[3] != 16 or packed.shape[0] > MOST_EXPERTS or kind not in HALVES_OF:
        raise module.refuse(f"tensor {packed.name} of shape {list(packed.shape)}")
    module.expect(scale, packed.shape[:3], dtypes=("U8",))
    experts, all_rows, groups, _ = packed.shape
    halves = HALVES_OF[kind]
    if all_rows % len(halves):
        raise module.refuse(f"tensor {packed.name} of {all_rows} rows")
    shape = all_rows // len(halves), 32 * groups
    for expert in range(experts):
        at, at_scale = packed.offset + expert * all_rows * groups * 16, scale.offset + expert * all_rows * groups
        for first, half in enumerate(halves):
            codes = Integers(
                StoredArray(packed.name, "U8", (all_rows, 16 * groups), packed.file, at), shape, TWO_IN_A_BYTE,
                first=first, step=len(halves),
            )  # fmt: skip
            scales = Scales(
                StoredArray(scale.name, "U8", (all_rows, groups), scale.file, at_scale), shape, (1, 32),
                first=first, step=len(halves),
            )  # fmt: skip
            yield ScaledTensor(
                f"{prefix}.{expert}.{half}.weight", shape, "mxfp4", packed.file, at, codes=codes, scales=scales,
                kept=MXFP4, within=32, table=E2M1,
            )  # fmt: skip


# -- stacked experts with scales --------------------------------------------------------------------------------------


def _float8_experts(module: Module) -> Iterator[ScaledTensor]:
    """[experts, rows, columns] as transformers keeps them, gate above up; by modelopt's names turned, as Llama 4's."""
    stacked, turned = module.need("_proj"), module.find("_proj_weight_scale")
    scale = turned or module.need("_proj_scale_inv", "_proj_scale")
    if turned is not None:
        module.expect(turned, (), (1,), stacked.shape[:1], (*stacked.shape[:1], 1, 1))
    for expert, (name, first, shape) in _experts(module, stacked, turned is not None):
        codes = Integers(_of_expert(stacked, expert), shape, transposed=turned is not None, first=first)
        scales = _scales_of_expert(module, stacked.shape, scale, expert, (first, shape))
        yield ScaledTensor(
            name, shape, "fp8", stacked.file, codes.array.offset, codes=codes, scales=scales, kept=FP8,
            within=_within(scales), table=E4M3,
        )  # fmt: skip


def _nvfp4_experts(module: Module) -> Iterator[ScaledTensor]:
    """Llama 4 of modelopt: [experts, columns / 2, rows], two columns in a byte; scales [experts, columns / 16, rows]"""
    stacked, scale = module.need("_proj"), module.need("_proj_weight_scale")
    whole = module.expect(module.need("_proj_weight_scale_2"), (), (1,), dtypes=("F32",))
    for expert, (name, first, shape) in _experts(module, stacked, True, 2):
        experts, _, rows = stacked.shape
        module.expect(scale, (experts, -(-shape[1] // 16), rows), dtypes=("F8_E4M3",))
        codes = Integers(_of_expert(stacked, expert), shape, TWO_IN_A_BYTE, transposed=True, first=first)
        scales = Scales(_of_expert(scale, expert), shape, (1, 16), transposed=True, first=first)
        yield ScaledTensor(
            name, shape, "nvfp4", stacked.file, codes.array.offset, codes=codes, scales=scales, kept=NVFP4, within=16,
            table=E2M1, whole=whole,
        )  # fmt: skip


def _experts(
    module: Module, stacked: StoredArray, turned: bool, per: int = 1
) -> Iterator[tuple[int, tuple[str, int, tuple[int, int]]]]:
    """Each expert's number with its matrices: name, first row and shape. `per` columns lie in an element."""
    prefix, _, kind = (module.name + "_proj").rpartition(".")
    if len(stacked.shape) != 3 or stacked.shape[0] > MOST_EXPERTS or kind not in HALVES_OF:
        raise module.refuse(f"tensor {stacked.name} of shape {list(stacked.shape)}")
    experts, all_rows, columns = (stacked.shape[i] for i in ((0, 2, 1) if turned else (0, 1, 2)))
    halves = HALVES_OF[kind]
    if all_rows % len(halves):
        raise module.refuse(f"tensor {stacked.name} of {all_rows} rows")
    rows = all_rows // len(halves)
    for expert in range(experts):
        for number, half in enumerate(halves):
            yield expert, (f"{prefix}.{expert}.{half}.weight", number * rows, (rows, columns * per))


def _of_expert(stacked: StoredArray, expert: int) -> StoredArray:
    """The array of one of them."""
    size = stacked.bytes // stacked.shape[0]
    return replace(stacked, shape=stacked.shape[1:], offset=stacked.offset + expert * size)


def _scales_of_expert(
    module: Module, stacked: tuple[int, ...], scale: StoredArray, expert: int, part: tuple[int, tuple[int, int]]
) -> Scales:
    """One for all experts, one for each, one for gate and one for up, or one for each block."""
    first, shape = part
    count, halves, (height, width) = stacked[0], stacked[1] // shape[0], _block(module)
    blocks = (count, -(-stacked[1] // height), -(-stacked[2] // width))
    single = dict.fromkeys(((), (1,), (count,), (count, 1, 1), (count, halves, 1)))
    module.expect(scale, *single, blocks, dtypes=(*FLOATS, "F8_E8M0"))
    if scale.shape in single:
        numbers = prod(scale.shape)
        each = numbers // count
        place = expert * each + (first // shape[0] if each > 1 else 0)
        offset = scale.offset + place * (scale.bytes // numbers)
        return Scales(replace(scale, shape=(1, 1), offset=offset), shape, shape)
    if first % height:
        raise module.refuse(f"scales for blocks of {height} rows, of which gate and up share some")
    return Scales(_of_expert(scale, expert), shape, (height, width), first=first // height)


# -- which methods there are ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """How one kind of matrix is stored: ending and types of its codes, what tells it from others, what it becomes."""

    codes: str
    dtypes: tuple[str, ...]
    make: Callable[[Module], Iterator[ScaledTensor]]
    beside: tuple[str, ...] = ()


FLOAT8 = (Scheme(".weight", ("F8_E4M3",), _float8), Scheme("_proj", ("F8_E4M3",), _float8_experts))
MODELOPT_NVFP4 = (Scheme(".weight", ("U8",), _nvfp4), Scheme("_proj", ("U8",), _nvfp4_experts))
METHODS: Mapping[str, tuple[Scheme, ...]] = {
    "fp8": (*FLOAT8, Scheme(".weight", ("I8", "U8"), _mxfp4)),
    "fbgemm_fp8": FLOAT8,
    "modelopt": (*FLOAT8, *MODELOPT_NVFP4),
    "modelopt_fp4": MODELOPT_NVFP4,
    "compressed-tensors": (
        *FLOAT8,
        Scheme(".weight", ("I8",), _int8),
        Scheme(".weight_packed", ("I32",), _pack_quantized),
        Scheme(".weight_packed", ("U8",), _nvfp4, (".weight_global_scale",)),
        Scheme(".weight_packed", ("U8",), _mxfp4),
    ),
    "awq": (Scheme(".qweight", ("I32",), _awq),),
    "gptq": (Scheme(".qweight", ("I32",), _gptq),),
    "mxfp4": (Scheme("_blocks", ("U8",), _mxfp4_experts),),
}
