"""Make the demo model from nothing: corpus, tokenizer, training, evaluation, export.

Needs torch, which mpillama itself does not: `pip install -e .[dev]`, then `python data/train_demo.py`.
"""

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from zlib import crc32

import demo_mtp
import torch
from demo_corpus import SPECIAL_TOKENS, Author
from demo_export import export
from demo_model import NO_TARGET, Llama, LlamaConfig, load, next_token_loss, save
from demo_tokenizer import train_tokenizer, write_tokenizer
from tokenizers import Tokenizer

HERE = Path(__file__).parent
LONGEST = 768  # tokens of a document: two stories and what is said between them
TOKENS = 3300  # of a batch, padding included
SHORT = 160  # tokens that a third of the documents are cut to: requests, titles and first sentences teach copying most
USER, ASSISTANT = SPECIAL_TOKENS.index("<|user|>"), SPECIAL_TOKENS.index("<|assistant|>")
log = logging.getLogger("train_demo")
Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and targets [documents, LONGEST + 1 or fewer]
LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Make `--out` from `--seed`."""
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    checkpoint = options.work_dir / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    if options.mtp:
        make_mtp(options)
        return
    model, tokenizer = resume(options.resume, checkpoint) if options.resume else begin(options.seed, checkpoint)
    log.info("%d parameters", sum(weight.numel() for weight in model.parameters()))
    train(model, batches(tokenizer, options.seed), options.steps)
    save(model, checkpoint)
    evaluate(load(checkpoint), tokenizer, options)
    export(checkpoint, options.out)


def make_mtp(options: argparse.Namespace) -> None:
    """Train the layer that drafts tokens for the model of `--mtp`, which stays as it is."""
    model, file = demo_mtp.frozen(options.mtp)
    tokenizer = Tokenizer.from_str(file.texts["tokenizer.json"].decode())
    kept = options.work_dir / f"hidden-states-{crc32(options.mtp.read_bytes()):08x}-{options.seed}.pt"
    found = demo_mtp.examples(model, batches(tokenizer, options.seed), kept)
    layer = demo_mtp.train(model, found, options.steps, options.seed)
    demo_mtp.export_mtp(layer, file, options.out)


def begin(seed: int, checkpoint: Path) -> tuple[Llama, Tokenizer]:
    """Return a new model and its tokenizer."""
    tokenizer = make_tokenizer(seed, checkpoint)
    return Llama(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=LONGEST)), tokenizer


def resume(earlier: Path, checkpoint: Path) -> tuple[Llama, Tokenizer]:
    """Return the model and the tokenizer of an earlier run, whose tokenizer files are copied."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((earlier / name).read_bytes())
    return load(earlier), Tokenizer.from_file(str(earlier / "tokenizer.json"))


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "demo.h5", help="file to write")
    parser.add_argument("--steps", type=int, default=2800, help=f"optimizer steps of about {TOKENS} tokens")
    parser.add_argument("--seed", type=int, default=1, help="of corpus and weights")
    parser.add_argument("--resume", type=Path, help="checkpoint folder to go on from; give another --seed")
    parser.add_argument("--mtp", type=Path, help="model file for which to train a layer that drafts tokens, into --out")
    parser.add_argument("--work-dir", type=Path, default=Path("demo-work"), help="where the checkpoint goes")
    return parser.parse_args()


def make_tokenizer(seed: int, checkpoint: Path) -> Tokenizer:
    """Train the tokenizer on 6000 documents of their own seed."""
    tokenizer = train_tokenizer(islice(Author(seed + 1000).documents(), 6000))
    write_tokenizer(tokenizer, checkpoint)
    return tokenizer


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """Yield batches of documents of about the same length, one document a row, for ever."""
    documents, rng = Author(seed).documents(), Random(seed)
    while True:
        encodings = tokenizer.encode_batch(list(islice(documents, 400)), add_special_tokens=False)
        groups = grouped(sorted((encoding.ids[: longest(rng)] for encoding in encodings), key=len))
        rng.shuffle(groups)
        yield from map(padded, groups)


def longest(rng: Random) -> int:
    """Draw to how many tokens a document is cut."""
    return SHORT if rng.random() < 1 / 3 else LONGEST + 1


def grouped(rows: list[list[int]]) -> list[list[list[int]]]:
    """Cut rows sorted by length into groups of at most TOKENS tokens once padded."""
    groups: list[list[list[int]]] = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * len(row) > TOKENS:
            groups.append([])
        groups[-1].append(row)
    return groups


def padded(rows: list[list[int]]) -> Batch:
    """Return tokens and targets; the padding and what the user says are no targets."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    targets = torch.full_like(tokens, NO_TARGET)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = targets[i, : len(row)] = torch.tensor(row)
    asking = (tokens == USER).cumsum(1) > (tokens == ASSISTANT).cumsum(1)
    return tokens, targets.masked_fill(asking, NO_TARGET)


def train(model: Llama, data: Iterable[Batch], steps: int) -> None:
    """Train the layers with Muon and the rest with AdamW."""
    # Meant to make copying names from the context come early; not compared with AdamW under equal conditions.
    layers = [weight for name, weight in model.named_parameters() if weight.ndim > 1 and "layers" in name]
    others = [w for name, w in model.named_parameters() if w.ndim == 1 or name.startswith("lm_head")]
    groups = [{"params": others, "lr": 2e-3}, {"params": [model.embed_tokens.weight], "lr": 5e-3}]
    muon = torch.optim.Muon(layers, lr=2.5e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizers = [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, partial(schedule, steps=steps)) for o in optimizers]
    loss_of = torch.compile(partial(next_token_loss, model), dynamic=True)
    for step, batch in enumerate(islice(data, steps)):
        loss = train_step(model, loss_of, optimizers, batch)
        for each in schedules:
            each.step()
        if step % 20 == 0:
            log.info("step %d of %d: loss %.4f", step, steps, loss)


def schedule(step: int, steps: int, warm_up: int = 60) -> float:
    """Return the factor of the learning rate: up, level for two thirds of the steps, then linearly down."""
    return min(1.0, (step + 1) / warm_up, 0.005 + (1 - step / steps) / 0.35)


def train_step(model: Llama, loss_of: LossOf, optimizers: list[torch.optim.Optimizer], batch: Batch) -> float:
    """Take one step and return the loss before it, in nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(*batch)
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def evaluate(model: Llama, tokenizer: Tokenizer, options: argparse.Namespace) -> dict[str, float]:
    """Return, log and write the perplexity per token of documents that training has not seen."""
    seen, unseen = Author(options.seed + 2000), Author(options.seed + 3000, held_out=True)
    figures = {
        "stories": perplexity(model, tokenizer, [seen.plain() for _ in range(200)]),
        "stories of held-out triples": perplexity(model, tokenizer, [unseen.plain() for _ in range(200)]),
        "chats": perplexity(model, tokenizer, [seen.chat() for _ in range(200)]),
        "chats of held-out triples": perplexity(model, tokenizer, [unseen.chat() for _ in range(200)]),
    }
    log.info("perplexity: %s", figures)
    (options.work_dir / "perplexity.json").write_text(json.dumps(figures, indent=1))
    return figures


@torch.no_grad()
def perplexity(model: Llama, tokenizer: Tokenizer, documents: list[str]) -> float:
    """Return the perplexity per token that the model says, each document on its own."""
    total, count = 0.0, 0
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        tokens, targets = padded([encoding.ids[: LONGEST + 1]])
        said = int((targets[:, 1:] != NO_TARGET).sum())
        total += next_token_loss(model, tokens, targets).item() * said
        count += said
    return math.exp(total / count)


if __name__ == "__main__":
    main()
