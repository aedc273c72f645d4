"""Build the zoo from nothing: corpus, reference, policies, vectors, masks, measurement, manifest.

Each stage writes its own folder under a working folder beside the target and is skipped when that folder is there, so
an interrupted build goes on where it stopped. The target is replaced at the end, whole, and only by a zoo that meets
its quality bars. The same seed gives the same bytes on the same instruction set and library versions.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import itertools
import platform
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from personafast._io import atomic_directory, read_json, write_json
from personafast.errors import PersonafastError
from personafast.zoo.corpus import contrast
from personafast.zoo.measure import Combine, Linear, alone, geometric, rates, sample
from personafast.zoo.model import make_model, make_tokenizer
from personafast.zoo.train import PolicySettings, Progress, ReferenceSettings, train_policy, train_reference
from personafast.zoo.traits import DEMO_TRAITS, TRAITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from personafast.library import PersonaLibrary

THREADS = 2
MIN_P = 0.05
MERGE_ALPHAS = (0.5, 0.75, 1.0, 1.25, 1.5)
_SEED_STRIDE = 10_000


@dataclass(frozen=True)
class Settings:
    """Everything besides the seed that decides the bytes of a zoo."""

    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    contrasts: int = 128
    sparsity: float = 0.5
    replies: int = 400


QUICK = Settings(ReferenceSettings(steps=20), PolicySettings(steps=2), contrasts=8, replies=8)
"""A build that exercises every stage in well under a minute and meets no bar."""


def build(out: Path | str, seed: int = 0, quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Build a zoo in ``out`` and return its manifest.

    Args:
        out: folder to write; one that is there is replaced only when the new one is finished and good.
        seed: of the corpus, the initial weights and every training run.
        quick: few steps and no quality bars, to try the pipeline.
        progress: called with (stage, steps done, steps in all); a progress bar is shown if there is none.

    Raises:
        PersonafastError: a package of the ``zoo`` extra is missing, or a quality bar was missed.
    """
    for package in ("peft", "trl", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise PersonafastError(f"zoo build: the package {package} is missing; pip install 'personafast[zoo]'")
    out = Path(out)
    settings = QUICK if quick else Settings()
    work = out.parent / f".{out.name}.building"
    _open_work_folder(work, {"seed": seed, "settings": asdict(settings), "versions": versions()})
    with _deterministic(), _shown(progress) as report:
        _reference_stage(work / "model", settings, seed, report)
        for index, name in enumerate(TRAITS):
            _policy_stage(work, name, settings, seed * _SEED_STRIDE + 100 + index, report)
        _library_stage(work, settings, seed, report)
        quality = measure(work, settings.replies, report)
    manifest = {
        "seed": seed,
        "settings": asdict(settings),
        "versions": versions(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "quality": quality,
        "files": {},
    }
    missed = [] if quick else missed_bars(quality)
    if missed:
        raise PersonafastError(f"zoo build: {'; '.join(missed)}; {work} is kept, {out} is left as it was")
    with atomic_directory(out) as target:
        for part in ("model", "library"):
            shutil.copytree(work / part, target / part)
        manifest["files"] = hashes(target)
        write_json(target / "manifest.json", manifest)
    shutil.rmtree(work)
    return manifest


def versions() -> dict[str, str]:
    """Versions of what decides the bytes."""
    packages = ("torch", "transformers", "tokenizers", "peft", "trl", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under the folder except the manifest, by relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def missed_bars(quality: dict[str, Any]) -> list[str]:
    """What a zoo's measured quality lacks, one phrase each."""
    singles = {name: quality["policies"][name] for name in TRAITS}
    direct, merge = quality["blends"]["direct"], quality["blends"]["merge 1.0"]
    bars = [
        ("reference grammar", quality["reference"]["grammar"], 0.98),
        *((f"policy {name} trait", row[name], 0.95) for name, row in singles.items()),
        *((f"policy {name} grammar", row["grammar"], 0.97) for name, row in singles.items()),
        ("direct joint", direct["joint"], 0.75),
        ("direct grammar", direct["grammar"], 0.95),
        ("direct joint less merge joint", direct["joint"] - merge["joint"], 0.22),
    ]
    return [f"{what} is {value:.3f}, below {bar}" for what, value, bar in bars if value < bar]


def measure(folder: Path, replies: int, progress: Progress) -> dict[str, Any]:
    """Rates of every trait, of the demo traits jointly and of grammatical replies: reference, policies, blends.

    Samples at T = 1 and min-p 0.05 with :mod:`personafast.zoo.measure`, on ``zoo.prompts``.
    """
    from personafast import zoo

    model, tokenizer, library = zoo.load(folder)
    policies = {name: _merged(model, library, [name], 1.0) for name in TRAITS}
    heads = [[{"role": "user", "content": text}] for text in zoo.prompts(replies)]
    chosen = [policies[name] for name in DEMO_TRAITS]
    ones = [1.0] * len(DEMO_TRAITS)

    def asked(name: str) -> list[list[dict[str, str]]]:
        return [[{"role": "system", "content": TRAITS[name].prompt}, *head] for head in heads]

    def run(models: list[PreTrainedModel], combine: Combine, rows: list[Any] | None = None) -> dict[str, float]:
        texts = sample(models, tokenizer, rows or [heads] * len(models), combine)
        return {what: round(rate, 4) for what, rate in rates(texts, DEMO_TRAITS).items()}

    jobs: list[tuple[str, str, Callable[[], dict[str, float]]]] = [
        ("", "reference", partial(run, [model], alone(MIN_P))),
        ("blends", "direct", partial(run, [model, *chosen], geometric(ones, MIN_P))),
        ("blends", "linear", partial(run, [model, *chosen], Linear(ones, MIN_P))),
        (
            "blends",
            "prompt",
            partial(run, [model] * 5, geometric(ones, MIN_P), [heads, *(asked(name) for name in DEMO_TRAITS)]),
        ),
    ]
    for name, policy in policies.items():
        jobs.append(("policies", name, partial(run, [policy], alone(MIN_P))))
        jobs.append(("prompts", name, partial(run, [model], alone(MIN_P), [asked(name)])))
    for weight in MERGE_ALPHAS:
        merged = _merged(model, library, DEMO_TRAITS, weight)
        jobs.append(("blends", f"merge {weight}", partial(run, [merged], alone(MIN_P))))
    quality: dict[str, Any] = {"replies": replies, "policies": {}, "prompts": {}, "blends": {}}
    for done, (group, name, job) in enumerate(jobs):
        (quality[group] if group else quality)[name] = job()
        progress("measure", done + 1, len(jobs))
    return quality


def _merged(model: PreTrainedModel, library: PersonaLibrary, names: Iterable[str], weight: float) -> PreTrainedModel:
    """theta0 + weight * sum of the named policies' differences, as a plain model."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            for path, factors in library.policies[name].factors.items():
                delta = factors.scale * (factors.b @ factors.a)
                merged.get_submodule(path).get_parameter("weight").add_(delta, alpha=weight)
    return merged


def _open_work_folder(work: Path, key: dict[str, Any]) -> None:
    """Keep the stages of an interrupted build of the same settings, else start empty."""
    note = work / "build.json"
    if note.is_file() and read_json(note) == _as_json(key):
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(note, key)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _reference_stage(folder: Path, settings: Settings, seed: int, progress: Progress) -> None:
    if folder.exists():
        return
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train_reference(model, tokenizer, settings.reference, seed * _SEED_STRIDE + 1, progress)
    with atomic_directory(folder) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _policy_stage(work: Path, name: str, settings: Settings, seed: int, progress: Progress) -> None:
    folder = work / "policies" / name
    if folder.exists():
        return
    with atomic_directory(folder) as target:
        train_policy(work / "model", target, name, settings.policy, seed, progress)


def _library_stage(work: Path, settings: Settings, seed: int, progress: Progress) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from personafast.library import PersonaLibrary
    from personafast.masks import build_mask, calibrate
    from personafast.models.anatomy import anatomy
    from personafast.models.reading import TokenizedText
    from personafast.vectors import Contrast, PersonaVector, extract_vectors

    if (work / "library").exists():
        return
    model = AutoModelForCausalLM.from_pretrained(work / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    library = PersonaLibrary(anatomy(model).shape)
    for done, name in enumerate(TRAITS):
        drawn = contrast(name, random.Random(seed * _SEED_STRIDE + 200 + done))
        positive, negative = zip(*itertools.islice(drawn, settings.contrasts), strict=True)
        chats = Contrast([c.messages() for c in positive], [c.messages() for c in negative])
        vector = extract_vectors(model, tokenizer, {name: chats}, statistics=False)[name]
        metadata = {key: vector.metadata[key] for key in ("method", "positive", "negative")}
        library.add_vector(name, PersonaVector(vector.directions, metadata=metadata))
        texts = [TokenizedText.from_chat(tokenizer, chat) for chat in chats.positive]
        library.add_mask(name, build_mask(model, calibrate(model, texts), sparsity=settings.sparsity))
        library.add_policy(name, work / "policies" / name)
        progress("library", done + 1, len(TRAITS))
    library.save_pretrained(work / "library")


@contextmanager
def _deterministic() -> Iterator[None]:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before writing it, so filling every new tensor first would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(strict)
        torch.set_num_threads(threads)


@contextmanager
def _shown(progress: Progress | None) -> Iterator[Progress]:
    """The given callback, or one that draws a bar a stage."""
    if progress is not None:
        yield progress
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report
