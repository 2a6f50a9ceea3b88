"""A layer that drafts tokens (multi-token prediction): from the last hidden state and the token that was sampled."""

import numpy as np

from mpillama.models.decoder import Decoder
from mpillama.models.workspace import Activations, StepArrays


class MtpDecoder(Decoder):
    """A rank's part of such a layer: the position of a token t gets h_t and the token behind it, and predicts the next.

    h_t is the `main` model's hidden state after its last norm, or, for tokens that are guesses, this layer's own.
    """

    main: Decoder
    _hidden: Activations

    def take(self, rows: np.ndarray) -> None:
        """Remember h for the tokens of the next step: int64 [tokens], rows of the main model's last step, or -1 - r
        for rows r of this layer's last step.
        """
        h = Activations.empty(len(rows), self.config.padded_hidden_size)
        for decoder, own in ((self.main, rows >= 0), (self, rows < 0)):
            places = np.flatnonzero(own)
            if len(places):
                source = np.where(rows >= 0, rows, -1 - rows)[places]
                residual = decoder.workspace.residual(0, decoder.workspace.capacity)[source]
                normalised = Activations.empty(*residual.shape)
                decoder._normalise(residual, normalised, quantised=False)
                h.x[places] = normalised.x
        self._hidden = h

    def _embed(self, token_ids: np.ndarray, a: StepArrays) -> None:
        """a.x = eh_proj (norm of each token's embedding, norm of h)."""
        super()._embed(token_ids, a)
        joint = self.weights.joint
        assert joint is not None
        hidden, config = self.config.padded_hidden_size, self.config
        both = Activations.empty(len(a.x), 2 * hidden)
        for first, x, weight in ((0, a.x, joint.embedding_norm), (hidden, self._hidden.x, joint.hidden_norm)):
            part = Activations.empty(*x.shape)
            self.team.normalise(x, weight, config.hidden_size, config.rms_norm_eps, False, part.argument())
            both.x[:, first : first + hidden] = part.x
        self.team.column_parallel(joint.projection.column_parallel(), both.argument(), a.x)
