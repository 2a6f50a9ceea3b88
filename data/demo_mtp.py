"""Train the layer that drafts tokens for the demo (multi-token prediction), beside its frozen weights."""

import json
import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from demo_model import NO_TARGET, DecoderLayer, Llama, LlamaConfig, rope_table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mpillama.formats.native.reader import NativeModel
from mpillama.formats.native.table import read_table
from mpillama.formats.native.writer import write_model
from mpillama.models.config import MTP
from mpillama.models.tensors import EH_PROJ, EMBEDDING_NORM, FINAL_NORM, HIDDEN_NORM
from mpillama.quant.types.q4_0 import Q4_0

log = logging.getLogger("train_demo")


class DraftingLayer(nn.Module):
    """From the hidden state of a token and the token behind it: what comes after that."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.enorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DecoderLayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        nn.init.normal_(self.eh_proj.weight, std=0.02)

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Map embeddings of the next tokens and hidden states [rows, tokens, hidden] to its own hidden states."""
        cos, sin = rope_table(embedded.shape[1], self.config)
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return self.norm(self.layer(x, cos, sin))


def frozen(path: Path) -> tuple[Llama, NativeModel]:
    """The demo's model, as its file holds it."""
    file = read_table(str(path))
    config = LlamaConfig(**{key: file.config_json[key] for key in LlamaConfig.__dataclass_fields__})
    model = Llama(config)
    weights = {name.removeprefix("model."): torch.from_numpy(value) for name, value in weights_of(file).items()}
    model.load_state_dict(weights)
    return model.requires_grad_(False), file


def weights_of(file: NativeModel) -> dict[str, np.ndarray]:
    """The tensors of a native file in float32, whose sizes need no padding."""
    reader, found = file.reader(lambda count: None), {}
    for spec in file.specs:
        arrays = [np.empty(array.shape, array.dtype) for array in spec.arrays()]
        reader.read(spec, range(spec.units), arrays)
        if spec.vector:
            found[spec.name] = arrays[0]
            continue
        panels = zip(*arrays, strict=True) if spec.panel else [arrays]
        kind = spec.weight_type
        found[spec.name] = np.concatenate([kind.dequantise(kind.from_lanes(each)) for each in panels], axis=1)
    reader.close()
    return found


def train(model: Llama, data: Iterable[tuple[Tensor, Tensor]], steps: int) -> DraftingLayer:
    """Train a layer for so many batches."""
    layer = DraftingLayer(model.config)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step, (tokens, targets) in enumerate(islice(data, steps)):
        loss, right = loss_and_acceptance(model, layer, tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            log.info("step %d of %d: loss %.4f, %.1f %% right", step, steps, loss.item(), 100 * right)
    return layer


def loss_and_acceptance(model: Llama, layer: DraftingLayer, tokens: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """The mean cross-entropy of the tokens after next, and the share of those that were the most likely ones."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden_states(tokens[:, :-2])
        embedded = model.embed_tokens(tokens[:, 1:-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.lm_head(layer(embedded, hidden)).float()
    wanted = targets[:, 2:]
    right = (logits.argmax(-1) == wanted)[wanted != NO_TARGET].float().mean().item()
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=NO_TARGET), right


def export_mtp(layer: DraftingLayer, model: NativeModel, path: Path) -> None:
    """Write the layer as `convert --mtp` does: with embedding and head, in q4_0."""
    shared, own = weights_of(model), {name: value.detach().numpy() for name, value in layer.named_parameters()}
    names = {
        "enorm.weight": EMBEDDING_NORM,
        "hnorm.weight": HIDDEN_NORM,
        "eh_proj.weight": EH_PROJ,
        "norm.weight": FINAL_NORM,
    }
    tensors = shared | {names.get(name, f"model.layers.0.{name.removeprefix('layer.')}"): own[name] for name in own}
    config = json.loads(json.dumps({**model.config_json, MTP: True}))
    write_model(str(path), config, Q4_0, tensors.__getitem__, model.texts)
