"""Between text and token ids: tokenizer, chat template, sampler and stop strings; used by rank 0 only."""
