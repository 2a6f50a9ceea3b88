"""What plans, makes, describes and checks weights knows every type, and all of each type's arrays."""

import json
from pathlib import Path

import numpy as np
import pytest

from mpillama.cli.inspect import describe
from mpillama.comm.communicator import Communicator
from mpillama.formats.native.table import read_table
from mpillama.loading.convert import target_bytes
from mpillama.loading.plan import PlanRequest, make_plan
from mpillama.loading.synthetic import SyntheticWeights
from mpillama.loading.verify import verify_file
from mpillama.models.config import ModelConfig
from mpillama.models.shapes import shape_config
from mpillama.models.tensors import EMBEDDING, LM_HEAD, WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES
from tests import tiny_models as models

CONFIG = ModelConfig.from_hf(shape_config("llama-3.2-1b"))
pytestmark = pytest.mark.parametrize("name", list(WEIGHT_TYPES))


def planned_bytes(types: WeightTypes, ranks: int) -> int:
    """What the ranks take for weights together."""
    fields = {"memory_per_node": 10**11, "max_seq_len": 1024, "batch": 1, "kv_type": "f16"}
    return sum(rank.weights for rank in make_plan(PlanRequest(CONFIG, types, ranks, 1, **fields)).ranks)


def test_a_plan_has_the_bytes_of_the_type(name: str) -> None:
    """On one rank, or on two together; the head perhaps with more bits. Float32 is what it is compared with."""
    types = [CONFIG.quantised_to(WEIGHT_TYPES[each]) for each in (name, "f32")]
    own, floats = (
        sum(s.rows // 16 * s.weight_type.group_bytes(s.columns) for s in CONFIG.tensors(each) if not s.vector)
        for each in types
    )
    for ranks in (1, 2):
        assert planned_bytes(types[1], ranks) - planned_bytes(types[0], ranks) == pytest.approx(floats - own, rel=2e-3)


def test_weights_made_in_memory_are_numbers_everywhere(name: str) -> None:
    """As `bench --shape` has them; each array is filled to its end."""
    made = SyntheticWeights()
    for config in (models.AWKWARD, models.TOY):
        for spec in models.specs_of(config, name):
            arrays = [np.empty(a.slice_shape(spec.units), a.dtype) for a in spec.arrays()]
            for array in arrays:
                array.view(np.uint8)[...] = 0xFF  # no number in any type that has such
            made.read(spec, range(spec.units), arrays)
            values = (
                arrays[0] if spec.vector else spec.weight_type.unpack([a[0] if spec.experts else a for a in arrays])
            )
            assert np.isfinite(values).all()
            assert spec.vector or 0.005 < np.abs(values).mean() < 0.05


@pytest.fixture
def path(name: str, tmp_path: Path) -> Path:
    """A native file of the type."""
    models.write_toy(tmp_path / "m.h5", name)
    return tmp_path / "m.h5"


def test_inspect_describes_each_array(name: str, path: Path) -> None:
    model = read_table(str(path))
    found = json.loads(json.dumps(describe(model)))
    matrix = next(tensor for tensor in found["tensors"] if tensor["name"] == EMBEDDING)
    suffixes = [array["name"].removeprefix(EMBEDDING) for array in matrix["arrays"]]
    assert suffixes == [array.suffix for array in WEIGHT_TYPES[name].lanes]
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == target_bytes(model)


def test_verify_looks_at_each_array(name: str, path: Path) -> None:
    model = read_table(str(path))
    assert verify_file(model, Communicator.alone(), lambda count: None).differences == []
    arrays = [array.suffix for array in WEIGHT_TYPES[name].lanes]
    for suffix in arrays:
        entry = model.entries["model.layers.0.mlp.down_proj.weight" + suffix]
        with path.open("r+b") as file:
            file.seek(entry.offset + entry.bytes // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 64]))
    found = verify_file(model, Communicator.alone(), lambda count: None).differences
    assert {each.tensor for each in found} == {"model.layers.0.mlp.down_proj.weight" + suffix for suffix in arrays}


def test_the_head_has_no_fewer_bits_than_what_was_asked_for(name: str) -> None:
    kind = WEIGHT_TYPES[name]
    for shape, head in (("llama-3.2-1b", EMBEDDING), ("llama-3.1-405b", LM_HEAD)):
        config = ModelConfig.from_hf(shape_config(shape))
        types = config.quantised_to(kind)
        assert types.default == kind
        assert types.of(head).group_bytes(2048) >= kind.group_bytes(2048)
        others = [spec for spec in config.tensors(types) if not spec.vector and spec.name != head]
        assert all(spec.weight_type == kind for spec in others)
