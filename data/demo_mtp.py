"""Train the layer that drafts tokens for the demo (multi-token prediction), beside its frozen weights.

It learns to guess what the model will say, not what stands in the corpus: its loss is the cross-entropy with the
model's own probabilities. The model's hidden states are computed once and kept, so that a step costs the layer alone.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from demo_model import NO_TARGET, DecoderLayer, Llama, LlamaConfig, rope_table
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from mpillama.formats.native.reader import NativeModel
from mpillama.formats.native.table import read_table
from mpillama.formats.native.writer import write_model
from mpillama.models.config import MTP
from mpillama.models.tensors import EH_PROJ, EMBEDDING_NORM, FINAL_NORM, HIDDEN_NORM
from mpillama.quant.types.q4_0 import Q4_0

log = logging.getLogger("train_demo")
BATCHES = 60
"""Of documents whose hidden states are kept: 180,000 tokens."""
HELD_OUT = 2
"""Of these, that only measure how often guesses are right."""
Example = tuple[Tensor, Tensor, Tensor]
"""Tokens int16 [rows, tokens]; whether the model says the one after next, bool [rows, tokens - 2]; and its hidden
states bfloat16 [rows, tokens - 1, hidden]."""


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
    """The demo's model in bfloat16, and its file."""
    file = read_table(str(path))
    config = LlamaConfig(**{key: file.config_json[key] for key in LlamaConfig.__dataclass_fields__})
    model = Llama(config)
    weights = {name.removeprefix("model."): torch.from_numpy(value) for name, value in weights_of(file).items()}
    model.load_state_dict(weights)
    return model.requires_grad_(False).bfloat16(), file


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


def examples(model: Llama, data: Iterable[tuple[Tensor, Tensor]], path: Path) -> list[Example]:
    """What to learn from: made by the model, or read from `path` where an earlier run has left it."""
    if path.exists():
        kept: list[Example] = torch.load(path)
        return kept
    found = []
    for number, (tokens, targets) in enumerate(islice(data, BATCHES)):
        with torch.no_grad():
            hidden = model.hidden_states(tokens[:, :-1]).bfloat16()
        found.append((tokens.short(), targets[:, 2:] != NO_TARGET, hidden))
        if number % 10 == 9:
            log.info("hidden states of %d of %d batches", number + 1, BATCHES)
    torch.save(found, path)
    return found


def train(model: Llama, found: list[Example], steps: int, seed: int) -> DraftingLayer:
    """Train a layer: the first half of the steps on the next guess, the others on the two next ones."""
    layer, rng = DraftingLayer(model.config), Random(seed)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    learned, checked = found[HELD_OUT:], found[:HELD_OUT]
    order = (example for _ in range(steps) for example in rng.sample(learned, len(learned)))
    for step, example in enumerate(islice(order, steps)):
        losses = [loss for loss, _ in guesses(model, layer, example, 1 + (2 * step >= steps))]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            log.info("step %d of %d: loss %.3f", step + 1, steps, loss.item())
        if step % 50 == 49 or step == steps - 1:
            log.info("right guesses among unseen documents: %s", acceptance(model, layer, checked))
    return layer


def learning_rate(step: int, steps: int, warm_up: int = 10) -> float:
    """Return the factor of the learning rate: up, level for half of the steps, then linearly down."""
    return min(1.0, (step + 1) / warm_up, 0.02 + 2 * (1 - step / steps))


def guesses(model: Llama, layer: DraftingLayer, example: Example, count: int) -> Iterator[tuple[Tensor, float]]:
    """Of each guess in turn: its cross-entropy with what the model will say, and how often the likeliest agree.

    The first one goes on from the model's hidden states, the others from the layer's own.
    """
    tokens, wanted, hidden = example
    embedded, x = model.embed_tokens(tokens[:, 1:-1].long()).float(), hidden[:, :-1]
    for number in range(count):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = layer(embedded[:, number:], x)
        rows = wanted[:, number:]
        own, models = (model.lm_head(state[rows].bfloat16()).float() for state in (x, hidden[:, number + 1 :]))
        loss = -(models.softmax(-1) * log_softmax(own, -1)).sum(-1).mean()
        yield loss, (own.argmax(-1) == models.argmax(-1)).float().mean().item()
        x = x[:, :-1]


@torch.no_grad()
def acceptance(model: Llama, layer: DraftingLayer, found: list[Example]) -> str:
    """How often each of the two next guesses is right, in words."""
    shares = np.mean([[right for _, right in guesses(model, layer, example, 2)] for example in found], axis=0)
    return ", then ".join(f"{100 * share:.1f} %" for share in shares)


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
