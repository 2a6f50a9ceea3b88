"""Write a GGUF of a known shape with random q4_0 weights: what the peer is measured on."""

import argparse
from pathlib import Path

import gguf
import numpy as np

from mpillama.models.config import ModelConfig
from mpillama.models.shapes import shape_config

BLOCK_BYTES = 18  # float16 scale, 16 bytes of nibbles


def main() -> None:
    """Write the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", default="llama-3.2-1b")
    options = parser.parse_args()
    source = shape_config(options.shape)
    write(options.path, options.shape, ModelConfig.from_hf(source))


def write(path: Path, name: str, config: ModelConfig) -> None:
    """Write metadata and tensors; the vocabulary is left out, token ids are used."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    random = np.random.default_rng(0)
    for tensor, shape in tensors(config):
        if len(shape) == 1:
            writer.add_tensor(tensor, np.ones(shape, np.float32))
        else:
            writer.add_tensor(tensor, random_q4_0(random, *shape), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes [rows, columns]."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (config.vocab_size, hidden))]
    for layer in range(config.num_hidden_layers):
        sizes = {
            "attn_norm": (hidden,),
            "attn_q": (config.num_attention_heads * head, hidden),
            "attn_k": (config.num_key_value_heads * head, hidden),
            "attn_v": (config.num_key_value_heads * head, hidden),
            "attn_output": (hidden, config.num_attention_heads * head),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        found += [(f"blk.{layer}.{name}.weight", shape) for name, shape in sizes.items()]
    found.append(("output_norm.weight", (hidden,)))
    return found if config.tie_word_embeddings else [*found, ("output.weight", (config.vocab_size, hidden))]


def random_q4_0(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random blocks with a small scale: uint8 [rows, bytes]."""
    blocks = random.integers(0, 256, (rows, columns // 32, BLOCK_BYTES), np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(2.0**-9).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


if __name__ == "__main__":
    main()
