"""Models as folders, on disk and on the Hugging Face Hub: the weights, what they are of, and a card.

The files are those of ``huggingface_hub.PyTorchModelHubMixin`` (``model.safetensors``, ``config.json``, ``README.md``).
It is no base class here: ``import avfast`` would load huggingface_hub with it. ``config.json`` holds every argument of
the model's constructor and of its front end, the defaults of the day included, so that a folder stays what it is.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from avfast.checkpoints import Resizing

Self = TypeVar("Self", bound="HubMixin")
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class HubMixin:
    """What every model can do beside the contract: be saved as a folder, be published, and come back.

    ``settings`` are the arguments of its constructor, which :func:`avfast.tensors.float32_weights` keeps.
    """

    settings: dict[str, Any]

    def save_pretrained(self, folder: str | Path, *, run: str | Path | None = None, license: str | None = None) -> Path:
        """Writes weights, ``config.json`` and a model card.

        Args:
            folder: made where it does not exist; files of these names in it are replaced.
            run: folder of the run that trained it, whose ``config.json`` and ``summary.json`` fill the card.
            license: of the weights, as the Hub names it, such as ``"cc-by-4.0"``.

        Returns:
            The folder.

        Raises:
            ValueError: a setting of the model is no plain value, such as weights given as a dictionary; a run folder
                without ``config.json``.
        """
        from avfast.card import card
        from avfast.weight_files import write

        folder, module = Path(folder), cast(nn.Module, self)
        config = describe(self)
        text = card(type(self), config["arguments"], run, license)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / WEIGHTS, module.state_dict())
        (folder / CARD).write_text(text, encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        message: str = "Weights of avfast",
    ) -> str:
        """Publishes what :meth:`save_pretrained` writes.

        Args:
            repo_id: ``"OWNER/NAME"``, made where it does not exist.
            run, license: as of :meth:`save_pretrained`.
            private: of a repository that is made; default the owner's own.
            token: default that of ``hf auth login``.
            revision: branch.
            message: of the commit.

        Returns:
            Address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, run=run, license=license)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
            )

    @classmethod
    def from_pretrained(
        cls: type[Self],
        where: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        resizing: Resizing = "cut",
        **settings: Any,
    ) -> Self:
        """A model that was saved or published, on the CPU, in training mode.

        Args:
            where: folder of :meth:`save_pretrained`, or ``"OWNER/NAME"`` on the Hub.
            revision: branch, tag or commit on the Hub.
            token: default that of ``hf auth login``.
            cache_dir: of downloads, default huggingface_hub's.
            resizing: of positions for another ``audio_size`` or ``img_size``, as of ``from_released``.
            settings: other arguments of the constructor than the saved ones. Decoder and classes that differ start
                anew, with a warning; ``decoder_depth=0`` leaves the decoder out.

        Raises:
            ValueError: naming the folder, if it holds no such model or the weights do not fit.
            FileNotFoundError: there is no such folder and the Hub does not give it.
        """
        folder = fetch(where, revision, token, cache_dir)
        name, saved = read_config(folder)
        if name not in [c.__name__ for c in cls.__mro__]:
            raise ValueError(f"{where} holds a model of the class {name}, not {cls.__name__}")
        return build(cls, folder, saved, settings, resizing)


def describe(model: HubMixin) -> dict[str, Any]:
    """What ``config.json`` says of a model.

    Raises:
        ValueError: naming a setting that is no plain value.
    """
    from avfast import __version__

    arguments = dict(model.settings)
    if "frontend" in arguments:
        given, made = arguments["frontend"] or {}, model.frontend  # type: ignore[attr-defined]
        own = model.frontend_args.keys() - given.keys()  # type: ignore[attr-defined]  # follow from the model's sizes
        arguments["frontend"] = {k: v for k, v in made.to_dict().items() if k not in own}
        if arguments["frontend"].get("time_shift") == made.num_frames:
            arguments["frontend"]["time_shift"] = None  # the default, which follows the model's size too
    for key, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError:
            hint = "; give the path of its file" if isinstance(value, dict) else ""
            raise ValueError(f"{key}: a {type(value).__name__} cannot be written into {CONFIG}{hint}") from None
    return {"library": "avfast", "version": __version__, "model": type(model).__name__, "arguments": arguments}


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The class of a saved model and its arguments.

    Raises:
        ValueError: naming the folder, if it holds no model of avfast.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG}; expected a folder of save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if isinstance(config, dict) and "recipe" in config:
        raise ValueError(f"{folder} is a run folder: avfast.train.checkpoint.load_model reads it")
    if not isinstance(config, dict) or config.get("library") != "avfast" or "arguments" not in config:
        raise ValueError(f"{path} is of no model of avfast; expected a folder of save_pretrained")
    return config["model"], {k: _tuples(v) for k, v in config["arguments"].items()}


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, which constructors take for any sequence."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def build(
    cls: type[Self], folder: Path, saved: dict[str, Any], settings: dict[str, Any], resizing: Resizing = "cut"
) -> Self:
    """A model of a folder, with other ``settings`` than the saved ones; raises what ``from_pretrained`` does."""
    from avfast.checkpoints import fit, grids, naming, resize_tables
    from avfast.weight_files import read

    if isinstance(settings.get("frontend"), dict):
        settings["frontend"] = {**(saved.get("frontend") or {}), **settings["frontend"]}
    with naming(folder):
        model = cls(**{**saved, **settings})
        weights = read(folder / WEIGHTS)
        if settings:
            with torch.device("meta"):
                own = grids(cast(nn.Module, cls(**saved)))
            resize_tables(weights, own, grids(cast(nn.Module, model)), resizing)
        fit(cast(nn.Module, model), weights, settings)
    return model


def fetch(
    where: str | Path, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """A folder, or what the Hub has under that name as one.

    Raises:
        FileNotFoundError: in one line, if there is neither.
        ImportError: without huggingface_hub.
    """
    if Path(where).is_dir():
        return Path(where)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(where)):
        raise FileNotFoundError(f"{where}: no such folder; expected one, or OWNER/NAME on the Hugging Face Hub")
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise ImportError("models on the Hub need huggingface_hub: pip install huggingface_hub") from None
    try:
        for name in (CONFIG, WEIGHTS):
            path = hf_hub_download(str(where), name, revision=revision, token=token, cache_dir=cache_dir)
    except Exception as error:  # huggingface_hub raises its own kinds and those of its HTTP client
        reasons = {
            errors.LocalEntryNotFoundError: "no connection to it, and no copy in the local cache",
            errors.GatedRepoError: "its owner asks for consent first, on its page there",
            errors.RepositoryNotFoundError: "no such model there, or a private one and no token",
            errors.RevisionNotFoundError: f"it has no revision {revision}",
            errors.EntryNotFoundError: f"it lacks {CONFIG} or {WEIGHTS}",
        }
        said = next((text for kind, text in reasons.items() if isinstance(error, kind)), str(error).split("\n")[0])
        raise FileNotFoundError(f"{where}: no such folder here, and not from the Hugging Face Hub: {said}") from error
    return Path(path).parent
