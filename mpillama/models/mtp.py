"""A layer that drafts tokens (multi-token prediction): from the last hidden state and the token that was sampled."""

from functools import cached_property

import numpy as np

from mpillama.kernels import arguments
from mpillama.models.decoder import Decoder
from mpillama.models.weights import JointInput
from mpillama.models.workspace import KeptActivations, StepArrays


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
        part, both = (kept.for_rows(len(a.x)) for kept in self._inputs)
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

    @cached_property
    def _inputs(self) -> tuple[KeptActivations, KeptActivations]:
        """For a normalised half of the projection's input, and for all of it."""
        hidden = self.config.padded_hidden_size
        return KeptActivations(hidden), KeptActivations(2 * hidden)
