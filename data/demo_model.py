"""A Llama for training, in plain torch; mpillama has its own."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

NO_TARGET = -100


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of the model, in the names of Hugging Face."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 768
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    model_type: str = "llama"
    bos_token_id: int = 0
    eos_token_id: int = 1


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, causal."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    @torch.no_grad()
    def copy_at_first(self) -> None:
        """Make each head's output the transpose of its value, so that it returns what it attends to."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        values = self.v_proj.weight.unflatten(0, (self.config.num_key_value_heads, -1))
        self.o_proj.weight.copy_(values.repeat_interleave(group, 0).flatten(0, 1).T)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `x` [rows, tokens, hidden] to the same shape."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return self.o_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.config.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [rows, tokens, hidden] to the same shape."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Advance the residual stream `x` [rows, tokens, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids to logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draw the weights; the embedding and the attention are meant to make copying from the context easy."""
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02 / 12**0.5 if "down_proj" in name else 0.02)
        # A large embedding is meant to stay visible under what the layers add to it.
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        for layer in self.layers:
            layer.self_attn.copy_at_first()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids [rows, tokens] to logits [rows, tokens, vocabulary]."""
        return self.lm_head(self.hidden_states(tokens))

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Map token ids [rows, tokens] to what the head gets [rows, tokens, hidden]."""
        cos, sin = rope_table(tokens.shape[1], self.config)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


def rope_table(tokens: int, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [tokens, head_dim] of the rotary angles, the halves alike."""
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angle = torch.outer(torch.arange(tokens), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of `x` [rows, heads, tokens, head_dim] by their angles."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def next_token_loss(model: Llama, rows: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of the targets after each row's first; those below zero do not count."""
    logits = model(rows[:, :-1])
    return cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=NO_TARGET)


def save(model: Llama, folder: Path) -> None:
    """Write config and float32 weights as a Hugging Face folder."""
    config = asdict(model.config) | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config |= {"attention_bias": False, "mlp_bias": False}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": [model.config.eos_token_id]}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=1))
    weights = {f"{prefix(name)}{name}": weight.detach().clone() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def prefix(name: str) -> str:
    """Return what Hugging Face puts before the name of a tensor."""
    return "" if name.startswith("lm_head") else "model."


def load(folder: Path) -> Llama:
    """Read what `save` wrote."""
    config = json.loads((folder / "config.json").read_text())
    model = Llama(LlamaConfig(**{key: config[key] for key in LlamaConfig.__dataclass_fields__}))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    return model
