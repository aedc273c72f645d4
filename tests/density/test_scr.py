"""`sample_scr` against a slow second implementation: one row at a time, in plain numbers, from the same uniforms."""

import math

import pytest
import torch
from helpers.table import Tables, TableScorer, rule

from personafast.density.draws import Draws, Stream, row_seed
from personafast.density.scr import ScrOptions, sample_scr
from personafast.density.transcript import Transcript
from personafast.errors import PersonafastError

TABLES = Tables(policies=2, vocab=3, length=9, seed=8)
COUNTED = ("rounds", "tokens", "proposed", "accepted", "scored", "clipped", "salvaged", "exact")


def softmax(logits, t):
    powers = [math.exp(float(x) / t) for x in logits]
    return [power / sum(powers) for power in powers]


def pick(p, u):
    """The first token whose cumulated share exceeds u."""
    total = 0.0
    for token, share in enumerate(p):
        total += share
        if total > u * sum(p):
            return token
    raise AssertionError("the shares do not reach their sum")


class SlowRow:
    """One row of SCR, as the paper and the docstrings tell it."""

    def __init__(self, tables, seed, weights, aggregator, min_p, t, eos, options, base=None):
        self.tables, self.weights, self.linear, self.min_p, self.t = tables, weights, aggregator == "linear", min_p, t
        self.eos, self.options, self.base = eos, options, base
        self.proposal_t = options.proposal_temperature or t
        self.carried = [0.0] * len(weights)  # log ratios of the text
        self.draws = Draws(torch.tensor([seed]))
        self.text, self.past = [], []
        self.counted = dict.fromkeys(COUNTED, 0)

    def uniforms(self, stream, n):
        return self.draws.uniform(stream, torch.tensor([len(self.text)]), n)[0].tolist()

    def members(self, text):
        """Next-token probabilities of the reference and of the policies after a text."""
        code = 0
        for token in text:
            code = code * self.tables.vocab + token
        index = self.tables.row(torch.tensor(code), torch.tensor(len(text)))
        reference, *policies = (softmax(self.tables.logits[n, index], self.t) for n in range(len(self.weights) + 1))
        return reference, policies

    def proposing(self, text):
        """Next-token probabilities of what proposes."""
        code = 0
        for token in text:
            code = code * self.tables.vocab + token
        index = self.tables.row(torch.tensor(code), torch.tensor(len(text)))
        return softmax(self.tables.logits[0 if self.base is None else 1 + self.base, index], self.proposal_t)

    def ratio(self, logs):
        """Log of the aggregated ratio, from the policies' log ratios."""
        if self.linear and self.options.carry:
            mix = [w * math.exp(x) for w, x in zip(self.weights, self.carried, strict=True)]
            return math.log(sum(m * math.exp(x) for m, x in zip(mix, logs, strict=True)) / sum(mix))
        if self.linear:
            return math.log(sum(w * math.exp(x) for w, x in zip(self.weights, logs, strict=True)))
        return sum(w * x for w, x in zip(self.weights, logs, strict=True))

    def inside(self, reference, policies):
        """Tokens that some member finds probable enough."""
        in_it = [p for p, w in zip(policies, self.weights, strict=True) if w]
        if self.base is not None:
            in_it.append(policies[self.base])
        elif not self.linear and 1 - sum(self.weights) > 1e-6:
            in_it.append(reference)
        return [any(p[v] >= self.min_p * max(p) for p in in_it) for v in range(self.tables.vocab)]

    def logs(self, token, reference, policies):
        return [math.log(p[token] / reference[token]) for p in policies]

    def exact(self):
        reference, policies = self.members(self.text)
        inside, proposing = self.inside(reference, policies), self.proposing(self.text)
        shares = [
            proposing[v] * math.exp(self.ratio(self.logs(v, reference, policies))) if inside[v] else 0.0
            for v in range(self.tables.vocab)
        ]
        self.counted["exact"] += 1
        return pick(shares, self.uniforms(Stream.EXACT, 1)[0])

    def chunk(self):
        """Proposed tokens up to an EOS or the limit, and the score of every prefix."""
        tokens, scores = [], []
        logs, supported = [0.0] * len(self.weights), True
        for u in self.uniforms(Stream.PROPOSE, self.options.chunk):
            if len(self.text) + len(tokens) == self.tables.length or (tokens and tokens[-1] in self.eos):
                break
            reference, policies = self.members(self.text + tokens)
            token = pick(self.proposing(self.text + tokens), u)
            supported = supported and self.inside(reference, policies)[token]
            logs = [a + b for a, b in zip(logs, self.logs(token, reference, policies), strict=True)]
            tokens.append(token)
            scores.append(self.ratio(logs) if supported else -math.inf)
        return tokens, scores

    def bound(self, scores):
        """Log gamma and the largest score of the window, for every prefix length."""
        found = []
        for j, own in enumerate(scores):
            window = self.past[-self.options.window :]
            if self.options.per_length:
                seen = [past[j] for past in window if j < len(past) and past[j] > -math.inf]
            else:
                seen = [score for past in window for score in past if score > -math.inf]
            found.append(math.log(self.options.gamma) + (max(seen) if seen else own))
        return found

    def one_token(self, log_m):
        reference, policies = self.members(self.text)
        inside = self.inside(reference, policies)
        u = self.uniforms(Stream.RETRY, 2 * self.options.retries)
        for attempt in range(self.options.retries):
            token = pick(self.proposing(self.text), u[2 * attempt])
            score = self.ratio(self.logs(token, reference, policies))
            if inside[token] and math.log(u[2 * attempt + 1]) < score - log_m:
                return token
        return self.exact()

    def round(self):
        tokens, scores = self.chunk()
        log_m = self.bound(scores)
        if len(self.past) < self.options.warmup:
            accepted = [self.exact()]
        else:
            log_u = [math.log(u) for u in self.uniforms(Stream.ACCEPT, self.options.chunk)]
            if not self.options.fresh_u:
                log_u = [log_u[0]] * len(log_u)
            good = [j for j in range(len(scores)) if scores[j] > -math.inf and log_u[j] < scores[j] - log_m[j]]
            accepted = tokens[: good[-1] + 1] if good else []
            self.counted["proposed"] += len(tokens)
            self.counted["scored"] += len(scores)
            self.counted["accepted"] += len(accepted)
            self.counted["salvaged"] += 0 < len(accepted) < len(tokens)
            self.counted["clipped"] += sum(score > m for score, m in zip(scores, log_m, strict=True))
            if not accepted:
                accepted = [self.one_token(log_m[0])]
        self.past.append(scores)
        for token in accepted:
            steps = self.logs(token, *self.members(self.text))
            self.carried = [a + b for a, b in zip(self.carried, steps, strict=True)]
            self.text.append(token)
        self.counted["rounds"] += 1
        self.counted["tokens"] += len(accepted)

    def run(self):
        while len(self.text) < self.tables.length and not (self.text and self.text[-1] in self.eos):
            self.round()
        return self


class Watched(TableScorer):
    """Keeps what every row is told to commit."""

    def __init__(self, tables, rows):
        super().__init__(tables, rows)
        self.rows, self.texts = list(range(rows)), [[] for _ in range(rows)]

    def commit(self, tokens, counts):
        super().commit(tokens, counts)
        for row, new, count in zip(self.rows, tokens.tolist(), counts.tolist(), strict=True):
            self.texts[row] += new[:count]

    def keep(self, rows):
        super().keep(rows)
        self.rows = [self.rows[row] for row in rows.tolist()]


def sample(seeds, weights, aggregator, min_p, t, eos, options, base=None):
    """Texts and statistics of `sample_scr`."""
    rows = len(seeds)
    transcript = Transcript(torch.zeros(rows, 1, dtype=torch.long), TABLES.length, eos)
    target = rule(rows, weights, aggregator, min_p, t)
    scorer = Watched(TABLES, rows)
    if base is not None:
        target.base, scorer.ahead = torch.full((rows,), base), TABLES.logits[1 + base]
    sample_scr(scorer, transcript, target, Draws(torch.tensor(seeds)), options)
    texts = [[token for token in text if token >= 0] for text in transcript.sequences(-1)[:, 1:].tolist()]
    assert scorer.texts == texts, "the models hold other texts than the transcript"
    return texts, transcript.stats


@pytest.mark.parametrize(
    ("weights", "aggregator", "min_p", "t", "eos", "options", "base"),
    [
        ([0.6, 0.4], "linear", 0.0, 1.0, (), ScrOptions(chunk=3, window=3, warmup=2), None),
        ([0.6, 0.4], "linear", 0.45, 1.0, (2,), ScrOptions(chunk=3, window=4, gamma=1.5, warmup=1, retries=3), None),
        ([0.9, 0.8], "geometric", 0.0, 0.7, (), ScrOptions(chunk=2, window=2, gamma=2.0, warmup=3, retries=2), None),
        ([0.5, -0.3], "geometric", 0.3, 1.6, (0,), ScrOptions(chunk=4, window=20, warmup=3, retries=1), None),
        ([1.3, 0.0], "geometric", 0.6, 0.8, (), ScrOptions(chunk=3, window=2, gamma=1.0, warmup=1, retries=4), None),
        ([0.6, 0.5], "linear", 0.2, 0.9, (1,), ScrOptions(chunk=3, warmup=1, fresh_u=False, per_length=False), None),
        ([0.6, 0.4], "linear", 0.0, 1.2, (2,), ScrOptions(chunk=3, warmup=1, carry=True), None),
        ([0.9, -0.4], "geometric", 0.0, 1.2, (), ScrOptions(chunk=2, warmup=1, carry=True), None),
        ([0.9, 0.6], "geometric", 0.3, 0.8, (2,), ScrOptions(chunk=3, proposal_temperature=1.4, retries=2), None),
        ([0.7, 0.0], "geometric", 0.2, 0.8, (2,), ScrOptions(chunk=3, warmup=1), 1),
        ([0.0, 0.8], "linear", 0.0, 1.0, (), ScrOptions(chunk=2, proposal_temperature=0.7, carry=True), 0),
    ],
)
def test_tokens_and_statistics_are_those_of_the_slow_row(weights, aggregator, min_p, t, eos, options, base):
    rows, alone = 150, 40
    seeds = [row_seed(11, row) for row in range(rows)]
    slow = [SlowRow(TABLES, seed, weights, aggregator, min_p, t, eos, options, base).run() for seed in seeds]
    # In one batch, where rows end at different times and leave it.
    texts, stats = sample(seeds, weights, aggregator, min_p, t, eos, options, base)
    assert texts == [row.text for row in slow]
    for name in COUNTED:
        assert getattr(stats, name) == (max if name == "rounds" else sum)(row.counted[name] for row in slow)
    # Rows of their own say what every single round did.
    for seed, row in zip(seeds[:alone], slow, strict=False):
        text, stats = sample([seed], weights, aggregator, min_p, t, eos, options, base)
        assert text[0] == row.text
        assert {name: getattr(stats, name) for name in COUNTED} == row.counted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk: 0 is not at least 1"),
        ({"warmup": 0}, "warmup: 0 is not at least 1"),
        ({"gamma": 0.9}, "gamma: 0.9 is not a finite number of at least 1"),
        ({"proposal_temperature": 0.0}, "proposal_temperature: 0.0 is not a finite number above 0"),
        ({"proposal_temperature": math.inf}, "proposal_temperature: inf is not a finite number above 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(PersonafastError, match=f"^{message}$"):
        ScrOptions(**options)
