"""Kimi K2 of Moonshot: the blocks of DeepSeek V3. In GGUF it is stored as DeepSeek."""

from dataclasses import replace

from mpillama.models.families import deepseek_v3

FAMILY = replace(deepseek_v3.FAMILY, model_type="kimi_k2", gguf=None, pre_tokenizer="kimi-k2")
