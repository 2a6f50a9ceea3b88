"""`bench --speculate`: what drafts gain on this job's ranks, by who guesses: the text so far, or a draft model."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median

from mpillama.cli.display import in_number, load_progress, print_sentence, print_table
from mpillama.cli.options import BenchOptions
from mpillama.cli.running import loaded, running
from mpillama.engine.engine import Engine
from mpillama.engine.executor import Executor
from mpillama.engine.sequence import Request
from mpillama.job.start import World
from mpillama.loading.draft import load_draft
from mpillama.loading.load import LoadedModel
from mpillama.loading.session import Session
from mpillama.models.cache import blocks_for
from mpillama.text.sampling_params import SamplingParams

STORY = "Once upon a time"
REPETITIONS = 3
"""How often the second workload's prompt holds the same text."""
PIECE = 48
"""Tokens of that text."""
NOBODY, TEXT, ALL_RANKS, FIRST_RANK = "nobody", "the text so far", "draft model, all ranks", "draft model, rank 0 alone"


@dataclass(frozen=True)
class DraftTiming:
    """Decoding of a workload with drafts by somebody: medians of the repetitions."""

    workload: str
    drafts_by: str
    sequences: int
    tokens_per_second: float
    tokens_per_step: float
    drafts_proposed: int
    acceptance: float
    gain: float


def bench_drafts(options: BenchOptions, world: World) -> int:
    if options.draft_ranks == "auto":  # both are measured anyway
        options = replace(options, draft_ranks="all")
    with running(options, world) as job, loaded(job, partial(_open, options)) as session:
        alone = None
        if session.draft is not None and world.comm.size > 1 and not session.draft.alone:
            progress = load_progress(session.is_root, options.json)
            alone = load_draft(
                replace(session.draft, alone=True), session.world, session.target, session.executor, progress
            )
        if session.is_root:
            _publish(options, session, list(_measure(options, session, alone)))
    return job.status


def _open(options: BenchOptions, loaded_model: LoadedModel) -> Executor:
    """A cache for the most sequences that are asked for, each with a prompt, its answer and drafts."""
    sequences, most = options.sequences, options.draft_tokens
    context = min(loaded_model.context, REPETITIONS * PIECE + 2 * options.decode + most + 64)
    tokens = max(options.prefill_chunk, sequences * (1 + most))
    blocks = sequences * blocks_for(context)
    return Executor(loaded_model.model, context, options.kv_type, tokens, sequences, blocks, options.state_slots)


def _measure(options: BenchOptions, session: Session, alone: Executor | None) -> Iterator[DraftTiming]:
    """Each workload, number of sequences and origin of drafts; every answer must be that without drafts."""
    shared = session.executor.draft
    by: dict[str, Executor | None] = {TEXT: None}
    if session.draft is not None and shared is not None:
        by |= {FIRST_RANK if session.draft.alone else ALL_RANKS: shared}
    by |= {FIRST_RANK: alone} if alone else {}
    for workload, prompt in _workloads(session).items():
        for sequences in options.batch:
            plain, answers = _timed(options, session, prompt, sequences, 0)
            yield replace(plain, workload=workload, gain=1.0)
            for name, draft in by.items():
                session.executor.draft = draft
                found, same = _timed(options, session, prompt, sequences, options.draft_tokens)
                if same != answers:
                    raise RuntimeError(f"drafts by {name} changed an answer")
                gain = found.tokens_per_second / plain.tokens_per_second
                yield replace(found, workload=workload, drafts_by=name, gain=gain)
            session.executor.draft = shared


def _workloads(session: Session) -> dict[str, list[int]]:
    """A story, and a text that holds what the model says three times, whatever model it is."""
    story = session.tokenizer.encode(STORY)
    engine = Engine(session.executor, session.tokenizer)
    sequence = engine.submit(Request(story, SamplingParams(temperature=0.0, max_tokens=PIECE, ignore_eos=True)))
    for _ in engine.run(sequence):
        pass
    return {"a story": story, "a text that repeats itself": REPETITIONS * sequence.answer.token_ids}


def _timed(
    options: BenchOptions, session: Session, prompt: list[int], sequences: int, drafts: int
) -> tuple[DraftTiming, list[list[int]]]:
    """Decode `sequences` answers, greedy and sampled ones by turns, as often as is asked for, and once before."""
    engine = Engine(session.executor, session.tokenizer, drafts)
    seconds, steps, answers = [], [], list[list[int]]()
    for repetition in range(1 + options.repetitions):
        before = replace(engine.counts.decode), engine.counts.steps
        running = [engine.submit(_request(prompt, number, options.decode)) for number in range(sequences)]
        while not engine.idle:
            engine.step()
        answers = [sequence.answer.token_ids for sequence in running]
        if repetition:
            tokens = engine.counts.decode.tokens - before[0].tokens
            seconds.append((engine.counts.decode.seconds - before[0].seconds) / tokens)
            steps.append(sequences * options.decode / (engine.counts.steps - before[1]) / sequences)
    drafter = engine.drafter
    return DraftTiming(
        "", NOBODY, sequences, 1 / median(seconds), median(steps),
        drafter.proposed if drafter else 0, drafter.acceptance if drafter else 0.0, 1.0,
    ), answers  # fmt: skip


def _request(prompt: list[int], number: int, tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.8 * (number % 2), seed=number, max_tokens=tokens, ignore_eos=True)
    return Request(prompt, sampling, continues=True)


def _publish(options: BenchOptions, session: Session, found: list[DraftTiming]) -> None:
    ranks, target = session.world.comm.size, session.target
    if options.json:
        report = {
            "model": session.path,
            "draft_model": options.draft_model,
            "speculate": options.draft_tokens,
            "ranks": ranks,
            "threads": target.threads,
            "isa": target.isa.name,
            "drafts": [asdict(each) for each in found],
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    drafts = in_number(options.draft_tokens, "draft")
    print_sentence(
        f"{session.path}, up to {drafts}, {in_number(ranks, 'rank')} x {in_number(target.threads, 'thread')}, "
        f"{target.isa.name}: the same answers from all."
    )
    header = ("workload", "sequences", "drafts by", "come true", "tokens a step", "tok/s", "gain")
    rows = [
        (
            each.workload,
            str(each.sequences),
            each.drafts_by,
            f"{100 * each.acceptance:.0f} %" if each.drafts_proposed else "",
            f"{each.tokens_per_step:.2f}",
            f"{each.tokens_per_second:.1f}",
            f"{each.gain:.2f}",
        )
        for each in found
    ]
    print_table(header, rows)
