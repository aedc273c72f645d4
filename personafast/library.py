"""A library of personas: vectors, masks and policies for one model, in one folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from personafast._io import atomic_directory, read_json, read_safetensors, write_json, write_safetensors
from personafast.density.lora import LoraPolicy
from personafast.errors import FormatError, PersonafastError
from personafast.masks.mask import PersonaMask
from personafast.masks.storage import PackedMasks, read_masks
from personafast.models.anatomy import Anatomy, ModelShape, linear_features
from personafast.persona import Persona
from personafast.vectors.card import CONVENTION, read_card, write_card
from personafast.vectors.vector import BLOCK_OUTPUT, PersonaVector

# 2 where masks are stored as differences from a base; a library without is readable for those who know 1 only.
FORMAT_VERSIONS = (1, 2)
_INDEX, _VECTORS, _POLICIES = "library.json", "vectors.safetensors", "policies"


class PersonaLibrary:
    """Named vectors, masks and policies for one model.

    On disk it is a folder: `library.json` (what is inside, for which model), `vectors.safetensors`,
    `masks.safetensors` and `mask_base.safetensors` (bit-packed: one base, and in what each mask differs from it), and
    one PEFT adapter folder a policy under `policies/`.

    Args:
        shape: the model the entries belong to; None until known, then every entry is checked against it.

    Example:
        >>> library = PersonaLibrary.from_pretrained("personas/")
        >>> sorted(library.policies)
        ['formal', 'warm']
    """

    def __init__(self, shape: ModelShape | None = None) -> None:
        self.shape = shape
        self._vectors: dict[str, PersonaVector] = {}
        self._masks: dict[str, PersonaMask] = {}
        self._policies: dict[str, LoraPolicy] = {}
        self._version = 0

    @property
    def version(self) -> int:
        """Grows with every change, so that an attached model notices."""
        return self._version

    @property
    def vectors(self) -> Mapping[str, PersonaVector]:
        """Persona vectors by name."""
        return self._vectors

    @property
    def masks(self) -> Mapping[str, PersonaMask]:
        """Persona masks by name."""
        return self._masks

    @property
    def policies(self) -> Mapping[str, LoraPolicy]:
        """LoRA policies by name."""
        return self._policies

    def __repr__(self) -> str:
        def names(kind: Mapping[str, object]) -> str:
            return ", ".join(sorted(kind)) or "none"

        return (
            f"PersonaLibrary(vectors: {names(self.vectors)}; masks: {names(self.masks)}; "
            f"policies: {names(self.policies)})"
        )

    def add_vector(self, name: str, vector: PersonaVector | torch.Tensor, *, blocks: Sequence[int] = ()) -> None:
        """Add a persona vector, or a float tensor [num_blocks, hidden] to make one of.

        Raises:
            PersonafastError: NaN, a wrong shape, or a hidden size other than the library's.
        """
        _check_name("vector", name)
        if not isinstance(vector, PersonaVector):
            try:
                vector = PersonaVector(vector, blocks)
            except PersonafastError as error:
                raise PersonafastError(f"vectors[{name!r}]: {error}") from None
        self._fit_vector(name, vector)
        self._vectors[name] = vector
        self._version += 1

    def add_mask(self, name: str, mask: PersonaMask) -> None:
        """Add a persona mask."""
        _check_name("mask", name)
        self._masks[name] = mask
        self._version += 1

    def add_policy(self, name: str, policy: LoraPolicy | str | Path) -> None:
        """Add a LoRA policy, or the PEFT adapter folder to read it from.

        Raises:
            FormatError: the folder does not hold a plain LoRA adapter.
            PersonafastError: a vocabulary other than the library's.
        """
        _check_name("policy", name)
        if not isinstance(policy, LoraPolicy):
            policy = LoraPolicy.from_pretrained(policy)
        if self.shape:
            policy.check_vocabulary(name, self.shape.vocab_size)
        self._policies[name] = policy
        self._version += 1

    def check(self, parts: Anatomy) -> None:
        """Raise `PersonafastError`, naming the entry, unless everything here fits the model."""
        if self.shape is not None:
            for what, value in asdict(self.shape).items():
                found = asdict(parts.shape)[what]
                if value != found:
                    raise PersonafastError(
                        f"library: made for a model with {what} {value}, this one has {found}; "
                        "attach it to the model it was made for"
                    )
        for name, vector in self._vectors.items():
            _fit(name, vector, parts.shape)
        for name, policy in self._policies.items():
            policy.check(name, parts)
        for name, mask in self._masks.items():
            _fit_mask(name, mask, parts)

    def check_persona(self, persona: Persona, policies: Collection[str] = ()) -> None:
        """Raise `PersonafastError` when the persona names what is neither in the library nor among `policies`."""
        all_policies = {*self._policies, *policies}
        for what, asked, known in (
            ("vector", _vectors_of(persona), set(self._vectors)),
            ("policy", persona.policies, all_policies),
            ("policy", [persona.base] if persona.base else [], all_policies),
            ("mask", [persona.mask] if persona.mask else [], set(self._masks)),
        ):
            for name in asked:
                if name not in known:
                    listing = ", ".join(sorted(known)) or "none"
                    raise PersonafastError(f"persona: no {what} {name!r} in the library; there are: {listing}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the library to a folder; a library that is there is replaced whole, or not at all.

        Raises:
            PersonafastError: the folder holds something else than a library; it is left as it is.
        """
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and ((folder / _INDEX).is_file() or not any(folder.iterdir()))):
            raise PersonafastError(f"{folder}: holds something else than a library; save to a new or empty folder")
        masks = PackedMasks.of(self._masks)
        with atomic_directory(folder) as target:
            write_json(target / _INDEX, self._index(masks))
            if self._vectors:
                tensors = {name: vector.directions for name, vector in self._vectors.items()}
                write_safetensors(target / _VECTORS, tensors, {"convention": CONVENTION})
            masks.write(target)
            for name, policy in self._policies.items():
                policy.save_pretrained(target / _POLICIES / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PersonaLibrary:
        """Read a library from its folder, or by `owner/name` from the Hub when there is no such folder.

        Raises:
            FormatError: a file is missing, truncated, a pickle, or does not hold what `library.json` says.
        """
        folder = _local(Path(folder))
        index = read_json(folder / _INDEX)
        if not isinstance(index, dict) or index.get("format_version") not in FORMAT_VERSIONS:
            raise FormatError(
                f"{folder / _INDEX}: expected format_version {' or '.join(map(str, FORMAT_VERSIONS))}; save the "
                "library again with this version"
            )
        try:
            return cls._from_index(folder, index)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError(f"{folder / _INDEX}: not laid out as a library's ({error}); save it again") from None

    @classmethod
    def _from_index(cls, folder: Path, index: dict[str, Any]) -> PersonaLibrary:
        shape = index.get("model")
        library = cls(ModelShape(**shape) if shape else None)
        library._read_vectors(folder, index.get("vectors") or {})
        base = (index.get("mask_base") or {}).get("sha256")
        for name, mask in read_masks(folder, index.get("masks") or {}, base).items():
            library.add_mask(name, mask)
        for name, card in (index.get("policies") or {}).items():
            policy = LoraPolicy.from_pretrained(folder / _POLICIES / name)
            vocab = card.get("vocab_size") or policy.vocab_size
            library.add_policy(name, LoraPolicy(policy.factors, policy.config, vocab))
        return library

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the library as a model repository and return its address; `options` go to `HfApi.create_repo`."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(repo_id, exist_ok=True, **options)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "library")
            api.upload_folder(repo_id=repo_id, folder_path=str(Path(folder) / "library"))
        return str(address)

    def _index(self, masks: PackedMasks) -> dict[str, Any]:
        return {
            "format_version": 2 if masks.base else 1,
            "model": asdict(self.shape) if self.shape else None,
            "vectors": {name: write_card(vector) for name, vector in sorted(self._vectors.items())},
            "masks": {
                name: {"in_features": dict(sorted(mask.in_features.items())), **mask.metadata}
                for name, mask in sorted(self._masks.items())
            },
            **({"mask_base": {"sha256": masks.checksum}} if masks.base else {}),
            "policies": {
                name: {"vocab_size": policy.vocab_size or (self.shape.vocab_size if self.shape else None)}
                for name, policy in sorted(self._policies.items())
            },
        }

    def _read_vectors(self, folder: Path, cards: Mapping[str, dict[str, Any]]) -> None:
        if not cards:
            return
        tensors, _ = read_safetensors(folder / _VECTORS)
        for name, card in cards.items():
            if name not in tensors:
                raise FormatError(f"{folder / _VECTORS}: lacks the vector {name!r} that {_INDEX} lists; save it again")
            try:
                self.add_vector(name, read_card(tensors[name], card))
            except PersonafastError as error:
                raise FormatError(f"{folder / _VECTORS}: {name!r}: {error}") from None

    def _fit_vector(self, name: str, vector: PersonaVector) -> None:
        if self.shape is not None:
            _fit(name, vector, self.shape)


def _local(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    missing = f"{folder}: no such folder; give the folder of a saved PersonaLibrary"
    # A relative path whose parent is here is a mistyped folder, not a repository.
    if folder.is_absolute() or len(folder.parts) != 2 or folder.parent.exists() or folder.parts[0].startswith("."):
        raise FormatError(missing)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder)))
    except Exception as error:  # the Hub client's errors share no base class with the network's
        raise FormatError(f"{missing} (and the Hub says: {str(error).splitlines()[0]})") from None


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or not name or "/" in name or "::" in name or name.startswith("."):
        raise PersonafastError(f"{what}: {name!r} is not a usable name; use letters, digits, '-' and '_'")


def _fit(name: str, vector: PersonaVector, shape: ModelShape) -> None:
    blocks, hidden = vector.directions.shape
    if hidden != shape.hidden_size:
        raise PersonafastError(
            f"vectors[{name!r}]: hidden size {hidden}, the model has {shape.hidden_size}; "
            "use a vector extracted from this model"
        )
    if vector.hook_point != BLOCK_OUTPUT:
        raise PersonafastError(
            f"vectors[{name!r}]: read at {vector.hook_point!r}, and vectors act at the output of blocks; "
            "extract it there"
        )
    if blocks != shape.num_blocks:
        raise PersonafastError(
            f"vectors[{name!r}]: {blocks} rows, the model has {shape.num_blocks} blocks; give one row a block "
            "(drop the embedding row of a persona_vectors file)"
        )


def _fit_mask(name: str, mask: PersonaMask, parts: Anatomy) -> None:
    for path, words in mask.words.items():
        if path not in parts.linears:
            raise PersonafastError(f"masks[{name!r}]: masks {path!r}, which the model lacks; build it on this model")
        found = linear_features(parts.linears[path])
        if (words.shape[0], mask.in_features[path]) != found:
            raise PersonafastError(
                f"masks[{name!r}]: {path} is [{words.shape[0]}, {mask.in_features[path]}] there and {list(found)} in "
                "the model; build it on this model"
            )


def _vectors_of(persona: Persona) -> list[str]:
    return [*persona.vectors, *(name for step in persona.steering for name in step.vectors)]
