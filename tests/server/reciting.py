"""A model that recites: it answers a conversation with the tokens it was made for, so that a server's answer is known.

One layer whose attention looks at all positions alike: what leaves it is the last token's embedding beside the mean of
all, which tells what came before. The head learns what follows on these states.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from mpillama.text.chat_template import ChatTemplate
from mpillama.text.tokenizer import Tokenizer
from tests import tiny_models as models

CHANNELS = 256
"""Of an embedding; the residual stream has twice as many."""
PIECE = 7
"""Characters of a token of an answer at the most; a mark has its own."""
LOUDER = 20.0
"""How much more of the mean there is in a state."""
SMALLEST, AHEAD = 1e-4, 0.5


def write_reciting(
    folder: Path, template: str, marks: Sequence[str], answers: Sequence[tuple[Mapping[str, Any], Sequence[str]]],
    ends: Sequence[str] = ("<|done|>",),
) -> None:  # fmt: skip
    """Write a Hugging Face folder whose chat template is `template` and whose vocabulary has the `marks`.

    `answers`: how the template is rendered, and the pieces of the answer. Pieces that are marks are their tokens; those
    of `ends` end an answer.
    """
    folder.mkdir()
    made = tokenizers.Tokenizer.from_buffer(models.toy_tokenizer())
    made.add_tokens([tokenizers.AddedToken(mark, special=True, normalized=False) for mark in (*marks, *ends)])
    short = [[part for piece in pieces for part in _parts(piece, [*marks, *ends])] for _, pieces in answers]
    made.add_tokens([tokenizers.AddedToken(part, normalized=False) for parts in short for part in parts])
    for parts in short:
        parts += [] if parts[-1] in ends else ends[:1]
    stops = [made.token_to_id(end) for end in ends]
    tokenizer = Tokenizer(made.to_str().encode(), bos_token_id=0, eos_token_ids=tuple(stops), add_bos=False)
    chat = ChatTemplate(template, bos_token=models.SPECIAL_TOKENS[0], eos_token=ends[0])
    sequences = [
        (tokenizer.encode_marked(chat.render_marked(**how)), list(map(made.token_to_id, parts)))
        for (how, _), parts in zip(answers, short, strict=True)
    ]
    size = made.get_vocab_size()
    config = {
        "model_type": "llama", "vocab_size": size, "hidden_size": 2 * CHANNELS, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": CHANNELS,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": stops,
    }  # fmt: skip
    save_file(_tensors(config, sequences), folder / "model.safetensors")
    for name, text in {
        "config.json": json.dumps(config),
        "generation_config.json": json.dumps({"eos_token_id": stops}),
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": json.dumps({"bos_token": "<|begin|>", "eos_token": ends[0], "add_bos_token": False}),
        "chat_template.jinja": template,
    }.items():
        (folder / name).write_text(text)


def _parts(piece: str, marks: Sequence[str]) -> list[str]:
    """A piece in short ones."""
    return [piece] if piece in marks else [piece[i : i + PIECE] for i in range(0, len(piece), PIECE)]


def _tensors(config: Mapping[str, Any], sequences: Sequence[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
    rng, vocab, hidden = np.random.default_rng(5), config["vocab_size"], config["hidden_size"]
    embedding = np.zeros((vocab, hidden), np.float32)
    embedding[:, :CHANNELS] = rng.standard_normal((vocab, CHANNELS))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True) / np.sqrt(hidden)  # a norm changes nothing
    look, mean = np.zeros((2, CHANNELS, hidden), np.float32)
    look[:, :CHANNELS] = np.eye(CHANNELS)
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": _head(embedding, sequences),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    values = {
        "self_attn.q_proj": mean, "self_attn.k_proj": mean, "self_attn.v_proj": look,
        "self_attn.o_proj": LOUDER * np.roll(look, CHANNELS, axis=1).T,
        "mlp.gate_proj": np.zeros((32, hidden), np.float32),
        "mlp.up_proj": np.zeros((32, hidden), np.float32), "mlp.down_proj": np.zeros((hidden, 32), np.float32),
        "input_layernorm": np.ones(hidden, np.float32), "post_attention_layernorm": np.ones(hidden, np.float32),
    }  # fmt: skip
    tensors |= {f"model.layers.0.{name}.weight": np.ascontiguousarray(value) for name, value in values.items()}
    return tensors


def _head(embedding: np.ndarray, sequences: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
    """A head that gives most to the token that follows, as far as these sequences go."""
    states, following = [], []
    for prompt, answer in sequences:
        tokens = [*prompt, *answer]
        seen = embedding[tokens, :CHANNELS].astype(np.float64).cumsum(axis=0) / np.arange(1, len(tokens) + 1)[:, None]
        for place in range(len(prompt) - 1, len(tokens) - 1):
            state = np.concatenate([embedding[tokens[place], :CHANNELS], LOUDER * seen[place]])
            states.append(state / np.sqrt(np.square(state).mean()))
            following.append(tokens[place + 1])
    left, sizes, right = np.linalg.svd(np.array(states), full_matrices=False)
    kept = sizes > SMALLEST * sizes[0]
    return (_learnt(left[:, kept], np.array(following), len(embedding)) @ (right[kept] / sizes[kept, None])).astype(
        "f4"
    )


def _learnt(states: np.ndarray, following: np.ndarray, vocab: int) -> np.ndarray:
    """The rule of the perceptron, until each token that follows is ahead of all others."""
    head, rows = np.zeros((vocab, states.shape[1])), np.arange(len(states))
    for _ in range(3000):
        scores = states @ head.T
        scores[rows, following] -= AHEAD
        found = scores.argmax(axis=1)
        wrong = np.flatnonzero(found != following)
        if not len(wrong):
            return head
        np.add.at(head, following[wrong], states[wrong])
        np.add.at(head, found[wrong], -states[wrong])
    raise AssertionError(f"not learnt: {len(wrong)} of {len(states)}")
