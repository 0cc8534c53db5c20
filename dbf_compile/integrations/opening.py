"""from_pretrained of transformers, with errors in our words, and no tensor that it makes up or leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from dbf_compile.checksums import listed
from dbf_compile.errors import CheckpointError, ConversionError, DBFError


def loaded(kind: Any, folder: Path | None, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model and what transformers says of its tensors; those of other shapes are an entry there, no error."""
    options = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True, **arguments}
    try:
        model, info = kind.from_pretrained(folder, **options)
    except DBFError:
        raise
    except Exception as error:  # of files, or of code that comes with the model
        raise unreadable(folder or f"a model of type {kind.__name__}", error) from error
    return model, info


def unreadable(what: object, error: Exception) -> DBFError:
    """Return the error for a model that transformers cannot load."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return ConversionError(
            f"{what}, whose code needs more ({text})", "packages that are installed", "install them"
        )
    if "trust_remote_code" in text:
        return ConversionError(
            f"{what}, which has code of its own",
            "code that you trust",
            "read it, and pass trust_remote_code=True",
        )
    allowed, do = "a whole, undamaged model", "download it again"
    if "does not recognize this architecture" in text:
        allowed, do = "a model that the installed transformers knows", "update transformers"
    elif isinstance(error, PermissionError):
        allowed, do = "files that can be read", "check who may read them"
    elif isinstance(error, MemoryError) or "out of memory" in text:
        allowed, do = "a model that fits into memory", "free memory, or take a smaller model"
    return CheckpointError(f"{what} cannot be loaded ({type(error).__name__}: {text})", allowed, do)


def refuse_others(what: str, info: dict[str, Any], kind: type[DBFError]) -> None:
    """Refuse tensors that from_pretrained would make up, or leave out."""
    others = [
        f"{state}: {listed(sorted(names))}"
        for state, names in (
            ("missing", info["missing_keys"]),
            ("left over", info["unexpected_keys"]),
            (
                "of another shape",
                [f"{name} {tuple(one)}, not {tuple(other)}" for name, one, other in info["mismatched_keys"]],
            ),
        )
        if names
    ]
    if others:
        raise kind(
            f"{what}, with other tensors than its configuration says ({'; '.join(others)})",
            "the tensors of its class, no more and no fewer",
            "correct its configuration, or open it with the class that it is for and pass that model",
        )


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """Return the class for the first architecture that a configuration names, or AutoModelForCausalLM if it names none.

    Args:
        config: of transformers.
        trust_remote_code: whether code of the model's own comes before a class of transformers.
    """
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    own = [
        auto
        for auto, code in (getattr(config, "auto_map", None) or {}).items()
        if str(code).endswith(f".{name}")
    ]
    kind = getattr(transformers, name, None)
    if own and (trust_remote_code or kind is None):
        return getattr(transformers, own[0])
    return kind or transformers.AutoModelForCausalLM
