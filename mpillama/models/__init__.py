"""The mathematics: configuration, split over ranks, weights, KV cache and the decoder."""
