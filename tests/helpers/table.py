"""Tables over a tiny vocabulary in place of models, and the distributions they imply by enumeration."""

from __future__ import annotations

import itertools

import torch
from scipy import stats as scipy_stats

from personafast.density.draft import Draft
from personafast.density.draws import Draws
from personafast.density.rule import Rule
from personafast.density.transcript import GenerationStats, Transcript
from personafast.ops import Aggregator

PROMPT = torch.zeros(1, 1, dtype=torch.long)


class Tables:
    """Next-token logits of a reference and N policies for every prefix of up to `length` tokens."""

    def __init__(
        self, policies: int, vocab: int = 4, length: int = 4, seed: int = 0, near: float | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab, self.length = vocab, length
        self.offsets = torch.tensor([sum(vocab**j for j in range(n)) for n in range(length + 1)])
        prefixes = int(self.offsets[-1]) + 1  # one spare row for drafts that run past the end
        self.logits = torch.randn(policies + 1, prefixes, vocab, generator=generator)
        if near is not None:  # policies that differ little from the reference, as trained ones do at most tokens
            self.logits[1:] = self.logits[0] + near * self.logits[1:]

    def row(self, code: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Index of a prefix, given as its base-V code and its length."""
        spare = self.logits.shape[1] - 1
        return torch.where(length < self.length, self.offsets[length.clamp(max=self.length)] + code, spare)

    def prefixes(self, count: int) -> torch.Tensor:
        """Every text of so many tokens, int64 [V ** count, count], in the order of their codes."""
        texts = list(itertools.product(range(self.vocab), repeat=count))
        return torch.tensor(texts, dtype=torch.long).view(len(texts), count)

    def members(self, count: int) -> torch.Tensor:
        """Logits of reference and policies after every text of so many tokens, [N + 1, V ** count, V]."""
        start = int(self.offsets[count])
        return self.logits[:, start : start + self.vocab**count]

    def law(self, rule: Rule, count: int, process=None) -> torch.Tensor:
        """Token-level target after every text of so many tokens, float64 [V ** count, V]; rule has one row."""
        members, texts = self.members(count), self.prefixes(count)
        target = rule.select(torch.zeros(len(texts), dtype=torch.long)).target(members[0], members[1:])
        if process is not None:
            target = process(torch.cat([PROMPT.expand(len(texts), 1), texts], dim=1), target)
        return target.double().softmax(-1)

    def joint(self, rule: Rule, process=None, eos: tuple[int, ...] = ()) -> torch.Tensor:
        """Probability of every text, by `codes`, under the token-level target; rule has one row."""
        joint = torch.ones(1, dtype=torch.float64)
        for count in range(self.length):
            joint = (joint[:, None] * self.law(rule, count, process)).flatten()
        return self.by_code(joint, eos)

    def chunk_joint(self, rule: Rule, chunk: int, score=None) -> torch.Tensor:
        """Probability of every text under the chunk-level target; rule has one row.

        `score` maps log probabilities of chunks, [N + 1, C, k], reference first, to log g; None takes the rule's.
        """
        joint = torch.ones(1, dtype=torch.float64)
        t = rule.policy_temperature
        for start in range(0, self.length, chunk):
            size = min(chunk, self.length - start)
            logp, inside = None, None
            for count in range(start, start + size):
                members = (self.members(count) / t).log_softmax(-1)
                step = members.flatten(1)[..., None]  # [N + 1, V ** (count + 1), 1]
                kept = (self.law(rule, count) > 0).flatten()
                if logp is None:
                    logp, inside = step, kept
                else:
                    logp = torch.cat([logp.repeat_interleave(self.vocab, dim=1), step], dim=2)
                    inside = inside.repeat_interleave(self.vocab) & kept
            if score is None:
                log_g = rule.select(torch.zeros(logp.shape[1], dtype=torch.long)).scores(logp[0], logp[1:])[:, -1]
            else:
                log_g = score(logp)
            base = 0 if rule.base is None else 1 + int(rule.base[0])
            target = torch.where(inside, logp[base].double().sum(-1) + log_g.double(), -torch.inf)
            target = target.view(self.vocab**start, -1).softmax(-1)
            joint = (joint[:, None] * target).flatten()
        return self.by_code(joint)

    def mixture_joint(self, weights: list[float], chunk: int, laws: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Probability of every text whose chunks each come from one policy, drawn with these weights anew."""
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        joint = torch.ones(1, dtype=torch.float64)
        for start in range(0, self.length, chunk):
            of = torch.ones(len(weights), self.vocab**start, dtype=torch.float64)
            for count in range(start, min(start + chunk, self.length)):
                law = self.members(count)[1:].double().softmax(-1) if laws is None else laws[count]
                of = (of[..., None] * law).flatten(1)
            mixed = torch.einsum("i,in->n", shares, of)
            joint = joint.repeat_interleave(mixed.numel() // joint.numel()) * mixed
        return joint

    def by_code(self, joint: torch.Tensor, eos: tuple[int, ...] = ()) -> torch.Tensor:
        """Sum the probabilities of full texts, [V ** length], over what follows an EOS."""
        texts = self.prefixes(self.length)
        ends = torch.isin(texts, torch.tensor(eos, dtype=torch.long)).long()
        texts = torch.where(ends.cumsum(1) - ends > 0, self.vocab, texts)
        found = torch.zeros((self.vocab + 1) ** self.length, dtype=joint.dtype)
        return found.index_add(0, self.codes(texts), joint)

    def codes(self, texts: torch.Tensor) -> torch.Tensor:
        """Texts [n, length], with V where a row has ended, as numbers of base V + 1."""
        code = torch.zeros(texts.shape[0], dtype=torch.long)
        for j in range(texts.shape[1]):
            code = code * (self.vocab + 1) + texts[:, j]
        return code


class TableScorer:
    """`Scorer` over tables, all rows with the same empty prompt; `ahead` are the logits of what proposes, [P, V]."""

    def __init__(self, tables: Tables, rows: int, ahead: torch.Tensor | None = None) -> None:
        self.tables = tables
        self.ahead = tables.logits[0] if ahead is None else ahead
        self.code = torch.zeros(rows, dtype=torch.long)
        self.length = torch.zeros(rows, dtype=torch.long)

    def _after(self, draft: torch.Tensor, count: int) -> torch.Tensor:
        code = self.code
        for j in range(count):
            code = code * self.tables.vocab + draft[:, j]
        return self.tables.row(code, self.length + count)

    def propose(self, draft: torch.Tensor) -> torch.Tensor:
        return self.ahead[self._after(draft, draft.shape[1])]

    def speak(self, member: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        return self.tables.logits[1 + member, self._after(draft, draft.shape[1])]

    def score(self, draft: torch.Tensor, *, reference: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        index = torch.stack([self._after(draft, j) for j in range(draft.shape[1] + 1)], dim=1)
        return (self.tables.logits[0, index] if reference else None), self.tables.logits[1:, index]

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        for j in range(tokens.shape[1]):
            adds = counts > j
            self.code = torch.where(adds, self.code * self.tables.vocab + tokens[:, j], self.code)
            self.length = self.length + adds.long()

    def keep(self, rows: torch.Tensor) -> None:
        self.code, self.length = self.code[rows], self.length[rows]


def rule(rows: int, weights: list[float], aggregator: str, min_p: float = 0.0, temperature: float = 1.0) -> Rule:
    """The same rule for every row."""
    return Rule(
        torch.tensor(weights).repeat(rows, 1),
        torch.full((rows,), int(Aggregator[aggregator.upper()]), dtype=torch.int32),
        torch.full((rows,), min_p),
        temperature,
    )


class Certain:
    """A drafter that is sure of itself: the token after the last one, in drafts of changing length."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def draft(self, transcript: Transcript, draws: Draws | None, chunk: int) -> Draft:
        last = transcript.ids()[:, -1:]
        tokens = (last + 1 + torch.arange(chunk)) % self.vocab
        lengths = torch.where(last[:, 0] % 2 == 0, chunk, transcript.positions % (chunk + 1))
        return Draft(tokens, None, lengths.to(torch.int32), deterministic=True)

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        pass

    def keep(self, rows: torch.Tensor) -> None:
        pass


def draws(rows: int, seed: int, kind: type[Draws] = Draws) -> Draws:
    return kind(torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(seed)))


def sample(run, tables: Tables, rows: int, seed: int, *, batch: int, eos=(), ahead=None, kind=Draws):
    """Codes of sampled texts and the statistics of every batch; run(scorer, transcript, draws) samples one."""
    codes: list[torch.Tensor] = []
    stats: list[GenerationStats] = []
    for start in range(0, rows, batch):
        count = min(batch, rows - start)
        transcript = Transcript(PROMPT.repeat(count, 1), tables.length, eos)
        run(TableScorer(tables, count, ahead), transcript, draws(count, seed * rows + start, kind))
        found = transcript.sequences(tables.vocab)[:, 1:]
        whole = torch.nn.functional.pad(found, (0, tables.length - found.shape[1]), value=tables.vocab)
        codes.append(tables.codes(whole))
        stats.append(transcript.stats)
    return torch.cat(codes), stats


def p_value(codes: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square of observed texts against probabilities; cells with expectation below 5 are pooled."""
    counts = torch.bincount(codes, minlength=expected.numel()).double()
    wanted = expected / expected.sum() * codes.numel()
    small = wanted < 5
    assert counts[wanted == 0].sum() == 0, "a text of probability zero was drawn"
    observed, hoped = counts[~small].tolist(), wanted[~small].tolist()
    if wanted[small].sum() > 0:
        observed.append(float(counts[small].sum()))
        hoped.append(float(wanted[small].sum()))
    return float(scipy_stats.chisquare(observed, hoped).pvalue)


def total_variation(codes: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(codes, minlength=expected.numel()).double()
    return float((counts / counts.sum() - expected / expected.sum()).abs().sum() / 2)
