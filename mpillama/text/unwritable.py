"""A tokenizer whose control tokens have other names, which nobody can know and hence nobody can write."""

import json
import secrets
from collections.abc import Callable, Collection
from typing import Any

import tokenizers


class Unwritable:
    """A copy of a `tokenizer.json` in which the tokens `names` are spelled as `secret` says, with the ids they had.

    Their own spelling is ordinary text in it, which the vocabulary's other tokens make up.
    """

    def __init__(self, tokenizer_json: bytes, names: Collection[str], load: Callable[[bytes], tokenizers.Tokenizer]):
        nonce = secrets.token_hex(16)
        self.secret = {name: f"{nonce}{number:06x}" for number, name in enumerate(sorted(names))}
        self.tokenizer = load(json.dumps(self._renamed(json.loads(tokenizer_json))).encode())

    def _renamed(self, config: dict[str, Any]) -> dict[str, Any]:
        model = config["model"]
        added = [{**token, "content": self._name(token["content"])} for token in config.get("added_tokens") or []]
        renamed: dict[str, Any] = {"vocab": self._vocabulary(model["vocab"])}
        if isinstance(model.get("unk_token"), str):
            renamed["unk_token"] = self._name(model["unk_token"])
        if "merges" in model:
            renamed["merges"] = [merge for merge in model["merges"] if not self._touches(merge)]
        # The post-processor adds tokens by name; what is encoded here goes without them.
        return {**config, "added_tokens": added, "model": {**model, **renamed}, "post_processor": None}

    def _name(self, name: str) -> str:
        return self.secret.get(name, name)

    def _vocabulary(self, vocabulary: Any) -> Any:
        """By token, or a list of tokens with scores."""
        if isinstance(vocabulary, dict):
            return {self._name(token): index for token, index in vocabulary.items()}
        return [[self._name(token), score] for token, score in vocabulary]

    def _touches(self, merge: Any) -> bool:
        """Whether a merge makes a renamed token or something of it."""
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not self.secret.keys().isdisjoint((left, right, left + right))
