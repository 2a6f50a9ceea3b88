"""The decoder, split over ranks: two all-reduces a layer, and what rank 0 needs of the logits."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.comm.pipeline import Pipeline
from mpillama.comm.shared_memory import CAPACITY
from mpillama.comm.ways import Traffic
from mpillama.kernels import arguments
from mpillama.kernels.library import Team
from mpillama.models.cache import KVCache, Step
from mpillama.models.candidates import Candidates, Wanted, message_numbers, read_candidates, write_candidates
from mpillama.models.config import ModelConfig
from mpillama.models.context_parallel import ContextParallel
from mpillama.models.family import Block
from mpillama.models.linear import LayerWeights, Matrix, any_quantised
from mpillama.models.partition import Division, Partition, micro_batches, split_units
from mpillama.models.residual_sum import Add, Ending, ResidualSum
from mpillama.models.weights import Weights
from mpillama.models.workspace import Activations, StepArrays, Workspace
from mpillama.quant.weight_type import LANES

SMALLEST_TIMED = 64 << 20
"""Bytes of a matrix below which caches, not memory, would be timed."""


def choose_in_flight(team: Team, matrix: Matrix) -> int:
    """How many row groups a single token should go through together, 1 or 2: processors prefetch differently."""
    if not matrix.weight_type.quantised or matrix.bytes < SMALLEST_TIMED:
        return 1
    h = Activations.empty(1, matrix.columns)
    for array in (h.x, h.values, h.scales, h.starts):
        array[:] = 0
    out, w, x = np.empty((1, matrix.rows), np.float32), matrix.column_parallel(), h.argument
    return min((1, 2), key=lambda n: fastest(lambda: team.column_parallel(w, x, out, n)))


def fastest(run: Callable[[], object], repetitions: int = 3) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


Array = np.ndarray


class DecoderLayer:
    """Attention and MLP, each closed by one all-reduce; `parts` are those of the ranks that divide the layer."""

    def __init__(
        self, config: ModelConfig, block: Block, weights: LayerWeights, parts: Sequence[Partition],
        all_reduce: ResidualSum, positions: ContextParallel | None = None,
    ):  # fmt: skip
        self.block = block
        self.rotation = config.rotations.index(config.rotation_of(block))
        self.team, self.comm = all_reduce.team, all_reduce.comm
        self.all_reduce = all_reduce
        self.positions = positions
        hidden, eps, part = config.hidden_size, config.rms_norm_eps, parts[self.comm.rank]
        self.attention = block.attention.layer(weights, part, hidden, block.attention_norm, eps)
        self.mlp = block.mlp.layer(weights, part, hidden, block.mlp_norm, eps)
        self.pieces = block.attention.in_pieces(self.attention, parts, self.comm.rank) if positions else None
        factor, vector = block.residual_factor, weights.vector
        self.attention_ending = Ending(
            block.attention.output_bias_of(weights), vector(block.attention_post_norm), factor
        )
        self.mlp_ending = Ending(block.mlp.output_bias_of(weights), vector(block.mlp_post_norm), factor)

    def forward(self, a: StepArrays, cache: Any) -> None:
        """Advance the residual stream a.x float32 [tokens, hidden], which every rank holds in full."""
        self.attend(a, cache, self.all_reduce)
        self.feed_forward(a, cache, self.all_reduce)

    def attend(self, a: StepArrays, cache: Any, add: Add) -> None:
        """The first half, closed by `add`."""
        a.turn_by(self.rotation)
        if self.block.attention.begin(self.team, self.attention, a.argument):
            self.all_reduce.finish_all()
            self.comm.all_reduce(a.squares)
        if self.positions is not None and self.pieces is not None:
            self.positions.attend(self.pieces, cache, a)
            attention = partial(self.pieces.finish, self.team, a.argument)
        else:
            attention = partial(self.block.attention.run, self.team, self.attention, cache, a.argument)
        add(a, attention, self.attention_ending)

    def feed_forward(self, a: StepArrays, cache: Any, add: Add) -> None:
        """The second half, closed by `add`."""
        add(a, partial(self.block.mlp.run, self.team, self.mlp, a.argument), self.mlp_ending)


class Decoder:
    """A rank's part of a model, which ranks divide evenly unless there is a `division`.

    `comm` has the ranks that divide this rank's layers: all, or with a `pipeline` those of its stage. `coarse`: panels'
    results are rounded to about 8 bits before they are added up.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, comm: Communicator, team: Team, coarse: bool = False,
        division: Division | None = None, pipeline: Pipeline | None = None,
    ):  # fmt: skip
        self.division = division or Division(comm.size)
        self.pipeline = pipeline
        self.all_ranks = pipeline.comm if pipeline else comm
        mates = self.division.mates_of(self.all_ranks.rank)
        parts = config.partition(self.division)[mates.start : mates.stop]
        self.tokens_run = 0
        self.coarse = coarse
        self.config = config
        self.weights = weights
        self.part = parts[comm.rank]
        self.vocabulary = self.part[config.vocabulary_split]
        self.comm = comm
        self.team = team
        self.logit_widths = [len(part[config.vocabulary_split]) * LANES for part in parts]
        self.frequencies = [np.array(r.inverse_frequencies(), np.float32) for r in config.rotations]
        self.in_flight = choose_in_flight(team, weights.lm_head)
        self.workspace = Workspace(config, self.part)
        self.embedding, self.head = weights.embed_tokens.column_parallel(), weights.lm_head.column_parallel()
        self.residual_sum = ResidualSum(comm, team, config)
        self._earlier: deque[Array] = deque(maxlen=pipeline.stages - 1 if pipeline and self.part.is_last else 0)
        """The residual streams of the steps before the last one, while their logits may be asked for."""
        self._last = 0
        self.positions = ContextParallel(comm, team) if self.division.holders > 1 else None
        self.layers = [
            DecoderLayer(config, block, of_layer, parts, self.residual_sum, self.positions)
            for block, of_layer in self.part.own(list(zip(config.blocks, weights.layers, strict=True)))
        ]

    def forward(self, step: Step, cache: KVCache) -> Array:
        """Run the step's tokens and return the wanted logits on rank 0, float32 [len(step.logit_rows), vocab_size]."""
        self.advance(step, cache)
        return self.logits(step.logit_rows)

    def advance(self, step: Step, cache: KVCache, parts: int = 1, micro: int | None = None) -> None:
        """Run the step's tokens; logits and hidden states of any of them can be had until the next step.

        With several `parts`, of which `most_parts` knows, the sums of one travel while the next is computed. Through
        stages the tokens go in `micro` parts, by default as many as `micro_batches` says. In a pipeline logits of steps
        before can be had, too: of one less than there are stages.
        """
        tokens = len(step.token_ids)
        if self._earlier.maxlen:
            self._earlier.append(self.workspace.residual(0, self._last).copy())
        a = self.workspace.for_tokens(tokens)
        if self.pipeline is None:
            self._embed(step.token_ids, a)
            self._run(step, range(tokens), cache, parts)
        else:
            self._run_stage(self.pipeline, step, cache, parts, micro or self.micro_batches(tokens))
        self._last = tokens
        self.tokens_run += tokens

    def micro_batches(self, tokens: int) -> int:
        """In how many parts a step goes through the stages if no other step is under way."""
        return micro_batches(tokens, self.division.stages)

    def most_parts(self, tokens: int) -> int:
        """In how many parts a step may go so that sums travel meanwhile: each in one exchange; 1 if they cannot.

        In a pipeline it is what goes through a stage at once that is cut so.
        """
        return self._most_parts(-(-tokens // self.micro_batches(tokens)))

    def _most_parts(self, tokens: int) -> int:
        width, shared = self.config.padded_hidden_size, self.comm.shared
        if shared is None or not shared.overlaps or tokens < 2:
            return 1
        if self.positions is not None:  # what ranks attended to is exchanged in the midst of half a layer
            return 1
        parts = max(2, -(-tokens // (CAPACITY // width)))
        return parts if self.comm.shared_for(-(-tokens // parts) * width) else 1

    def _run(self, step: Step, rows: range, cache: KVCache, count: int) -> None:
        """Tokens in some rows of the workspace, in so many parts, through the layers."""
        if count > 1:
            self._run_parts(step, rows, cache, count)
            return
        a = self.workspace.for_rows(rows.start, len(rows))
        self._describe(step, a)
        for decoder, layer_cache in zip(self.layers, cache.arguments, strict=False):
            decoder.forward(a, layer_cache)

    def _run_parts(self, step: Step, rows: range, cache: KVCache, count: int) -> None:
        """Each half layer of one part after the other: what a part needs of the sums has come when its turn comes."""
        ranges = split_units(len(rows), count)
        parts = [(step.rows(r.start, r.stop), self.workspace.for_rows(rows.start + r.start, len(r))) for r in ranges]
        for part, a in parts:
            self._describe(part, a)
        for decoder, layer_cache in zip(self.layers, cache.arguments, strict=False):
            for half in (decoder.attend, decoder.feed_forward):
                for _, a in parts:
                    self.residual_sum.make_room()
                    half(a, layer_cache, self.residual_sum.begin)
        self.residual_sum.finish_all()

    def _describe(self, step: Step, a: StepArrays) -> None:
        """Tell kernels of the tokens."""
        self._turn(step.positions, a)
        step.describe(a.argument)
        if self.positions is not None:
            self.positions.begin(step, a.argument)
        a.argument.in_flight = self.in_flight
        a.argument.shifts = arguments.address(a.shifts) if self.coarse else None

    def _run_stage(self, pipeline: Pipeline, step: Step, cache: KVCache, count: int, micro: int) -> None:
        """The step in micro-batches, so that the stage after works on one while this stage works on the next.

        Each goes in parts if `count` is not 1, as many as this stage's ranks can do. Other stages may have no other
        hosts.
        """
        ranges = split_units(len(step.token_ids), micro)
        batches = [(r, step.rows(r.start, r.stop), self.workspace.for_rows(r.start, len(r))) for r in ranges]
        if count > 1:
            count = min(self._most_parts(len(ranges[0])), len(ranges[-1]))
        pipeline.expect([a.x for _, _, a in batches])
        for rows, part, a in batches:
            if self.part.is_first:
                self._embed(part.token_ids, a)
            pipeline.receive()
            self._run(part, rows, cache, count)
            pipeline.send(a.x)
        pipeline.finish()

    @property
    def communication_seconds(self) -> float:
        """Time spent in collectives and in waiting for other stages."""
        return self.comm.seconds + (self.pipeline.seconds if self.pipeline else 0.0)

    @property
    def sent(self) -> Traffic:
        """What this rank sent in steps."""
        return self.comm.sent + self.pipeline.comm.sent + self.pipeline.sent if self.pipeline else self.comm.sent

    def forget_costs(self) -> None:
        """Begin to count communication anew."""
        self.comm.forget_costs()
        if self.pipeline:
            self.pipeline.forget_costs()

    def logits(self, rows: Array, ago: int = 0) -> Array:
        """On rank 0 what comes after tokens of the last step, or one `ago`, float32 [len(rows), vocab_size].

        All ranks ask for the same; elsewhere there are no rows.
        """
        if not self.part.is_last:
            return np.empty((0, self.config.vocab_size), np.float32)
        return self._gather(self._logits(rows, ago))

    def wanted_logits(self, rows: Array, wanted: Sequence[Wanted]) -> list[Array | Candidates]:
        """On rank 0 of each row what is wanted: as `logits`, or its candidates. All ranks ask for the same."""
        if self.comm.size == 1 or not self.part.is_last or not any(each.count for each in wanted):
            return list(self.logits(rows))
        part = self._logits(rows)
        found: list[Array | Candidates] = [np.empty(0, np.float32)] * (len(rows) if self.comm.is_root else 0)
        whole = [i for i, each in enumerate(wanted) if not each.count]
        for i, row in zip(whole, self._gather(part[whole]), strict=False):
            found[i] = row
        few = [i for i, each in enumerate(wanted) if each.count]
        for i, candidates in zip(few, self._candidates(part, rows, few, wanted), strict=False):
            found[i] = candidates
        return found

    def hidden_states(self, first: int, count: int, ago: int = 0) -> Array:
        """Tokens of the last step, or one `ago`, after the last layer and norm, float32 [count, hidden_size]; no
        collective.
        """
        h = Activations.empty(count, self.config.padded_hidden_size)
        self._normalise(self._residual(ago)[first : first + count], h, quantised=False)
        return h.x[:, : self.config.hidden_size]

    def _residual(self, ago: int) -> Array:
        return self._earlier[-ago] if ago else self.workspace.residual(0, self.workspace.capacity)

    def _embed(self, token_ids: Array, a: StepArrays) -> None:
        """Each token's row, which one rank has, to a.x."""
        groups = self.vocabulary
        rows = token_ids.astype(np.int64) - groups.start * LANES
        rows[rows >= len(groups) * LANES] = -1
        self.team.library.embed_rows(self.embedding, rows, a.partial)
        self.team.round_to_float(self.comm.all_reduce(a.partial), a.x, self.config.factors.embedding)

    def _turn(self, positions: Array, a: StepArrays) -> None:
        """What each rotation makes of the positions."""
        for rotation, frequencies, to in zip(self.config.rotations, self.frequencies, a.angles, strict=True):
            self.team.library.angles(positions, frequencies, rotation.rope.factor, to.cosines, to.sines)
            if rotation.rope.query_factors and to.query_factors is not None:
                to.query_factors[:] = [rotation.rope.query_factors.at(int(p)) for p in positions]

    def _candidates(self, part: Array, rows: Array, few: list[int], wanted: Sequence[Wanted]) -> Iterator[Candidates]:
        """One message of each rank with the candidates of all rows that want them; rank 0 joins them."""
        ends = np.cumsum([0, *self.logit_widths]).clip(max=self.config.vocab_size).tolist()
        widths = [last - first for first, last in pairwise(ends)]
        lengths = [[message_numbers(wanted[i].count, width) for i in few] for width in widths]
        mine = lengths[self.comm.rank]
        message = np.empty((1, sum(mine)), np.float32)
        for i, piece in zip(few, np.split(message[0], np.cumsum(mine)[:-1]), strict=True):
            if len(piece):
                write_candidates(part[i, : widths[self.comm.rank]], wanted[i], piece)
        gathered = self.comm.gather_columns(message, [sum(of_rank) for of_rank in lengths])
        if len(gathered):
            of_ranks = np.split(gathered[0], np.cumsum([sum(of_rank) for of_rank in lengths])[:-1])
            parts = [np.split(all_, np.cumsum(of_rank)[:-1]) for all_, of_rank in zip(of_ranks, lengths, strict=True)]
            for place, i in enumerate(few):
                yield read_candidates([of_rank[place] for of_rank in parts], ends[:-1], int(rows[i]))

    def _gather(self, part: Array) -> Array:
        """Whole rows of logits on rank 0."""
        if not len(part):
            return np.empty((0, self.config.vocab_size), np.float32)
        return self.comm.gather_columns(part, self.logit_widths)[:, : self.config.vocab_size]

    def _logits(self, rows: Array, ago: int = 0) -> Array:
        """This rank's logits after tokens of a step, float32 [len(rows), its part of the vocabulary]."""
        x, head = self._residual(ago)[rows], self.weights.lm_head
        if not len(x):
            return np.empty((0, self.logit_widths[self.comm.rank]), np.float32)
        h = self.workspace.normalised(len(x))
        part = np.empty((len(x), self.logit_widths[self.comm.rank]), np.float32)
        self._normalise(x, h, any_quantised(head))
        self.team.column_parallel(self.head, h.argument, part, self.in_flight)
        factors = self.config.factors
        if factors.logits != 1.0 or factors.logits_cap:
            self.team.scale_logits(part, factors.logits, factors.logits_cap)
        return part

    def _normalise(self, x: Array, h: Activations, quantised: bool) -> None:
        """The model's last norm, of x [tokens, padded hidden] to h."""
        c = self.config
        self.team.normalise(x, self.weights.norm, c.hidden_size, c.rms_norm_eps, quantised, h.argument)
