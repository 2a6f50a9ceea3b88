"""A layer that drafts tokens (multi-token prediction): from the last hidden state and the token that was sampled."""

from functools import cached_property

import numpy as np

from mpillama.kernels import arguments
from mpillama.models.decoder import Decoder
from mpillama.models.weights import JointInput
from mpillama.models.workspace import KEPT_ROWS, Activations, StepArrays


class MtpDecoder(Decoder):
    """A rank's part of such a layer: the position of a token t gets h_t and the token behind it, and predicts the next.

    h_t is the `main` model's hidden state after its last norm, or, for tokens that are guesses, this layer's own.
    """

    main: Decoder
    _hidden: np.ndarray

    def take(self, rows: np.ndarray) -> None:
        """Remember h for the tokens of the next step: int64 [tokens], rows of the main model's last step, or -1 - r
        for rows r of this layer's last step.
        """
        self._hidden = np.empty((len(rows), self.config.padded_hidden_size), np.float32)
        for decoder, own in ((self.main, rows >= 0), (self, rows < 0)):
            places = np.flatnonzero(own)
            if len(places):
                source = rows[places] if decoder is self.main else -1 - rows[places]
                residual = decoder.workspace.residual(0, decoder.workspace.capacity)[source]
                normalised = decoder.workspace.normalised(len(source))
                decoder._normalise(residual, normalised, quantised=False)
                self._hidden[places] = normalised.x

    def _embed(self, token_ids: np.ndarray, a: StepArrays) -> None:
        """a.x = eh_proj (norm of each token's embedding, norm of h)."""
        super()._embed(token_ids, a)
        hidden, config, joint = self.config.padded_hidden_size, self.config, self._joint
        part, both = self._arrays(len(a.x))
        for first, x, weight in ((0, a.x, joint.embedding_norm), (hidden, self._hidden, joint.hidden_norm)):
            self.team.normalise(x, weight, config.hidden_size, config.rms_norm_eps, False, part.argument)
            both.x[:, first : first + hidden] = part.x
        self.team.column_parallel(self._projection, both.argument, a.x)

    @cached_property
    def _joint(self) -> JointInput:
        assert self.weights.joint is not None
        return self.weights.joint

    @cached_property
    def _projection(self) -> arguments.Matrix:
        return self._joint.projection.column_parallel()

    def _arrays(self, tokens: int) -> tuple[Activations, Activations]:
        """Unfilled arrays for a normalised half of the projection's input, and for all of it."""
        if tokens in self._kept:
            return self._kept[tokens]
        hidden = self.config.padded_hidden_size
        found = Activations.empty(tokens, hidden), Activations.empty(tokens, 2 * hidden)
        if tokens <= KEPT_ROWS:
            self._kept[tokens] = found
        return found

    @cached_property
    def _kept(self) -> dict[int, tuple[Activations, Activations]]:
        return {}
